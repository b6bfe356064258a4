//! One op as a lane sees it: where its input lies, where its result goes, what is asked.

use std::ffi::c_void;
use std::time::Instant;

use crate::dtype::{DType, Finish, Op};
use crate::fingerprint::{Call, CallKind};
use crate::layout::flat_shard;

/// Where the rows of an op lie: row r is what this rank gives to rank r.
#[derive(Clone, Copy, Debug)]
pub enum Rows {
    /// A pointer for every rank.
    Pieces(*const *const u8),
    /// One tensor of `total` elements, cut into shards; the tail counts as zeros.
    Flat {
        /// Its first element.
        data: *const u8,
        /// Its elements.
        total: usize,
    },
}

/// Results of this many bytes and more are written past the caches: they do not fit there beside what else is
/// done, and memory that is overwritten whole need not be read before.
const PAST: usize = 4 << 20;

/// One op, checked. Its pointers hold what the contract's rule 6 promises.
#[derive(Clone, Copy, Debug)]
pub struct Work {
    /// The input.
    pub rows: Rows,
    /// Ranks of the comm.
    pub size: u32,
    /// Elements of one shard.
    pub numel: usize,
    /// Type of the input.
    pub dtype: DType,
    /// What to do with it.
    pub op: Op,
    /// The last step.
    pub finish: Finish,
    /// Where the result goes: `numel` elements of `finish.output`.
    pub output: *mut u8,
    /// Whether that is memory of ours, which an engine must not have once the op has failed.
    pub output_is_ours: bool,
    /// Whether the input stays as it is until the op is done.
    pub borrow: bool,
    /// Which tensor this is.
    pub tag: u64,
    /// Device memory: the stream of its input; null: the comm's.
    pub stream: *mut c_void,
    /// The bucketer's number on the comm, and its bucket size, as ranks compare them.
    pub bucketer: (u32, u64),
}

impl Work {
    /// Bytes of a shard of the input.
    #[inline]
    pub fn bytes(&self) -> usize {
        self.numel * self.dtype.size()
    }

    /// Whether its result is too large to be found in a cache later. One of another type than the input is
    /// mostly a sum that the next op adds to, and is read anyway.
    #[inline]
    pub fn is_past_caches(&self) -> bool {
        self.finish.output == self.dtype && self.bytes() >= PAST
    }

    /// Its place in the sequence, as ranks compare it.
    #[inline]
    pub fn call(&self) -> Call {
        let (flat, numel) = match self.rows {
            Rows::Pieces(_) => (false, self.numel),
            Rows::Flat { total, .. } => (true, total),
        };
        Call {
            kind: CallKind::Submit,
            flat,
            types: Some((self.dtype, self.op)),
            ordinal: self.bucketer.0,
            bucket_bytes: self.bucketer.1,
            tag: self.tag,
            numel: numel as u64,
            scale: self.finish.scale,
        }
    }

    /// Where the shard of `rank` begins in a flat tensor, and how many of its elements are real.
    #[inline]
    pub fn place(&self, rank: u32) -> (usize, usize) {
        match self.rows {
            Rows::Pieces(_) => (0, self.numel),
            Rows::Flat { total, .. } => flat_shard(total, self.size, rank),
        }
    }

    /// Row `rank`: its first byte, and how many of its elements are real.
    ///
    /// # Safety
    /// The input is readable and not empty; `rank` is a rank of the comm.
    #[inline]
    pub unsafe fn row(&self, rank: u32) -> (*const u8, usize) {
        match self.rows {
            // SAFETY: there is a pointer for every rank.
            Rows::Pieces(pieces) => (unsafe { *pieces.add(rank as usize) }, self.numel),
            Rows::Flat { data, total } => {
                let (offset, valid) = flat_shard(total, self.size, rank);
                // Past the end nothing is read: no need for a real address.
                (data.wrapping_add(offset * self.dtype.size()), valid)
            }
        }
    }

