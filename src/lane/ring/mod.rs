//! The ring lane: ops travel in chunks of about the size of a cache, through memory all ranks read.
//!
//! A rank copies its rows into a chunk, when an op is submitted or, if it is lent, when the chunk is
//! published: that is when it is full, or its bucket is launched. Once all ranks have published chunk k, each reduces its own row of k straight into the
//! results. So a large tensor streams through like many small ones, and on one host the chunk in
//! cache is the real bucket. `State` never waits; all waiting is in `wait`, with the lock released.

mod carry;
mod desync;
mod direct;
#[cfg(any(loom, shuttle))]
mod model;
mod pack;
mod slots;
mod state;
mod wait;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::pack::may_wait;
use self::state::{Content, State};
use self::wait::Limit;
use super::work::{Meter, Waited, Work};
use super::LaneId;
use crate::comm::group::Group;
use crate::dtype::{DType, Op};
use crate::error::{Error, Result};
use crate::fingerprint::{Call, CallKind};
use crate::layout::aligned;
use crate::lock::{Guard, Lock};

pub use self::desync::name as name_difference;

/// One rank's ring.
pub struct Ring {
    group: Group,
    timeout: Option<Duration>,
    state: Lock<State>,
    /// Bytes of staging made real.
    committed: AtomicU64,
}

type Held<'a> = Guard<'a, State>;

impl Ring {
    /// The ring of one rank's end of a group. `timeout`: none waits for ever.
    pub fn new(group: Group, timeout: Option<Duration>) -> Ring {
        Ring {
            group,
            timeout,
            state: Lock::new(State::new()),
            committed: AtomicU64::new(0),
        }
    }

    /// The group.
    pub fn group(&self) -> &Group {
        &self.group
    }

