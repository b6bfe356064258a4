//! The lane of device memory: ops travel as in a bucket lane, and everything that would be waited for
//! is put behind an event instead.
//!
//! An op is packed on its producer's stream when it is submitted, or, borrowed, with its whole bucket at
//! the launch. A launch makes the comm's stream come after the producers, and enqueues there what the
//! bucket needs: collectives, in one group with the direct ops that wait, then the last step. Results
//! are ready in the order of the result stream. The host only ever enqueues and polls.

mod bucket;
mod check;
mod direct;
mod enqueue;
mod memory;
mod take;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use self::bucket::{Bucket, Route};
use self::check::Check;
use self::memory::LaneMemory;
use super::{take_place, LaneId};
use crate::comm::engine::{Abilities, Engine, Kind};
use crate::cuda::context::Entered;
use crate::cuda::event::Event;
use crate::cuda::{CUstream, Device};
use crate::dtype::{DType, Op};
use crate::error::{unsupported, Error, Result, Status};
use crate::fingerprint::{Call, CallKind};
use crate::memory::Pool;

/// The lane of direct ops, which wait for the next launch.
pub const DIRECT: LaneId = LaneId::MAX;

/// Buckets of a round that are remembered.
const ROUND: usize = 1024;

/// Where an op's result will be.
#[derive(Clone, Copy, Debug)]
pub struct Placed {
    /// Its first element.
    pub data: *mut u8,
    /// A reference to its memory, if that is ours; else 0.
    pub token: u64,
}

/// The streams of callers, as a comm is told.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    /// That of inputs, where an op names none.
    pub producer: CUstream,
    /// In whose order results are ready; none: a stream of ours, which flush joins into the producer's.
    pub result: Option<CUstream>,
}

// SAFETY: streams are names here, used from any thread.
unsafe impl Send for Streams {}
// SAFETY: as above.
unsafe impl Sync for Streams {}

/// One rank's buckets on a GPU.
pub struct DeviceBuckets {
    engine: Box<dyn Engine>,
    abilities: Abilities,
    exact: bool,
    rank: u32,
    size: u32,
    timeout: Option<Duration>,
    streams: Streams,
    device: Arc<Device>,
    cause: OnceLock<Arc<Error>>,
    state: Mutex<State>,
}

/// What one (bucketer, dtype, op) has gathered and not launched.
struct DeviceLane {
    dtype: DType,
    op: Op,
    staged: u64,
    done: u64,
    open: Option<Bucket>,
    /// Had for the next ops while this one is still open.
    next: Option<Bucket>,
    /// Elements of each row that a bucket takes.
    capacity: usize,
    memory: Option<LaneMemory>,
    /// What the buckets of the last round held; a round ends with a launch or a flush.
    rounds: Vec<usize>,
    number: usize,
}

/// Work on the comm's stream.
struct Flight {
    done: Arc<Event>,
    since: Instant,
    /// Freed when it has passed; of which lane it is.
    slot: Option<memory::Slot>,
    lane: Option<LaneId>,
}

#[derive(Default)]
struct State {
    ordinals: u32,
    lanes: Vec<Option<DeviceLane>>,
    /// Direct ops that wait for the next launch; taken and enqueued so far.
    waiting: Vec<Bucket>,
    directs: (u64, u64),
    flying: VecDeque<Flight>,
    /// When a flight was last seen to be over.
    passed: Option<Instant>,
    /// The last mark on the comm's stream.
    last: Option<Arc<Event>>,
    check: Option<Check>,
    spares: Vec<Event>,
    /// Marks of packing that went for nothing.
    cancelled: Vec<Event>,
}

type Held<'a> = MutexGuard<'a, State>;

impl State {
    /// Gives back what a lane's direct ops still use, in the order of the device.
    fn free_direct(&mut self, id: LaneId, device: &Device) {
        for flight in self.flying.iter_mut().filter(|f| f.lane == Some(id)) {
            if let Some(slot) = flight.slot.take() {
                slot.give_back(device, std::iter::empty());
            }
        }
    }

    fn lane(&mut self, id: LaneId) -> &mut DeviceLane {
        match self.lanes.get_mut(id as usize) {
            Some(Some(lane)) => lane,
            _ => unreachable!("a lane is used between its opening and its closing"),
        }
    }
}

impl DeviceLane {
    fn memory(&mut self, buckets: &DeviceBuckets, pool: &Pool) -> &mut LaneMemory {
        let stream = buckets.result_stream();
        self.memory
            .get_or_insert_with(|| LaneMemory::new(&buckets.device, pool, stream))
    }
}