    /// Copies elements `from..from + count` of row `rank` to `to`, with zeros past the real ones.
    ///
    /// # Safety
    /// As for `row`; `from + count <= numel`; `to` takes them and overlaps no input.
    #[inline(never)]
    pub unsafe fn copy_row(&self, rank: u32, from: usize, count: usize, to: *mut u8) {
        if count == 0 {
            return;
        }
        let element = self.dtype.size();
        // SAFETY: by the promise of this function.
        let (row, valid) = unsafe { self.row(rank) };
        let real = valid.saturating_sub(from).min(count);
        // SAFETY: `real` elements from `from` on exist in the row; `to` takes `count` of them.
        unsafe {
            if real > 0 {
                copy(row.add(from * element), to, real * element);
            }
            if real < count {
                to.add(real * element)
                    .write_bytes(0, (count - real) * element);
            }
        }
    }

    /// Copies elements `from..from + count` of every row but `skipped` to `to`, one `stride` bytes after
    /// the other.
    ///
    /// # Safety
    /// As for `copy_row`.
    #[inline(always)]
    pub unsafe fn copy_rows(
        &self,
        from: usize,
        count: usize,
        to: *mut u8,
        stride: usize,
        skipped: u32,
    ) {
        let Rows::Pieces(pieces) = self.rows else {
            for rank in (0..self.size).filter(|&rank| rank != skipped) {
                // SAFETY: by the promise of this function.
                unsafe { self.copy_row(rank, from, count, to.add(rank as usize * stride)) };
            }
            return;
        };
        let (skip, bytes) = (from * self.dtype.size(), count * self.dtype.size());
        let (mut rank, mut to) = (0, to);
        while rank < self.size {
            if rank != skipped {
                // SAFETY: by the promise of this function; there is a pointer for every rank.
                unsafe { copy((*pieces.add(rank as usize)).add(skip), to, bytes) };
            }
            rank += 1;
            to = to.wrapping_add(stride);
        }
    }

    /// Whether all elements of all rows are real.
    #[inline]
    pub fn is_unpadded(&self) -> bool {
        match self.rows {
            Rows::Pieces(_) => true,
            Rows::Flat { total, .. } => total == self.numel * self.size as usize,
        }
    }

    /// Whether elements `from..from + count` of this rank's own row are all real.
    ///
    /// # Safety
    /// As for `row`.
    #[inline]
    pub unsafe fn is_whole(&self, rank: u32, from: usize, count: usize) -> bool {
        // SAFETY: by the promise of this function.
        let (_, valid) = unsafe { self.row(rank) };
        from + count <= valid
    }
}

/// Copies `bytes`. Single elements are common, and cost less than a call of memcpy.
///
/// # Safety
/// `from` is readable and `to` writable for `bytes`; they do not overlap.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, bytes: usize) {
    // SAFETY: by the promise of this function; any alignment.
    unsafe {
        match bytes {
            4 => to
                .cast::<u32>()
                .write_unaligned(from.cast::<u32>().read_unaligned()),
            8 => to
                .cast::<u64>()
                .write_unaligned(from.cast::<u64>().read_unaligned()),
            _ => from.copy_to_nonoverlapping(to, bytes),
        }
    }
}

/// What a call cost, for the bucketer's statistics.
#[derive(Clone, Copy, Debug, Default)]
pub struct Meter {
    /// Bytes copied into staging or buckets.
    pub copied: u64,
    /// Time copying what was noted before; what a submit copies at once is the bucketer's to time.
    pub pack_ns: u64,
    /// Time waiting for peers.
    pub wait_ns: u64,
    /// Time in reduction kernels; small pieces are not timed.
    pub reduce_ns: u64,
}

impl Meter {
    /// Counts the time since a wait began, if one did, but for what was reduced meanwhile: `reducing` is
    /// `reduce_ns` at its beginning.
    pub fn waited(&mut self, start: Option<Instant>, reducing: u64) {
        if let Some(start) = start {
            let all = start.elapsed().as_nanos() as u64;
            self.wait_ns += all.saturating_sub(self.reduce_ns - reducing);
        }
    }
}

/// How a wait for an op ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waited {
    /// It is complete, or failed: [`super::Endpoint::completed`] tells.
    Over,
    /// The caller's own time is up.
    TimeUp,
}
