//! The socket file at which a job meets: its name, and how rank 0 puts it there and takes it away.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
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
        let file = file_of(name);
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
    let boot = file_of("");
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
pub fn file_of(name: &str) -> String {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = boot.split('-').next().unwrap_or_default();
    format!("{name}.{boot}.sock")
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let seen = fs::symlink_metadata(path).ok()?;
    Some((seen.dev(), seen.ino()))
}
