//! Any engine that can carry a collective: MPI, torch.distributed, a vendor's library.
//!
//! The bucket lane drives it; src/ffi makes one of the function pointers of an `rsb_transport`.

use std::ffi::c_void;

use crate::dtype::{DType, Op};

/// A kind of collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// size * count elements in, rank-major; count out, reduced.
    ReduceScatter = 1,
    /// size * count in and out, rank-major; bytes only.
    AllToAll = 2,
    /// count in, size * count out; bytes only.
    AllGather = 3,
}

/// One collective.
#[derive(Clone, Copy, Debug)]
pub struct Collective {
    /// What it does.
    pub kind: Kind,
    /// Input.
    pub send: *const u8,
    /// Output.
    pub recv: *mut u8,
    /// Elements of `dtype`.
    pub count: usize,
    /// Type of the elements.
    pub dtype: DType,
    /// SUM, MIN, MAX or PROD.
    pub op: Op,
    /// Elements from one row of the input to the next: `count`, but for engines that take others.
    pub stride: usize,
    /// Device memory: where to enqueue it.
    pub stream: *mut c_void,
}

/// What an engine can do.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// It reduces.
    pub reduce_scatter: bool,
    /// It exchanges: enough for every dtype and op.
    pub all_to_all: bool,
    /// It gathers: for the cross-check and for all_gather.
    pub all_gather: bool,
    /// Bits `1 << dtype`: what it can reduce; 0: all.
    pub reduce_dtypes: u64,
    /// Largest count of a collective.
    pub max_count: usize,
    /// It takes rows that lie further apart than they are long.
    pub strided: bool,
    /// Its MIN and MAX of floats are NaN where any rank's is.
    pub keeps_nan: bool,
}

/// An engine. Calls come one at a time but for `abort`; dropping it is its release.
pub trait Engine: Send + Sync {
    /// Starts a collective and names the request, or fails with the engine's code. Never blocks.
    ///
    /// # Safety
    /// The memory of `collective` lives until the request has ended or the engine is dropped.
    unsafe fn start(&self, collective: &Collective) -> Result<usize, i32>;
    /// Whether the request has ended. An error ends it, too. Never blocks.
    fn test(&self, request: usize) -> Result<bool, i32>;
    /// Gives up: any thread, any time.
    fn abort(&self);
    /// The engine's words for its code.
    fn describe(&self, code: i32) -> String;
    /// What is started from here to `ungroup` is one launch, where the engine has such a thing.
    fn group(&self) -> Result<(), i32> {
        Ok(())
    }
    /// The end of a group: all of it is enqueued.
    fn ungroup(&self) -> Result<(), i32> {
        Ok(())
    }
    /// Whether all of the last group is enqueued by now. Never blocks.
    fn settled(&self) -> Result<bool, i32> {
        Ok(true)
    }
    /// What has failed since, of what was enqueued.
    fn health(&self) -> Result<(), i32> {
        Ok(())
    }
}
