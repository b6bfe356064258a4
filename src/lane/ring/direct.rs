//! What goes over a ring at once: ops larger than a bucket, and all-gathers, streamed through chunks of
//! their own.

use super::state::{Chunk, Content, State};
use super::wait::Limit;
use super::Ring;
use crate::error::Result;
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Work};

/// A stretch that goes into one chunk: elements `from..from + count` to slot `slot`.
pub(super) struct Stretch {
    pub(super) slot: u32,
    pub(super) from: usize,
    pub(super) count: usize,
}

/// Threads read each other's inputs in place from this many bytes of a row on. Below, waiting until all have
/// read costs more than a copy.
const IN_PLACE: usize = 32 << 10;

impl Ring {
    /// Carries out an op at once, and waits for the result.
    ///
    /// # Safety
    /// The pointers of `work` are as the contract's rule 6 says, during the call.
    pub unsafe fn direct(&self, work: &Work, meter: &mut Meter) -> Result<()> {
        // SAFETY: by the promise of this function.
        unsafe {
            if self.group.is_one_process() && work.bytes() >= IN_PLACE {
                self.lend(work, meter)
            } else {
                self.stream_op(work, meter)
            }
        }
    }

    /// Lets all ranks, which are threads, read the input where it lies. Returns when none of them will read
    /// it any more. A committed op is reduced by every rank, since each is inside this very function.
    ///
    /// # Safety
    /// As for `direct`.
    unsafe fn lend(&self, work: &Work, meter: &mut Meter) -> Result<()> {
        let st = self.enter(meter)?;
        let mut st = self.line(st, meter)?;
        self.accept(&mut st, &work.call());
        let chunk = Chunk {
            slot: None,
            lane: None,
            ops_end: 0,
            fill: work.bytes(),
            inline: false,
            content: Content::Lent { work },
        };
        let seq = st.publish(&self.group, chunk);
        let all_read = |st: &mut State| {
            st.reclaim(&self.group);
            (self.group.slowest().1 > seq && st.reduced > seq).then_some(Ok(()))
        };
        let waited = self.wait_for(st, Limit::Timeout, meter, all_read).map(drop);
        if waited.is_ok() || self.lock().reduced <= seq {
            return waited;
        }
        // The group has ended after this op was committed.
        while self.group.slowest().1 <= seq {
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Streams an op through chunks of its own and waits for the result.
    ///
    /// # Safety
    /// As for `direct`.
    unsafe fn stream_op(&self, work: &Work, meter: &mut Meter) -> Result<()> {
        let element = work.dtype.size();
        let room = self.group.layout().geometry.row_bytes / element;
        let fill = |st: &mut State, s: Stretch, meter: &mut Meter| {
            // SAFETY: by the promise of this function; the input stays until this op is over.
            let piece = unsafe { self.stage(work, s.slot, 0, s.from, s.count, true, meter) };
            let mut pieces = st.pieces();
            pieces.push(piece);
            Content::Rows {
                dtype: work.dtype,
                op: work.op,
                pieces,
            }
        };
        self.stream(&work.call(), work.numel, room, element, meter, fill)
    }

    /// Gathers `bytes` of every rank into `output`, in rank order; the input may be this rank's place.
    ///
    /// # Safety
    /// `input` has `bytes` bytes, `output` as many for every rank; they overlap as said or not at all.
    pub unsafe fn all_gather(
        &self,
        input: *const u8,
        output: *mut u8,
        bytes: usize,
        meter: &mut Meter,
    ) -> Result<()> {
        let room = self.group.layout().geometry.chunk_bytes;
        let fill = |_: &mut State, s: Stretch, meter: &mut Meter| {
            let chunk = self.group.own_chunk(s.slot);
            // SAFETY: by the promise of this function; the chunk is not published yet.
            unsafe { input.add(s.from).copy_to_nonoverlapping(chunk, s.count) };
            meter.copied += s.count as u64;
            Content::Gather {
                output: output.wrapping_add(s.from),
                stride: bytes,
                bytes: s.count,
            }
        };
        let call = Call::bare(CallKind::AllGather, 0, 0, bytes as u64);
        self.stream(&call, bytes, room, 1, meter, fill)?;
        if bytes > 0 {
            // SAFETY: this rank's place in the output, which the input may be.
            unsafe { input.copy_to(output.add(self.group.rank() as usize * bytes), bytes) };
        }
        Ok(())
    }

    /// Sends `total` elements, `room` at most in a chunk, as `fill` puts them there, and waits until the
    /// last chunk is reduced here. Without elements ranks only meet.
    pub(super) fn stream(
        &self,
        call: &Call,
        total: usize,
        room: usize,
        element: usize,
        meter: &mut Meter,
        mut fill: impl FnMut(&mut State, Stretch, &mut Meter) -> Content,
    ) -> Result<()> {
        let mut st = self.enter(meter)?;
        let mut spare = None;
        if total > 0 {
            // Memory may be missing only now, before the call counts.
            let (held, slot) = self.slot(st, None, meter)?;
            (st, spare) = (held, Some(slot));
        }
        self.accept(&mut st, call);
        let mut from = 0;
        let last = loop {
            let count = (total - from).min(room);
            if count > 0 && spare.is_none() {
                let (held, slot) = self.slot(st, None, meter)?;
                (st, spare) = (held, Some(slot));
            }
            let slot = spare.take();
            let content = match slot {
                Some(slot) => fill(&mut st, Stretch { slot, from, count }, meter),
                None => Content::Nothing,
            };
            from += count;
            st = self.line(st, meter)?;
            let chunk = Chunk {
                slot,
                lane: None,
                ops_end: 0,
                fill: count * element,
                inline: false,
                content,
            };
            let seq = st.publish(&self.group, chunk);
            st.progress(&self.group, meter);
            if from == total {
                break seq;
            }
        };
        let over = |st: &mut State| (st.reduced > last).then_some(Ok(()));
        self.wait_for(st, Limit::Timeout, meter, over).map(drop)
    }
}
