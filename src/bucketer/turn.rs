//! One call on a bucketer, step by step: a look takes finished ops out of the queue, which are handed
//! back one by one, until a look finds that the call is over.
//!
//! The caller runs each callback with no lock held. Should it never come back (a C++ exception),
//! dropping the turn settles what was handed back; everything else is in the queue again.

use std::sync::atomic::Ordering;

use super::hand::Hand;
use super::plan::{Plan, Step};
use super::queue::Queue;
use super::{Bucketer, Completion};
use crate::error::Result;
use crate::fingerprint::CallKind;
use crate::lock::Guard;
use crate::thread;

/// A call under way.
pub struct Turn<'a, C: Copy + Send> {
    pub(super) bucketer: &'a Bucketer<C>,
    pub(super) plan: Plan<'a, C>,
    pub(super) result: Result<()>,
    /// Callbacks run under this; none: nobody needs one, or the call is made by a callback.
    pub(super) guard: Option<Guard<'a, ()>>,
    pub(super) nested: bool,
    /// A callback has thrown: no further one runs in this call.
    pub(super) abandoned: bool,
    /// What is handed back now.
    pub(super) batch: Hand<C>,
    /// What a callback did at once: it comes right after that callback.
    pub(super) due: Hand<C>,
    /// Whether callbacks are being timed.
    timing: bool,
    count: u64,
}

/// How many ops are handed back before their memory is taken back.
const BATCH: usize = 32;

impl<'a, C: Copy + Send> Turn<'a, C> {
    pub(super) fn new(bucketer: &'a Bucketer<C>, plan: Plan<'a, C>) -> Turn<'a, C> {
        let mut turn = Turn {
            bucketer,
            nested: bucketer.is_running_here(),
            abandoned: false,
            result: Ok(()),
            guard: None,
            batch: Hand::empty(),
            due: Hand::empty(),
            timing: false,
            count: 0,
            plan,
        };
        if !matches!(turn.plan, Plan::Submit { .. }) {
            turn.take_turn();
        }
        turn
    }

    pub(super) fn take_turn(&mut self) {
        let guard = self.bucketer.turn.lock(thread::this());
        self.guard = Some(guard);
    }

    /// The next op whose callback is due, of those that the last look has found; none: look again.
    #[inline]
    pub fn hand_back(&mut self) -> Option<Completion<'_, C>> {
        let counters = &self.bucketer.counters;
        let hand = if !self.due.is_over() {
            &mut self.due
        } else if self.bucketer.is_due.load(Ordering::Relaxed) || self.batch.unsettled() >= BATCH {
            return None;
        } else {
            &mut self.batch
        };
        let next = hand.next()?;
        self.count += 1;
        match next.error {
            None => counters.ops_completed.add(1),
            Some(_) => counters.ops_failed.add(1),
        }
        Some(next)
    }

    /// Carries the call on until ops are there to be handed back. False: it is over, and
    /// [`Turn::result`] has the result.
    ///
    /// # Safety
    /// The pointers that the call was given are as the contract's rule 6 says.
    pub unsafe fn look(&mut self) -> bool {
        let bucketer = self.bucketer;
        let mut q = bucketer.lock();
        if std::mem::take(&mut self.timing) {
            bucketer.counters.callback_ns.add(q.stopwatch.end());
        }
        self.settle_memory(&mut q);
        let mut first = self.first(&mut q);
        loop {
            let step = match first.take() {
                Some(step) => step,
                // SAFETY: by the promise of this function.
                None => unsafe { self.advance(&mut q) },
            };
            match step {
                Step::Batch => {
                    self.timing = !self.nested;
                    if self.timing {
                        q.stopwatch.begin();
                    }
                    return true;
                }
                Step::Done => return false,
                Step::Again => first = self.enqueued(&mut q),
                Step::NeedsTurn => {
                    // The turn comes before the queue's lock.
                    drop(q);
                    self.take_turn();
                    q = bucketer.lock();
                    first = self.first(&mut q);
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
        for hand in [&mut self.due, &mut self.batch] {
            if hand.needs_settling() {
                hand.settle(q);
            }
        }
    }

    /// Leaves what is not handed back to the next call.
    fn owe(&mut self, q: &mut Queue<C>) {
        self.settle_memory(q);
        for hand in [&mut self.batch, &mut self.due] {
            if !hand.is_over() {
                q.owed.push_front(std::mem::take(hand));
            }
        }
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
    /// As for `look`.
    pub unsafe fn abandon(&mut self) {
        let bucketer = self.bucketer;
        let mut q = bucketer.lock();
        self.owe(&mut q);
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
        let idle = |hand: &Hand<C>| hand.is_over() && hand.unsettled() == 0;
        if !idle(&self.batch) || !idle(&self.due) {
            let mut q = self.bucketer.lock();
            self.owe(&mut q);
        }
    }
}
