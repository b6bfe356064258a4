//! What the functions of the header do.
//!
//! Every call goes the same way: look handles up, read and check arguments, run Rust behind
//! [`guarded`], write the error. Callbacks run outside of it, since a C++ exception may pass.

mod bucketer;
mod comm;
mod drive;
mod engine;
mod read;
mod submit;

use std::any::Any;
use std::ffi::{c_char, c_void, CString};
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, Ordering};

use super::{rsb_error, rsb_log_fn, rsb_status};
use crate::error::{Error, Result, Status};
use crate::handle::{Bad, Pinned, Table};
use crate::log;
use crate::thread;

pub use bucketer::*;
pub use comm::*;

/// Runs Rust code; a panic becomes an error.
#[inline]
fn guarded<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = thread::inside(|| catch_unwind(AssertUnwindSafe(body)));
    result.unwrap_or_else(|payload| Err(panicked(payload.as_ref())))
}

#[cold]
fn panicked(payload: &(dyn Any + Send)) -> Error {
    let text = payload
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| payload.downcast_ref::<String>().map(String::as_str));
    let text = format!("a bug in rsbucket: {}", text.unwrap_or("panic"));
    Error::new(Status::Panic, text)
}

/// Sends our own panics to the logger in place of the standard error stream; others go where they
/// went before.
fn hook_panics() {
    // Not a Once: a child forked while another thread runs it would wait for ever.
    static DONE: AtomicBool = AtomicBool::new(false);
    if DONE.load(Ordering::Relaxed) || DONE.swap(true, Ordering::Relaxed) {
        return;
    }
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if thread::is_inside() {
            log::write(log::Level::Error, "panic", format_args!("{info}"));
        } else {
            before(info);
        }
    }));
}

/// Writes `error` in full.
fn fill(error: &Error) -> rsb_error {
    let mut out = rsb_error {
        status: error.status.code(),
        native_code: error.native,
        peer: error.peer,
        reserved: 0,
        message: [0; 240],
    };
    let mut len = error.message.len().min(out.message.len() - 1);
    while !error.message.is_char_boundary(len) {
        len -= 1;
    }
    for (to, from) in out.message.iter_mut().zip(&error.message.as_bytes()[..len]) {
        *to = *from as c_char;
    }
    out
}

/// Turns a result into a status, and tells `err` on any but OK.
///
/// # Safety
/// `err` is NULL or may be written.
#[inline(always)]
unsafe fn answer(result: Result<()>, err: *mut rsb_error) -> rsb_status {
    match result {
        Ok(()) => Status::Ok.code(),
        // SAFETY: by the promise of this function.
        Err(e) => unsafe { refuse(&e, err) },
    }
}

/// # Safety
/// As for `answer`.
#[cold]
unsafe fn refuse(e: &Error, err: *mut rsb_error) -> rsb_status {
    if !err.is_null() {
        // SAFETY: by the promise of this function; any alignment.
        unsafe { err.write_unaligned(fill(e)) };
    }
    e.status.code()
}

/// The object of a handle, or why there is none.
#[inline(always)]
fn look_up<'a, T: Send + Sync>(
    table: &'a Table<T>,
    token: u64,
    name: &str,
    kind: &str,
) -> Result<Pinned<'a, T>> {
    table
        .get(token)
        .map_err(|bad| bad_handle(bad, token, name, kind))
}

#[cold]
fn bad_handle(bad: Bad, token: u64, name: &str, kind: &str) -> Error {
    match bad {
        Bad::Null => Error::new(
            Status::BadHandle,
            format!("{name}: NULL; expected a live {kind}"),
        ),
        Bad::Unknown => {
            let text = format!("{name}: {token:#x} is no live {kind}; it was freed, or never made");
            Error::new(Status::BadHandle, text)
        }
        Bad::Forked => {
            let text =
                format!("{name}: made before this process was forked; expected one made after");
            Error::new(Status::Aborted, text)
        }
    }
}

fn too_many(kind: &str) -> Error {
    Error::new(Status::NoMemory, format!("too many live {kind} handles"))
}

/// A logger of the caller's.
struct Logger {
    take: unsafe extern "C" fn(*mut c_void, i32, *const c_char, *const c_char),
    user_data: *mut c_void,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
}

// SAFETY: the header asks for a logger that may be called on any thread, on several at once.
unsafe impl Send for Logger {}
// SAFETY: as above.
unsafe impl Sync for Logger {}

impl log::Sink for Logger {
    fn take(&self, level: log::Level, target: &str, message: &str) {
        let clean = |text: &str| CString::new(text.replace('\0', " ")).unwrap_or_default();
        let (target, message) = (clean(target), clean(message));
        // SAFETY: both texts live during the call; the function is the caller's.
        unsafe {
            (self.take)(
                self.user_data,
                level as i32,
                target.as_ptr(),
                message.as_ptr(),
            )
        };
    }
}

impl Drop for Logger {
    fn drop(&mut self) {
        if let Some(release) = self.release {
            // SAFETY: dropped once, after the last use.
            unsafe { release(self.user_data) };
        }
    }
}

pub unsafe fn set_logger(
    take: rsb_log_fn,
    user_data: *mut c_void,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
    max_level: i32,
) -> rsb_status {
    let set = || {
        let Some(take) = take else {
            return log::set(None, log::Level::Error);
        };
        let max = match max_level {
            1 => log::Level::Error,
            2 => log::Level::Warn,
            3 => log::Level::Info,
            4 => log::Level::Debug,
            _ => {
                return Err(crate::error::invalid!(
                    "max_level: {max_level}; expected 1 to 4"
                ))
            }
        };
        let logger = Logger {
            take,
            user_data,
            release,
        };
        log::set(Some(Box::new(logger)), max)
    };
    // SAFETY: there is no error struct to write.
    unsafe { answer(guarded(set), std::ptr::null_mut()) }
}
