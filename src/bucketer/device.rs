//! What is different on a device comm: what is enqueued is complete, so its callbacks run in the call
//! that enqueues it; direct ops wait for the next launch; results are the comm's own memory.

use std::sync::atomic::Ordering;
use std::sync::Arc;

use super::plan::Step;
use super::queue::{Flight, Lane, Outcome, Pending, Queue};
use super::turn::Turn;
use super::{Ask, Bucketer};
use crate::error::Result;
use crate::lane::device::{Placed, DIRECT};
use crate::lane::work::Meter;
use crate::lane::Endpoint;

impl<C> Pending<C> {
    fn lies_at(&mut self, comm: &Endpoint, placed: Placed) {
        (self.data, self.shard) = (placed.data, placed.token);
        self.stream = comm.result_stream();
    }
}

impl<C: Copy + Send> Bucketer<C> {
    /// Gives an op its place in the open bucket of a lane on a device comm. On error nothing has changed.
    ///
    /// # Safety
    /// As for `submit`.
    pub(super) unsafe fn gather_on_device(
        &self,
        lane: &mut Lane<C>,
        tickets: &mut u64,
        ask: &mut Ask<C>,
    ) -> Result<u64> {
        let Some(comm) = lane.open.as_ref().map(|open| open.comm.clone()) else {
            return Ok(0);
        };
        ask.work.bucketer = self.number(lane, &comm);
        let mut meter = Meter::default();
        // SAFETY: by the promise of this function.
        let taken = unsafe { comm.place(lane.id, &ask.work, false, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        let (_, placed) = taken?;
        let ticket = self.count(tickets, &ask.work);
        self.counters.ops_bucketed.add(1);
        lane.taken += 1;
        if let Some(open) = &mut lane.open {
            let mut pending = self.pending(ticket, comm.rank(), ask, None);
            pending.lies_at(&comm, placed);
            open.used += ask.work.numel;
            open.ops.push(pending);
        }
        Ok(ticket)
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
        let mut meter = Meter::default();
        let lane = q.lanes[index].id;
        // SAFETY: by the promise of this function.
        let taken = unsafe { comm.place(lane, &ask.work, true, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        let (number, placed) = taken.map_err(|e| self.refused(q, e))?;
        let ticket = self.count(&mut q.tickets, &ask.work);
        if q.lanes[index].ordinal.is_none() {
            self.first_use(q, index, ask.work.bucketer.0);
        }
        self.counters.ops_direct.add(1);
        self.counters.collectives_launched.add(1);
        let mut pending = self.pending(ticket, comm.rank(), ask, None);
        pending.lies_at(comm, placed);
        let mut ops = q.list();
        ops.push(pending);
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

    /// Whether it has been used on device comms.
    #[inline]
    pub(super) fn has_devices(&self) -> bool {
        self.devices.load(Ordering::Relaxed)
    }

    /// The device comms that this bucketer has used.
    fn device_comms<'a>(&self, q: &'a Queue<C>) -> impl Iterator<Item = Arc<Endpoint>> + 'a {
        let live = q.uses.iter().filter_map(|u| u.comm.upgrade());
        live.filter(|comm| comm.is_device())
    }

    /// Refuses a call that launches while a stream that it would touch is being captured.
    pub(super) fn refuse_captures(&self) -> Result<()> {
        if !self.has_devices() {
            return Ok(());
        }
        let q = self.lock();
        let refused = self
            .device_comms(&q)
            .try_for_each(|comm| comm.refuse_captures());
        refused
    }
}

impl<C> Flight<C> {
    /// Whether it is a direct op of a device comm that is not enqueued yet. Only a launch or a flush may
    /// do that: calls that ranks need not make alike start nothing.
    pub(super) fn is_put_off(&self) -> bool {
        if self.lane != DIRECT || !self.comm.is_device() || self.outcome.is_some() {
            return false;
        }
        let (done, failure) = self.comm.completed(self.lane);
        done < self.end && failure.is_none()
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
    #[inline]
    pub(super) fn enqueued(&mut self, q: &mut Queue<C>) -> Option<Step> {
        if self.bucketer.has_devices() && !self.nested {
            self.first_enqueued(q)
        } else {
            None
        }
    }

    #[cold]
    fn first_enqueued(&mut self, q: &mut Queue<C>) -> Option<Step> {
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
        if !self.bucketer.has_devices() {
            return result;
        }
        for comm in self.bucketer.device_comms(q) {
            result = result.and(comm.settle(join));
        }
        result
    }
}
