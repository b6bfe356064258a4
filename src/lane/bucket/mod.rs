//! The bucket lane: ops travel in one contiguous rank-major bucket, one collective of an engine each.
//!
//! Small ops are packed as they come; a large one whose rows already lie one after the other goes to
//! the engine as it is. Collectives start in the comm's order, each behind a small all-gather in which
//! ranks compare what they were asked so far: sizes may differ, so the check comes before the bytes.

mod direct;
mod drive;
mod open;
mod unit;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

pub use self::direct::contiguous;
use self::open::{BucketLane, Route};
use self::unit::Unit;
use super::work::{Meter, Work};
use super::{take_place, Endpoint, LaneId};
use crate::comm::engine::{Abilities, Engine, Kind};
use crate::dtype::{DType, Op};
use crate::error::{unsupported, Error, Result};
use crate::fingerprint::{Call, CallKind, Chain, Words};
use crate::memory::{Pool, System};

/// Requests that may be open at once.
const OPEN: usize = 4;
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
        take_place(&mut st.lanes, BucketLane::new(dtype, op))
    }

    /// Forgets a lane, what it has gathered, and where its results go.
    pub fn close_lane(&self, id: LaneId) {
        let mut st = self.lock();
        for unit in st.units.iter_mut().filter(|u| u.lane == Some(id)) {
            unit.pieces.clear();
        }
        let lane = st.lane(id);
        lane.dead = true;
        lane.clear();
        st.bury(id);
    }

    /// Frees the idle buckets of a lane.
    pub fn release_buffers(&self, id: LaneId) {
        self.lock().lane(id).release_buffers();
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

    fn route_of(&self, kind: Kind) -> Route {
        Route {
            kind,
            size: self.size,
            max_count: self.abilities.max_count,
        }
    }

    /// Has the memory of a lane's next bucket.
    pub fn prepare_next(&self, id: LaneId, numel: usize, pool: &Arc<Pool>) -> Result<()> {
        let mut st = self.lock();
        let lane = st.lane(id);
        let (dtype, op) = lane.types();
        let route = self.route_of(self.route(dtype, op)?);
        lane.prepare_next(numel, route, pool)
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
        let route = self.route_of(self.route(work.dtype, work.op)?);
        // SAFETY: by the promise of this function.
        unsafe { st.lane(id).add(work, route, pool)? };
        meter.copied += (self.size as usize * work.bytes()) as u64;
        st.accept(&work.call());
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
        let (dtype, op) = st.lane(id).types();
        let route = self.route_of(self.route(dtype, op)?);
        match st.lane(id).take(id, chain, route) {
            Some(unit) => self.queue(st, unit, meter).map(drop),
            None => Ok(()),
        }
    }
}
