//! How ops travel: what an `rsb_comm` handle names, and the two kinds of lane it may have.
//!
//! A lane holds the pending ops of one (bucketer, dtype, op) on one comm. Where ranks share memory it
//! is a [`ring`]; on an engine it is a [`bucket`]. Both count ops: a lane's ops complete in order.

pub mod bucket;
pub mod device;
mod gpu;
mod options;
pub mod ring;
pub mod work;

use std::mem::ManuallyDrop;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::Instant;

use self::bucket::Buckets;
use self::device::{DeviceBuckets, DIRECT};
pub use self::options::Options;
use self::options::{check_engine, check_rank};
use self::ring::Ring;
use self::work::{Meter, Waited, Work};
use crate::comm::engine::{Abilities, Engine};
use crate::comm::group::Group;
use crate::comm::local;
use crate::comm::shm;
use crate::comm::shrink::{self, Origin};
use crate::dtype::{DType, Op};
use crate::error::{invalid, unsupported, Error, Result, Status};
use crate::fingerprint::Call;
use crate::fork;
use crate::memory::Pool;

/// Names a lane of one comm.
pub type LaneId = u32;

/// Puts a lane into the first idle place of a comm's lanes, or a new one. Its name.
fn take_place<T>(lanes: &mut Vec<Option<T>>, lane: T) -> LaneId {
    let idle = lanes.iter().position(Option::is_none);
    let id = idle.unwrap_or_else(|| {
        lanes.push(None);
        lanes.len() - 1
    });
    lanes[id] = Some(lane);
    id as LaneId
}

// One lies in every comm, on the heap: a box of its own would be one more step for every op.
#[allow(clippy::large_enum_variant)]
enum Lanes {
    Ring(Ring, Origin),
    Buckets(Buckets),
    Device(Box<DeviceBuckets>),
}

/// One rank's end of a group.
pub struct Endpoint {
    id: AtomicU64,
    label: String,
    lanes: ManuallyDrop<Lanes>,
    /// In which process it was made.
    process: u32,
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        // A child that is forked off inside a call may be the last to let go of it: nothing behind it is the
        // child's, neither the mappings nor the engine.
        if fork::epoch() == self.process {
            // SAFETY: dropped here alone, and not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.lanes) };
        }
    }
}

fn endpoint(label: &str, lanes: Lanes) -> Arc<Endpoint> {
    static IDS: AtomicU64 = AtomicU64::new(1);
    Arc::new(Endpoint {
        id: AtomicU64::new(IDS.fetch_add(1, Ordering::Relaxed)),
        label: label.to_string(),
        lanes: ManuallyDrop::new(lanes),
        process: fork::epoch(),
    })
}

fn on_ring(options: &Options, group: Group, origin: Origin) -> Arc<Endpoint> {
    let ring = Ring::new(group, options.timeout);
    endpoint(&options.label, Lanes::Ring(ring, origin))
}

impl Endpoint {
    /// `size` ranks as threads of this process.
    pub fn local(size: u32, options: &Options) -> Result<Vec<Arc<Endpoint>>> {
        let layout = options.layout(size)?;
        let (ends, threads) = local::create(size, layout)?;
        let end = |group| on_ring(options, group, Origin::Local(threads.clone()));
        Ok(ends.into_iter().map(end).collect())
    }

    /// `size` ranks as processes of this host.
    pub fn shm(name: &str, rank: u32, size: u32, options: &Options) -> Result<Arc<Endpoint>> {
        let layout = options.layout(size)?;
        check_rank(rank, size)?;
        let deadline = options.timeout.and_then(|t| Instant::now().checked_add(t));
        let group = shm::join(name, (rank, size), layout, deadline, None)?;
        let name = name.to_string();
        let origin = Origin::Shm {
            name,
            generation: 0,
        };
        Ok(on_ring(options, group, origin))
    }

