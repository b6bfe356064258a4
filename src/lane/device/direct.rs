//! Ops larger than a bucket, which wait for the next launch to go in one group with it; and all-gathers.

use super::bucket::Bucket;
use super::memory::{Landing, Sizes, Slot};
use super::{DeviceBuckets, Placed, State};
use crate::comm::engine::{Collective, Kind};
use crate::dtype::{DType, Finish, Op};
use crate::error::{unsupported, Result};
use crate::fingerprint::{Call, CallKind};
use crate::lane::bucket::contiguous;
use crate::lane::work::{Meter, Work};
use crate::lane::LaneId;
use crate::memory::{self as shards, Pool, System};

impl DeviceBuckets {
    /// Takes a direct op: its number among those of the comm, and where its result will be. Borrowed
    /// and with its rows one after the other it is sent as it lies. Else it is packed on its producer's
    /// stream, in whose order the caller may use its memory again (rule 6).
    ///
    /// # Safety
    /// As for `Ring::submit`.
    pub unsafe fn defer(
        &self,
        id: LaneId,
        work: &Work,
        pool: &Pool,
        meter: &mut Meter,
    ) -> Result<(u64, Placed)> {
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        let State { lanes, spares, .. } = &mut *st;
        let Some(lane) = lanes.get_mut(id as usize).and_then(Option::as_mut) else {
            unreachable!("a lane is used between its opening and its closing");
        };
        let route = self.route(work.dtype, work.op)?;
        let (element, all) = (work.dtype.size(), work.bytes() * self.size as usize);
        let (mut own, mut lies) = (std::ptr::null(), None);
        if work.numel > 0 {
            // SAFETY: by the promise of this function.
            unsafe { (own, lies) = (work.row(self.rank).0, contiguous(work)) };
        }
        // Engines take elements where elements may lie.
        let fits = |at: *const u8| (at as usize).is_multiple_of(element);
        let lies = lies.filter(|&at| work.borrow && work.numel <= route.max_count && fits(at));
        let plain = work.finish == Finish::plain(work.dtype) && work.op != Op::Avg;
        let given = !work.output.is_null();
        let reduces = route.kind == Kind::ReduceScatter;
        let straight =
            plain && given && reduces && work.output.cast_const() != own && fits(work.output);
        let stays = !given && work.finish.output == work.dtype;
        let sizes = Sizes {
            send: if lies.is_some() { 0 } else { all },
            exchange: if reduces { 0 } else { all },
            scratch: if reduces && !straight && !stays {
                work.numel * element
            } else {
                0
            },
        };
        let memory = lane.memory(self, pool);
        let slot = Slot::new(&self.device, memory.buckets(), sizes).map_err(|e| self.sift(e))?;
        let landing = match (straight, stays) {
            (true, _) => Landing {
                is_callers: true,
                ..Landing::passing(work.output)
            },
            (_, true) => memory.landing(work.numel * element)?,
            _ => Landing::passing(slot.scratch()),
        };
        let result = self.result_of(lane, work, pool, &landing)?;
        let base = lies.unwrap_or(slot.send());
        let numel = work.numel;
        let mut bucket = Bucket::new((work.dtype, work.op), (numel, numel), base, slot, landing);
        bucket.lane = id;
        let stream = self.producer(work.stream.cast());
        let event = || spares.pop().map_or_else(|| self.device.event(), Ok);
        let producer = bucket.producer(stream, event).map_err(|e| self.sift(e))?;
        let output = result.as_ref().map_or(work.output, |l| l.at);
        let lands = bucket.place(work, output, route.max_count);
        let placed = match &result {
            Some(result) => Placed {
                data: result.at,
                token: result.token,
            },
            None if given => Placed {
                data: work.output,
                token: 0,
            },
            None => {
                let _ = shards::retain(bucket.landing.token);
                Placed {
                    data: lands,
                    token: bucket.landing.token,
                }
            }
        };
        // The reference goes with the op.
        result.into_iter().for_each(std::mem::forget);
        // SAFETY: by the promise of this function.
        let packed = unsafe { self.pack(&mut bucket, work, producer) };
        if lies.is_none() {
            meter.copied += all as u64;
        }
        st.waiting.push(bucket);
        if let Err(e) = packed {
            let _ = shards::release(placed.token);
            return Err(self.fail(e));
        }
        st.directs.0 += 1;
        self.accept(&mut st, &work.call());
        Ok((st.directs.0, placed))
    }

