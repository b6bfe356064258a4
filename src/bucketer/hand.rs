//! Launches buckets, completes them, and hands their ops back, each exactly once.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{self, Flight, Ops, Outcome, Pending, Queue};
use super::{Bucketer, Completion, TICKET_BITS};
use crate::error::{invalid, Error, Result, Status};
use crate::lane::work::Meter;
use crate::memory;

impl<C: Copy + Send> Bucketer<C> {
    /// Launches the open bucket of a lane; a comm that has failed makes it a failed flight.
    pub(super) fn launch_lane(&self, q: &mut Queue<C>, index: usize, full: bool) -> Result<()> {
        let lane = &mut q.lanes[index];
        let Some(open) = &lane.open else {
            return Ok(());
        };
        let mut meter = Meter::default();
        let launched = open.comm.launch(lane.id, &mut meter);
        self.counters.meter(&meter);
        // Only now: should a bug of ours have ended the call, its ops are found where they were.
        let Some(open) = lane.open.take() else {
            return Ok(());
        };
        let mut outcome = None;
        match &launched {
            Ok(()) => {
                self.counters.collectives_launched.add(1);
                let kind = if full {
                    &self.counters.flushes_full
                } else {
                    &self.counters.flushes_explicit
                };
                kind.add(1);
            }
            Err(e) => outcome = Some((open.comm.completed(lane.id).0, e.clone())),
        }
        let mut outcome = outcome.map(|(done, e)| Outcome {
            done,
            failure: Some(Arc::new(e)),
        });
        if open.comm.is_device() {
            // Enqueued is complete.
            outcome.get_or_insert(Outcome {
                done: lane.taken,
                failure: None,
            });
        }
        q.flights.push_back(Flight {
            first: lane.taken - open.ops.len() as u64,
            end: lane.taken,
            lane: lane.id,
            comm: open.comm.clone(),
            ops: open.ops,
            outcome,
            direct: false,
            owed: false,
        });
        self.measure(q, &open.comm);
        launched
    }

    /// Waits until flight `index` is over, until `limit` at most. Whether it is.
    pub(super) fn complete(
        &self,
        q: &mut Queue<C>,
        index: usize,
        upto: u64,
        limit: Option<Instant>,
    ) -> bool {
        let flight = &mut q.flights[index];
        if flight.outcome.is_some() {
            return true;
        }
        let mut meter = Meter::default();
        flight.comm.wait(flight.lane, upto, limit, &mut meter);
        self.counters.meter(&meter);
        let (done, failure) = flight.comm.completed(flight.lane);
        if failure.is_some() || done >= flight.end {
            flight.outcome = Some(Outcome {
                done,
                failure: failure.map(Arc::new),
            });
        }
        flight.outcome.is_some() || done >= upto
    }

    /// Takes ops out of flight `index`, which is over as far as those, up to number `upto` of its lane.
    pub(super) fn take_out(&self, q: &mut Queue<C>, index: usize, upto: u64) -> Hand<C> {
        let mut ops = q.list();
        let flight = &mut q.flights[index];
        let first = flight.first;
        let count = upto.saturating_sub(first) as usize;
        let outcome = flight.outcome.as_ref();
        let failure = outcome.and_then(|o| Some((o.done, o.failure.clone()?)));
        if count < flight.ops.len() {
            flight.first = upto;
            ops.extend(flight.ops.drain(..count));
        } else {
            let empty = std::mem::replace(&mut ops, std::mem::take(&mut flight.ops));
            q.flights.remove(index);
            q.recycle(empty);
        }
        Hand::new(
            q,
            ops,
            failure.map(|(done, e)| (done.saturating_sub(first), e)),
        )
    }

    /// Takes the next direct op that a callback submitted.
    pub(super) fn take_due(&self, q: &mut Queue<C>) -> Option<Hand<C>> {
        let flight = q.due.pop_front()?;
        self.is_due.store(!q.due.is_empty(), Ordering::Relaxed);
        let failure = flight.outcome.and_then(|o| Some((o.done, o.failure?)));
        Some(Hand::new(q, flight.ops, failure))
    }

