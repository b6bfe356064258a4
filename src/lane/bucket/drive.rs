//! Carries units through an engine: check, payload, results, in the comm's order; and waits for them.

use std::sync::Arc;
use std::time::Instant;

use super::unit::{call_words, Stage, Unit, CALL_WORDS, LINE_WORDS};
use super::{Buckets, Check, Held, State, KEPT, OPEN};
use crate::comm::patience::Patience;
use crate::error::{Error, Result, Status};
use crate::fingerprint::Words;
use crate::lane::ring::name_difference;
use crate::lane::work::{Meter, Waited};
use crate::lane::{Endpoint, LaneId};

impl Buckets {
    /// Puts a unit at the end of the queue, behind the check of ranks. Its number.
    pub(super) fn queue<'a>(
        &'a self,
        mut st: Held<'a>,
        mut unit: Unit,
        meter: &mut Meter,
    ) -> Result<(Held<'a>, u64)> {
        let own = vec![unit.chain.lo, unit.chain.hi, unit.chain.calls];
        match &self.check {
            Check::None => {}
            Check::Engine => {
                unit.gather_words(Stage::Check, own, self.size, self.abilities.max_count)
            }
            Check::Control(control) => {
                drop(st);
                let compared = self.compare_over(control, own);
                st = self.lock();
                if let Err(e) = compared {
                    self.abort(e);
                }
            }
        }
        if let Some(id) = unit.lane {
            st.lane(id).travelling += 1;
        }
        st.units.push_back(unit);
        st.queued += 1;
        let number = st.queued;
        self.progress(&mut st, meter);
        match &st.failure {
            Some(e) if st.finished() < number => Err(Error::clone(e)),
            _ => Ok((st, number)),
        }
    }

    /// Compares this rank's line with all others' over a host comm; explains a difference.
    fn compare_over(&self, control: &Endpoint, own: Vec<u64>) -> Result<()> {
        let gather = |own: &[u64]| -> Result<Vec<Vec<u64>>> {
            let mut all = vec![0u64; own.len() * self.size as usize];
            // SAFETY: both are vectors of the lengths that are named.
            unsafe {
                control.all_gather(own.as_ptr().cast(), all.as_mut_ptr().cast(), own.len() * 8)?
            };
            Ok(all.chunks(own.len()).map(<[u64]>::to_vec).collect())
        };
        let lines = gather(&own)?;
        if lines.iter().all(|l| *l == own) {
            self.agree(&mut self.lock(), own[2]);
            return Ok(());
        }
        let words = self.explaining(&mut self.lock(), &lines);
        Err(explanation(self.lock().agreed, &gather(&words)?))
    }

    /// Ranks agreed up to call `calls`: earlier ones need no explaining any more.
    fn agree(&self, st: &mut State, calls: u64) {
        while st.agreed < calls {
            st.kept.pop_front();
            st.agreed += 1;
        }
    }

    /// What this rank gives to the exchange that names the first difference.
    fn explaining(&self, st: &mut State, lines: &[Vec<u64>]) -> Vec<u64> {
        let last = lines.iter().map(|l| l[2]).max().unwrap_or(0);
        let n = last.saturating_sub(st.agreed).clamp(1, KEPT as u64);
        call_words(&st.kept, n as usize)
    }

    /// Tests open requests, starts what may start, finishes what is done, in the comm's order.
    pub(super) fn progress(&self, st: &mut State, meter: &mut Meter) -> bool {
        let before = st.finished();
        let mut index = 0;
        while st.failure.is_none() && self.cause.get().is_none() && index < st.units.len() {
            if let Err((what, code)) = self.drive(st, index) {
                let text = format!(
                    "{what} failed with code {code}: {}",
                    self.engine.describe(code)
                );
                self.abort(Error::new(Status::Transport, text).native(code));
                break;
            }
            let unit = &mut st.units[index];
            if unit.stage != Stage::Payload && unit.current().all_done() {
                self.judge(st, index);
                continue;
            }
            // The next may start only after everything of this one has.
            if unit.stage != Stage::Payload || !unit.payload.all_started() {
                break;
            }
            index += 1;
        }
        if let (None, Some(cause)) = (&st.failure, self.cause.get()) {
            st.failure = Some(cause.clone());
        }
        if st.failure.is_none() {
            self.finish(st, meter);
        }
        st.finished() > before || st.failure.is_some()
    }

    /// Starts and tests the collectives of one unit's present stage.
    fn drive(&self, st: &mut State, index: usize) -> std::result::Result<(), (&'static str, i32)> {
        let State { units, open, .. } = st;
        let parts = units[index].current();
        for part in parts.open() {
            match self.engine.test(part.request.unwrap_or_default()) {
                Ok(false) => continue,
                Ok(true) => part.done = true,
                Err(code) => {
                    part.request = None;
                    return Err(("a collective", code));
                }
            }
            part.request = None;
            *open -= 1;
        }
        while *open < OPEN {
            let Some(part) = parts.unstarted() else { break };
            // SAFETY: the unit owns the memory, or rule 6 keeps it; a unit with open requests is
            // kept until the engine is dropped.
            let request = unsafe { self.engine.start(&part.collective) };
            part.request = Some(request.map_err(|code| ("starting a collective", code))?);
            *open += 1;
            parts.count_started();
        }
        Ok(())
    }

    /// The lines, or the calls, of all ranks are here.
    fn judge(&self, st: &mut State, index: usize) {
        let max = self.abilities.max_count;
        let unit = &st.units[index];
        let said: Vec<Vec<u64>> = (0..self.size)
            .map(|r| unit.words_of(r, self.size, max))
            .collect();
        if unit.stage == Stage::Explain {
            self.abort(explanation(st.agreed, &said));
            return;
        }
        debug_assert_eq!(unit.own.len(), LINE_WORDS);
        if said.iter().all(|line| *line == unit.own) {
            let calls = unit.chain.calls;
            st.units[index].stage = Stage::Payload;
            self.agree(st, calls);
        } else {
            let words = self.explaining(st, &said);
            st.units[index].gather_words(Stage::Explain, words, self.size, max);
        }
    }

    /// Delivers what is complete at the head of the queue.
    fn finish(&self, st: &mut State, meter: &mut Meter) {
        while st
            .units
            .front()
            .is_some_and(|u| u.stage == Stage::Payload && u.payload.all_done())
        {
            let Some(unit) = st.units.pop_front() else {
                break;
            };
            // SAFETY: the payload is done, and the outputs are valid until their ops are (rule 6).
            unsafe { unit.deliver(self.size, &mut st.sources, meter) };
            if let Some(id) = unit.lane {
                let lane = st.lane(id);
                lane.done = unit.ops_end;
                lane.travelling -= 1;
                lane.recycle(unit);
                st.bury(id);
            }
        }
    }

    pub(super) fn finished(&self, st: Held<'_>, number: u64, meter: &mut Meter) -> Result<()> {
        match self.wait_for(st, None, meter, |st| st.finished() >= number) {
            (_, Waited::Over, None) => Ok(()),
            (_, _, Some(e)) => Err(Error::clone(&e)),
            (_, Waited::TimeUp, None) => Ok(()),
        }
    }

    /// See `Ring::wait`.
    pub fn wait(
        &self,
        id: LaneId,
        target: u64,
        limit: Option<Instant>,
        meter: &mut Meter,
    ) -> Waited {
        let st = self.lock();
        self.wait_for(st, limit, meter, |st| st.lane(id).done >= target)
            .1
    }

    pub(super) fn wait_for<'a>(
        &'a self,
        mut st: Held<'a>,
        limit: Option<Instant>,
        meter: &mut Meter,
        mut over: impl FnMut(&mut State) -> bool,
    ) -> (Held<'a>, Waited, Option<Arc<Error>>) {
        let (start, reducing) = (Instant::now(), meter.reduce_ns);
        let mut patience = Patience::new(false);
        let (waited, failure) = loop {
            if self.progress(&mut st, meter) {
                patience.progress();
            }
            if over(&mut st) {
                break (Waited::Over, None);
            }
            if let Some(e) = &st.failure {
                break (Waited::Over, Some(e.clone()));
            }
            if limit.is_some_and(|t| Instant::now() >= t) {
                break (Waited::TimeUp, None);
            }
            drop(st);
            // Nothing wakes us when an engine is done: short sleeps, after a while of yielding.
            patience.pause(|| false, |slice| std::thread::sleep(slice / 5));
            if self.timeout.is_some_and(|t| patience.waited() >= t) {
                let text = format!(
                    "rank {} waited {:.3} s for a collective of the transport; some rank has not come",
                    self.rank,
                    patience.waited().as_secs_f64()
                );
                self.abort(Error::new(Status::Timeout, text));
            }
            st = self.lock();
        };
        meter.waited(Some(start), reducing);
        (st, waited, failure)
    }
}

/// Names the first call that differs among what ranks gave to the exchange.
fn explanation(agreed: u64, said: &[Vec<u64>]) -> Error {
    let calls = said.iter().map(Vec::len).min().unwrap_or(0) / CALL_WORDS;
    for n in 0..calls {
        let made: Vec<Option<Words>> = said
            .iter()
            .map(|words| {
                let w = &words[n * CALL_WORDS..(n + 1) * CALL_WORDS];
                (w[0] == 1).then(|| std::array::from_fn(|i| w[i + 1]))
            })
            .collect();
        if made.iter().any(|c| *c != made[0]) {
            return name_difference(agreed + n as u64, &made);
        }
    }
    let text = format!(
        "ranks submitted different work after call {}",
        agreed + calls as u64
    );
    Error::new(Status::Desync, text)
}
