//! Takes waiting ops: checked before anything changes, then packed on their producer's stream, or noted
//! for the launch where they are borrowed.

use super::bucket::{Bucket, Copies};
use super::memory::{Landing, Sizes};
use super::{DeviceBuckets, DeviceLane, Placed, State, ROUND};
use crate::comm::engine::Kind;
use crate::cuda::stream::refuse_capture;
use crate::cuda::CUstream;
use crate::error::{Error, Result, Status};
use crate::lane::work::{Meter, Work};
use crate::lane::LaneId;
use crate::layout::{bucket_capacity, total_bytes};
use crate::memory::{self as shards, Pool};

impl DeviceBuckets {
    /// Checks what an op points to, before anything changes: all of it is memory of the device, and no
    /// stream is being captured.
    pub fn vet(
        &self,
        pointers: impl Iterator<Item = (*const u8, &'static str, Option<u32>)>,
        stream: CUstream,
    ) -> Result<()> {
        let checked = self.device.enter().and_then(|_entered| {
            let context = self.device.context();
            if !stream.is_null() && stream != self.streams.producer {
                context.check_stream(stream, "stream")?;
                refuse_capture(context, stream, "stream")?;
            }
            self.look_for_captures()?;
            for (pointer, name, index) in pointers {
                let name = || index.map_or(name.to_string(), |i| format!("{name}[{i}]"));
                self.device.check_pointer(pointer, name)?;
            }
            Ok(())
        });
        checked.map_err(|e| self.sift(e))
    }

    /// Refuses a launch while a stream that it would touch is being captured. What else fails is the
    /// end of the comm, and told by the launch.
    pub fn refuse_captures(&self) -> Result<()> {
        let looked = self
            .device
            .enter()
            .and_then(|_entered| self.look_for_captures());
        match looked {
            Err(e) if e.status == Status::Unsupported => Err(e),
            Err(e) => {
                self.fail(e);
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn look_for_captures(&self) -> Result<()> {
        let context = self.device.context();
        let other = |result: &CUstream| *result != self.streams.producer;
        if let Some(result) = self.streams.result.filter(other) {
            refuse_capture(context, result, "config->result_stream")?;
        }
        refuse_capture(context, self.streams.producer, "config->stream")
    }

    /// An empty bucket for a lane, with all the memory that its collective will need.
    fn bucket(&self, lane: &mut DeviceLane, pool: &Pool) -> Result<Bucket> {
        let (element, capacity) = (lane.dtype.size(), lane.capacity);
        let route = self.route(lane.dtype, lane.op)?;
        let Some(all) = total_bytes(capacity, self.size, element) else {
            let text = format!(
                "a bucket of {capacity} elements for each rank is more than memory can hold"
            );
            return Err(Error::new(Status::NoMemory, text));
        };
        let sizes = Sizes {
            send: all,
            exchange: if route.kind == Kind::AllToAll { all } else { 0 },
            scratch: 0,
        };
        let types = (lane.dtype, lane.op);
        let memory = lane.memory(self, pool);
        let landing = memory.landing(capacity * element)?;
        let slot = memory.slot(sizes)?;
        let base = slot.send();
        Ok(Bucket::new(types, (capacity, 0), base, slot, landing))
    }

    /// Has the memory of a lane's next bucket.
    pub fn prepare_next(&self, id: LaneId, pool: &Pool) -> Result<()> {
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        let lane = st.lane(id);
        if lane.next.is_none() {
            lane.next = Some(self.bucket(lane, pool).map_err(|e| self.sift(e))?);
        }
        Ok(())
    }

    /// Takes an op into the lane's bucket, and packs it unless it is borrowed.
    ///
    /// # Safety
    /// As for `Ring::submit`.
    pub unsafe fn submit(
        &self,
        id: LaneId,
        work: &Work,
        pool: &Pool,
        meter: &mut Meter,
    ) -> Result<Placed> {
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        let State { lanes, spares, .. } = &mut *st;
        let Some(lane) = lanes.get_mut(id as usize).and_then(Option::as_mut) else {
            unreachable!("a lane is used between its opening and its closing");
        };
        let bytes = work.bucketer.1;
        lane.capacity = bucket_capacity(bytes, self.size, work.dtype.size());
        let mut bucket = match lane.open.take().or_else(|| lane.next.take()) {
            Some(bucket) => bucket,
            None => self.bucket(lane, pool).map_err(|e| self.sift(e))?,
        };
        if bucket.is_empty() {
            bucket.number = lane.number;
            bucket.expect(lane.rounds.get(lane.number).copied().unwrap_or(0));
        }
        let taken = self.result_of(lane, work, pool, &bucket.landing);
        let stream = self.producer(work.stream.cast());
        let ready = taken.and_then(|own| {
            let event = || spares.pop().map_or_else(|| self.device.event(), Ok);
            Ok((own, bucket.producer(stream, event)?))
        });
        let (own, (producer, is_new)) = match ready {
            Ok(ready) => ready,
            Err(e) => {
                lane.open = Some(bucket);
                return Err(self.sift(e));
            }
        };
        if bucket.is_empty() {
            lane.number = (lane.number + 1) % ROUND;
        }
        let output = own.as_ref().map_or(work.output, |l| l.at);
        let lands = bucket.place(work, output, self.abilities.max_count);
        let placed = match &own {
            Some(own) => Placed {
                data: own.at,
                token: own.token,
            },
            None if work.output.is_null() => {
                let _ = shards::retain(bucket.landing.token);
                Placed {
                    data: lands,
                    token: bucket.landing.token,
                }
            }
            None => Placed {
                data: work.output,
                token: 0,
            },
        };
        // The reference goes with the op.
        own.into_iter().for_each(std::mem::forget);
        // SAFETY: by the promise of this function.
        let packed = unsafe { self.pack(&mut bucket, work, (producer, is_new)) };
        lane.staged += 1;
        lane.open = Some(bucket);
        if let Err(e) = packed {
            let _ = shards::release(placed.token);
            return Err(self.fail(e));
        }
        // A borrowed one, too: by the launch.
        meter.copied += (self.size as usize * work.bytes()) as u64;
        self.accept(&mut st, &work.call());
        Ok(placed)
    }

    /// Memory for a result that is neither the caller's nor stays where it lands.
    pub(super) fn result_of(
        &self,
        lane: &mut DeviceLane,
        work: &Work,
        pool: &Pool,
        landing: &Landing,
    ) -> Result<Option<Landing>> {
        let stays = landing.token != 0 && work.finish.output == work.dtype;
        if !work.output.is_null() || stays {
            return Ok(None);
        }
        let bytes = work.numel * work.finish.output.size();
        lane.memory(self, pool).landing(bytes).map(Some)
    }

    /// Packs the op that was placed last on its producer's stream, or notes how to; then its mark.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn pack(
        &self,
        bucket: &mut Bucket,
        work: &Work,
        (producer, is_new): (usize, bool),
    ) -> Result<()> {
        let mut copies = Copies::new();
        if work.numel > 0 && !bucket.is_sent_as_it_lies() {
            // SAFETY: by the promise of this function.
            unsafe { bucket.copies(work, &mut copies) };
        }
        let stream = bucket.producers[producer].stream;
        let packed = match is_new && !bucket.slot.passed && !bucket.is_sent_as_it_lies() {
            true => bucket.slot.ready.hold(stream),
            false => Ok(()),
        };
        let packed = packed.and_then(|()| match work.borrow {
            true => {
                bucket.lent.append(&mut copies);
                Ok(())
            }
            false => self.pack_copies(bucket.slot.send(), &copies, stream),
        });
        // Also after a failure, since part of it may be under way.
        let mark = &bucket.producers[producer].event;
        let marked = mark.record(stream);
        if marked.is_err() && mark.record(stream).is_err() {
            bucket.slot.is_lost = true;
        }
        packed.and(marked)
    }
}
