//! The socket file at which a job meets: its name, and how rank 0 puts it there and takes it away.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::super::rundir::RunDir;
use super::socket::Socket;
use super::{failed, past, status_of};
use crate::error::{Error, Result, Status};

/// The listening socket of rank 0. Dropped, it takes its file with it.
pub struct Door<'a> {
    /// Where ranks arrive.
    pub listener: Socket,
    dir: &'a RunDir,
    file: String,
    identity: Option<(u64, u64)>,
}

impl<'a> Door<'a> {
    /// Puts the socket of job `name` into `dir`. The file of a killed job makes place; `PERMISSION`
    /// if somebody is listening there.
    pub fn open(name: &str, dir: &'a RunDir, deadline: Option<Instant>) -> Result<Door<'a>> {
        let file = file_of(name)?;
        let path = dir.path_to(&file);
        // Between the look and the new file nobody else may put one there.
        let _lock = loop {
            if let Some(lock) = dir.try_lock() {
                break lock;
            }
            if past(deadline) {
                let text = format!("job {name}: run directory {dir} stayed locked");
                return Err(Error::new(Status::Timeout, text));
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        let blame = |e: io::Error| {
            failed(
                status_of(&e),
                format_args!("job {name}: socket {file} in {dir}"),
                &e,
            )
        };
        sweep(dir);
        match Socket::connect(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {
                fs::remove_file(&path).map_err(blame)?;
            }
            Err(e) if status_of(&e) == Status::NoMemory => return Err(blame(e)),
            _ => {
                let text = format!("job {name}: rank 0 is already there, at {file} in {dir}");
                return Err(Error::new(Status::Permission, text).blame(0));
            }
        }
        let listener = Socket::listen(&path).map_err(blame)?;
        Ok(Door {
            listener,
            dir,
            identity: identity(&path),
            file,
        })
    }
}

impl Drop for Door<'_> {
    fn drop(&mut self) {
        // The listener is still open, so no other rank 0 has taken the file for a stale one; the
        // look is for files that somebody has moved by hand.
        let path = self.dir.path_to(&self.file);
        if self.identity.is_some() && self.identity == identity(&path) {
            // Nobody can be told if it fails; the next job of this name replaces the file.
            let _ = fs::remove_file(path);
        }
    }
}

/// Removes what a rank 0 left that has just died, unless somebody else is at it.
pub fn tidy(dir: &RunDir) {
    if let Some(_lock) = dir.try_lock() {
        sweep(dir);
    }
}

/// Removes what rank 0s left that were killed while their ranks met. The directory is locked.
fn sweep(dir: &RunDir) {
    let Ok(boot) = file_of("") else { return };
    let entries = fs::read_dir(dir.path_to("."))
        .into_iter()
        .flatten()
        .flatten();
    for entry in entries.filter(|e| e.file_name().to_string_lossy().ends_with(&boot)) {
        let path = dir.path_to(&entry.file_name().to_string_lossy());
        if Socket::connect(&path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused) {
            // Whoever comes next tries again.
            let _ = fs::remove_file(path);
        }
    }
}

/// The name of a job's socket. With this boot's id in it, hosts that share a home directory over
/// the network do not take each other's sockets for stale ones.
pub fn file_of(name: &str) -> Result<String> {
    /// The id, with the bit above it set, once it is known.
    static BOOT: AtomicU64 = AtomicU64::new(0);
    let boot = boot(Path::new("/proc/sys/kernel/random/boot_id"), &BOOT)?;
    Ok(format!("{name}.{boot:08x}.sock"))
}

/// The beginning of this boot's id. A rank that cannot read it must not look for the others in
/// another place than they do.
fn boot(path: &Path, known: &AtomicU64) -> Result<u32> {
    let seen = known.load(Ordering::Relaxed);
    if seen != 0 {
        return Ok(seen as u32);
    }
    let text = fs::read_to_string(path).map_err(|e| {
        let what = format_args!("reading this boot's id from {}", path.display());
        failed(status_of(&e), what, &e)
    })?;
    let first = text.split('-').next().unwrap_or_default();
    let boot = u32::from_str_radix(first, 16).map_err(|_| {
        let text = format!("{} is {text:?}, expected a UUID", path.display());
        Error::new(Status::Transport, text)
    })?;
    known.store(1 << 32 | u64::from(boot), Ordering::Relaxed);
    Ok(boot)
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let seen = fs::symlink_metadata(path).ok()?;
    Some((seen.dev(), seen.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_an_error_and_what_was_read_is_kept() {
        let known = AtomicU64::new(0);
        let missing = Path::new("/proc/no/boot_id");
        let e = boot(missing, &known).unwrap_err();
        assert_eq!((e.status, e.native), (Status::Transport, libc::ENOENT));
        assert!(e.message.contains("/proc/no/boot_id"), "{e}");
        let e = boot(Path::new("/proc/self/comm"), &known).unwrap_err();
        assert_eq!(e.status, Status::Transport);
        assert!(e.message.contains("expected a UUID"), "{e}");
        let path = Path::new("/proc/sys/kernel/random/boot_id");
        let text = fs::read_to_string(path).unwrap();
        let id = boot(path, &known).unwrap();
        assert!(text.starts_with(&format!("{id:08x}-")), "{text}");
        assert_eq!(boot(missing, &known).unwrap(), id);
        assert_eq!(file_of("job").unwrap(), format!("job.{id:08x}.sock"));
    }
}
