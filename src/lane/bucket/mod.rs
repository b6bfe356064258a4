//! The bucket lane: ops travel in one contiguous rank-major bucket, one collective of an engine each.
//!
//! Small ops are packed as they come; a large one whose rows already lie one after the other goes to
//! the engine as it is. Collectives start in the comm's order, each behind a small all-gather in which
//! ranks compare what they were asked so far: sizes may differ, so the check comes before the bytes.

mod unit;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use self::unit::{call_words, Piece, Stage, Unit, CALL_WORDS, LINE_WORDS};
use super::ring::name_difference;
use super::work::{Meter, Rows, Waited, Work};
use super::{Endpoint, LaneId};
use crate::comm::engine::{Abilities, Collective, Engine, Kind};
use crate::comm::patience::Patience;
use crate::dtype::{DType, Finish, Op};
use crate::error::{unsupported, Error, Result, Status};
use crate::fingerprint::{Call, CallKind, Chain, Words};
use crate::memory::{Buffer, Pool, System};

/// Requests that may be open at once.
const OPEN: usize = 4;
/// Idle buckets that a lane keeps: two in flight and one open, in and out.
const IDLE: usize = 6;
/// Calls kept since the last agreement, for naming the first that differs.
const KEPT: usize = 256;

/// How ranks compare what they were asked.
enum Check {
    /// Not at all.
    None,
    /// By the engine's own all-gather.
    Engine,
    /// Over a host comm of the same ranks.
    Control(Arc<Endpoint>),
}

/// One rank's buckets on an engine.
pub struct Buckets {
    // First: dropping it is its release, after which the memory of open requests may go.
    engine: Box<dyn Engine>,
    abilities: Abilities,
    exact: bool,
    rank: u32,
    size: u32,
    timeout: Option<Duration>,
    check: Check,
    pool: Arc<Pool>,
    cause: OnceLock<Arc<Error>>,
    state: Mutex<State>,
}

/// What one (bucketer, dtype, op) has gathered and not launched.
struct BucketLane {
    dtype: DType,
    op: Op,
    staged: u64,
    done: u64,
    send: Option<Buffer>,
    /// Elements from one row to the next, and elements of each row used.
    stride: usize,
    fill: usize,
    /// What the last bucket took: the next will most likely take as much.
    last: usize,
    pieces: Vec<Piece>,
    pool: Option<Arc<Pool>>,
    /// Buckets that have come back.
    idle: Vec<Buffer>,
    dead: bool,
    travelling: u32,
}

/// A bucket of at least `bytes`: one that has come back, or a new one.
fn buffer(idle: &mut Vec<Buffer>, pool: &Arc<Pool>, bytes: usize) -> Result<Buffer> {
    let fits = |b: &Buffer| (bytes..=bytes.saturating_mul(2)).contains(&b.len());
    match idle.iter().position(fits) {
        Some(index) => Ok(idle.swap_remove(index)),
        None => Buffer::new(pool, bytes),
    }
}

#[derive(Default)]
struct State {
    chain: Chain,
    ordinals: u32,
    /// Calls since the last agreement, the first of them number `agreed`.
    kept: VecDeque<Words>,
    agreed: u64,
    lanes: Vec<Option<BucketLane>>,
    units: VecDeque<Unit>,
    /// Units under way or over; the next gets this number.
    queued: u64,
    open: usize,
    sources: Vec<*const u8>,
    failure: Option<Arc<Error>>,
}

// SAFETY: the pointers are to callers' memory that stays valid until the op is over, or the engine
// released (rule 6), and to our own buffers; the lock lets one thread at a time use them.
unsafe impl Send for State {}

type Held<'a> = MutexGuard<'a, State>;

impl State {
    fn lane(&mut self, id: LaneId) -> &mut BucketLane {
        match self.lanes.get_mut(id as usize) {
            Some(Some(lane)) => lane,
            _ => unreachable!("a lane is used between its opening and its closing"),
        }
    }

