//! What each kind of call does, step by step: the rules of order and of callbacks (1, 3 and 9).

use std::sync::Arc;
use std::time::Instant;

use super::hand::{Found, Hand};
use super::queue::{self, Queue};
use super::turn::Turn;
use super::{Ask, Held, IN_FLIGHT};
use crate::error::{Error, Result, Status};
use crate::fingerprint::CallKind;
use crate::lane::work::Meter;
use crate::lane::Endpoint;

/// What a call still has to do.
pub enum Plan<'a, C> {
    /// Take an op.
    Submit {
        /// Where it goes.
        comm: &'a Arc<Endpoint>,
        /// The op.
        ask: &'a Ask<C>,
        /// Its ticket, once it is accepted; 0 before.
        ticket: u64,
    },
    /// Launch what was open when the call began; a flush drains then.
    Launch {
        /// Which of the two.
        kind: CallKind,
        /// Buckets before this one were open, once that is announced.
        limit: Option<u64>,
        /// How the launches went.
        result: Result<()>,
    },
    /// Hand back everything that is launched.
    Drain,
    /// Hand back what is complete.
    Poll {
        /// Whether peers' progress was looked at.
        looked: bool,
    },
    /// Hand back everything up to one op.
    Wait {
        /// That op.
        ticket: u64,
        /// The caller's own time.
        limit: Option<Instant>,
        /// Its comm, lane and number there.
        found: Option<(u64, u32, u64)>,
    },
    /// Hand back everything, cancelling what is not launched.
    Close,
    /// Nothing more.
    Over,
}

impl<C> Plan<'_, C> {
    /// The beginning of a launch or a flush.
    pub fn launch(kind: CallKind) -> Self {
        Plan::Launch {
            kind,
            limit: None,
            result: Ok(()),
        }
    }
}

/// What a step found.
pub enum Step {
    /// Ops to hand back are in the batch, or due.
    Batch,
    /// Look again.
    Again,
    /// Look again, but only as the one who runs callbacks.
    NeedsTurn,
    /// The plan is done.
    Done,
}

/// How far a submit got.
enum Taken {
    /// The op has this ticket.
    Accepted(u64),
    /// Something comes first.
    First(Step),
}

