//! The control memory of a rank: where everything lies that its peers read.
//!
//! Every word here is written by its own rank alone; peers only read, in processes through a
//! read-only mapping. The one exception, the group word, lies in a page of its own that all ranks
//! may write ([`super::word`]). All fields are atomics: no reference to shared bytes is ever made.

use crate::error::Result;
use crate::layout::Geometry;
use crate::sync::{AtomicI32, AtomicU32, AtomicU64, MODEL};

/// A value on a cache line of its own.
#[repr(C, align(64))]
pub struct Lone<T>(pub T);

/// How many of its last calls a rank keeps readable, for naming the first that differs.
pub const CALLS: usize = if MODEL { 2 } else { 4096 };

/// Bytes of a message, with its terminator.
pub const MESSAGE: usize = if MODEL { 16 } else { 240 };

/// The head of a rank's memory.
#[repr(C)]
pub struct Head {
    /// Marked by the kernel when this rank's process is gone ([`super::keeper`]). The very first word.
    pub alive: Lone<AtomicU32>,
    /// Rung (changed, then woken) at every event that a peer may sleep for.
    pub bell: Lone<AtomicU32>,
    /// Not 0 while this rank sleeps on some peer's bell.
    pub sleeping: Lone<AtomicU32>,
    /// Chunks this rank has reduced.
    pub consumed: Lone<AtomicU64>,
    /// Twice the calls this rank has recorded, plus one while it records the next.
    pub calls: Lone<AtomicU64>,
    /// Not 0 once this rank has freed its comm.
    pub left: Lone<AtomicU32>,
    /// Not 0 while this rank is in rsb_comm_shrink.
    pub shrinking: Lone<AtomicU32>,
    /// What this rank says about a failure that it was first to report.
    pub detail: Lone<Detail>,
}

/// The text of a failure.
#[repr(C)]
pub struct Detail {
    /// An engine's or the system's code.
    pub native: AtomicI32,
    /// Bytes of `text` that are used.
    pub len: AtomicU32,
    /// UTF-8, in words of eight bytes.
    pub text: [AtomicU64; MESSAGE / 8],
}

/// Words of a line that take the rows of a very small chunk.
pub const INLINE_WORDS: usize = if MODEL { 0 } else { 11 };

/// What a rank publishes about one chunk, on two cache lines. `ready` is `seq + 1` once the rest of
/// the line and the chunk's rows may be read.
#[repr(C, align(128))]
pub struct Line {
    /// Sequence number plus one, stored last.
    pub ready: AtomicU64,
    /// Fingerprint of all calls up to this chunk, lower half.
    pub lo: AtomicU64,
    /// Upper half.
    pub hi: AtomicU64,
    /// Calls in the fingerprint.
    pub calls: AtomicU64,
    /// In which slot of its rank's staging the chunk lies, or, among threads, the address of what is lent;
    /// `INLINE`: in `rows`; `NOWHERE`: it has no bytes.
    pub place: AtomicU64,
    /// The rows of a chunk that is small enough, so that whoever reads the line has them already.
    pub rows: [AtomicU64; INLINE_WORDS],
}

/// Where a chunk without bytes lies.
pub const NOWHERE: u64 = u64::MAX;
/// Where a chunk lies whose rows are in its line.
pub const INLINE: u64 = u64::MAX - 1;

/// One recorded call: the words of [`crate::fingerprint::Call::words`].
pub type CallRecord = [AtomicU64; 5];

/// Where the parts of a rank's memory lie, the same for every rank of a group.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    /// How the staging is cut.
    pub geometry: Geometry,
    /// Lines in the ring, a power of two.
    pub lines: usize,
    /// Byte offset of the lines.
    pub lines_at: usize,
    /// Byte offset of the recorded calls.
    pub calls_at: usize,
    /// Byte offset of the staging.
    pub staging_at: usize,
    /// Bytes of all.
    pub total: usize,
}

impl Layout {
    /// The least staging that `size` ranks can work with.
    pub fn least_staging(size: u32) -> usize {
        Geometry::least_staging(size)
    }

    /// The layout for `size` ranks with `staging_bytes` of staging each.
    pub fn new(staging_bytes: usize, size: u32) -> Result<Layout> {
        let geometry = Geometry::new(staging_bytes, size)?;
        // Twice the chunks, so that chunks without bytes seldom have to wait for a line.
        let lines = (geometry.chunks * 2).next_power_of_two().max(64);
        let page = |at: usize| at.div_ceil(4096) * 4096;
        let lines_at = size_of::<Head>().next_multiple_of(align_of::<Line>());
        let calls_at = lines_at + lines * std::mem::size_of::<Line>();
        let staging_at = page(calls_at + CALLS * std::mem::size_of::<CallRecord>());
        Ok(Layout {
            geometry,
            lines,
            lines_at,
            calls_at,
            staging_at,
            total: staging_at + geometry.chunks * geometry.chunk_bytes,
        })
    }
}
