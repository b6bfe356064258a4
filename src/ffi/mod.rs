//! The C surface, and the only place that knows C.
//!
//! Each file here is one section of the header: constants, types and functions with their manual,
//! from which the header is made. The functions' bodies are in `imp`: they check every value, turn
//! it into Rust, and hand callbacks the results.

#![allow(non_camel_case_types, clippy::missing_safety_doc)]

pub mod bucketer;
pub mod comm;
pub mod dtype;
pub mod log;
pub mod status;
pub mod version;

mod imp;

pub use self::{bucketer::*, comm::*, dtype::*, log::*, status::*, version::*};

#[cfg(fuzzing)]
#[doc(hidden)]
pub use self::imp::handle_of;
