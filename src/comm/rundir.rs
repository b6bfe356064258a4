//! The directory in which the processes of a job meet: private to the user, and checked to be so.
//!
//! The first that can be used of `$RSBUCKET_RUN_DIR`, `$XDG_RUNTIME_DIR/rsbucket`,
//! `$HOME/.cache/rsbucket` and a per-user directory in the temporary directory. It is opened once
//! and then named through its descriptor, so what was checked is what is used.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::error::{Error, Result, Status};

/// The variable that names the directory.
pub const VARIABLE: &str = "RSBUCKET_RUN_DIR";

/// How an environment variable is looked up: tests bring their own.
pub type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// An open run directory.
#[derive(Debug)]
pub struct RunDir {
    dir: File,
    path: PathBuf,
}

impl RunDir {
    /// Finds the run directory, and makes it if it is not there.
    pub fn find(environment: Environment) -> Result<RunDir> {
        let get = |name| {
            environment(name)
                .filter(|v| !v.is_empty())
                .map(PathBuf::from)
        };
        if let Some(path) = get(VARIABLE) {
            return RunDir::open(path);
        }
        if let Some(runtime) = get("XDG_RUNTIME_DIR").filter(|p| is_ours(p)) {
            let path = runtime.join("rsbucket");
            if make(&path).is_ok() {
                return RunDir::open(path);
            }
        }
        if let Some(home) = get("HOME").filter(|p| is_ours(p)) {
            let cache = home.join(".cache");
            let path = cache.join("rsbucket");
            if make(&cache).and_then(|()| make(&path)).is_ok() {
                return RunDir::open(path);
            }
        }
        let temporary = get("TMPDIR").unwrap_or_else(|| PathBuf::from("/tmp"));
        RunDir::open(temporary.join(format!("rsbucket-{}", effective_user())))
    }

    /// Opens the directory `path`, making it if need be; `PERMISSION` unless it is this user's alone.
    fn open(path: PathBuf) -> Result<RunDir> {
        let refused = |why: fmt::Arguments| {
            Error::new(
                Status::Permission,
                format!(
                    "run directory {}: {why}; set {VARIABLE} to a private directory of yours",
                    path.display()
                ),
            )
        };
        let failed = |e: io::Error| {
            let code = e.raw_os_error().unwrap_or_default();
            let mut error = refused(format_args!("{e}")).native(code);
            let scarce = [
                libc::EMFILE,
                libc::ENFILE,
                libc::ENOMEM,
                libc::ENOSPC,
                libc::EDQUOT,
            ];
            if scarce.contains(&code) {
                error.status = Status::NoMemory;
            }
            error
        };
        make(&path).map_err(failed)?;
        let dir = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW)
            .open(&path)
            .map_err(|e| match e.raw_os_error() {
                Some(code @ (libc::ENOTDIR | libc::ELOOP)) => {
                    let why = "is a link or a file, expected a directory";
                    refused(format_args!("{why}")).native(code)
                }
                _ => failed(e),
            })?;
        let seen = dir.metadata().map_err(failed)?;
        let user = effective_user();
        if seen.uid() != user {
            return Err(refused(format_args!(
                "belongs to user {}, expected {user}",
                seen.uid()
            )));
        }
        if seen.mode() & 0o077 != 0 {
            return Err(refused(format_args!(
                "has mode {:04o}, expected 0700",
                seen.mode() & 0o7777
            )));
        }
        // Rank 0 makes a file in it: where it cannot, nobody needs to wait for it.
        // SAFETY: takes a descriptor, which is open, a C string and numbers.
        let denied = unsafe {
            libc::faccessat(dir.as_raw_fd(), c".".as_ptr(), libc::W_OK, libc::AT_EACCESS)
        };
        if denied != 0 {
            return Err(failed(io::Error::last_os_error()));
        }
        Ok(RunDir { dir, path })
    }

    /// A path to `file` in this directory that is short, and right even if the directory is moved.
    pub fn path_to(&self, file: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{file}", self.dir.as_raw_fd()))
    }

    /// Takes the directory's lock if it is free: `None` while somebody else has it.
    pub fn try_lock(&self) -> Option<Lock<'_>> {
        // SAFETY: takes a descriptor, which is open, and flags.
        let rc = unsafe { libc::flock(self.dir.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) };
        let code = io::Error::last_os_error().raw_os_error();
        // Some network file systems lock no directories: there it goes without, and only two
        // processes that claim one rank at the very same moment would notice.
        let busy = rc != 0 && matches!(code, Some(libc::EWOULDBLOCK | libc::EINTR));
        (!busy).then_some(Lock(self))
    }
}

impl fmt::Display for RunDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

/// The lock of a run directory, given back when dropped.
pub struct Lock<'a>(&'a RunDir);

impl Drop for Lock<'_> {
    fn drop(&mut self) {
        // Said explicitly: a child forked in the meantime holds the same open directory.
        // SAFETY: takes a descriptor, which is open, and a flag.
        unsafe { libc::flock(self.0.dir.as_raw_fd(), libc::LOCK_UN) };
    }
}

/// The user whom files that we make belong to.
pub fn effective_user() -> u32 {
    // SAFETY: takes nothing and cannot fail.
    unsafe { libc::geteuid() }
}

fn is_ours(path: &Path) -> bool {
    path.is_absolute()
        && fs::metadata(path).is_ok_and(|m| m.is_dir() && m.uid() == effective_user())
}

