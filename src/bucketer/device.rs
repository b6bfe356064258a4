//! What is different on a device comm: what is enqueued is complete, so its callbacks run in the call
//! that enqueues it; direct ops wait for the next launch; results are the comm's own memory.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::plan::Step;
use super::queue::{Flight, Outcome, Pending, Queue};
use super::turn::Turn;
use super::{Ask, Bucketer};
use crate::error::Result;
use crate::lane::device::{Placed, DIRECT};
use crate::lane::work::{Meter, Work};
use crate::lane::Endpoint;

impl<C> Pending<C> {
    fn lies_at(&mut self, comm: &Endpoint, placed: Placed) {
        (self.data, self.shard) = (placed.data, placed.token);
        self.stream = comm.result_stream();
    }
}

impl<C: Copy + Send> Bucketer<C> {
    /// Gives an op its place in the open bucket of a device comm.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn place(
        &self,
        q: &Queue<C>,
        index: usize,
        comm: &Endpoint,
        work: &Work,
        pending: &mut Pending<C>,
        meter: &mut Meter,
    ) -> Result<()> {
        let lane = q.lanes[index].id;
        // SAFETY: by the promise of this function.
        let (_, placed) = unsafe { comm.place(lane, work, false, &self.pool, meter)? };
        pending.lies_at(comm, placed);
        Ok(())
    }

    /// Takes a direct op, which waits for the next launch; one that a callback submits does not.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn defer(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Arc<Endpoint>,
        ask: &Ask<C>,
        nested: bool,
    ) -> Result<u64> {
        let (work, mut pending) = self.prepare(q, index, comm, ask)?;
        let mut meter = Meter::default();
        let lane = q.lanes[index].id;
        // SAFETY: by the promise of this function.
        let taken = unsafe { comm.place(lane, &work, true, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        let (number, placed) = taken.map_err(|e| self.refused(q, e))?;
        pending.lies_at(comm, placed);
        self.count(q, index, &work);
        self.counters.ops_direct.add(1);
        self.counters.collectives_launched.add(1);
        let ticket = pending.ticket;
        let mut ops = q.spare.pop().unwrap_or_default();
        ops.push_back(pending);
        let mut flight = Flight {
            comm: comm.clone(),
            lane: DIRECT,
            first: number - 1,
            end: number,
            ops,
            outcome: None,
            direct: true,
            owed: false,
        };
        if nested {
            // What fails is told by its callback.
            let _ = comm.settle(false);
            see(&mut flight);
            q.due.push_back(flight);
            self.is_due.store(true, Ordering::Relaxed);
        } else {
            q.flights.push_back(flight);
        }
        Ok(ticket)
    }

    /// The device comms that this bucketer has used.
    fn devices<'a>(&self, q: &'a Queue<C>) -> impl Iterator<Item = Arc<Endpoint>> + 'a {
        let live = q.uses.iter().filter_map(|u| u.comm.upgrade());
        live.filter(|comm| comm.is_device())
    }

    /// Refuses a call that launches while a stream that it would touch is being captured.
    pub(super) fn refuse_captures(&self) -> Result<()> {
        let q = self.lock();
        let refused = self.devices(&q).try_for_each(|comm| comm.refuse_captures());
        refused
    }
}

/// Notes that a flight is enqueued, or will never be. Whether it is so.
fn see<C>(flight: &mut Flight<C>) -> bool {
    if flight.outcome.is_none() {
        let (done, failure) = flight.comm.completed(flight.lane);
        if failure.is_some() || done >= flight.end {
            let failure = failure.map(Arc::new);
            flight.outcome = Some(Outcome { done, failure });
        }
    }
    flight.outcome.is_some()
}

impl<C: Copy + Send> Turn<'_, C> {
    /// The next op on a device comm that is enqueued, for its callback in this call.
    pub(super) fn enqueued(&mut self, q: &mut Queue<C>) -> Option<Step<C>> {
        if self.nested {
            return None;
        }
        let mut flights = q.flights.iter_mut();
        let index = flights.position(|f| f.comm.is_device() && see(f))?;
        if self.guard.is_none() {
            return Some(Step::NeedsTurn);
        }
        let end = q.flights[index].end;
        Some(self.take_out(q, index, end))
    }

    /// The end of a launch or flush on device comms: direct ops that wait are enqueued, and a flush
    /// joins results into the producer's stream.
    pub(super) fn settle(&self, q: &Queue<C>, join: bool) -> Result<()> {
        let mut result = Ok(());
        for comm in self.bucketer.devices(q) {
            result = result.and(comm.settle(join));
        }
        result
    }
}