    fn accept(&mut self, call: &Call) {
        if call.kind == CallKind::Submit {
            self.ordinals = self.ordinals.max(call.ordinal + 1);
        }
        let words = call.words();
        self.chain.extend(&words);
        if self.kept.len() < KEPT {
            self.kept.push_back(words);
        }
    }

    fn bury(&mut self, id: LaneId) {
        let lane = self.lane(id);
        if lane.dead && lane.travelling == 0 {
            self.lanes[id as usize] = None;
        }
    }

    fn finished(&self) -> u64 {
        self.queued - self.units.len() as u64
    }
}

impl Buckets {
    /// The buckets of rank `rank` on `engine`.
    pub fn new(
        engine: Box<dyn Engine>,
        abilities: Abilities,
        (rank, size): (u32, u32),
        exact: bool,
        timeout: Option<Duration>,
        control: Option<Arc<Endpoint>>,
    ) -> Buckets {
        let check = match control {
            Some(comm) => Check::Control(comm),
            None if abilities.all_gather => Check::Engine,
            None => Check::None,
        };
        Buckets {
            engine,
            abilities,
            exact,
            rank,
            size,
            timeout,
            check,
            pool: Pool::new(Box::new(System)),
            cause: OnceLock::new(),
            state: Mutex::default(),
        }
    }

    /// This rank and the number of ranks.
    pub fn place(&self) -> (u32, u32) {
        (self.rank, self.size)
    }

