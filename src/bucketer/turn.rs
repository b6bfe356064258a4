//! One call on a bucketer, step by step: each step hands out a finished op whose callback is due, or
//! says that the call is over.
//!
//! The caller runs the callback between two steps, with no lock held. Should it never come back (a C++
//! exception), dropping the turn settles what was handed out; everything else is still in the queue.

use std::collections::VecDeque;
use std::sync::{MutexGuard, PoisonError};
use std::time::Instant;

use super::plan::{Plan, Step};
use super::queue::Queue;
use super::{this_thread, Bucketer, Completion};
use crate::error::Result;
use crate::fingerprint::CallKind;
use crate::memory::{self, Block};
use std::sync::atomic::Ordering;

/// A call under way.
pub struct Turn<'a, C: Copy + Send> {
    pub(super) bucketer: &'a Bucketer<C>,
    pub(super) plan: Plan<C>,
    pub(super) result: Result<()>,
    /// Callbacks run under this; none: nobody needs one, or the call is made by a callback.
    pub(super) guard: Option<MutexGuard<'a, ()>>,
    pub(super) nested: bool,
    /// A callback has thrown: no further one runs in this call.
    pub(super) abandoned: bool,
    /// Taken out together, to be handed out one by one.
    pub(super) batch: VecDeque<(Completion<C>, Option<Block>)>,
    /// Handed out; their memory goes back with the next look at the queue.
    handed: Vec<(Option<Block>, u64)>,
    since: Option<Instant>,
    count: u64,
}

/// How many ops are taken out of the queue at a time.
const BATCH: usize = 32;

impl<'a, C: Copy + Send> Turn<'a, C> {
    pub(super) fn new(bucketer: &'a Bucketer<C>, plan: Plan<C>) -> Turn<'a, C> {
        let nested = bucketer.is_running_here();
        let mut turn = Turn {
            bucketer,
            nested,
            abandoned: false,
            result: Ok(()),
            guard: None,
            batch: VecDeque::new(),
            handed: Vec::new(),
            since: None,
            count: 0,
            plan,
        };
        if !matches!(turn.plan, Plan::Submit { .. }) {
            turn.take_turn();
        }
        turn
    }

    pub(super) fn take_turn(&mut self) {
        let guard = self
            .bucketer
            .turn
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.bucketer.runner.store(this_thread(), Ordering::Relaxed);
        self.guard = Some(guard);
    }

    /// The next op whose callback is due; none: [`Turn::result`] has the result.
    ///
    /// # Safety
    /// The pointers that the call was given are as the contract's rule 6 says.
    pub unsafe fn step(&mut self) -> Option<Completion<C>> {
        let bucketer = self.bucketer;
        if self.batch.is_empty() || bucketer.is_due.load(Ordering::Relaxed) {
            // SAFETY: by the promise of this function.
            unsafe { self.look() };
        }
        let (op, block) = self.batch.pop_front()?;
        if op.shard != 0 {
            self.handed.push((block, op.shard));
        }
        self.count += 1;
        self.since.get_or_insert_with(Instant::now);
        match op.error {
            None => bucketer.counters.ops_completed.count(),
            Some(_) => bucketer.counters.ops_failed.count(),
        }
        Some(op)
    }

    /// Looks at the queue: what comes next is at the front of the batch then, unless the call is over.
    ///
    /// # Safety
    /// As for `step`.
    unsafe fn look(&mut self) {
        let bucketer = self.bucketer;
        let mut q = bucketer.lock();
        if let Some(start) = self.since.take() {
            let spent = start.elapsed().as_nanos() as u64;
            bucketer.counters.callback_ns.add(spent);
        }
        self.settle_memory(&mut q);
        loop {
            // SAFETY: by the promise of this function.
            match unsafe { self.advance(&mut q) } {
                Step::Op(op, block) => {
                    self.batch.push_front((op, block));
                    return;
                }
                Step::Batch | Step::Done => return,
                Step::Again => {}
                Step::NeedsTurn => {
                    // The turn comes before the queue's lock.
                    drop(q);
                    self.take_turn();
                    q = bucketer.lock();
                }
            }
        }
    }

    /// Ops handed out so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How the call ended, once there is no further step.
    pub fn result(&mut self) -> Result<()> {
        std::mem::replace(&mut self.result, Ok(()))
    }

    fn settle_memory(&mut self, q: &mut Queue<C>) {
        for (block, shard) in self.handed.drain(..) {
            match block {
                Some(block) => q.cache.settle(block, shard),
                // A device comm's own.
                None => drop(memory::release(shard)),
            }
        }
    }

    /// Takes ops out of flight `index`, which is over as far as those, up to number `upto` of its lane.
    pub(super) fn take_out(&mut self, q: &mut Queue<C>, index: usize, upto: u64) -> Step<C> {
        let room = BATCH.min(upto.saturating_sub(q.flights[index].first) as usize);
        for _ in 0..room.max(1) {
            let last = q.flights[index].ops.len() <= 1;
            let Some(op) = self.bucketer.hand_out(q, index) else {
                return Step::Again;
            };
            self.batch.push_back(op);
            if last {
                break;
            }
        }
        Step::Batch
    }
}

impl<C: Copy + Send> Turn<'_, C> {
    /// The ticket of a submit, once it is accepted.
    pub fn ticket(&self) -> Option<u64> {
        match &self.plan {
            Plan::Submit { ticket, .. } => Some(*ticket).filter(|&t| t != 0),
            _ => None,
        }
    }