    #[inline(always)]
    fn lock(&self) -> Held<'_> {
        // Nobody asks who has it.
        self.state.lock(1)
    }

    /// The state of a comm that has not failed.
    #[inline]
    fn enter(&self, meter: &mut Meter) -> Result<Held<'_>> {
        let st = self.lock();
        if st.failure.is_none() && !self.group.has_ended() {
            return Ok(st);
        }
        self.enter_ended(st, meter)
    }

    /// The group has ended: what was committed before is reduced all the same.
    #[cold]
    fn enter_ended<'a>(&'a self, mut st: Held<'a>, meter: &mut Meter) -> Result<Held<'a>> {
        st.progress(&self.group, meter);
        match &st.failure {
            Some(e) => Err(Error::clone(e)),
            None => Ok(st),
        }
    }

    /// The first cause, once everything committed before it is reduced.
    pub fn failure(&self) -> Option<Arc<Error>> {
        self.lock().failure.clone()
    }

    /// Bytes of staging that this rank has made real.
    pub fn committed(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }

    /// A new lane.
    pub fn open_lane(&self, dtype: DType, op: Op) -> LaneId {
        self.lock().open_lane(dtype, op)
    }

    /// Forgets a lane and where its results go.
    pub fn close_lane(&self, id: LaneId) {
        self.lock().close_lane(&self.group, id);
    }

    /// How many ops of a lane are complete, and why no more will be.
    pub fn completed(&self, id: LaneId) -> (u64, Option<Arc<Error>>) {
        let mut st = self.lock();
        (st.lane(id).reduced, st.failure.clone())
    }

    /// Reduces what can be reduced now.
    pub fn carry_on(&self, meter: &mut Meter) {
        self.lock().progress(&self.group, meter);
    }

    /// The number that a bucketer gets on its first use of this comm.
    pub fn next_ordinal(&self) -> u32 {
        self.lock().ordinals
    }

    /// Stages a waiting op. The op counts once this returns OK.
    ///
    /// # Safety
    /// The pointers of `work` are as the contract's rule 6 says; with `borrow`, and for the output,
    /// until the op is complete or its lane is closed.
    pub unsafe fn submit(&self, id: LaneId, work: &Work, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        // SAFETY: by the promise of this function.
        unsafe {
            if self.add(&mut st, id, work, meter) {
                return Ok(());
            }
            self.spread(st, id, work, meter)
        }
    }

    /// Adds an op to the open chunk of its lane, or to one that is opened in memory used before; it does not
    /// fill up by it. False: it is not so.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline(always)]
    unsafe fn add(&self, st: &mut State, id: LaneId, work: &Work, meter: &mut Meter) -> bool {
        let (bytes, element) = (work.bytes(), work.dtype.size());
        let room = self.group.layout().geometry.row_bytes;
        if bytes == 0 {
            // It takes no memory: whether a chunk has some must be the same on all ranks.
            return false;
        }
        let lane = st.lane(id);
        let (slot, at) = match &lane.open {
            Some(chunk) => match chunk.slot {
                Some(slot) => (slot, aligned(chunk.fill, bytes)),
                None => return false,
            },
            None if bytes + element <= room => match self.open_warm(st, id) {
                Some(slot) => (slot, 0),
                None => return false,
            },
            None => return false,
        };
        if at + bytes + element > room {
            return false;
        }
        self.accept(st, &work.call());
        // SAFETY: by the promise of this function; the row has room.
        unsafe {
            if work.borrow && may_wait(work) {
                self.note(st.lane(id), work, at, meter);
            } else {
                let piece = self.stage(work, slot, at, 0, work.numel, work.borrow, meter);
                st.lane(id).add(piece, at + bytes);
            }
        }
        true
    }

    /// Opens a chunk for a lane in memory that is free and was used before, if that takes nothing else.
    #[inline]
    fn open_warm(&self, st: &mut State, id: LaneId) -> Option<u32> {
        if st.open.len() >= self.group.layout().geometry.chunks / 2 {
            return None;
        }
        let slot = st.warm_slot(&self.group)?;
        st.open(id, Some(slot));
        Some(slot)
    }

    /// Spreads an op over chunks, the lane's open one first; each is published when it is full.
    ///
    /// # Safety
    /// As for `submit`.
    #[cold]
    unsafe fn spread<'a>(
        &'a self,
        mut st: Held<'a>,
        id: LaneId,
        work: &Work,
        meter: &mut Meter,
    ) -> Result<()> {
        let element = work.dtype.size();
        let room = self.group.layout().geometry.row_bytes;
        let mut spare = None;
        let lane = st.lane(id);
        let start = lane
            .open
            .as_ref()
            .map_or(0, |c| aligned(c.fill, work.bytes()));
        let ready = lane.open.as_ref().is_some_and(|c| c.slot.is_some()) && start + element <= room;
        if work.numel > 0 && !ready {
            // Memory may be missing only now, before the op counts.
            let (held, slot) = self.slot(st, self.patience(), meter)?;
            (st, spare) = (held, Some(slot));
        }
        self.accept(&mut st, &work.call());
        let mut done = 0;
        loop {
            if st.lane(id).open.is_none() {
                st = self.open_chunk(st, id, meter)?;
            }
            let lane = st.lane(id);
            let staged = lane.staged;
            let Some(chunk) = lane.open.as_mut() else {
                continue;
            };
            let at = aligned(chunk.fill, (work.numel - done) * element);
            let count = (work.numel - done).min(room.saturating_sub(at) >> work.dtype.shift());
            if work.numel > done && count == 0 {
                st = self.publish(st, id, meter)?;
                continue;
            }
            if count > 0 {
                let slot = match chunk.slot.or(spare.take()) {
                    Some(slot) => slot,
                    None => {
                        let (held, slot) = self.slot(st, self.patience(), meter)?;
                        (st, spare) = (held, Some(slot));
                        continue;
                    }
                };
                chunk.slot = Some(slot);
                chunk.fill = at + count * element;
                // SAFETY: by the promise of this function, and by `count`'s choice.
                let piece = unsafe { self.stage(work, slot, at, done, count, work.borrow, meter) };
                if let Content::Rows { pieces, .. } = &mut chunk.content {
                    pieces.push(piece);
                }
                done += count;
            }
            if done == work.numel {
                chunk.ops_end = staged + 1;
                lane.staged = staged + 1;
            }
            if chunk.fill + element > room {
                st = self.publish(st, id, meter)?;
            }
            if done == work.numel {
                break;
            }
        }
        if let Some(slot) = spare {
            st.unslot(slot);
        }
        Ok(())
    }

    /// Takes a call into the sequence; a bucketer's first one gives it its number.
    #[inline(always)]
    fn accept(&self, st: &mut State, call: &Call) {
        if call.kind == CallKind::Submit {
            st.ordinals = st.ordinals.max(call.ordinal + 1);
        }
        st.record(&self.group, &call.words());
    }

    /// Opens a chunk for a lane. Should fewer than half of all chunks be left for travelling, the
    /// oldest open one is published first.
    fn open_chunk<'a>(
        &'a self,
        mut st: Held<'a>,
        id: LaneId,
        meter: &mut Meter,
    ) -> Result<Held<'a>> {
        while st.open.len() + 1 > self.group.layout().geometry.chunks / 2 {
            let Some(&oldest) = st.open.front() else {
                break;
            };
            st = self.publish(st, oldest, meter)?;
        }
        if st.lane(id).open.is_none() {
            st.open(id, None);
        }
        Ok(st)
    }

    /// Publishes a lane's open chunk, if it has one.
    fn publish<'a>(&'a self, st: Held<'a>, id: LaneId, meter: &mut Meter) -> Result<Held<'a>> {
        let mut st = self.line(st, meter)?;
        // Meanwhile another thread may have published it, and closed the lane.
        let lane = st.lanes.get_mut(id as usize).and_then(Option::as_mut);
        let Some(lane) = lane.filter(|lane| lane.open.is_some()) else {
            return Ok(st);
        };
        lane.pack(&self.group, meter);
        let Some(chunk) = lane.open.take() else {
            return Ok(st);
        };
        st.open.retain(|&open| open != id);
        st.publish(&self.group, chunk);
        st.progress(&self.group, meter);
        Ok(st)
    }

    /// Takes a launch or flush that finds something open into the sequence.
    pub fn announce(&self, call: &Call, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        self.accept(&mut st, call);
        Ok(())
    }

    /// Publishes what a lane has staged.
    pub fn launch(&self, id: LaneId, meter: &mut Meter) -> Result<()> {
        let st = self.enter(meter)?;
        self.publish(st, id, meter).map(drop)
    }

    /// A flush of all that a bucketer has open, one lane's ops: announces it, publishes them and completes
    /// them, in one go. How the launch went, and then as [`Ring::completed`].
    pub fn flush(
        &self,
        id: LaneId,
        call: &Call,
        meter: &mut Meter,
    ) -> (Result<()>, u64, Option<Arc<Error>>) {
        let launched = self.enter(meter).and_then(|mut st| {
            self.accept(&mut st, call);
            self.publish(st, id, meter)
        });
        let waited = match launched {
            Err(e) => Err((Err(e.clone()), e)),
            Ok(mut st) => {
                let target = st.lane(id).staged;
                let over = |st: &mut State| (st.lane(id).reduced >= target).then_some(Ok(()));
                self.wait_for(st, Limit::Timeout, meter, over)
                    .map(|_| target)
                    .map_err(|e| (Ok(()), e))
            }
        };
        match waited {
            Ok(done) => (Ok(()), done, None),
            Err((launched, e)) => {
                let (done, failure) = self.completed(id);
                (launched, done, failure.or_else(|| Some(Arc::new(e))))
            }
        }
    }

    /// Waits until `target` ops of a lane are complete, or the comm has failed; until `limit` at most.
    pub fn wait(
        &self,
        id: LaneId,
        target: u64,
        limit: Option<Instant>,
        meter: &mut Meter,
    ) -> Waited {
        let st = self.lock();
        let over = |st: &mut State| (st.lane(id).reduced >= target).then_some(Ok(()));
        let limit = limit.map_or(Limit::Timeout, Limit::Callers);
        match self.wait_for(st, limit, meter, over) {
            Ok((_, None)) => Waited::TimeUp,
            _ => Waited::Over,
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.group.leave();
    }
}
