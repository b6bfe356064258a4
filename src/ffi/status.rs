//! Status codes and rsb_error as C sees them; `crate::error` is the same within Rust, and the two
//! are checked against each other when this file compiles.
//!
//! # Status and errors
//!
//! Every call that can fail returns an rsb_status, and most fill in an rsb_error for the details
//! (rule 5). A call's comment lists what it returns and why. Three things are said once, here:
//!
//! - Any call that takes a handle may return RSB_ERR_ABORTED in the child of a fork (rule 10).
//! - Any call may return RSB_ERR_PANIC, which reports a bug in rsbucket.
//! - "The comm's sticky error" stands for the first cause of the comm's failure, one of TIMEOUT,
//!   PEER_LOST, DESYNC, ABORTED, TRANSPORT and PANIC (rule 5).

use crate::error::Status;
use std::ffi::c_char;
use std::mem::{offset_of, size_of};

/// How a call ended: 0 is success, a negative number an error, a positive one "not done yet".
pub type rsb_status = i32;

/// Success.
pub const RSB_OK: rsb_status = 0;
/// A wait's own time is up, the op lives on.
pub const RSB_PENDING: rsb_status = 1;
/// An argument has a value that the call does not accept. Nothing changed.
pub const RSB_ERR_INVALID_ARGUMENT: rsb_status = -1;
/// A handle is NULL, stale, freed twice, of another kind or invented.
pub const RSB_ERR_BAD_HANDLE: rsb_status = -2;
/// An unknown dtype, op, flag or field, or a part that is not built in.
pub const RSB_ERR_UNSUPPORTED: rsb_status = -3;
/// Memory could not be had.
pub const RSB_ERR_NO_MEMORY: rsb_status = -4;
/// The object is in use.
pub const RSB_ERR_BUSY: rsb_status = -5;
/// A wait on an op that is still in an open bucket.
pub const RSB_ERR_NOT_LAUNCHED: rsb_status = -6;
/// A call that a callback must not make on its own bucketer (rule 3).
pub const RSB_ERR_REENTRANT: rsb_status = -7;
/// The bucketer was freed before the op was launched.
pub const RSB_ERR_CANCELLED: rsb_status = -8;
/// The rendezvous was refused: another user, or a wrong token.
pub const RSB_ERR_PERMISSION: rsb_status = -9;
/// Ranks joined with different settings.
pub const RSB_ERR_CONFIG_MISMATCH: rsb_status = -10;
/// A wait saw no progress for the comm's timeout. This error and those below are sticky on the
/// comm (rule 5).
pub const RSB_ERR_TIMEOUT: rsb_status = -20;
/// A rank's process is gone; rsb_error.peer says which.
pub const RSB_ERR_PEER_LOST: rsb_status = -21;
/// Ranks submitted different work (rule 1).
pub const RSB_ERR_DESYNC: rsb_status = -22;
/// rsb_comm_abort ended the group, or the handle crossed a fork.
pub const RSB_ERR_ABORTED: rsb_status = -23;
/// The engine failed; rsb_error.native_code is its own code.
pub const RSB_ERR_TRANSPORT: rsb_status = -24;
/// A bug in rsbucket.
pub const RSB_ERR_PANIC: rsb_status = -99;

/// The name of a status, such as "RSB_ERR_TIMEOUT"; "RSB_UNKNOWN" for a number that is none.
/// Static: never freed, never NULL. Any thread; never blocks.
#[no_mangle]
pub unsafe extern "C" fn rsb_status_name(status: rsb_status) -> *const c_char {
    Status::from_code(status)
        .map_or(c"RSB_UNKNOWN", Status::name)
        .as_ptr()
}

// ## The details of an error

/// What went wrong, in the caller's memory: 256 bytes, a size that never changes. It owns nothing,
/// needs no initialization and may be reused. Rule 5 says when it is written.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_error {
    /// The status that the call returned.
    pub status: rsb_status,
    /// The engine's or the system's own code: ncclResult_t, CUresult, errno, MPI; 0: none.
    pub native_code: i32,
    /// The rank to blame; -1: unknown.
    pub peer: i32,
    /// Always 0.
    pub reserved: u32,
    /// One sentence for a human: UTF-8, NUL-terminated, cut where it does not fit.
    pub message: [c_char; 240],
}

const _: () = assert!(size_of::<rsb_error>() == 256 && offset_of!(rsb_error, message) == 16);

const _: () = {
    const CODES: [rsb_status; Status::ALL.len()] = [
        RSB_OK,
        RSB_PENDING,
        RSB_ERR_INVALID_ARGUMENT,
        RSB_ERR_BAD_HANDLE,
        RSB_ERR_UNSUPPORTED,
        RSB_ERR_NO_MEMORY,
        RSB_ERR_BUSY,
        RSB_ERR_NOT_LAUNCHED,
        RSB_ERR_REENTRANT,
        RSB_ERR_CANCELLED,
        RSB_ERR_PERMISSION,
        RSB_ERR_CONFIG_MISMATCH,
        RSB_ERR_TIMEOUT,
        RSB_ERR_PEER_LOST,
        RSB_ERR_DESYNC,
        RSB_ERR_ABORTED,
        RSB_ERR_TRANSPORT,
        RSB_ERR_PANIC,
    ];
    let mut i = 0;
    while i < CODES.len() {
        assert!(CODES[i] == Status::ALL[i].code());
        i += 1;
    }
};
