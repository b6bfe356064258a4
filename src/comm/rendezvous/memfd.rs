//! Memory without a name: it is handed over as a descriptor and is gone with the last process that
//! holds it, however that process ends.
//!
//! Sealed, so that nobody can cut it short under a mapping; and given to peers as a descriptor
//! opened for reading only, so that they cannot write to it by mistake. Not sealed against
//! writing: that would also forbid its owner to give pages back.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use super::super::mapping::Mapping;
use super::{failed, status_of};
use crate::error::{Error, Result, Status};

const SEALS: i32 = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;

/// `bytes` that only this rank may write, the first of them committed and with its liveness word: its own mapping, and what peers get.
pub fn own(bytes: usize, committed: usize) -> Result<(Mapping, File)> {
    let file = create(bytes)?;
    let mut mapping = Mapping::of_file(file.as_fd(), bytes, true)?;
    if committed > 0 {
        mapping.commit(0, 1)?;
        mapping = mapping.enliven()?;
    }
    // Last: it takes long where there is much of it, and what can fail has not failed.
    mapping.commit(0, committed)?;
    let what = "re-opening shared memory for reading through /proc/self/fd";
    let shared = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map_err(|e| failed(status_of(&e), what, &e))?;
    Ok((mapping, shared))
}

/// `bytes` that all ranks may write, committed at once: a mapping, and what peers get.
pub fn group(bytes: usize) -> Result<(Mapping, File)> {
    let shared = create(bytes)?;
    let mapping = Mapping::of_file(shared.as_fd(), bytes, true)?;
    mapping.commit(0, bytes)?;
    Ok((mapping, shared))
}

/// Maps memory that came from a peer, once it is certain that it can neither shrink nor grow.
/// `whose` names it in errors.
pub fn receive(file: &File, bytes: usize, writable: bool, whose: &str) -> Result<Mapping> {
    // SAFETY: takes a descriptor, which is open, and a number.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(Error::new(
            Status::Permission,
            format!("{whose} has seals {seals:#x}, expected at least {SEALS:#x}"),
        ));
    }
    let seen = file
        .metadata()
        .map_err(|e| failed(Status::NoMemory, whose, &e))?
        .len();
    if seen != bytes as u64 {
        return Err(Error::new(
            Status::Permission,
            format!("{whose} has {seen} bytes, expected {bytes}"),
        ));
    }
    Mapping::of_file(file.as_fd(), bytes, writable)
}

fn create(bytes: usize) -> Result<File> {
    let what = format!("creating {bytes} bytes of shared memory");
    let limit = most_bytes();
    if bytes as u64 > limit {
        // Going past it would not only fail: a signal would end the process.
        let text =
            format!("{what}: this process's limit of file sizes (ulimit -f) is {limit} bytes");
        return Err(Error::new(Status::NoMemory, text).native(libc::EFBIG));
    }
    let new = |flags| {
        // SAFETY: the name is a C string; the call only reads it.
        unsafe { libc::memfd_create(c"rsbucket".as_ptr(), flags) }
    };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    let mut fd = new(flags | libc::MFD_NOEXEC_SEAL);
    if fd < 0 && io::Error::last_os_error().raw_os_error() == Some(libc::EINVAL) {
        fd = new(flags); // before Linux 6.3
    }
    if fd < 0 {
        return Err(Error::os(Status::NoMemory, what));
    }
    // SAFETY: a fresh descriptor that nothing else owns.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    file.set_len(bytes as u64)
        .map_err(|e| failed(Status::NoMemory, &what, &e))?;
    // SAFETY: takes a descriptor, which is open, and numbers.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, SEALS) } != 0 {
        return Err(Error::os(Status::NoMemory, what));
    }
    Ok(file)
}

/// How long this process may make a file.
fn most_bytes() -> u64 {
    // SAFETY: a struct of numbers, for which zero is a value.
    let mut limit: libc::rlimit = unsafe { std::mem::zeroed() };
    // SAFETY: fills the struct in.
    match unsafe { libc::getrlimit(libc::RLIMIT_FSIZE, &mut limit) } {
        0 => limit.rlim_cur,
        _ => u64::MAX,
    }
}