    /// What is known of a ticket.
    pub(super) fn find(&self, q: &Queue<C>, ticket: u64) -> Result<Found> {
        let count = ticket & ((1 << TICKET_BITS) - 1);
        if ticket >> TICKET_BITS != self.nonce >> TICKET_BITS || count == 0 || count > q.tickets {
            return Err(invalid!(
                "ticket: {ticket} is none of this bucketer; expected one that a submit gave"
            ));
        }
        let within = |ops: &queue::Ops<C>| ops.binary_search_by_key(&ticket, |op| op.ticket).ok();
        for flight in &q.flights {
            if let Some(at) = within(&flight.ops) {
                if flight.is_put_off() {
                    let text = format!(
                        "ticket: {ticket} goes with the next launch; expected a launch or flush before"
                    );
                    return Err(Error::new(Status::NotLaunched, text));
                }
                return Ok(Found::InFlight {
                    comm: flight.comm.id(),
                    lane: flight.lane,
                    upto: flight.first + at as u64 + 1,
                });
            }
        }
        if q.lanes
            .iter()
            .filter_map(|l| l.open.as_ref())
            .any(|o| within(&o.ops).is_some())
        {
            let text =
                format!("ticket: {ticket} is in an open bucket; expected a launch or flush before");
            return Err(Error::new(Status::NotLaunched, text));
        }
        match q.failed.iter().find(|(t, _)| *t == ticket) {
            Some((_, e)) => Err(Error::clone(e)),
            None => Ok(Found::Over),
        }
    }
}

/// Ops that a call has taken out of the queue, to hand them back one by one.
pub struct Hand<C> {
    ops: Ops<C>,
    /// How many have been handed back, and how many of those have given their memory back.
    handed: usize,
    settled: usize,
    /// From which op on they have failed, and why.
    failure: Option<(usize, Arc<Error>)>,
}

/// So many ops ahead the counts of results' memory are fetched.
const SOON: usize = 4;

impl<C> Hand<C> {
    /// Nothing.
    pub fn empty() -> Hand<C> {
        Hand {
            ops: Ops::new(),
            handed: 0,
            settled: 0,
            failure: None,
        }
    }

    /// All of `ops`, of which those from number `failure.0` on have failed.
    pub fn new(q: &mut Queue<C>, mut ops: Ops<C>, failure: Option<(u64, Arc<Error>)>) -> Hand<C> {
        let failure = failure.map(|(from, error)| (from as usize, error));
        if let Some((from, error)) = &failure {
            q.fail(&mut ops, *from, error);
        }
        Hand {
            ops,
            failure,
            ..Hand::empty()
        }
    }

    /// The first failure in it.
    pub fn failure(&self) -> Option<&Arc<Error>> {
        let (from, error) = self.failure.as_ref()?;
        (*from < self.ops.len()).then_some(error)
    }

    /// Whether all of it is handed back.
    #[inline]
    pub fn is_over(&self) -> bool {
        self.handed == self.ops.len()
    }

    /// Ops that are handed back and hold their memory still.
    #[inline]
    pub fn unsettled(&self) -> usize {
        self.handed - self.settled
    }

    /// The next op. Its shard counts from here on.
    #[inline]
    pub fn next(&mut self) -> Option<Completion<'_, C>> {
        if let Some(Pending {
            block: Some(block), ..
        }) = self.ops.get(self.handed + SOON)
        {
            block.prefetch();
        }
        let op = self.ops.get_mut(self.handed)?;
        if let Some(block) = &op.block {
            op.shard = block.arm();
        }
        let failed = self.failure.as_ref();
        let error = failed.filter(|(from, _)| *from <= self.handed);
        self.handed += 1;
        Some(Completion {
            op,
            error: error.map(|(_, error)| &**error),
        })
    }

    /// Whether something is there to be taken back.
    #[inline]
    pub fn needs_settling(&self) -> bool {
        self.unsettled() > 0 || (self.is_over() && self.ops.capacity() > 0)
    }

    /// Takes back the memory of what is handed back, but for what callbacks have kept.
    pub fn settle(&mut self, q: &mut Queue<C>) {
        for op in &self.ops[self.settled..self.handed] {
            match op.block {
                Some(block) => q.results.cache.settle(block, op.shard),
                // A device comm's own.
                None if op.shard != 0 => drop(memory::release(op.shard)),
                None => {}
            }
        }
        self.settled = self.handed;
        if self.is_over() {
            q.recycle(std::mem::take(self).ops);
        }
    }
}

impl<C> Default for Hand<C> {
    fn default() -> Hand<C> {
        Hand::empty()
    }
}

/// Where the op of a ticket is.
pub enum Found {
    InFlight { comm: u64, lane: u32, upto: u64 },
    Over,
}
