//! rsbucket: bucketed reduce-scatter behind a C ABI.
//!
//! Many small reduce-scatters are gathered into few, over threads, processes or any engine, and
//! each ends in a callback. `ARCHITECTURE.md` has the map; data flows one way through it:
//!
//! [`ffi`] (the only place that knows C) → [`bucketer`] (buckets, order, callbacks) → [`lane`] (how
//! a bucket travels) → [`comm`] (memory and engines that ranks share), [`reduce`] (kernels) and
//! [`cuda`] (the memory and streams of a GPU).

#![deny(
    missing_docs,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("rsbucket's handles are 64-bit tokens in pointer types: 64-bit targets only");

#[cfg(not(any(loom, shuttle)))]
pub mod bucketer;
pub mod comm;
pub mod cuda;
pub mod dtype;
pub mod error;
#[cfg(not(any(loom, shuttle)))]
pub mod ffi;
pub mod fingerprint;
pub mod fork;
pub mod handle;
pub mod lane;
pub mod layout;
pub mod lock;
pub mod log;
pub mod memory;
pub mod prefetch;
pub mod reduce;
pub mod sync;
pub mod thread;