    fn lock(&self) -> Held<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self, meter: &mut Meter) -> Result<Held<'_>> {
        let mut st = self.lock();
        if st.failure.is_none() && self.cause.get().is_some() {
            self.progress(&mut st, meter);
        }
        match &st.failure {
            Some(e) => Err(Error::clone(e)),
            None => Ok(st),
        }
    }

    /// The first cause.
    pub fn cause(&self) -> Option<Arc<Error>> {
        self.cause.get().cloned()
    }

    /// Ends this rank's end of the comm; the first cause stays. Never blocks.
    pub fn abort(&self, cause: Error) {
        if self.cause.set(Arc::new(cause)).is_ok() {
            self.engine.abort();
        }
    }

    /// See `Ring::next_ordinal`.
    pub fn next_ordinal(&self) -> u32 {
        self.lock().ordinals
    }

    /// A new lane.
    pub fn open_lane(&self, dtype: DType, op: Op) -> LaneId {
        let mut st = self.lock();
        let idle = st.lanes.iter().position(Option::is_none);
        let id = idle.unwrap_or(st.lanes.len());
        if id == st.lanes.len() {
            st.lanes.push(None);
        }
        st.lanes[id] = Some(BucketLane {
            dtype,
            op,
            staged: 0,
            done: 0,
            send: None,
            stride: 0,
            fill: 0,
            last: 0,
            pieces: Vec::new(),
            pool: None,
            idle: Vec::new(),
            dead: false,
            travelling: 0,
        });
        id as LaneId
    }

    /// Forgets a lane, what it has gathered, and where its results go.
    pub fn close_lane(&self, id: LaneId) {
        let mut st = self.lock();
        for unit in st.units.iter_mut().filter(|u| u.lane == Some(id)) {
            unit.pieces.clear();
        }
        let lane = st.lane(id);
        lane.dead = true;
        lane.pieces.clear();
        lane.send = None;
        lane.idle.clear();
        st.bury(id);
    }

    /// Frees the idle buckets of a lane.
    pub fn release_buffers(&self, id: LaneId) {
        let mut st = self.lock();
        let lane = st.lane(id);
        lane.idle.clear();
        lane.last = 0;
    }

    /// See `Ring::completed`.
    pub fn completed(&self, id: LaneId) -> (u64, Option<Arc<Error>>) {
        let mut st = self.lock();
        (st.lane(id).done, st.failure.clone())
    }

    /// Tests what is under way, starts what may start.
    pub fn carry_on(&self, meter: &mut Meter) {
        self.progress(&mut self.lock(), meter);
    }

    /// How this dtype and op travel.
    fn route(&self, dtype: DType, op: Op) -> Result<Kind> {
        let dtypes = self.abilities.reduce_dtypes;
        let native =
            self.abilities.reduce_scatter && (dtypes == 0 || dtypes >> dtype as u64 & 1 == 1);
        if native && !self.exact {
            return Ok(Kind::ReduceScatter);
        }
        if self.abilities.all_to_all {
            return Ok(Kind::AllToAll);
        }
        Err(unsupported!(
            "dtype: this transport does not reduce {} with {}; expected a dtype of reduce_dtypes \
             ({dtypes:#x}), or a transport with ALL_TO_ALL",
            dtype.name(),
            op.name()
        ))
    }

    /// Packs a waiting op into the lane's bucket.
    ///
    /// # Safety
    /// As for `Ring::submit`.
    pub unsafe fn submit(
        &self,
        id: LaneId,
        work: &Work,
        pool: &Arc<Pool>,
        meter: &mut Meter,
    ) -> Result<()> {
        let mut st = self.enter(meter)?;
        self.route(work.dtype, work.op)?;
        let element = work.dtype.size();
        let size = self.size as usize;
        let lane = st.lane(id);
        lane.pool.get_or_insert_with(|| pool.clone());
        let end = lane.fill + work.numel;
        if end > lane.stride || lane.send.is_none() {
            let stride = end.max(lane.last).max(lane.stride * 2).max(64);
            let Some(bytes) = crate::layout::total_bytes(stride, self.size, element) else {
                return Err(Error::new(
                    Status::NoMemory,
                    "the bucket is larger than memory can be",
                ));
            };
            let wider = buffer(&mut lane.idle, pool, bytes)?;
            if let Some(old) = &lane.send {
                for r in 0..size {
                    // SAFETY: both hold `fill` elements from the start of every row on.
                    unsafe {
                        let from = old.as_ptr().add(r * lane.stride * element);
                        let to = wider.as_ptr().add(r * stride * element);
                        to.copy_from_nonoverlapping(from, lane.fill * element);
                    }
                }
            }
            (lane.send, lane.stride) = (Some(wider), stride);
        }
        let Some(send) = lane.send.as_ref() else {
            return Ok(());
        };
        for r in 0..self.size {
            let at = (r as usize * lane.stride + lane.fill) * element;
            // SAFETY: the row has room for `numel` more elements; the bucket is ours alone.
            unsafe { work.copy_row(r, 0, work.numel, send.as_ptr().add(at)) };
        }
        meter.copied += (size * work.bytes()) as u64;
        lane.pieces.push(Piece {
            at: lane.fill,
            count: work.numel,
            output: work.output,
            finish: work.finish,
        });
        lane.fill = end;
        lane.staged += 1;
        st.accept(&work.call);
        Ok(())
    }

    /// See `Ring::announce`.
    pub fn announce(&self, call: &Call, meter: &mut Meter) -> Result<()> {
        self.enter(meter)?.accept(call);
        Ok(())
    }

    /// Starts the collective of what a lane has gathered.
    pub fn launch(&self, id: LaneId, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        let chain = st.chain;
        let lane = st.lane(id);
        if lane.pieces.is_empty() {
            return Ok(());
        }
        let (Some(send), Some(pool)) = (lane.send.take(), lane.pool.clone()) else {
            return Ok(());
        };
        let kind = self.route(lane.dtype, lane.op)?;
        let mut unit = Unit::new(chain, Some(id), lane.staged);
        (unit.dtype, unit.op) = (lane.dtype, lane.op);
        unit.pieces = std::mem::take(&mut lane.pieces);
        unit.count = lane.fill;
        unit.block = self.abilities.max_count.min(lane.fill.max(1));
        (lane.last, lane.fill) = (lane.fill, 0);
        let stride = std::mem::take(&mut lane.stride);
        let element = unit.dtype.size();
        // SAFETY: the buffer holds size rows, `stride` apart, with `count` elements each; the new
        // one is as large as they are packed.
        let planned = unsafe {
            if unit.block < unit.count {
                let rows = |r: usize| send.as_ptr().add(r * stride * element).cast_const();
                Buffer::new(&pool, self.size as usize * unit.count * element).and_then(|packed| {
                    pack(&unit, self.size, packed.as_ptr(), |r, at, n, to| {
                        to.copy_from_nonoverlapping(
                            rows(r as usize).add(at * element),
                            n * element,
                        );
                    });
                    let from = packed.as_ptr();
                    unit.send = Some(packed);
                    unit.plan(kind, from, self.size, None, &pool)
                })
            } else {
                let from = send.as_ptr();
                for r in 1..self.size as usize {
                    let to = from.add(r * unit.count * element);
                    from.add(r * stride * element)
                        .copy_to(to, unit.count * element);
                }
                unit.send = Some(send);
                unit.plan(kind, from, self.size, None, &pool)
            }
        };
        if let Err(e) = planned {
            // The ops were accepted and peers will launch: without memory this comm is at its end.
            self.abort(Error::new(
                Status::Transport,
                format!("at a launch: {}", e.message),
            ));
            self.progress(&mut st, meter);
            return Err(e);
        }
        self.queue(st, unit, meter).map(drop)
    }

    /// Carries out an op at once.
    ///
    /// # Safety
    /// As for `Ring::direct`.
    pub unsafe fn direct(&self, work: &Work, pool: &Arc<Pool>, meter: &mut Meter) -> Result<()> {
        let mut st = self.enter(meter)?;
        let kind = self.route(work.dtype, work.op)?;
        let mut unit = Unit::new(st.chain, None, 0);
        (unit.dtype, unit.op, unit.count) = (work.dtype, work.op, work.numel);
        unit.block = self.abilities.max_count.min(work.numel.max(1));
        unit.pieces.push(Piece {
            at: 0,
            count: work.numel,
            output: work.output,
            finish: work.finish,
        });
        // SAFETY: the rows are readable; the packed copy has room for all of them.
        unsafe {
            let whole = contiguous(work).filter(|_| unit.block == unit.count);
            let own = work.row(self.rank).0;
            let plain = work.finish == Finish::plain(work.dtype) && work.op != Op::Avg;
            let straight = plain && kind == Kind::ReduceScatter && work.output.cast_const() != own;
            let direct = (straight && unit.block >= unit.count).then_some(work.output);
            let send = match whole {
                Some(send) => send,
                None => {
                    let packed = Buffer::new(pool, self.size as usize * work.bytes())?;
                    pack(&unit, self.size, packed.as_ptr(), |r, at, n, to| {
                        work.copy_row(r, at, n, to)
                    });
                    meter.copied += (self.size as usize * work.bytes()) as u64;
                    let at = packed.as_ptr();
                    unit.send = Some(packed);
                    at
                }
            };
            unit.plan(kind, send, self.size, direct, pool)?;
        }
        st.accept(&work.call);
        unit.chain = st.chain;
        let (st, number) = self.queue(st, unit, meter)?;
        self.finished(st, number, meter)
    }

    /// See `Ring::all_gather`.
    ///
    /// # Safety
    /// As for `Ring::all_gather`.
    pub unsafe fn all_gather(
        &self,
        input: *const u8,
        output: *mut u8,
        bytes: usize,
        meter: &mut Meter,
    ) -> Result<()> {
        let mut st = self.enter(meter)?;
        if !self.abilities.all_gather {
            return Err(unsupported!(
                "comm: its transport has no ALL_GATHER; expected that flag"
            ));
        }
        let mut unit = Unit::new(st.chain, None, 0);
        let max = self.abilities.max_count;
        let size = self.size as usize;
        // One collective straight into the output, unless it is too large, in place, or empty: an
        // empty one is a barrier, and has to carry something.
        let straight = bytes > 0
            && bytes <= max
            && output.wrapping_add(self.rank as usize * bytes).cast_const() != input;
        let mut landing = None;
        let (from, into) = if straight {
            (input, output)
        } else {
            let copy = Buffer::new(&self.pool, bytes)?;
            let all = Buffer::new(&self.pool, bytes.max(1) * size)?;
            // SAFETY: the copy has room for the input; an empty input is not read.
            unsafe {
                copy.as_ptr().write(0);
                input.copy_to(copy.as_ptr(), bytes);
            }
            let places = (copy.as_ptr().cast_const(), all.as_ptr());
            landing = Some(places.1.cast_const());
            (unit.send, unit.recv) = (Some(copy), Some(all));
            places
        };
        let (mut done, total) = (0, bytes.max(1));
        while done < total {
            let count = (total - done).min(max);
            unit.payload.push(Collective {
                kind: Kind::AllGather,
                send: from.wrapping_add(done),
                recv: into.wrapping_add(done * size),
                count,
                dtype: DType::U8,
                op: Op::Sum,
            });
            done += count;
        }
        unit.in_place = straight;
        let keep = (unit.send.take(), unit.recv.take());
        // The unit is taken apart once it is over, but the landed bytes are needed after that.
        let keep = Arc::new(Mutex::new(keep));
        unit.keep = Some(keep.clone());
        st.accept(&Call::bare(CallKind::AllGather, 0, 0, bytes as u64));
        unit.chain = st.chain;
        let (st, number) = self.queue(st, unit, meter)?;
        self.finished(st, number, meter)?;
        if let Some(all) = landing.filter(|_| bytes > 0) {
            let mut done = 0;
            while done < bytes {
                let count = (bytes - done).min(max);
                for r in 0..size {
                    // SAFETY: part by part, rank-major, all ranks' bytes have landed.
                    unsafe {
                        let part = all.add(done * size + r * count);
                        part.copy_to_nonoverlapping(output.add(r * bytes + done), count);
                    }
                }
                done += count;
            }
        }
        drop(keep);
        Ok(())
    }

    /// Puts a unit at the end of the queue, behind the check of ranks. Its number.
    fn queue<'a>(
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
        call_words(st.kept.iter(), n as usize)
    }

    /// Tests open requests, starts what may start, finishes what is done, in the comm's order.
    fn progress(&self, st: &mut State, meter: &mut Meter) -> bool {
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
                if !lane.dead {
                    lane.idle.extend(unit.send.into_iter().chain(unit.recv));
                    lane.idle.truncate(IDLE);
                }
                st.bury(id);
            }
        }
    }

    fn finished(&self, st: Held<'_>, number: u64, meter: &mut Meter) -> Result<()> {
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

    fn wait_for<'a>(
        &'a self,
        mut st: Held<'a>,
        limit: Option<Instant>,
        meter: &mut Meter,
        mut over: impl FnMut(&mut State) -> bool,
    ) -> (Held<'a>, Waited, Option<Arc<Error>>) {
        let start = Instant::now();
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
        meter.wait_ns += start.elapsed().as_nanos() as u64;
        (st, waited, failure)
    }
}

