//! How ops come into a chunk: copied when they are submitted, or, where their inputs are lent, when the chunk
//! is published. One copy after the other, with nothing in between, takes half the time: the memory that the
//! next one needs is on its way meanwhile.

use std::time::Instant;

use super::state::{Piece, RingLane};
use super::Ring;
use crate::comm::group::Group;
use crate::lane::work::{Meter, Work};
use crate::prefetch::prefetch;

/// A row of an op that is still to be copied into the open chunk of its lane.
pub struct Lent {
    from: *const u8,
    /// Where in the chunk it goes.
    at: usize,
    bytes: usize,
}

/// Rows of fewer bytes are copied at once: a note of them would cost as much.
const LATER: usize = 512;
/// So much of a row is fetched when it is noted: the call has more to do. The CPU itself looks ahead in longer ones.
const NEAR: usize = 4096;
/// Chunks into which less is copied are not timed.
const TIMED: usize = 16 << 10;

/// Whether a lent op need not be copied before its chunk is published.
#[inline]
pub fn may_wait(work: &Work) -> bool {
    work.bytes() >= LATER && work.is_unpadded()
}

impl Ring {
    /// Adds an op to the open chunk of its lane, of which the rows are copied by [`RingLane::pack`].
    ///
    /// # Safety
    /// As for `submit`; the op may wait, and the chunk has room for it at `at`.
    #[inline(never)]
    pub(super) unsafe fn note(
        &self,
        lane: &mut RingLane,
        work: &Work,
        at: usize,
        meter: &mut Meter,
    ) {
        let (me, size, bytes) = (self.group.rank(), self.group.size(), work.bytes());
        let row_bytes = self.group.layout().geometry.row_bytes;
        for rank in (0..size).filter(|&rank| rank != me) {
            // SAFETY: by the promise of this function.
            let (from, _) = unsafe { work.row(rank) };
            prefetch(from, bytes.min(NEAR));
            let at = at + rank as usize * row_bytes;
            lane.lent.push(Lent { from, at, bytes });
        }
        meter.copied += bytes as u64 * u64::from(size - 1);
        // SAFETY: as above.
        let (own, _) = unsafe { work.row(me) };
        let piece = Piece {
            at,
            count: work.numel,
            output: work.output,
            own,
            finish: work.finish,
            past: work.is_past_caches(),
        };
        lane.add(piece, at + bytes);
    }

    /// Copies elements `from..from + count` of all rows into a chunk, this rank's own only if it
    /// cannot be read from the caller's memory later.
    ///
    /// # Safety
    /// As for `submit`; the stretch fits into a row at `at`.
    #[allow(clippy::too_many_arguments)]
    #[inline(always)]
    pub(super) unsafe fn stage(
        &self,
        work: &Work,
        slot: u32,
        at: usize,
        from: usize,
        count: usize,
        lent: bool,
        meter: &mut Meter,
    ) -> Piece {
        let element = work.dtype.size();
        let (chunk, row_bytes) = (
            self.group.own_chunk(slot),
            self.group.layout().geometry.row_bytes,
        );
        let me = self.group.rank();
        // SAFETY: the caller's rows have `from + count` elements, or zeros for them; the chunk has a
        // row for every rank; no peer reads it before it is published.
        unsafe {
            let own = if lent && work.is_whole(me, from, count) {
                work.row(me).0.add(from * element)
            } else {
                std::ptr::null()
            };
            let skipped = if own.is_null() { u32::MAX } else { me };
            work.copy_rows(from, count, chunk.add(at), row_bytes, skipped);
            let rows = self.group.size() - u32::from(!own.is_null());
            meter.copied += (count * element) as u64 * u64::from(rows);
            Piece {
                at,
                count,
                output: work.output.add(from * work.finish.output.size()),
                own,
                finish: work.finish,
                past: work.is_past_caches(),
            }
        }
    }
}

impl RingLane {
    /// Copies the rows that are noted into the open chunk. Afterwards the inputs' owners may do with them
    /// what they like, but for this rank's own rows.
    #[inline]
    pub fn pack(&mut self, group: &Group, meter: &mut Meter) {
        let Some(slot) = self.open.as_ref().and_then(|chunk| chunk.slot) else {
            return;
        };
        let Some(first) = self.lent.first() else {
            return;
        };
        let start = (self.lent.len() * first.bytes >= TIMED).then(Instant::now);
        let chunk = group.own_chunk(slot);
        for lent in self.lent.drain(..) {
            // SAFETY: the ops are not over: their inputs stay as they are (rule 6). Each has its place in
            // the chunk, which no peer reads before it is published.
            unsafe {
                lent.from
                    .copy_to_nonoverlapping(chunk.add(lent.at), lent.bytes);
            }
        }
        if let Some(start) = start {
            meter.pack_ns += start.elapsed().as_nanos() as u64;
        }
    }
}
