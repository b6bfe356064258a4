//! Why a call did not succeed: the status codes of the contract and the one error type that
//! carries a code, the rank to blame, an engine's own code and a sentence for a human.
//!
//! Messages name the argument (or the rank), the value that was seen and what was expected.

use std::fmt;
use std::ops::{Deref, DerefMut};

/// What a call answers. The numbers are the C contract's and are never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(i32)]
pub enum Status {
    /// Success.
    Ok = 0,
    /// Not an error: the caller's own time is up, the work goes on.
    Pending = 1,
    /// An argument has a value that no call accepts.
    InvalidArgument = -1,
    /// NULL, stale, freed twice, of another kind, or invented.
    BadHandle = -2,
    /// Known to be impossible here: an unknown dtype, op, flag or field, or a part not built in.
    Unsupported = -3,
    /// Memory could not be had; nothing changed.
    NoMemory = -4,
    /// The object is in use.
    Busy = -5,
    /// A wait on an op that is still in an open bucket.
    NotLaunched = -6,
    /// A call that a callback must not make on its own bucketer.
    Reentrant = -7,
    /// The bucketer was freed before the op was launched.
    Cancelled = -8,
    /// The rendezvous was refused.
    Permission = -9,
    /// Ranks joined with different settings.
    ConfigMismatch = -10,
    /// A rank did not come in time.
    Timeout = -20,
    /// A rank is gone.
    PeerLost = -21,
    /// Ranks submitted different work.
    Desync = -22,
    /// `rsb_comm_abort` was called, or the handle crossed a fork.
    Aborted = -23,
    /// The engine below failed.
    Transport = -24,
    /// A bug in rsbucket.
    Panic = -99,
}

impl Status {
    /// Every status, in the order of the contract.
    pub const ALL: [Status; 18] = [
        Status::Ok,
        Status::Pending,
        Status::InvalidArgument,
        Status::BadHandle,
        Status::Unsupported,
        Status::NoMemory,
        Status::Busy,
        Status::NotLaunched,
        Status::Reentrant,
        Status::Cancelled,
        Status::Permission,
        Status::ConfigMismatch,
        Status::Timeout,
        Status::PeerLost,
        Status::Desync,
        Status::Aborted,
        Status::Transport,
        Status::Panic,
    ];

    /// The number that crosses the C ABI.
    pub const fn code(self) -> i32 {
        self as i32
    }

    /// The status of a number, if it is one.
    pub fn from_code(code: i32) -> Option<Status> {
        Status::ALL.into_iter().find(|s| s.code() == code)
    }

    /// The name that the header gives it.
    pub const fn name(self) -> &'static std::ffi::CStr {
        match self {
            Status::Ok => c"RSB_OK",
            Status::Pending => c"RSB_PENDING",
            Status::InvalidArgument => c"RSB_ERR_INVALID_ARGUMENT",
            Status::BadHandle => c"RSB_ERR_BAD_HANDLE",
            Status::Unsupported => c"RSB_ERR_UNSUPPORTED",
            Status::NoMemory => c"RSB_ERR_NO_MEMORY",
            Status::Busy => c"RSB_ERR_BUSY",
            Status::NotLaunched => c"RSB_ERR_NOT_LAUNCHED",
            Status::Reentrant => c"RSB_ERR_REENTRANT",
            Status::Cancelled => c"RSB_ERR_CANCELLED",
            Status::Permission => c"RSB_ERR_PERMISSION",
            Status::ConfigMismatch => c"RSB_ERR_CONFIG_MISMATCH",
            Status::Timeout => c"RSB_ERR_TIMEOUT",
            Status::PeerLost => c"RSB_ERR_PEER_LOST",
            Status::Desync => c"RSB_ERR_DESYNC",
            Status::Aborted => c"RSB_ERR_ABORTED",
            Status::Transport => c"RSB_ERR_TRANSPORT",
            Status::Panic => c"RSB_ERR_PANIC",
        }
    }
}

/// An error with its sentence, as one pointer: most calls succeed, and what they return is small then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(Box<Cause>);

/// What went wrong. Built only where something did, so it may allocate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// The kind of failure.
    pub status: Status,
    /// The engine's or the system's own code; 0: none.
    pub native: i32,
    /// The rank to blame; -1: unknown.
    pub peer: i32,
    /// One sentence: what was seen, what was expected.
    pub message: String,
}

impl Deref for Error {
    type Target = Cause;

    fn deref(&self) -> &Cause {
        &self.0
    }
}

impl DerefMut for Error {
    fn deref_mut(&mut self) -> &mut Cause {
        &mut self.0
    }
}

impl Error {
    /// An error that blames no rank and has no native code.
    pub fn new(status: Status, message: impl Into<String>) -> Error {
        Error(Box::new(Cause {
            status,
            native: 0,
            peer: -1,
            message: message.into(),
        }))
    }

    /// The same error, blaming `rank`.
    pub fn blame(mut self, rank: u32) -> Error {
        self.peer = i32::try_from(rank).unwrap_or(-1);
        self
    }

    /// The same error with the code that the engine or the system gave.
    pub fn native(mut self, code: i32) -> Error {
        self.native = code;
        self
    }

    /// The error of a system call that just failed, with its errno.
    pub fn os(status: Status, what: impl fmt::Display) -> Error {
        let e = std::io::Error::last_os_error();
        Error::new(status, format!("{what}: {e}")).native(e.raw_os_error().unwrap_or(0))
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {}",
            self.status.name().to_string_lossy(),
            self.message
        )
    }
}

impl std::error::Error for Error {}

/// The result of everything that can fail.
pub type Result<T> = std::result::Result<T, Error>;

/// `INVALID_ARGUMENT` with a formatted sentence.
macro_rules! invalid {
    ($($text:tt)*) => { $crate::error::Error::new($crate::error::Status::InvalidArgument, format!($($text)*)) };
}
/// `UNSUPPORTED` with a formatted sentence.
macro_rules! unsupported {
    ($($text:tt)*) => { $crate::error::Error::new($crate::error::Status::Unsupported, format!($($text)*)) };
}
pub(crate) use {invalid, unsupported};
