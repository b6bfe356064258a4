//! All waiting of a ring: for a chunk of memory, for a line, for ops to be complete. The lock is released
//! while a rank sleeps, and whatever travels is carried on.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::state::State;
use super::{Held, Ring};
use crate::comm::group::Stall;
use crate::comm::patience::Patience;
use crate::error::{Error, Result, Status};
use crate::lane::work::Meter;

/// How long a rank that is ahead waits in a submit for peers that stand still before it takes some more cold
/// memory. Those that keep step need less than this.
const PATIENCE: Duration = Duration::from_micros(500);
/// The same where the peer may not run: it shares this rank's core, or was waited for in vain. It comes back when
/// its next slice of time begins.
const LONG_PATIENCE: Duration = Duration::from_millis(5);

/// What ends a wait whose answer does not come.
#[derive(Clone, Copy)]
pub(super) enum Limit {
    /// The comm's timeout, which ends the group.
    Timeout,
    /// That, or the caller's own time, before.
    Callers(Instant),
    /// Our own time: nobody has to come, so nobody is late.
    Ours(Instant),
}

impl Limit {
    fn time(self) -> Option<Instant> {
        match self {
            Limit::Timeout => None,
            Limit::Callers(time) | Limit::Ours(time) => Some(time),
        }
    }
}

impl Ring {
    /// How long a submit waits for a chunk that was used before.
    pub(super) fn patience(&self) -> Option<Duration> {
        Some(match self.group.spin() {
            true => PATIENCE,
            false => LONG_PATIENCE,
        })
    }

    /// A free chunk of memory. Waits for peers only where some of ours travel; a rank that is ahead waits
    /// for `patience` before it takes memory that was not used before, none: as long as it takes.
    pub(super) fn slot<'a>(
        &'a self,
        mut st: Held<'a>,
        patience: Option<Duration>,
        meter: &mut Meter,
    ) -> Result<(Held<'a>, u32)> {
        let group = &self.group;
        if let Some(slot) = st.warm_slot(group) {
            return Ok((st, slot));
        }
        if st.is_ahead(group) {
            let far = st.is_far_ahead();
            let limit = patience.map_or(Limit::Timeout, |time| {
                let time = if far { LONG_PATIENCE } else { time };
                Limit::Ours(Instant::now() + time)
            });
            // Nobody waits for memory that another thread has taken meanwhile.
            let warm = |st: &mut State| {
                let slot = st.warm_slot(group);
                (slot.is_some() || !st.is_ahead(group)).then_some(Ok(slot))
            };
            let (held, answer) = self.wait_for(st, limit, meter, warm)?;
            st = held;
            match answer {
                Some(Some(slot)) => return Ok((st, slot)),
                Some(None) => {}
                None => st.note_stuck(group),
            }
        }
        let free = |st: &mut State| st.slot(group).transpose();
        match self.wait_for(st, Limit::Timeout, meter, free)? {
            (st, Some(slot)) => {
                let bytes = st.committed(group);
                self.committed.store(bytes, Ordering::Relaxed);
                Ok((st, slot))
            }
            (_, None) => Err(Error::new(Status::NoMemory, "staging: no chunk is free")),
        }
    }

    /// A free line.
    pub(super) fn line<'a>(&'a self, mut st: Held<'a>, meter: &mut Meter) -> Result<Held<'a>> {
        let group = &self.group;
        if st.has_line(group) {
            return Ok(st);
        }
        let free = |st: &mut State| st.has_line(group).then_some(Ok(()));
        self.wait_for(st, Limit::Timeout, meter, free)
            .map(|(st, _)| st)
    }

    /// Waits until `over` has an answer, carrying on everything that travels; none once the time of `limit`
    /// has come. The lock is released while this rank sleeps.
    pub(super) fn wait_for<'a, T>(
        &'a self,
        mut st: Held<'a>,
        limit: Limit,
        meter: &mut Meter,
        mut over: impl FnMut(&mut State) -> Option<Result<T>>,
    ) -> Result<(Held<'a>, Option<T>)> {
        let group = &self.group;
        let mut patience = Patience::new(group.spin());
        let (mut start, mut seen) = (None, st.reduced);
        let reducing = meter.reduce_ns;
        let answer = loop {
            // What can be answered at once is not held up by work that other calls can do.
            if let Some(answer) = over(&mut st).or_else(|| {
                st.progress(group, meter);
                over(&mut st)
            }) {
                break answer.map(Some);
            }
            if let Some(e) = &st.failure {
                break Err(Error::clone(e));
            }
            // Whoever it was that reduced something.
            if std::mem::replace(&mut seen, st.reduced) != st.reduced {
                patience.progress();
            }
            if limit.time().is_some_and(|t| Instant::now() >= t) {
                break Ok(None);
            }
            let Some(stall) = st.stall(group) else {
                continue;
            };
            drop(st);
            let ready = || group.seems_over(&stall);
            if !patience.glance(ready) {
                start.get_or_insert_with(Instant::now);
                patience.pause(ready, |slice| {
                    let left = limit
                        .time()
                        .map(|t| t.saturating_duration_since(Instant::now()));
                    group.sleep(&stall, slice.min(left.unwrap_or(slice)));
                });
            }
            self.mourn(&stall);
            if !matches!(limit, Limit::Ours(_)) {
                self.lose_patience(&patience, &stall);
            }
            st = self.lock();
        };
        meter.waited(start, reducing);
        answer.map(|answer| (st, answer))
    }

    /// Ends the group if a rank is gone that will not reduce what this wait needs. A missing line is mourned
    /// where lines are read.
    fn mourn(&self, stall: &Stall) {
        let group = &self.group;
        if let Stall::Consumed { seq, .. } = *stall {
            if let Some(gone) = group.lost(|rank| group.consumed(rank) <= seq) {
                group.abort(&gone);
            }
        }
    }

    /// Ends the group if the awaited rank is too late.
    fn lose_patience(&self, patience: &Patience, stall: &Stall) {
        let Some(timeout) = self.timeout else { return };
        let (group, rank) = (&self.group, stall.rank());
        if patience.waited() >= timeout && !group.is_over(stall) {
            let text = format!(
                "rank {} waited {:.3} s for rank {rank}, which has made {} calls on this comm",
                group.rank(),
                timeout.as_secs_f64(),
                group.calls(rank)
            );
            group.abort(&Error::new(Status::Timeout, text).blame(rank));
        }
    }
}