    /// Rank `rank` of `size` on an engine. On error the engine is not released.
    pub fn custom(
        engine: Box<dyn Engine>,
        abilities: Abilities,
        (rank, size): (u32, u32),
        options: &Options,
    ) -> Result<Arc<Endpoint>> {
        options.refuse_streams()?;
        check_engine(abilities, rank, size, options)?;
        let control = options.control.clone();
        let place = (rank, size);
        let lanes = Buckets::new(
            engine,
            abilities,
            place,
            options.exact,
            options.timeout,
            control,
        );
        Ok(endpoint(&options.label, Lanes::Buckets(lanes)))
    }

    /// A comm on memory that a fuzz target fills.
    #[cfg(fuzzing)]
    #[doc(hidden)]
    pub fn on_group(group: Group, origin: Origin, options: &Options) -> Arc<Endpoint> {
        on_ring(options, group, origin)
    }

    /// This rank's end of the smaller group that the survivors of a lost rank form. Blocks for them.
    pub fn shrink(&self, options: &Options) -> Result<Arc<Endpoint>> {
        let Lanes::Ring(ring, origin) = &*self.lanes else {
            return Err(unsupported!(
                "comm: on a transport; expected a local or shm comm, which alone can shrink"
            ));
        };
        let lost = self.status().err().map(|e| e.status);
        if lost != Some(Status::PeerLost) {
            let now = lost.unwrap_or(Status::Ok).name().to_string_lossy();
            return Err(invalid!(
                "comm: its status is {now}; expected RSB_ERR_PEER_LOST"
            ));
        }
        let layout = |size| options.layout(size);
        let formed = shrink::shrink(ring.group(), origin, layout, options.timeout);
        self.naming(formed.map(|(group, origin)| on_ring(options, group, origin)))
    }

    /// A number that no other comm of this process has or had.
    #[inline]
    pub fn id(&self) -> u64 {
        self.id.load(Ordering::Relaxed)
    }

    /// Gives a comm that nobody uses yet the number of its handle, which is as unique.
    pub fn rename(&self, token: u64) {
        self.id.store(token, Ordering::Relaxed);
    }

