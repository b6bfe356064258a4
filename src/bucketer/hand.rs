//! Launches buckets, completes them, and hands their ops back, each exactly once.

use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Instant;

use super::queue::{self, Flight, Outcome, Pending, Queue};
use super::{Bucketer, Completion, TICKET_BITS};
use crate::error::{invalid, Error, Result, Status};
use crate::lane::work::Meter;
use crate::memory::{self, Block};

impl<C: Copy + Send> Bucketer<C> {
    /// Launches the open bucket of a lane; a comm that has failed makes it a failed flight.
    pub(super) fn launch_lane(&self, q: &mut Queue<C>, index: usize, full: bool) -> Result<()> {
        let lane = &mut q.lanes[index];
        let Some(open) = lane.open.take() else {
            return Ok(());
        };
        let mut meter = Meter::default();
        let launched = open.comm.launch(lane.id, &mut meter);
        self.counters.meter(&meter);
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

    /// Hands out the next op of flight `index`, which is over as far as that op.
    pub(super) fn hand_out(
        &self,
        q: &mut Queue<C>,
        index: usize,
    ) -> Option<(Completion<C>, Option<Block>)> {
        let flight = q.flights.get_mut(index)?;
        let taken = Self::take_op(flight);
        if flight.ops.is_empty() {
            let flight = q.flights.remove(index)?;
            q.spare.push(flight.ops);
        }
        taken.map(|(op, error)| self.completion(q, op, error))
    }

    /// Hands out the next direct op that a callback submitted.
    pub(super) fn hand_out_due(&self, q: &mut Queue<C>) -> Option<(Completion<C>, Option<Block>)> {
        self.is_due.store(q.due.len() > 1, Ordering::Relaxed);
        let mut flight = q.due.pop_front()?;
        let (op, error) = Self::take_op(&mut flight)?;
        q.spare.push(flight.ops);
        Some(self.completion(q, op, error))
    }

    pub(super) fn take_op(flight: &mut Flight<C>) -> Option<(Pending<C>, Option<Arc<Error>>)> {
        let op = flight.ops.pop_front()?;
        let number = flight.first;
        flight.first += 1;
        let failed = flight.outcome.as_ref().filter(|o| number >= o.done);
        Some((op, failed.and_then(|o| o.failure.clone())))
    }

    /// What the callback of `op` is told; the op counts as handed back from here on.
    pub(super) fn completion(
        &self,
        q: &mut Queue<C>,
        mut op: Pending<C>,
        error: Option<Arc<Error>>,
    ) -> (Completion<C>, Option<Block>) {
        let (mut data, mut block) = (op.data, op.block);
        match &error {
            None => {}
            Some(e) => {
                if e.status != Status::Cancelled {
                    q.note(e);
                }
                q.failed.push((op.ticket, e.clone()));
                data = std::ptr::null_mut();
                block.take().into_iter().for_each(|b| q.cache.put(b));
                if op.shard != 0 {
                    let _ = memory::release(std::mem::take(&mut op.shard));
                }
            }
        }
        let completion = Completion {
            ticket: op.ticket,
            tag: op.tag,
            payload: op.payload,
            data,
            numel: op.numel,
            valid: op.valid,
            offset: op.offset,
            shard: block.map_or(op.shard, |b| b.arm()),
            stream: op.stream,
            dtype: op.dtype,
            error,
        };
        (completion, block)
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

/// Where the op of a ticket is.
pub enum Found {
    InFlight { comm: u64, lane: u32, upto: u64 },
    Over,
}