/// Where the rows begin if they lie one after the other, with no padding.
///
/// # Safety
/// The input of `work` is readable.
unsafe fn contiguous(work: &Work) -> Option<*const u8> {
    match work.rows {
        Rows::Flat { data, total } => (total == work.numel * work.size as usize).then_some(data),
        Rows::Pieces(_) => {
            // SAFETY: by the promise of this function.
            let row = |r: u32| unsafe { work.row(r).0 };
            let first = row(0);
            (0..work.size)
                .all(|r| row(r) == first.wrapping_add(r as usize * work.bytes()))
                .then_some(first)
        }
    }
}

/// Lays rows out rank-major in blocks: `copy(rank, from, count, to)` copies a stretch of a row.
///
/// # Safety
/// `to` has room for all rows of the unit.
unsafe fn pack(unit: &Unit, size: u32, to: *mut u8, copy: impl Fn(u32, usize, usize, *mut u8)) {
    let element = unit.dtype.size();
    let mut done = 0;
    while done < unit.count {
        let count = (unit.count - done).min(unit.block);
        for r in 0..size {
            let at = done * size as usize + r as usize * count;
            // SAFETY: the blocks before, and the rows before in this one, end at `at`.
            copy(r, done, count, unsafe { to.add(at * element) });
        }
        done += count;
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