    /// A callback has thrown, and the call ends here. What the other ranks will see is completed all
    /// the same: buckets are launched, the op is taken. Callbacks stay owed.
    ///
    /// # Safety
    /// As for `step`.
    pub unsafe fn abandon(&mut self) {
        let bucketer = self.bucketer;
        let mut q = bucketer.lock();
        self.settle_memory(&mut q);
        while let Some(op) = self.batch.pop_back() {
            q.owed.push_front(op);
        }
        let nested = std::mem::replace(&mut self.nested, true);
        self.abandoned = true;
        match self.plan {
            Plan::Launch { kind, limit, .. } => {
                let limit = limit.unwrap_or_else(|| {
                    // What fails now is told to the ops.
                    let _ = self.announce(&mut q, kind);
                    q.orders + 1
                });
                while let Some(index) = q.first_open(limit) {
                    let comm = q.lanes[index].comm_id;
                    self.make_room(&mut q, comm);
                    let _ = bucketer.launch_lane(&mut q, index, false);
                }
                if kind == CallKind::Flush {
                    q.flights.iter_mut().for_each(|f| f.owed = true);
                }
            }
            Plan::Drain => q.flights.iter_mut().for_each(|f| f.owed = true),
            Plan::Submit { ticket: 0, .. } => {
                // As if a callback had submitted it: it is taken, and no callback runs.
                let guard = self.guard.take();
                // SAFETY: by the promise of this function.
                while matches!(unsafe { self.submit(&mut q) }, Step::Again)
                    && self.ticket().is_none()
                {}
                self.guard = guard;
                if q.flights.back().is_some_and(|f| f.direct) {
                    q.flights.iter_mut().for_each(|f| f.owed = true);
                }
            }
            _ => {}
        }
        self.nested = nested;
    }
}

impl<C: Copy + Send> Drop for Turn<'_, C> {
    fn drop(&mut self) {
        if !self.handed.is_empty() || !self.batch.is_empty() {
            let mut q = self.bucketer.lock();
            self.settle_memory(&mut q);
            while let Some(op) = self.batch.pop_back() {
                q.owed.push_front(op);
            }
        }
        if self.guard.is_some() {
            self.bucketer.runner.store(0, Ordering::Relaxed);
        }
    }
}