    /// This rank.
    #[inline]
    pub fn rank(&self) -> u32 {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.group().rank(),
            Lanes::Buckets(buckets) => buckets.place().0,
            Lanes::Device(buckets) => buckets.place().0,
        }
    }

    /// Ranks of the group.
    #[inline]
    pub fn size(&self) -> u32 {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.group().size(),
            Lanes::Buckets(buckets) => buckets.place().1,
            Lanes::Device(buckets) => buckets.place().1,
        }
    }

    /// The sticky first cause.
    pub fn status(&self) -> Result<()> {
        let cause = match &*self.lanes {
            Lanes::Ring(ring, _) => ring.group().cause(),
            Lanes::Buckets(buckets) => buckets.cause().map(|e| Error::clone(&e)),
            Lanes::Device(buckets) => buckets.cause().map(|e| Error::clone(&e)),
        };
        cause.map_or(Ok(()), |e| Err(self.named(e)))
    }

    /// Ends the group. Any thread; never blocks.
    pub fn abort(&self) {
        let text = format!("rsb_comm_abort was called on rank {}", self.rank());
        self.end(Error::new(Status::Aborted, text).blame(self.rank()));
    }

    /// A bug of ours was caught in a call on this comm: peers must not wait for it.
    pub fn poison(&self, message: &str) {
        let text = format!("rank {}: {message}", self.rank());
        self.end(Error::new(Status::Panic, text));
    }

    fn end(&self, cause: Error) {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.group().abort(&cause),
            Lanes::Buckets(buckets) => buckets.abort(cause),
            Lanes::Device(buckets) => buckets.abort(cause),
        }
    }

    /// Puts the comm's label before an error's sentence.
    #[cold]
    pub fn named(&self, mut error: Error) -> Error {
        if !self.label.is_empty() {
            error.message = format!("{}: {}", self.label, error.message);
        }
        error
    }

    #[inline]
    fn naming<T>(&self, result: Result<T>) -> Result<T> {
        result.map_err(|e| self.named(e))
    }

    /// Whether its ranks share memory.
    fn is_ring(&self) -> bool {
        matches!(*self.lanes, Lanes::Ring(..))
    }

    /// Bytes of shared staging that this rank has made real.
    pub fn staging(&self) -> u64 {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.committed(),
            Lanes::Buckets(_) | Lanes::Device(_) => 0,
        }
    }

    /// The number that a bucketer gets on its first use of this comm.
    pub fn next_ordinal(&self) -> u32 {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.next_ordinal(),
            Lanes::Buckets(buckets) => buckets.next_ordinal(),
            Lanes::Device(buckets) => buckets.next_ordinal(),
        }
    }

    /// A new lane.
    pub fn open_lane(&self, dtype: DType, op: Op) -> LaneId {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.open_lane(dtype, op),
            Lanes::Buckets(buckets) => buckets.open_lane(dtype, op),
            Lanes::Device(buckets) => buckets.open_lane(dtype, op),
        }
    }

    /// Forgets a lane, what waits in it, and where its results go.
    pub fn close_lane(&self, id: LaneId) {
        if fork::epoch() != self.process {
            // Nothing behind it is this process's.
            return;
        }
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.close_lane(id),
            Lanes::Buckets(buckets) => buckets.close_lane(id),
            Lanes::Device(buckets) => buckets.close_lane(id),
        }
    }

    /// Frees the idle buckets of a lane. A comm's staging stays.
    pub fn release_buffers(&self, id: LaneId) {
        match &*self.lanes {
            Lanes::Ring(..) => {}
            Lanes::Buckets(buckets) => buckets.release_buffers(id),
            Lanes::Device(buckets) => buckets.release_buffers(id),
        }
    }

    /// Has the memory that a lane's next bucket will need for `numel` elements, while this one is still
    /// open. On error nothing has changed.
    pub fn prepare_next(&self, id: LaneId, numel: usize, pool: &Arc<Pool>) -> Result<()> {
        match &*self.lanes {
            Lanes::Ring(..) => Ok(()),
            Lanes::Buckets(buckets) => buckets.prepare_next(id, numel, pool),
            Lanes::Device(buckets) => self.naming(buckets.prepare_next(id, pool)),
        }
    }

    /// Takes a waiting op; buckets are made in `pool`. Ops of a lane are counted from 1.
    ///
    /// # Safety
    /// The pointers of `work` are as the contract's rule 6 says; with `borrow`, and for the output,
    /// until the op is complete or its lane is closed.
    #[inline]
    pub unsafe fn submit(
        &self,
        id: LaneId,
        work: &Work,
        pool: &Arc<Pool>,
        meter: &mut Meter,
    ) -> Result<()> {
        // SAFETY: by the promise of this function.
        self.naming(unsafe {
            match &*self.lanes {
                Lanes::Ring(ring, _) => ring.submit(id, work, meter),
                Lanes::Buckets(buckets) => buckets.submit(id, work, pool, meter),
                Lanes::Device(_) => Err(only_on_host()),
            }
        })
    }

    /// Takes a launch or flush that finds something open into the sequence.
    pub fn announce(&self, call: &Call, meter: &mut Meter) -> Result<()> {
        self.naming(match &*self.lanes {
            Lanes::Ring(ring, _) => ring.announce(call, meter),
            Lanes::Buckets(buckets) => buckets.announce(call, meter),
            Lanes::Device(buckets) => buckets.announce(call),
        })
    }

    /// Starts the communication of what a lane holds.
    pub fn launch(&self, id: LaneId, meter: &mut Meter) -> Result<()> {
        self.naming(match &*self.lanes {
            Lanes::Ring(ring, _) => ring.launch(id, meter),
            Lanes::Buckets(buckets) => buckets.launch(id, meter),
            Lanes::Device(buckets) => buckets.launch(id),
        })
    }

    /// Announces a flush of all that a bucketer has open, one lane's ops, launches and completes them, in one
    /// go. How the launch went, how many of the lane's ops are complete, and why no more will be. None: this
    /// kind of comm takes the steps one by one.
    #[allow(clippy::type_complexity)]
    pub fn flush(
        &self,
        id: LaneId,
        call: &Call,
        meter: &mut Meter,
    ) -> Option<(Result<()>, u64, Option<Error>)> {
        let Lanes::Ring(ring, _) = &*self.lanes else {
            return None;
        };
        let (launched, done, failure) = ring.flush(id, call, meter);
        let failure = failure.map(|e| self.named(Error::clone(&e)));
        Some((self.naming(launched), done, failure))
    }

    /// Carries out an op at once.
    ///
    /// # Safety
    /// The pointers of `work` are as the contract's rule 6 says.
    pub unsafe fn direct(&self, work: &Work, pool: &Arc<Pool>, meter: &mut Meter) -> Result<()> {
        // SAFETY: by the promise of this function.
        self.naming(unsafe {
            match &*self.lanes {
                Lanes::Ring(ring, _) => ring.direct(work, meter),
                Lanes::Buckets(buckets) => buckets.direct(work, pool, meter),
                Lanes::Device(_) => Err(only_on_host()),
            }
        })
    }

    /// How many ops of a lane are complete; and why no more will be, if so.
    pub fn completed(&self, id: LaneId) -> (u64, Option<Error>) {
        let (count, failure) = match &*self.lanes {
            Lanes::Ring(ring, _) => ring.completed(id),
            Lanes::Buckets(buckets) => buckets.completed(id),
            Lanes::Device(buckets) => buckets.completed(id),
        };
        (count, failure.map(|e| self.named(Error::clone(&e))))
    }

    /// Carries on what can be carried on now.
    pub fn carry_on(&self, meter: &mut Meter) {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.carry_on(meter),
            Lanes::Buckets(buckets) => buckets.carry_on(meter),
            Lanes::Device(buckets) => buckets.carry_on(),
        }
    }

    /// Waits until `target` ops of a lane are complete or the comm has failed, until `limit` at most.
    pub fn wait(
        &self,
        id: LaneId,
        target: u64,
        limit: Option<Instant>,
        meter: &mut Meter,
    ) -> Waited {
        match &*self.lanes {
            Lanes::Ring(ring, _) => ring.wait(id, target, limit, meter),
            Lanes::Buckets(buckets) => buckets.wait(id, target, limit, meter),
            Lanes::Device(buckets) => {
                if id == DIRECT {
                    // What fails is told by `completed`.
                    let _ = buckets.settle(false);
                }
                Waited::Over
            }
        }
    }

    /// Gathers `bytes` of every rank in rank order; 0 bytes: a barrier.
    ///
    /// # Safety
    /// `input` has `bytes` bytes, `output` as many for every rank; the input may be this rank's place
    /// in the output, and overlaps nothing else of it.
    pub unsafe fn all_gather(&self, input: *const u8, output: *mut u8, bytes: usize) -> Result<()> {
        let mut meter = Meter::default();
        // SAFETY: by the promise of this function.
        self.naming(unsafe {
            match &*self.lanes {
                Lanes::Ring(ring, _) => ring.all_gather(input, output, bytes, &mut meter),
                Lanes::Buckets(buckets) => buckets.all_gather(input, output, bytes, &mut meter),
                Lanes::Device(buckets) => buckets.all_gather(input, output, bytes),
            }
        })
    }
}

/// What is asked of a host comm alone was asked of a device comm.
fn only_on_host() -> Error {
    Error::new(
        Status::Panic,
        "a device comm was asked for a host comm's work",
    )
}