impl<C: Copy + Send> Turn<'_, C> {
    /// What comes before the plan: what a callback did at once, the rest of a batch, and what earlier calls
    /// owe.
    pub(super) fn first(&mut self, q: &mut Queue<C>) -> Option<Step> {
        self.guard.as_ref()?;
        if let Some(due) = self.bucketer.take_due(q) {
            self.due = due;
            return Some(Step::Batch);
        }
        if !self.batch.is_over() {
            return Some(Step::Batch);
        }
        if let Some(owed) = q.owed.pop_front() {
            self.batch = owed;
            return Some(Step::Batch);
        }
        self.owed_flight(q).or_else(|| self.enqueued(q))
    }

    /// # Safety
    /// As for `look`.
    pub(super) unsafe fn advance(&mut self, q: &mut Held<'_, C>) -> Step {
        match &mut self.plan {
            // SAFETY: by the promise of this function.
            Plan::Submit { .. } => unsafe { self.submit(q) },
            Plan::Launch { .. } => self.launch(q),
            Plan::Drain => match self.oldest_op(q, None) {
                Some(step) => step,
                None => {
                    q.failed.clear();
                    if let Some(e) = q.first_failure.take() {
                        self.result = Err(Error::clone(&e));
                    }
                    self.over()
                }
            },
            Plan::Poll { .. } => self.poll(q),
            Plan::Wait { .. } => self.wait(q),
            Plan::Close => self.close(q),
            Plan::Over => Step::Done,
        }
    }

    /// Takes ops out of flight `index`, which is over as far as those, up to number `upto` of its lane.
    pub(super) fn take_out(&mut self, q: &mut Queue<C>, index: usize, upto: u64) -> Step {
        self.batch = self.bucketer.take_out(q, index, upto);
        Step::Batch
    }

    pub(super) fn over(&mut self) -> Step {
        self.plan = Plan::Over;
        Step::Done
    }

    /// The next op of a flight whose callbacks a call owes that an exception has ended. It is waited for,
    /// so that callbacks come at the same place on every rank; but for a poll, and a wait with a limit,
    /// which take what is complete.
    fn owed_flight(&mut self, q: &mut Queue<C>) -> Option<Step> {
        let front = q.flights.front().filter(|f| f.owed)?;
        match self.plan {
            Plan::Poll { .. } | Plan::Wait { limit: Some(_), .. } => {
                let (end, over) = (front.end, front.outcome.is_some());
                let over = over || front.comm.completed(front.lane).0 >= end;
                over.then(|| self.take_out(q, 0, end))
            }
            _ => self.oldest_op(q, None),
        }
    }

    /// The next op of the oldest flight, of one comm or of all; none: nothing is in flight. Waits.
    pub(super) fn oldest_op(&mut self, q: &mut Queue<C>, comm: Option<u64>) -> Option<Step> {
        let index = match comm {
            Some(id) => q.oldest(id)?,
            None if q.flights.is_empty() => return None,
            None => 0,
        };
        let end = q.flights[index].end;
        self.bucketer.complete(q, index, end, None);
        Some(self.take_out(q, index, end))
    }

    /// Room for one more bucket of a comm in flight; or the step that makes it.
    pub(super) fn make_room(&mut self, q: &mut Queue<C>, comm: u64) -> Option<Step> {
        if q.in_flight(comm) < IN_FLIGHT {
            return None;
        }
        if self.nested {
            // Callbacks wait for the running one; their bucket is completed all the same.
            if let Some(index) = q.oldest(comm) {
                let end = q.flights[index].end;
                self.bucketer.complete(q, index, end, None);
            }
            return None;
        }
        if self.guard.is_none() {
            return Some(Step::NeedsTurn);
        }
        self.oldest_op(q, Some(comm))
    }

    /// # Safety
    /// As for `look`.
    pub(super) unsafe fn submit(&mut self, q: &mut Held<'_, C>) -> Step {
        let Plan::Submit { comm, ask, ticket } = self.plan else {
            return Step::Done;
        };
        if ticket != 0 {
            if comm.is_device() {
                return self.enqueued(q).unwrap_or(Step::Done);
            }
            // A direct op: the buckets launched before it on its comm, then its own callback.
            let direct = |q: &Queue<C>| {
                let mut flights = q.flights.iter();
                flights.any(|f| f.direct && f.comm.id() == comm.id())
            };
            if self.guard.is_none() || !direct(q) {
                return Step::Done;
            }
            return self.oldest_op(q, Some(comm.id())).unwrap_or(Step::Done);
        }
        // SAFETY: by the promise of this function.
        match unsafe { self.take(q, comm, &mut { *ask }) } {
            Ok(Taken::Accepted(number)) => {
                if let Plan::Submit { ticket, .. } = &mut self.plan {
                    *ticket = number;
                }
                Step::Again
            }
            Ok(Taken::First(step)) => step,
            Err(e) => self.refuse(e),
        }
    }

    /// Takes the op, or says what must come before.
    ///
    /// # Safety
    /// As for `look`.
    unsafe fn take(
        &mut self,
        q: &mut Held<'_, C>,
        comm: &Arc<Endpoint>,
        ask: &mut Ask<C>,
    ) -> Result<Taken> {
        let bucketer = self.bucketer;
        if q.closing {
            let text = "bucketer: it is being freed; expected a live one";
            return Err(Error::new(Status::BadHandle, text));
        }
        if q.owes() && !self.nested && self.guard.is_none() {
            return Ok(Taken::First(Step::NeedsTurn));
        }
        let index = bucketer.lane_of(q, comm, ask.work.dtype, ask.work.op);
        let lane = &q.lanes[index];
        let capacity = lane.capacity.unwrap_or(0);
        if lane.capacity.is_none() || ask.work.numel > capacity {
            if !self.nested && self.guard.is_none() {
                return Ok(Taken::First(Step::NeedsTurn));
            }
            // SAFETY: by the promise of this function.
            return unsafe { bucketer.direct(q, index, comm, ask, self.nested && !self.abandoned) }
                .map(Taken::Accepted);
        }
        let left = capacity - lane.open.as_ref().map_or(0, |o| o.used);
        let (too_large, fills) = (
            ask.work.numel > left,
            ask.work.numel == left && ask.work.numel > 0,
        );
        if too_large || fills {
            if let Some(step) = self.make_room(q, comm.id()) {
                return Ok(Taken::First(step));
            }
        }
        if too_large {
            // Memory that is missing is missed before anything changes.
            let bytes = ask.work.numel * ask.work.finish.output.size();
            if ask.work.output.is_null() && q.results.reserved.is_none() && !comm.is_device() {
                q.results.reserved = Some((q.results.cache.take(bytes)?.0, bytes));
            }
            comm.prepare_next(q.lanes[index].id, ask.work.numel, &bucketer.pool)?;
            bucketer.launch_lane(q, index, true)?;
            // What is open and in flight has changed: look again.
            return Ok(Taken::First(Step::Again));
        }
        // SAFETY: by the promise of this function.
        let ticket = unsafe { bucketer.gather_first(q, index, comm, ask) }?;
        if fills {
            // The op is accepted: should the comm fail right now, its callback tells.
            let _ = bucketer.launch_lane(q, index, true);
        }
        Ok(Taken::Accepted(ticket))
    }

    pub(super) fn refuse(&mut self, e: Error) -> Step {
        self.result = Err(e);
        self.over()
    }

    /// Tells every comm with something open that a launch or flush comes.
    pub(super) fn announce(&self, q: &mut Queue<C>, kind: CallKind) -> Result<()> {
        let mut result = Ok(());
        let mut after = 0;
        while let Some((order, index)) = q.next_open(after) {
            after = order;
            let comm = match &q.lanes[index].open {
                // A comm is told once, with its oldest bucket.
                Some(open) if q.oldest_open(open.comm.id()) == Some(order) => open.comm.clone(),
                _ => continue,
            };
            let ordinal = q.ordinal(comm.id()).unwrap_or_else(|| comm.next_ordinal());
            let call = self.bucketer.call(ordinal, kind);
            let mut meter = Meter::default();
            result = result.and(comm.announce(&call, &mut meter));
            self.bucketer.counters.meter(&meter);
        }
        result
    }

    /// The usual flush in one step: one bucket is open, and nothing else is pending.
    fn flush_alone(&mut self, q: &mut Queue<C>, kind: CallKind) -> Option<Step> {
        let bucketer = self.bucketer;
        if kind != CallKind::Flush || !q.flights.is_empty() || bucketer.has_devices() {
            return None;
        }
        let (order, index) = q.next_open(0)?;
        if q.next_open(order).is_some() {
            return None;
        }
        let lane = &mut q.lanes[index];
        let call = bucketer.call(lane.ordinal?, kind);
        let mut meter = Meter::default();
        let comm = &lane.open.as_ref()?.comm;
        let (launched, done, failure) = comm.flush(lane.id, &call, &mut meter)?;
        bucketer.counters.meter(&meter);
        if launched.is_ok() {
            bucketer.counters.collectives_launched.add(1);
            bucketer.counters.flushes_explicit.add(1);
        }
        let open = lane.open.take()?;
        let first = lane.taken - open.ops.len() as u64;
        bucketer.measure(q, &open.comm);
        let failure = failure.map(|e| (done.saturating_sub(first), Arc::new(e)));
        self.batch = Hand::new(q, open.ops, failure);
        self.result = launched;
        self.plan = Plan::Drain;
        Some(Step::Batch)
    }

    pub(super) fn launch(&mut self, q: &mut Queue<C>) -> Step {
        let Plan::Launch { kind, limit, .. } = self.plan else {
            return Step::Done;
        };
        let Some(limit) = limit else {
            if let Some(step) = self.flush_alone(q, kind) {
                return step;
            }
            let told = self.announce(q, kind);
            let limit = Some(q.orders + 1);
            self.plan = Plan::Launch {
                kind,
                limit,
                result: told,
            };
            return Step::Again;
        };
        if let Some(index) = q.first_open(limit) {
            if let Some(step) = self.make_room(q, q.lanes[index].comm_id) {
                return step;
            }
            let launched = self.bucketer.launch_lane(q, index, false);
            if let Plan::Launch { result, .. } = &mut self.plan {
                let before = std::mem::replace(result, Ok(()));
                *result = before.and(launched);
            }
            return Step::Again;
        }
        let settled = self.settle(q, kind == CallKind::Flush);
        let plan = match kind {
            CallKind::Flush => Plan::Drain,
            _ => Plan::Over,
        };
        if let Plan::Launch { result, .. } = std::mem::replace(&mut self.plan, plan) {
            self.result = result.and(settled);
        }
        Step::Again
    }

    pub(super) fn poll(&mut self, q: &mut Queue<C>) -> Step {
        let Plan::Poll { looked } = &mut self.plan else {
            return Step::Done;
        };
        if !std::mem::replace(looked, true) {
            let mut meter = Meter::default();
            let mut told: Vec<u64> = Vec::new();
            for flight in &q.flights {
                if !told.contains(&flight.comm.id()) {
                    told.push(flight.comm.id());
                    flight.comm.carry_on(&mut meter);
                }
            }
            self.bucketer.counters.meter(&meter);
        }
        // The oldest of each comm that is over.
        let mut behind: Vec<u64> = Vec::new();
        for index in 0..q.flights.len() {
            let flight = &mut q.flights[index];
            let comm = flight.comm.id();
            if behind.contains(&comm) {
                continue;
            }
            if flight.outcome.is_none() {
                let (done, failure) = flight.comm.completed(flight.lane);
                if failure.is_some() || done >= flight.end {
                    let failure = failure.map(Arc::new);
                    flight.outcome = Some(queue::Outcome { done, failure });
                }
            }
            if flight.outcome.is_none() {
                behind.push(comm);
                continue;
            }
            let end = flight.end;
            let step = self.take_out(q, index, end);
            if let (Some(e), true) = (self.batch.failure(), self.result.is_ok()) {
                self.result = Err(Error::clone(e));
            }
            return step;
        }
        self.over()
    }

    pub(super) fn wait(&mut self, q: &mut Queue<C>) -> Step {
        let Plan::Wait {
            ticket,
            limit,
            found,
        } = self.plan
        else {
            return Step::Done;
        };
        let (comm, lane, upto) = match found {
            Some(found) => found,
            None => match self.bucketer.find(q, ticket) {
                Ok(Found::InFlight { comm, lane, upto }) => (comm, lane, upto),
                Ok(Found::Over) => return self.over(),
                Err(e) => return self.refuse(e),
            },
        };
        if found.is_none() {
            // Only now, while nothing is handed out, may the caller's own time run out.
            let target = q.flights.iter().position(|f| {
                f.comm.id() == comm
                    && f.lane == lane
                    && !f.direct
                    && (f.first..f.end).contains(&(upto - 1))
            });
            if let Some(index) = target {
                if !self.bucketer.complete(q, index, upto, limit) {
                    let text = format!("ticket: {ticket} is not complete yet");
                    return self.refuse(Error::new(Status::Pending, text));
                }
            }
            self.plan = Plan::Wait {
                ticket,
                limit,
                found: Some((comm, lane, upto)),
            };
        }
        // Everything up to the op, in launch order; it is over when the op is no longer there.
        match self.bucketer.find(q, ticket) {
            Ok(Found::InFlight { .. }) => {}
            Ok(Found::Over) => return self.over(),
            Err(e) => return self.refuse(e),
        }
        let Some(index) = q.oldest(comm) else {
            return self.over();
        };
        let flight = &q.flights[index];
        let own = flight.lane == lane
            && !flight.direct
            && (flight.first..flight.end).contains(&(upto - 1));
        let target = if own { upto } else { flight.end };
        self.bucketer.complete(q, index, target, None);
        self.take_out(q, index, target)
    }

    pub(super) fn close(&mut self, q: &mut Queue<C>) -> Step {
        q.closing = true;
        if let Some(step) = self.oldest_op(q, None) {
            return step;
        }
        if let Some(index) = q.first_open(u64::MAX) {
            let lane = &mut q.lanes[index];
            // Results go nowhere from here on, whatever peers still do.
            lane.close();
            if let Some(open) = lane.open.take() {
                let text = "the bucketer was freed before this op was launched";
                let error = Arc::new(Error::new(Status::Cancelled, text));
                self.batch = Hand::new(q, open.ops, Some((0, error)));
                return Step::Batch;
            }
            return Step::Again;
        }
        q.results.free_idle();
        self.over()
    }
}