    /// See `Ring::all_gather`; in the order of the comm's `stream`.
    ///
    /// # Safety
    /// As for `Ring::all_gather`, in device memory, until the stream has passed.
    pub unsafe fn all_gather(&self, input: *const u8, output: *mut u8, bytes: usize) -> Result<()> {
        if !self.abilities.all_gather {
            return Err(unsupported!(
                "comm: its transport has no ALL_GATHER; expected that flag"
            ));
        }
        self.refuse_captures()?;
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        if bytes > 0 {
            let input = self.device.check_pointer(input, || "input".into());
            let output = self.device.check_pointer(output, || "output".into());
            input.and(output).map_err(|e| self.sift(e))?;
        }
        let size = self.size as usize;
        let block = self.abilities.max_count.min(bytes.max(1));
        // An empty one is a barrier, and has to carry something; a split one has to be sorted.
        let sizes = Sizes {
            send: usize::from(bytes == 0),
            exchange: if bytes == 0 || block < bytes {
                block * size
            } else {
                0
            },
            scratch: 0,
        };
        let pool = Pool::new(Box::new(System));
        let memory = super::memory::LaneMemory::new(&self.device, &pool, self.result_stream());
        let slot = Slot::new(&self.device, memory.buckets(), sizes);
        let mut slot = slot.map_err(|e| self.sift(e))?;
        if !st.waiting.is_empty() {
            self.enqueue(&mut st, None)?;
        }
        self.accept(
            &mut st,
            &Call::bare(CallKind::AllGather, 0, 0, bytes as u64),
        );
        let from = if bytes == 0 { slot.send() } else { input };
        let staged = sizes.exchange > 0;
        // SAFETY: by the promise of this function.
        let gathered = unsafe {
            self.gather(
                from,
                output,
                bytes.max(1),
                block,
                staged.then_some(&slot),
                bytes > 0,
            )
        };
        let enqueued = gathered.map_err(|e| self.fail(e));
        match self.mark(&mut st) {
            Ok(done) => {
                slot.ready = done;
                let joined = slot.ready.hold(self.streams.producer);
                slot.give_back(&self.device, std::iter::empty());
                enqueued?;
                joined.map_err(|e| self.fail(e))?;
            }
            Err(e) => {
                std::mem::forget(slot);
                return Err(self.fail(e));
            }
        }
        match &mut st.check {
            Some(check) => check.beat().map_err(|e| self.fail(e)),
            None => Ok(()),
        }
    }

    /// Gathers block by block; those that land in a slot are sorted into rank order, if `wanted`.
    ///
    /// # Safety
    /// As for `all_gather`.
    unsafe fn gather(
        &self,
        from: *const u8,
        output: *mut u8,
        bytes: usize,
        block: usize,
        staged: Option<&Slot>,
        wanted: bool,
    ) -> Result<()> {
        let (comm, size) = (self.device.comm(), self.size as usize);
        self.order(self.streams.producer, comm)?;
        if let Some(slot) = staged {
            slot.ready.hold(comm)?;
        }
        for done in (0..bytes).step_by(block) {
            let count = block.min(bytes - done);
            let recv = staged.map_or(output, Slot::exchange);
            let collective = Collective {
                kind: Kind::AllGather,
                send: from.wrapping_add(done),
                recv,
                count,
                dtype: DType::U8,
                op: Op::Sum,
                stride: count,
                stream: comm.cast(),
            };
            self.start(std::iter::once(&collective))?;
            for r in (0..size).filter(|_| wanted && staged.is_some()) {
                let to = output.wrapping_add(r * bytes + done);
                // SAFETY: block by block, both are inside their memory.
                unsafe { self.device.copy(to, recv.add(r * count), count, comm)? };
            }
        }
        Ok(())
    }
}
