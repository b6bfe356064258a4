//! The bucket lane: ops travel in one contiguous rank-major bucket, one collective of an engine each.
//!
//! Small ops are packed as they come; a large one whose rows already lie one after the other goes to
//! the engine as it is. Collectives start in the comm's order, each behind a small all-gather in which
//! ranks compare what they were asked so far: sizes may differ, so the check comes before the bytes.

mod direct;
mod drive;
mod unit;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use self::unit::{Piece, Unit};
use super::work::{Meter, Work};
use super::{Endpoint, LaneId};
use crate::comm::engine::{Abilities, Engine, Kind};
use crate::dtype::{DType, Op};
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