/// Makes a directory for this user alone; one that is there stays as it is.
fn make(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::os::unix::fs::{symlink, PermissionsExt};
    use std::sync::atomic::{AtomicU32, Ordering};

    /// An empty private directory, gone afterwards.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Scratch {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let n = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("rsbucket-d{}-{n}", std::process::id()));
            DirBuilder::new().mode(0o700).create(&path).unwrap();
            Scratch(path)
        }

        fn dir(&self, name: &str, mode: u32) -> PathBuf {
            let path = self.0.join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn find(values: &[(&str, &Path)]) -> Result<RunDir> {
        let values: HashMap<&str, &Path> = values.iter().copied().collect();
        RunDir::find(&|name| values.get(name).map(|path| path.as_os_str().to_owned()))
    }

    fn assert_refused(values: &[(&str, &Path)], path: &Path, why: &str) {
        let e = find(values).unwrap_err();
        assert_eq!(e.status, Status::Permission);
        let path = path.display().to_string();
        for part in [path.as_str(), VARIABLE, why] {
            assert!(e.message.contains(part), "{part}: {e}");
        }
    }

    /// A directory that belongs to somebody else.
    fn foreign(scratch: &Scratch) -> PathBuf {
        if effective_user() != 0 {
            return PathBuf::from("/usr");
        }
        let path = scratch.dir("foreign", 0o700);
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        path
    }

    #[test]
    fn the_first_that_can_be_used_is_taken() {
        let scratch = Scratch::new();
        let (run, home) = (scratch.dir("run", 0o755), scratch.dir("home", 0o755));
        let (explicit, foreign) = (scratch.0.join("explicit"), foreign(&scratch));
        let (missing, empty) = (scratch.0.join("missing"), Path::new(""));
        let (xdg, cache) = (run.join("rsbucket"), home.join(".cache/rsbucket"));
        let temporary = scratch.0.join(format!("rsbucket-{}", effective_user()));
        let tmp = ("TMPDIR", scratch.0.as_path());
        let cases: &[(&[&Path; 3], &Path)] = &[
            (&[&explicit, &run, &home], &explicit),
            (&[empty, &run, &home], &xdg),
            (&[empty, &missing, &home], &cache),
            (&[empty, &foreign, &home], &cache),
            (&[empty, Path::new("relative"), &home], &cache),
            (&[empty, empty, &foreign], &temporary),
            (&[empty, &missing, &missing], &temporary),
        ];
        for ([explicit, run, home], expected) in cases {
            // Made the first time, found the second.
            for _ in 0..2 {
                let names = [
                    (VARIABLE, *explicit),
                    ("XDG_RUNTIME_DIR", run),
                    ("HOME", home),
                    tmp,
                ];
                assert_eq!(find(&names).unwrap().path, *expected);
                let seen = fs::symlink_metadata(expected).unwrap();
                assert_eq!(seen.mode() & 0o7777, 0o700);
            }
        }
    }

    #[test]
    fn what_is_not_ours_alone_is_refused() {
        let scratch = Scratch::new();
        let target = scratch.dir("target", 0o700);
        let link = scratch.0.join("link");
        symlink(&target, &link).unwrap();
        let file = scratch.0.join("file");
        fs::write(&file, "").unwrap();
        let nowhere = scratch.0.join("no/where");
        let readable = scratch.dir("readable", 0o740);
        let foreign = foreign(&scratch);
        for (path, why) in [
            (&link, "expected a directory"),
            (&file, "expected a directory"),
            (&nowhere, "No such file"),
            (&readable, "mode 0740, expected 0700"),
            (&foreign, "belongs to user"),
        ] {
            assert_refused(&[(VARIABLE, path)], path, why);
        }
        // Squatted places further down the list are no reason to go on to the next.
        let run = scratch.dir("run", 0o700);
        symlink(&target, run.join("rsbucket")).unwrap();
        let names = [("XDG_RUNTIME_DIR", run.as_path()), ("TMPDIR", &scratch.0)];
        assert_refused(&names, &run.join("rsbucket"), "expected a directory");
        let squatted = scratch.dir(&format!("rsbucket-{}", effective_user()), 0o707);
        assert_refused(&[("TMPDIR", &scratch.0)], &squatted, "mode 0707");
    }

    #[test]
    fn one_that_takes_no_files_is_refused() {
        let scratch = Scratch::new();
        let dir = scratch.dir("locked", 0o500);
        let check = || assert_refused(&[(VARIABLE, &dir)], &dir, "Permission denied");
        if effective_user() != 0 {
            return check();
        }
        // Nothing is closed to root: somebody else looks.
        std::os::unix::fs::chown(&dir, Some(65534), None).unwrap();
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o711)).unwrap();
        std::thread::scope(|s| {
            s.spawn(|| {
                // SAFETY: takes numbers. The system call itself, unlike the C library's function,
                // changes this thread alone, which ends soon.
                let changed = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
                assert_eq!(changed, 0);
                check();
            });
        });
    }

    #[test]
    fn one_at_a_time_has_the_lock() {
        let scratch = Scratch::new();
        let open = || find(&[(VARIABLE, &scratch.0)]).unwrap();
        let (one, other) = (open(), open());
        let lock = one.try_lock();
        assert!(lock.is_some() && other.try_lock().is_none());
        drop(lock);
        assert!(other.try_lock().is_some());
    }
}