impl DeviceBuckets {
    /// The buckets of rank `rank` on `engine`, which works on `device`.
    pub fn new(
        engine: Box<dyn Engine>,
        abilities: Abilities,
        (rank, size): (u32, u32),
        options: &super::Options,
        device: Arc<Device>,
        streams: Streams,
    ) -> DeviceBuckets {
        let control = options.control.clone();
        let state = State {
            check: control.map(|comm| Check::new(comm, size)),
            ..State::default()
        };
        DeviceBuckets {
            engine,
            abilities,
            exact: options.exact,
            rank,
            size,
            timeout: options.timeout,
            streams,
            device,
            cause: OnceLock::new(),
            state: Mutex::new(state),
        }
    }

    /// This rank and the number of ranks.
    pub fn place(&self) -> (u32, u32) {
        (self.rank, self.size)
    }

    /// In whose order results are ready.
    pub fn result_stream(&self) -> CUstream {
        self.streams.result.unwrap_or(self.device.comm())
    }

    fn lock(&self) -> Held<'_> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(&self) -> Result<Held<'_>> {
        match self.cause.get() {
            Some(e) => Err(Error::clone(e)),
            None => Ok(self.lock()),
        }
    }

    /// The first cause, once what the device says by now is looked at.
    pub fn cause(&self) -> Option<Arc<Error>> {
        // Not while a call of another thread has it, which the engine may keep waiting.
        if self.cause.get().is_none() {
            match self.state.try_lock() {
                Ok(mut st) => self.progress(&mut st),
                Err(TryLockError::Poisoned(st)) => self.progress(&mut st.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
        }
        self.cause.get().cloned()
    }

    /// Ends this rank's end of the comm; the first cause stays. Never blocks.
    pub fn abort(&self, cause: Error) {
        if self.cause.set(Arc::new(cause)).is_ok() {
            self.engine.abort();
        }
    }

    /// What failed after the ranks could have become different is the end of the comm.
    fn fail(&self, mut e: Error) -> Error {
        if e.status == Status::NoMemory {
            e.status = Status::Transport;
        }
        self.abort(e);
        self.cause.get().map_or_else(
            || Error::new(Status::Panic, "a failed comm without a cause"),
            |e| Error::clone(e),
        )
    }

    /// A failure of the device is the end of the comm; others change nothing. The context is current.
    fn sift(&self, e: Error) -> Error {
        match e.status {
            Status::Transport => self.fail(e),
            // A device that has failed has no memory either.
            Status::NoMemory => match self.device.event() {
                Err(worse) if worse.status == Status::Transport => self.fail(worse),
                _ => e,
            },
            _ => e,
        }
    }

    fn enter_device(&self) -> Result<Entered<'_>> {
        self.device.enter().map_err(|e| self.fail(e))
    }

    /// The number that a bucketer gets on its first use.
    pub fn next_ordinal(&self) -> u32 {
        self.lock().ordinals
    }

    /// A new lane.
    pub fn open_lane(&self, dtype: DType, op: Op) -> LaneId {
        let mut st = self.lock();
        let lane = DeviceLane {
            dtype,
            op,
            staged: 0,
            done: 0,
            open: None,
            next: None,
            capacity: 0,
            memory: None,
            rounds: Vec::new(),
            number: 0,
        };
        take_place(&mut st.lanes, lane)
    }

    /// Forgets a lane, and what it has gathered.
    pub fn close_lane(&self, id: LaneId) {
        let mut st = self.lock();
        let Some(lane) = st.lanes.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        let Ok(_entered) = self.device.context().enter_to_end() else {
            return;
        };
        st.free_direct(id, &self.device);
        let buckets = lane.open.into_iter().chain(lane.next);
        let marks = buckets.flat_map(|bucket| self.drop_bucket(bucket));
        st.cancelled.extend(marks);
        st.cancelled.retain(|mark| !mark.passed().unwrap_or(true));
    }

    /// Gives back a bucket that is not launched: behind what packs it, whose marks it leaves. The context
    /// is current.
    fn drop_bucket(&self, bucket: Bucket) -> impl Iterator<Item = Event> {
        let marks = bucket.producers.iter().map(|p| &p.event);
        bucket.slot.give_back(&self.device, marks);
        bucket.producers.into_iter().map(|p| p.event)
    }

    /// Frees what is idle of a lane.
    pub fn release_buffers(&self, id: LaneId) {
        let mut st = self.lock();
        let Ok(_entered) = self.device.context().enter_to_end() else {
            return;
        };
        st.free_direct(id, &self.device);
        let lane = st.lane(id);
        if let Some(bucket) = lane.next.take() {
            // Nothing is packed in it.
            drop(self.drop_bucket(bucket));
        }
        if let Some(memory) = &mut lane.memory {
            memory.free_idle();
        }
    }

    /// How many ops of a lane are enqueued; and why no more will be.
    pub fn completed(&self, id: LaneId) -> (u64, Option<Arc<Error>>) {
        let mut st = self.lock();
        let done = match id {
            DIRECT => st.directs.1,
            id => st.lane(id).done,
        };
        (done, self.cause.get().cloned())
    }

    /// Looks at what has passed and what has failed.
    pub fn carry_on(&self) {
        self.progress(&mut self.lock());
    }

    /// How this dtype and op travel.
    fn route(&self, dtype: DType, op: Op) -> Result<Route> {
        let dtypes = self.abilities.reduce_dtypes;
        let nan_matters = dtype.is_float() && matches!(op, Op::Min | Op::Max);
        let takes = (dtypes == 0 || dtypes >> dtype as u64 & 1 == 1)
            && (self.abilities.keeps_nan || !nan_matters);
        let kind = match (
            self.abilities.reduce_scatter && takes,
            self.abilities.all_to_all,
        ) {
            (true, _) if !self.exact => Kind::ReduceScatter,
            (_, true) => Kind::AllToAll,
            _ => {
                return Err(unsupported!(
                    "dtype: this transport does not reduce {} with {}; expected a dtype of \
                     reduce_dtypes ({dtypes:#x}), or a transport with ALL_TO_ALL",
                    dtype.name(),
                    op.name()
                ))
            }
        };
        Ok(Route {
            kind,
            size: self.size,
            max_count: self.abilities.max_count,
            strided: self.abilities.strided,
            stream: self.device.comm(),
        })
    }

    /// The stream of an op that names `stream`.
    fn producer(&self, stream: CUstream) -> CUstream {
        match stream.is_null() {
            true => self.streams.producer,
            false => stream,
        }
    }

    fn accept(&self, st: &mut State, call: &Call) {
        if call.kind == CallKind::Submit {
            st.ordinals = st.ordinals.max(call.ordinal + 1);
        }
        if let Some(check) = &st.check {
            check.note(call);
        }
    }

    /// Takes a launch or flush into the sequence: a round ends.
    pub fn announce(&self, call: &Call) -> Result<()> {
        let mut st = self.enter()?;
        st.lanes
            .iter_mut()
            .flatten()
            .for_each(|lane| lane.number = 0);
        self.accept(&mut st, call);
        Ok(())
    }

    /// Enqueues the bucket of a lane, and the direct ops that wait.
    pub fn launch(&self, id: LaneId) -> Result<()> {
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        let lane = st.lane(id);
        let Some(bucket) = lane.open.take() else {
            return Ok(());
        };
        let rounds = bucket.number + 1;
        if lane.rounds.len() < rounds {
            lane.rounds.resize(rounds, 0);
        }
        lane.rounds[bucket.number] = bucket.fill;
        self.enqueue(&mut st, Some((id, bucket)))
    }

    /// Enqueues the direct ops that wait; `join`: the producer's stream then comes after all results.
    pub fn settle(&self, join: bool) -> Result<()> {
        let mut st = self.enter()?;
        let _entered = self.enter_device()?;
        self.progress(&mut st);
        if let Some(e) = self.cause.get() {
            return Err(Error::clone(e));
        }
        if !st.waiting.is_empty() {
            self.enqueue(&mut st, None)?;
        }
        match (&st.last, self.streams.result) {
            (Some(last), None) if join => {
                last.hold(self.streams.producer).map_err(|e| self.fail(e))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for DeviceBuckets {
    fn drop(&mut self) {
        let st = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let state = std::mem::take(st);
        let Ok(_entered) = self.device.context().enter_to_end() else {
            // The context is gone, and with it all memory on the device.
            return;
        };
        let mut marks = state.cancelled;
        let lanes = state.lanes.into_iter().flatten();
        let open = lanes.flat_map(|lane| lane.open.into_iter().chain(lane.next));
        let buckets = state.waiting.into_iter().chain(open);
        marks.extend(buckets.flat_map(|bucket| self.drop_bucket(bucket)));
        let mut idle = marks.iter().all(|mark| mark.passed().unwrap_or(false));
        for flight in state.flying {
            idle &= flight.done.passed().unwrap_or(false);
            if let Some(slot) = flight.slot {
                slot.give_back(&self.device, std::iter::empty());
            }
        }
        if !idle {
            self.device.kernels().keep();
        }
    }
}
