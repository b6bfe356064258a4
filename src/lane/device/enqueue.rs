//! What a launch puts on the comm's stream, in one order on all ranks; and what is seen of it later.

use std::sync::Arc;
use std::time::Instant;

use super::bucket::{Bucket, Copies};
use super::{DeviceBuckets, Flight, State};
use crate::comm::engine::Collective;
use crate::comm::patience::Patience;
use crate::cuda::event::Event;
use crate::cuda::CUstream;
use crate::error::{Error, Result, Status};
use crate::lane::LaneId;

impl DeviceBuckets {
    /// Enqueues the direct ops that wait and a lane's bucket, in one group. The context is current.
    pub(super) fn enqueue(&self, st: &mut State, bucket: Option<(LaneId, Bucket)>) -> Result<()> {
        self.progress(st);
        let mut buckets = std::mem::take(&mut st.waiting);
        let directs = buckets.len();
        let lane = bucket.map(|(id, bucket)| {
            buckets.push(bucket);
            id
        });
        let enqueued = match self.cause.get() {
            Some(e) => Err(Error::clone(e)),
            None => self.send(&buckets).map_err(|e| self.fail(e)),
        };
        if enqueued.is_err() {
            // Their memory is free only after what packs it, too, which a send that broke off may not
            // have waited for.
            let comm = self.device.comm();
            for bucket in &mut buckets {
                let mut marks = bucket.producers.iter().map(|p| &p.event);
                let held = |m: &Event| m.hold(comm).or_else(|_| m.hold(comm)).is_ok();
                bucket.slot.is_lost |= !marks.all(held);
            }
        }
        let marked = self.mark(st);
        for (index, mut bucket) in buckets.into_iter().enumerate() {
            st.spares
                .extend(bucket.producers.drain(..).map(|p| p.event));
            match &marked {
                Ok(done) => (bucket.slot.ready, bucket.slot.passed) = (done.clone(), false),
                // Nothing says when this memory is free again: it stays taken.
                Err(_) => {
                    std::mem::forget(bucket);
                    continue;
                }
            }
            let own = lane.filter(|_| index >= directs).map(|id| st.lane(id));
            match own.and_then(|lane| lane.memory.as_mut()) {
                Some(memory) => memory.put(bucket.slot),
                None => st.flying.push_back(Flight {
                    done: bucket.slot.ready.clone(),
                    since: Instant::now(),
                    slot: Some(bucket.slot),
                    lane: Some(bucket.lane),
                }),
            }
        }
        enqueued?;
        marked.map_err(|e| self.fail(e))?;
        st.directs.1 += directs as u64;
        if let Some(id) = lane {
            let lane = st.lane(id);
            lane.done = lane.staged;
        }
        if let Some(check) = &mut st.check {
            check.beat().map_err(|e| self.fail(e))?;
        }
        Ok(())
    }

    /// Puts buckets on the comm's stream: after their inputs, packed, sent, finished.
    fn send(&self, buckets: &[Bucket]) -> Result<()> {
        let comm = self.device.comm();
        for bucket in buckets {
            for producer in &bucket.producers {
                producer.event.hold(comm)?;
            }
            if !bucket.slot.passed {
                bucket.slot.ready.hold(comm)?;
            }
            self.pack_copies(bucket.slot.send(), &bucket.lent, comm)?;
        }
        if let Some(result) = self.streams.result {
            // Memory of results is ours only after what its stream held when it came back.
            self.order(result, comm)?;
        }
        let mut moved = Vec::with_capacity(buckets.len());
        for bucket in buckets {
            let route = self.route(bucket.dtype, bucket.op)?;
            moved.push((route, bucket.collectives(&route)));
        }
        self.start(moved.iter().flat_map(|(_, collectives)| collectives))?;
        for (bucket, (route, collectives)) in buckets.iter().zip(&moved) {
            for (rows, parts) in bucket.reductions(route, collectives) {
                self.device.kernels().reduce(&rows, &parts, comm)?;
            }
        }
        Ok(())
    }

    /// What comes next in `later` comes after what `earlier` holds now.
    pub(super) fn order(&self, earlier: CUstream, later: CUstream) -> Result<()> {
        let mark = self.device.event()?;
        mark.record(earlier)?;
        mark.hold(later)
    }

