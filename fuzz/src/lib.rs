//! The fuzz targets, as functions of bytes: libFuzzer calls them with what it makes up, and the
//! test in `tests/` with the committed corpus.
//!
//! Each target opens with what it is for. What they share: reading choices from bytes, memory that
//! ends where a page ends, and what the header promises about every call.

#![cfg(fuzzing)]

pub mod calls;
pub mod config;
pub mod control;
pub mod rendezvous;

mod guard;
mod input;
mod rules;

pub use rules::tidy;

/// Every target, by name.
pub const TARGETS: [(&str, fn(&[u8])); 4] = [
    ("calls", calls::run),
    ("config", config::run),
    ("control", control::run),
    ("rendezvous", rendezvous::run),
];
