//! What an engine carries out at once: ops larger than a bucket, and all-gathers.

use std::sync::Arc;

use super::open::pack;
use super::unit::{Landing, Piece, Unit};
use super::Buckets;
use crate::comm::engine::{Collective, Kind};
use crate::dtype::{DType, Finish, Op};
use crate::error::{unsupported, Result};
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Rows, Work};
use crate::memory::{Buffer, Pool};

impl Buckets {
    /// Carries out an op at once.
    ///
    /// # Safety
    /// As for `Ring::direct`.
    pub unsafe fn direct(&self, work: &Work, pool: &Arc<Pool>, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        let kind = self.route(work.dtype, work.op)?;
        let mut unit = Unit::new(st.chain, None, 0);
        (unit.dtype, unit.op, unit.count) = (work.dtype, work.op, work.numel);
        unit.block = self.abilities.max_count.min(work.numel.max(1));
        unit.pieces.push(Piece {
            at: 0,
            count: work.numel,
            output: work.output,
            finish: work.finish,
        });
        // SAFETY: the rows are readable; the packed copy has room for all of them.
        unsafe {
            let empty = work.numel == 0;
            let whole = (!empty && unit.block == unit.count)
                .then(|| contiguous(work))
                .flatten();
            let own = if empty {
                std::ptr::null()
            } else {
                work.row(self.rank).0
            };
            let plain = work.finish == Finish::plain(work.dtype) && work.op != Op::Avg;
            let theirs = !work.output_is_ours && work.output.cast_const() != own;
            let straight = plain && theirs && kind == Kind::ReduceScatter;
            let landing = match straight {
                true => Landing::Output(work.output),
                false => Landing::Buffer(Buffer::new(pool, unit.landing_bytes(kind, self.size))?),
            };
            let send = match whole {
                Some(send) => send,
                None => {
                    let packed = Buffer::new(pool, self.size as usize * work.bytes())?;
                    pack(&unit, self.size, packed.as_ptr(), |r, at, n, to| {
                        work.copy_row(r, at, n, to)
                    });
                    meter.copied += (self.size as usize * work.bytes()) as u64;
                    let at = packed.as_ptr();
                    unit.send = Some(packed);
                    at
                }
            };
            unit.plan(kind, send, self.size, landing);
        }
        st.accept(&work.call());
        unit.chain = st.chain;
        let (st, number) = self.queue(st, unit, meter)?;
        self.finished(st, number, meter)
    }

    /// See `Ring::all_gather`.
    ///
    /// # Safety
    /// As for `Ring::all_gather`.
    pub unsafe fn all_gather(
        &self,
        input: *const u8,
        output: *mut u8,
        bytes: usize,
        meter: &mut Meter,
    ) -> Result<()> {
        let mut st = self.enter(meter)?;
        if !self.abilities.all_gather {
            return Err(unsupported!(
                "comm: its transport has no ALL_GATHER; expected that flag"
            ));
        }
        let mut unit = Unit::new(st.chain, None, 0);
        let (size, max) = (self.size as usize, self.abilities.max_count);
        // An empty one is a barrier, and has to carry something.
        (unit.count, unit.block) = (bytes.max(1), max.min(bytes.max(1)));
        let place = output.wrapping_add(self.rank as usize * bytes);
        let straight = bytes > 0 && unit.block == bytes && place.cast_const() != input;
        let (from, into) = if straight {
            (input, output)
        } else {
            let copy = Buffer::new(&self.pool, unit.count)?;
            let all = Buffer::new(&self.pool, unit.count * size)?;
            // SAFETY: the copy has room for the input; an empty input is not read.
            unsafe {
                copy.as_ptr().write(0);
                input.copy_to(copy.as_ptr(), bytes);
            }
            let places = (copy.as_ptr().cast_const(), all.as_ptr());
            (unit.send, unit.recv) = (Some(copy), Some(all));
            unit.gather = (bytes > 0).then_some(output);
            places
        };
        let mut done = 0;
        while done < unit.count {
            let count = (unit.count - done).min(unit.block);
            unit.payload.push(Collective {
                kind: Kind::AllGather,
                send: from.wrapping_add(done),
                recv: into.wrapping_add(done * size),
                count,
                dtype: DType::U8,
                op: Op::Sum,
                stride: count,
                stream: std::ptr::null_mut(),
            });
            done += count;
        }
        st.accept(&Call::bare(CallKind::AllGather, 0, 0, bytes as u64));
        unit.chain = st.chain;
        let (st, number) = self.queue(st, unit, meter)?;
        self.finished(st, number, meter)
    }
}

/// Where the rows begin if they lie one after the other, with no padding.
///
/// # Safety
/// The input of `work` is readable.
pub unsafe fn contiguous(work: &Work) -> Option<*const u8> {
    match work.rows {
        Rows::Flat { data, total } => (total == work.numel * work.size as usize).then_some(data),
        Rows::Pieces(_) => {
            // SAFETY: by the promise of this function.
            let row = |r: u32| unsafe { work.row(r).0 };
            let first = row(0);
            (0..work.size)
                .all(|r| row(r) == first.wrapping_add(r as usize * work.bytes()))
                .then_some(first)
        }
    }
}