    /// Starts collectives as one group.
    pub(super) fn start<'a>(&self, all: impl Iterator<Item = &'a Collective>) -> Result<()> {
        let mut all = all.peekable();
        if all.peek().is_none() {
            return Ok(());
        }
        let refused = |what: &str, code: i32| {
            let text = format!(
                "{what} failed with code {code}: {}",
                self.engine.describe(code)
            );
            Error::new(Status::Transport, text).native(code)
        };
        let group = self.engine.group();
        group.map_err(|code| refused("opening a group of collectives", code))?;
        let started = all.try_for_each(|collective| {
            // SAFETY: the memory is given back behind a mark that comes after this.
            let request = unsafe { self.engine.start(collective) };
            let request = request.map_err(|code| refused("starting a collective", code))?;
            self.until("a collective", || self.engine.test(request), refused)
        });
        // A group that was opened is closed, whatever came in between.
        let closed = self.engine.ungroup();
        started.and(closed.map_err(|code| refused("starting a group of collectives", code)))?;
        self.until("a group of collectives", || self.engine.settled(), refused)
    }

    /// An engine that takes its time to enqueue is asked again: what follows must not overtake it.
    fn until(
        &self,
        what: &str,
        is_enqueued: impl Fn() -> std::result::Result<bool, i32>,
        refused: impl Fn(&str, i32) -> Error,
    ) -> Result<()> {
        let mut patience = Patience::new(false);
        loop {
            match is_enqueued() {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(code) => return Err(refused(what, code)),
            }
            if let Some(e) = self.cause.get() {
                return Err(Error::clone(e));
            }
            if self.timeout.is_some_and(|t| patience.waited() >= t) {
                let text = format!(
                    "rank {}: the transport has not enqueued a collective for {:.3} s",
                    self.rank,
                    patience.waited().as_secs_f64()
                );
                return Err(Error::new(Status::Timeout, text));
            }
            patience.pause(|| false, |slice| std::thread::sleep(slice / 5));
        }
    }

    /// Marks the end of what is enqueued, after which results are ready and memory is free. Also after
    /// a failure, since part of it may be under way; tried twice, in case that was a passing one.
    pub(super) fn mark(&self, st: &mut State) -> Result<Arc<Event>> {
        let set = || {
            let done = Arc::new(self.device.event()?);
            done.record(self.device.comm())?;
            if let Some(result) = self.streams.result {
                done.hold(result)?;
            }
            Ok(done)
        };
        let done = match set() {
            Ok(done) => done,
            Err(e) => {
                self.fail(e);
                set()?
            }
        };
        st.last = Some(done.clone());
        st.flying.push_back(Flight {
            done: done.clone(),
            since: Instant::now(),
            slot: None,
            lane: None,
        });
        Ok(done)
    }

    /// Packs pieces, in as few launches as their strides allow.
    pub(super) fn pack_copies(&self, to: *mut u8, copies: &Copies, stream: CUstream) -> Result<()> {
        let kernels = self.device.kernels();
        let mut rest = copies.as_slice();
        let mut pieces = Vec::new();
        while !rest.is_empty() {
            let shape = rest.iter().find_map(|(shape, _)| *shape);
            let fits = |(s, _): &&(Option<(usize, u32)>, _)| s.is_none() || *s == shape;
            let count = rest.iter().take_while(fits).count();
            pieces.clear();
            pieces.extend(rest[..count].iter().map(|(_, copy)| *copy));
            let (stride, rows) = shape.unwrap_or((0, 1));
            kernels.pack(to, stride, rows, &pieces, stream)?;
            rest = &rest[count..];
        }
        Ok(())
    }

    /// Sees what has passed and what has failed; never waits.
    pub(super) fn progress(&self, st: &mut State) {
        if self.cause.get().is_some() {
            return;
        }
        if let Err(e) = self.look(st) {
            self.fail(e);
        }
    }

    fn look(&self, st: &mut State) -> Result<()> {
        let _entered = self.device.enter()?;
        while let Some(flight) = st.flying.front() {
            if !flight.done.passed()? {
                break;
            }
            st.passed = Some(Instant::now());
            // What the device has passed is freed at once.
            if let Some(slot) = st.flying.pop_front().and_then(|f| f.slot) {
                slot.give_back(&self.device, std::iter::empty());
            }
        }
        self.engine.health().map_err(|code| {
            let text = format!(
                "work on the device failed with code {code}: {}; the communicator is its owner's to abort",
                self.engine.describe(code)
            );
            Error::new(Status::Transport, text).native(code)
        })?;
        if let Some(check) = &st.check {
            check.look()?;
        }
        self.look_at_time(st)
    }

    fn look_at_time(&self, st: &State) -> Result<()> {
        let (Some(flight), Some(timeout)) = (st.flying.front(), self.timeout) else {
            return Ok(());
        };
        let since = st.passed.map_or(flight.since, |t| t.max(flight.since));
        if since.elapsed() < timeout {
            return Ok(());
        }
        let text = format!(
            "rank {}: the device has not passed what was enqueued {:.3} s ago; some rank has not come. \
             A communicator that was wrapped is its owner's to abort",
            self.rank,
            flight.since.elapsed().as_secs_f64()
        );
        Err(Error::new(Status::Timeout, text))
    }
}
