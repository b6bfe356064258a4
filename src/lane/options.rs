//! Settings of a comm, and what is refused before it is made.

use std::ffi::c_void;
use std::sync::Arc;
use std::time::Duration;

use super::Endpoint;
use crate::comm::control::Layout;
use crate::comm::engine::Abilities;
use crate::comm::word::MAX_RANKS;
use crate::error::{invalid, unsupported, Result};
use crate::layout::DEFAULT_STAGING;

/// Settings of a comm.
#[derive(Clone)]
pub struct Options {
    /// How long a wait may last without progress; none: for ever.
    pub timeout: Option<Duration>,
    /// Reduce as shared memory does, also on an engine.
    pub exact: bool,
    /// The caller's name for the comm, in errors; empty: none.
    pub label: String,
    /// A host comm of the same ranks for the cross-check.
    pub control: Option<Arc<Endpoint>>,
    /// Shared staging of a rank; 0: the default.
    pub staging_bytes: usize,
    /// Device comm: the stream of inputs, and the one in whose order results are ready; null: none.
    pub stream: *mut c_void,
    /// See `stream`.
    pub result_stream: *mut c_void,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            timeout: Some(Duration::from_secs(300)),
            exact: false,
            label: String::new(),
            control: None,
            staging_bytes: 0,
            stream: std::ptr::null_mut(),
            result_stream: std::ptr::null_mut(),
        }
    }
}

impl Options {
    /// Host memory has no streams.
    pub(super) fn refuse_streams(&self) -> Result<()> {
        for (name, stream) in [
            ("stream", self.stream),
            ("result_stream", self.result_stream),
        ] {
            if !stream.is_null() {
                return Err(invalid!(
                    "config->{name}: given for a comm of host memory; expected NULL"
                ));
            }
        }
        Ok(())
    }

    /// Where things lie in the shared memory of `size` ranks.
    pub(super) fn layout(&self, size: u32) -> Result<Layout> {
        self.refuse_streams()?;
        if size == 0 || size > MAX_RANKS {
            return Err(invalid!(
                "size: {size}; expected 1 to {MAX_RANKS} ranks on one host"
            ));
        }
        if self.control.is_some() {
            return Err(invalid!(
                "control: given; expected NULL, since ranks on one host are checked anyway"
            ));
        }
        let staging = match self.staging_bytes {
            0 => DEFAULT_STAGING.max(Layout::least_staging(size)),
            bytes => bytes,
        };
        Layout::new(staging, size)
    }
}

/// Refuses a rank that a group of `size` has not.
pub(super) fn check_rank(rank: u32, size: u32) -> Result<()> {
    if rank >= size {
        return Err(invalid!(
            "rank: {rank}; expected 0 to {} for size {size}",
            size.saturating_sub(1)
        ));
    }
    Ok(())
}

/// Refuses what an engine cannot do.
pub(super) fn check_engine(
    abilities: Abilities,
    rank: u32,
    size: u32,
    options: &Options,
) -> Result<()> {
    if size == 0 || size > i32::MAX as u32 {
        return Err(invalid!("size: {size}; expected 1 to {}", i32::MAX));
    }
    check_rank(rank, size)?;
    if options.staging_bytes != 0 {
        return Err(invalid!(
            "staging_bytes: {}; expected 0, since a transport shares no memory",
            options.staging_bytes
        ));
    }
    if options.exact && !abilities.all_to_all {
        return Err(unsupported!(
            "flags: RSB_COMM_EXACT needs a transport with ALL_TO_ALL; this one has none"
        ));
    }
    if let Some(control) = &options.control {
        if !control.is_ring() {
            return Err(invalid!(
                "control: a comm on a transport; expected a local or shm comm"
            ));
        }
        if (control.rank(), control.size()) != (rank, size) {
            return Err(invalid!(
                "control: rank {} of {}; expected rank {rank} of {size}, like this comm",
                control.rank(),
                control.size()
            ));
        }
    }
    Ok(())
}
