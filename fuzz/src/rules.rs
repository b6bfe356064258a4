//! What the header promises about every call, whatever it is: a known status, an error struct that
//! is written in full or left alone, and no panic.

use std::ffi::{c_char, c_void, CStr};
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Once, OnceLock};

use rsbucket::ffi::*;

/// Every status that a call may return.
const KNOWN: [i32; 18] = [
    0, 1, -1, -2, -3, -4, -5, -6, -7, -8, -9, -10, -20, -21, -22, -23, -24, -99,
];

/// Statuses that end a comm.
pub const STICKY: [i32; 6] = [
    RSB_ERR_TIMEOUT,
    RSB_ERR_PEER_LOST,
    RSB_ERR_DESYNC,
    RSB_ERR_ABORTED,
    RSB_ERR_TRANSPORT,
    RSB_ERR_PANIC,
];

/// A panic inside the library ends the run, whatever status a peer may name.
unsafe extern "C" fn heard(_: *mut c_void, level: i32, target: *const c_char, text: *const c_char) {
    // SAFETY: both are NUL-terminated texts of the library's.
    let (target, text) = unsafe { (CStr::from_ptr(target), CStr::from_ptr(text)) };
    assert!((1..=4).contains(&level) && std::str::from_utf8(text.to_bytes()).is_ok());
    assert_ne!(target, c"panic", "{text:?}");
}

/// Listens to the logger.
pub fn listen() {
    static ONCE: Once = Once::new();
    // SAFETY: the function lives as long as the program.
    ONCE.call_once(|| unsafe {
        assert_eq!(
            rsb_set_logger(Some(heard), std::ptr::null_mut(), None, 4),
            RSB_OK
        );
    });
}

/// What ranks of our own know, and strangers do not.
pub const TOKEN: &str = "of-the-fuzzer";

/// A run directory of our own, for all that meets.
pub fn run_dir() -> &'static Path {
    static DIR: OnceLock<PathBuf> = OnceLock::new();
    DIR.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("rsbucket-fuzz-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        std::env::set_var("RSBUCKET_RUN_DIR", &dir);
        std::env::set_var("RSBUCKET_TOKEN", TOKEN);
        dir
    })
}

/// Removes the run directory.
pub fn tidy() {
    fs::remove_dir(run_dir()).unwrap();
}

const UNTOUCHED: u8 = 0xa5;

/// An error struct that no call has written.
pub fn fresh() -> rsb_error {
    rsb_error {
        status: i32::from_ne_bytes([UNTOUCHED; 4]),
        native_code: i32::from_ne_bytes([UNTOUCHED; 4]),
        peer: i32::from_ne_bytes([UNTOUCHED; 4]),
        reserved: u32::from_ne_bytes([UNTOUCHED; 4]),
        message: [UNTOUCHED as c_char; 240],
    }
}

/// Checks what a call has made of a fresh error struct; its status.
pub fn told(status: rsb_status, err: &rsb_error) -> rsb_status {
    assert!(KNOWN.contains(&status), "status {status}");
    if status == RSB_OK {
        assert_eq!(err.status, fresh().status, "written on OK");
        return status;
    }
    full(err);
    assert_eq!(err.status, status);
    status
}

/// Checks that an error struct was written in full.
pub fn full(err: &rsb_error) {
    assert!(
        KNOWN.contains(&err.status) && err.status != RSB_OK,
        "{err:?}"
    );
    assert!(err.peer >= -1 && err.reserved == 0, "{err:?}");
    let end = err.message.iter().position(|&c| c == 0);
    let end = end.expect("a message without an end");
    let text: Vec<u8> = err.message[..end].iter().map(|&c| c as u8).collect();
    assert!(std::str::from_utf8(&text).is_ok(), "{text:?}");
}

/// Makes a call with a fresh error struct, and checks what it says.
pub fn call(body: impl FnOnce(*mut rsb_error) -> rsb_status) -> rsb_status {
    let mut err = fresh();
    let status = body(&mut err);
    told(status, &err)
}
