//! What goes over a ring at once: ops larger than a bucket, and all-gathers, streamed through chunks of
//! their own.

use super::state::{Chunk, Content, State};
use super::{Held, Ring};
use crate::error::Result;
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Work};

impl Ring {
    /// Carries out an op at once: streams it through chunks of its own and waits for the result.
    ///
    /// # Safety
    /// The pointers of `work` are as the contract's rule 6 says, during the call.
    pub unsafe fn direct(&self, work: &Work, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        let element = work.dtype.size();
        let room = self.group.layout().geometry.row_bytes / element;
        let mut spare = None;
        if work.numel > 0 {
            let (held, slot) = self.slot(st, meter)?;
            (st, spare) = (held, Some(slot));
        }
        self.accept(&mut st, &work.call);
        let mut done = 0;
        let last = loop {
            let count = (work.numel - done).min(room);
            let mut content = Content::Nothing;
            let mut slot = None;
            if count > 0 {
                let place = match spare.take() {
                    Some(place) => place,
                    None => {
                        let (held, place) = self.slot(st, meter)?;
                        st = held;
                        place
                    }
                };
                slot = Some(place);
                // SAFETY: by the promise of this function; the input stays until this op is over.
                let piece = unsafe { self.stage(work, place, 0, done, count, true, meter) };
                let mut pieces = st.pieces();
                pieces.push(piece);
                content = Content::Rows {
                    dtype: work.dtype,
                    op: work.op,
                    pieces,
                };
            }
            done += count;
            st = self.line(st, meter)?;
            let chunk = Chunk {
                slot,
                lane: None,
                ops_end: 0,
                fill: count * element,
                content,
            };
            let seq = st.publish(&self.group, chunk);
            st.progress(&self.group, meter);
            if done == work.numel {
                break seq;
            }
        };
        self.reduced(st, last, meter)
    }

    /// Waits until chunk `seq` is reduced here.
    fn reduced(&self, st: Held<'_>, seq: u64, meter: &mut Meter) -> Result<()> {
        let over = |st: &mut State| (st.reduced > seq).then_some(Ok(()));
        self.wait_for(st, None, meter, over).map(drop)
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
        let mut st = self.enter(meter)?;
        let room = self.group.layout().geometry.chunk_bytes;
        let mut spare = None;
        if bytes > 0 {
            let (held, slot) = self.slot(st, meter)?;
            (st, spare) = (held, Some(slot));
        }
        self.accept(
            &mut st,
            &Call::bare(CallKind::AllGather, 0, 0, bytes as u64),
        );
        let mut done = 0;
        let last = loop {
            let count = (bytes - done).min(room);
            let mut content = Content::Nothing;
            let mut slot = None;
            if count > 0 {
                let place = match spare.take() {
                    Some(place) => place,
                    None => {
                        let (held, place) = self.slot(st, meter)?;
                        st = held;
                        place
                    }
                };
                slot = Some(place);
                // SAFETY: by the promise of this function; the chunk is not published yet.
                unsafe {
                    input
                        .add(done)
                        .copy_to_nonoverlapping(self.group.own_chunk(place), count)
                };
                meter.copied += count as u64;
                content = Content::Gather {
                    output: output.wrapping_add(done),
                    stride: bytes,
                    bytes: count,
                };
            }
            done += count;
            st = self.line(st, meter)?;
            let chunk = Chunk {
                slot,
                lane: None,
                ops_end: 0,
                fill: count,
                content,
            };
            let seq = st.publish(&self.group, chunk);
            st.progress(&self.group, meter);
            if done == bytes {
                break seq;
            }
        };
        if bytes > 0 {
            // SAFETY: this rank's place in the output, which the input may be.
            unsafe { input.copy_to(output.add(self.group.rank() as usize * bytes), bytes) };
        }
        self.reduced(st, last, meter)
    }
}
