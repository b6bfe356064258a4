//! The atomics of the group protocol: the standard library's, or a model checker's, so that the very
//! code that processes run can be tried in every order (`--cfg loom`, `--cfg shuttle`; make models).

#[cfg(any(loom, shuttle))]
pub mod model;

#[cfg(any(loom, shuttle))]
pub use model::{fence, AtomicI32, AtomicU32, AtomicU64, Mutex, Ordering};
#[cfg(not(any(loom, shuttle)))]
pub use std::sync::{
    atomic::{fence, AtomicI32, AtomicU32, AtomicU64, Ordering},
    Mutex,
};

/// Whether this build is for a model checker: small memory, no spinning.
pub const MODEL: bool = cfg!(any(loom, shuttle));
