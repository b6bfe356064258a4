//! The process-wide logger as C sets it.
//!
//! # Log
//!
//! The library prints nothing. Whoever wants to hear from it sets a logger; there is one per
//! process.

use super::rsb_status;
use std::ffi::{c_char, c_void};

/// Something failed; a panic (rule 10).
pub const RSB_LOG_ERROR: i32 = 1;
/// Something is unusual; work goes on.
pub const RSB_LOG_WARN: i32 = 2;
/// What happens seldom.
pub const RSB_LOG_INFO: i32 = 3;
/// What happens often.
pub const RSB_LOG_DEBUG: i32 = 4;

/// A logger. level is one of RSB_LOG_; target is the part of the library that speaks; message is
/// UTF-8. Both texts are NUL-terminated and valid during the call only. It is called on any thread,
/// on several at once, and calls no function of this library. It must not unwind.
pub type rsb_log_fn = Option<
    unsafe extern "C" fn(
        user_data: *mut c_void,
        level: i32,
        target: *const c_char,
        message: *const c_char,
    ),
>;

/// Sets the process's logger, in place of the one before.
///
/// - fn: called with each message whose level is at most max_level; NULL: no logger.
/// - user_data: the first argument of fn; the caller's until release.
/// - release: called with user_data once, after the last use of this logger; may be NULL. If the
///   call fails it is not called, and the logger before stays.
/// - max_level: one of RSB_LOG_.
///
/// Any thread; waits for no peer.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: fn is given and max_level is none of RSB_LOG_.
#[no_mangle]
pub unsafe extern "C" fn rsb_set_logger(
    r#fn: rsb_log_fn,
    user_data: *mut c_void,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
    max_level: i32,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::set_logger(r#fn, user_data, release, max_level) }
}
