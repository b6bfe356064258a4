//! The bucketer: takes ops, fills buckets, launches them in one order on all ranks, and hands every
//! accepted op back exactly once.
//!
//! What is launched, and when, follows from the sequence of calls alone (rule 1). No lock is held
//! while a caller's code runs: a call is a [`Turn`] that hands out finished ops one by one, and the
//! caller runs its callback between two steps. So an exception may pass, a callback may submit, and
//! what is still owed stays in the queue for the next call.

mod queue;
mod stats;
mod turn;

#[cfg(test)]
mod tests;

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use self::queue::{Flight, Lane, Open, Outcome, Pending, Queue, Use};
pub use self::stats::Counters;
use self::turn::Plan;
pub use self::turn::Turn;
use crate::dtype::{DType, Finish, Op};
use crate::error::{invalid, Error, Result, Status};
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::{Meter, Rows, Work};
use crate::lane::Endpoint;
use crate::layout::{bucket_capacity, flat_shard};
use crate::memory::{Block, Cache, Pool};

/// Default of `bucket_bytes`.
pub const DEFAULT_BUCKET: u64 = 25 << 20;

/// Buckets of one bucketer and comm that may be in flight when another is launched.
const IN_FLIGHT: usize = 2;

/// One op as the caller asks for it, checked against the comm.
#[derive(Clone, Copy)]
pub struct Ask<C> {
    /// Where the input lies.
    pub rows: Rows,
    /// Elements of a shard.
    pub numel: usize,
    /// Type of the input.
    pub dtype: DType,
    /// What to do with it.
    pub op: Op,
    /// The last step.
    pub finish: Finish,
    /// Where the result goes; null: memory of ours.
    pub output: *mut u8,
    /// Whether the input stays as it is until the callback.
    pub borrow: bool,
    /// Which tensor this is.
    pub tag: u64,
    /// Comes back with the result.
    pub payload: C,
}

/// A finished op, for its callback.
pub struct Completion<C> {
    /// Its ticket.
    pub ticket: u64,
    /// Its tag.
    pub tag: u64,
    /// What the caller wanted back.
    pub payload: C,
    /// The reduced shard; null after an error.
    pub data: *mut u8,
    /// Elements in it.
    pub numel: usize,
    /// Those that came from callers.
    pub valid: usize,
    /// Where a flat tensor's shard begins.
    pub offset: usize,
    /// Names the memory, if it is ours; else 0.
    pub shard: u64,
    /// Type of the elements.
    pub dtype: DType,
    /// Why it failed, if it did.
    pub error: Option<Arc<Error>>,
}

/// Takes ops of type-erased memory; `C` is what comes back with each.
pub struct Bucketer<C> {
    /// Upper bits of its tickets.
    nonce: u64,
    bucket_bytes: Option<u64>,
    pool: Arc<Pool>,
    /// Held by the call that runs callbacks; and which thread that is.
    turn: Mutex<()>,
    runner: AtomicUsize,
    /// Whether a callback has submitted direct ops, whose callbacks come right after it.
    is_due: AtomicBool,
    queue: Mutex<Queue<C>>,
    /// The thread that has the queue.
    holder: AtomicUsize,
    counters: Counters,
}

/// The queue, and the note of which thread has it.
struct Held<'a, C> {
    queue: MutexGuard<'a, Queue<C>>,
    holder: &'a AtomicUsize,
}

impl<C> Deref for Held<'_, C> {
    type Target = Queue<C>;

    #[inline]
    fn deref(&self) -> &Queue<C> {
        &self.queue
    }
}

impl<C> DerefMut for Held<'_, C> {
    #[inline]
    fn deref_mut(&mut self) -> &mut Queue<C> {
        &mut self.queue
    }
}

impl<C> Drop for Held<'_, C> {
    #[inline]
    fn drop(&mut self) {
        self.holder.store(0, Ordering::Relaxed);
    }
}

const TICKET_BITS: u32 = 40;
/// Packing less than this is timed only now and then.
const TIMED: usize = 16 << 10;
const SAMPLE: u64 = 64;

/// A number that names this thread while it lives.
fn this_thread() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| std::ptr::from_ref(mark) as usize)
}

impl<C: Copy + Send> Bucketer<C> {
    /// A bucketer. `bucket_bytes`: none turns bucketing off.
    pub fn new(bucket_bytes: Option<u64>, pool: Arc<Pool>) -> Arc<Bucketer<C>> {
        static NONCES: AtomicU64 = AtomicU64::new(1);
        Arc::new(Bucketer {
            nonce: NONCES.fetch_add(1, Ordering::Relaxed) << TICKET_BITS,
            bucket_bytes,
            queue: Mutex::new(Queue::new(Cache::new(pool.clone()))),
            pool,
            holder: AtomicUsize::new(0),
            turn: Mutex::new(()),
            runner: AtomicUsize::new(0),
            is_due: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    #[inline]
    fn lock(&self) -> Held<'_, C> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        self.holder.store(this_thread(), Ordering::Relaxed);
        Held {
            queue,
            holder: &self.holder,
        }
    }

    /// Refuses a call that an allocator function makes while this bucketer waits for it.
    #[inline]
    pub fn refuse_inner_call(&self) -> Result<()> {
        if self.holder.load(Ordering::Relaxed) == this_thread() {
            let text = "bucketer: called by its own allocator; expected no call while it allocates";
            return Err(Error::new(Status::Reentrant, text));
        }
        Ok(())
    }

    /// Whether this thread is inside a call of this bucketer, that is: in a callback.
    pub fn is_running_here(&self) -> bool {
        self.runner.load(Ordering::Relaxed) == this_thread()
    }

    fn refuse_reentry(&self, what: &str) -> Result<()> {
        self.refuse_inner_call()?;
        if self.is_running_here() {
            let text = format!(
                "{what}: called by a callback of the same bucketer; expected it after the callback"
            );
            return Err(Error::new(Status::Reentrant, text));
        }
        Ok(())
    }

    /// Its numbers; and the bytes it holds, now and at most.
    pub fn stats(&self) -> (&Counters, u64, u64) {
        let (now, peak) = self.pool.bytes();
        (&self.counters, now, peak)
    }

    /// Takes an op. The turn runs the callbacks that are due, and ends with the ticket.
    ///
    /// # Safety
    /// The pointers of `ask` are as the contract's rule 6 says.
    pub unsafe fn submit(&self, comm: Arc<Endpoint>, ask: Ask<C>) -> Turn<'_, C> {
        Turn::new(
            self,
            Plan::Submit {
                comm,
                ask,
                ticket: 0,
            },
        )
    }

    /// Starts the communication of all open buckets.
    pub fn launch(&self) -> Result<Turn<'_, C>> {
        self.refuse_reentry("launch")?;
        Ok(Turn::new(self, Plan::launch(CallKind::Launch)))
    }

    /// Launches, completes and hands back everything.
    pub fn flush(&self) -> Result<Turn<'_, C>> {
        self.refuse_reentry("flush")?;
        Ok(Turn::new(self, Plan::launch(CallKind::Flush)))
    }

    /// Hands back what is complete, without waiting for peers.
    pub fn poll(&self) -> Result<Turn<'_, C>> {
        self.refuse_reentry("poll")?;
        Ok(Turn::new(self, Plan::Poll { looked: false }))
    }

    /// Hands back everything up to the op of `ticket`. `timeout`: none waits for the comm's own.
    pub fn wait(&self, ticket: u64, timeout: Option<Duration>) -> Result<Turn<'_, C>> {
        self.refuse_reentry("wait")?;
        let limit = timeout.and_then(|t| Instant::now().checked_add(t));
        Ok(Turn::new(
            self,
            Plan::Wait {
                ticket,
                limit,
                found: None,
            },
        ))
    }

    /// Completes what is launched, cancels the rest, hands all of it back; then nothing is left.
    pub fn close(&self) -> Result<Turn<'_, C>> {
        self.refuse_reentry("free")?;
        Ok(Turn::new(self, Plan::Close))
    }

    /// A bug of ours was caught in a call: no peer must wait for this rank.
    pub fn poison(&self, message: &str) {
        let q = self.lock();
        let open = q
            .lanes
            .iter()
            .filter_map(|l| l.open.as_ref())
            .map(|o| &o.comm);
        open.chain(q.flights.iter().map(|f| &f.comm))
            .for_each(|comm| comm.poison(message));
    }

    /// Gives idle memory back.
    pub fn release_buffers(&self) -> Result<()> {
        self.refuse_reentry("release_buffers")?;
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let mut q = self.lock();
        if !q.is_idle() {
            let text = "release_buffers: ops are pending; expected a flush before";
            return Err(Error::new(Status::Busy, text));
        }
        let reserved = q.reserved.take();
        reserved.into_iter().for_each(|(b, _)| q.cache.put(b));
        q.cache.free_idle();
        for lane in &q.lanes {
            if let Some(comm) = lane.comm.upgrade() {
                comm.release_buffers(lane.id);
            }
        }
        Ok(())
    }

    /// The lane of (comm, dtype, op), made if it is new.
    fn lane_of(&self, q: &mut Queue<C>, comm: &Arc<Endpoint>, dtype: DType, op: Op) -> usize {
        let fits = |l: &Lane<C>| l.comm_id == comm.id() && l.dtype == dtype && l.op == op;
        if q.lanes.get(q.recent).is_some_and(fits) {
            return q.recent;
        }
        let index = q.lanes.iter().position(fits).unwrap_or_else(|| {
            q.forget_dead();
            q.lanes.push(Lane {
                comm: Arc::downgrade(comm),
                comm_id: comm.id(),
                id: comm.open_lane(dtype, op),
                dtype,
                op,
                capacity: self
                    .bucket_bytes
                    .map(|b| bucket_capacity(b, comm.size(), dtype.size())),
                ordinal: q.ordinal(comm.id()),
                taken: 0,
                open: None,
                closed: false,
            });
            q.lanes.len() - 1
        });
        q.recent = index;
        index
    }

    fn call(&self, ordinal: u32, kind: CallKind) -> Call {
        Call::bare(kind, ordinal, self.bucket_bytes.unwrap_or(u64::MAX), 0)
    }

    /// The op for the lanes, with memory for its result.
    #[inline]
    fn prepare(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Endpoint,
        ask: &Ask<C>,
    ) -> Result<(Work, Pending<C>)> {
        let (rank, size) = (comm.rank(), comm.size());
        let (numel, flat, offset, valid) = match ask.rows {
            Rows::Pieces(_) => (ask.numel, false, 0, ask.numel),
            Rows::Flat { total, .. } => {
                let (offset, valid) = flat_shard(total, size, rank);
                (total, true, offset, valid)
            }
        };
        let mut block: Option<Block> = None;
        if ask.output.is_null() {
            let bytes = ask.numel * ask.finish.output.size();
            let reserved = q.reserved.take();
            block = match reserved.filter(|(_, had)| *had == bytes) {
                Some((block, _)) => Some(block),
                None => {
                    reserved.into_iter().for_each(|(b, _)| q.cache.put(b));
                    Some(q.cache.take(bytes)?)
                }
            };
        }
        let output = block.map_or(ask.output, |b| b.ptr);
        let ordinal = q.lanes[index]
            .ordinal
            .unwrap_or_else(|| comm.next_ordinal());
        let call = Call {
            flat,
            types: Some((ask.dtype, ask.op)),
            tag: ask.tag,
            numel: numel as u64,
            scale: ask.finish.scale,
            ..self.call(ordinal, CallKind::Submit)
        };
        let work = Work {
            rows: ask.rows,
            size,
            numel: ask.numel,
            dtype: ask.dtype,
            op: ask.op,
            finish: ask.finish,
            output,
            output_is_ours: block.is_some(),
            borrow: ask.borrow,
            call,
        };
        let pending = Pending {
            ticket: self.nonce | (q.tickets + 1),
            tag: ask.tag,
            payload: ask.payload,
            data: output,
            block,
            numel: ask.numel,
            valid,
            offset,
            dtype: ask.finish.output,
        };
        Ok((work, pending))
    }

    /// Counts an accepted op.
    #[inline]
    fn count(&self, q: &mut Queue<C>, index: usize, work: &Work) {
        q.tickets += 1;
        if q.lanes[index].ordinal.is_none() {
            self.first_use(q, index, work.call.ordinal);
        }
        let element = work.dtype.size() as u64;
        let all = work.numel as u64 * u64::from(work.size) * element;
        let real = if work.call.flat {
            work.call.numel * element
        } else {
            all
        };
        self.counters.payload_bytes.add(real);
        self.counters.padding_bytes.add(all - real);
    }

    /// Notes the number that the bucketer has got on a comm.
    #[cold]
    fn first_use(&self, q: &mut Queue<C>, index: usize, ordinal: u32) {
        let (comm, comm_id) = (q.lanes[index].comm.clone(), q.lanes[index].comm_id);
        for lane in q.lanes.iter_mut().filter(|l| l.comm_id == comm_id) {
            lane.ordinal = Some(ordinal);
        }
        q.uses.push(Use {
            comm,
            comm_id,
            ordinal,
            staging: 0,
        });
    }

    /// Notes how much staging a comm has by now.
    fn measure(&self, q: &mut Queue<C>, comm: &Endpoint) {
        if let Some(known) = q.uses.iter_mut().find(|u| u.comm_id == comm.id()) {
            known.staging = known.staging.max(comm.staging());
        }
        let all = q.uses.iter().map(|u| u.staging).sum();
        self.counters.staging_bytes_peak.raise(all);
    }

    /// Puts an op into the open bucket of its lane. On error nothing has changed.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    unsafe fn gather(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Endpoint,
        ask: &Ask<C>,
    ) -> Result<u64> {
        let (work, pending) = self.prepare(q, index, comm, ask)?;
        let mut meter = Meter::default();
        let rare = q.tickets.is_multiple_of(SAMPLE);
        let start = (rare || work.bytes() >= TIMED).then(Instant::now);
        // SAFETY: by the promise of this function.
        let taken = unsafe { comm.submit(q.lanes[index].id, &work, &self.pool, &mut meter) };
        if let Some(start) = start {
            let times = if work.bytes() >= TIMED { 1 } else { SAMPLE };
            let spent =
                (start.elapsed().as_nanos() as u64).saturating_sub(meter.wait_ns + meter.reduce_ns);
            self.counters.pack_ns.add(spent * times);
        }
        self.counters.meter(&meter);
        if let Err(e) = taken {
            pending.block.into_iter().for_each(|b| q.cache.put(b));
            return Err(self.refused(q, e));
        }
        self.count(q, index, &work);
        self.counters.ops_bucketed.add(1);
        let ticket = pending.ticket;
        let lane = &mut q.lanes[index];
        lane.taken += 1;
        if let Some(open) = &mut lane.open {
            open.used += work.numel;
            open.ops.push_back(pending);
        }
        Ok(ticket)
    }

    /// As [`Bucketer::gather`], into a bucket that is opened for it if need be.
    ///
    /// # Safety
    /// As for `submit`.
    unsafe fn gather_first(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Arc<Endpoint>,
        ask: &Ask<C>,
    ) -> Result<u64> {
        if q.lanes[index].open.is_none() {
            let open = Open {
                comm: comm.clone(),
                order: q.orders + 1,
                used: 0,
                ops: q.spare.pop().unwrap_or_default(),
            };
            q.lanes[index].open = Some(open);
        }
        // SAFETY: by the promise of this function.
        let taken = unsafe { self.gather(q, index, comm, ask) };
        let open = &mut q.lanes[index].open;
        match open.as_ref().map_or(0, |o| o.ops.len()) {
            0 => *open = None,
            1 => q.orders += 1,
            _ => {}
        }
        taken
    }

    /// The common case of a submit: the op fits into the open bucket of the lane that was used last,
    /// with room to spare, so that nothing else has to happen. None: it is not that case.
    ///
    /// # Safety
    /// As for `submit`.
    #[inline]
    pub unsafe fn submit_fitting(&self, comm: &Endpoint, ask: &Ask<C>) -> Option<Result<u64>> {
        let mut q = self.lock();
        let index = q.recent;
        let lane = q.lanes.get(index)?;
        let same = lane.comm_id == comm.id() && lane.dtype == ask.dtype && lane.op == ask.op;
        let left = lane.capacity? - lane.open.as_ref()?.used;
        if !same || ask.numel >= left || q.closing || q.owes() {
            return None;
        }
        // SAFETY: by the promise of this function.
        Some(unsafe { self.gather(&mut q, index, comm, ask) })
    }

    /// Carries out an op that is larger than a bucket; it is in `flights`, or `due`, afterwards.
    ///
    /// # Safety
    /// As for `submit`.
    unsafe fn direct(
        &self,
        q: &mut Queue<C>,
        index: usize,
        comm: &Arc<Endpoint>,
        ask: &Ask<C>,
        nested: bool,
    ) -> Result<u64> {
        let (work, pending) = self.prepare(q, index, comm, ask)?;
        let mut meter = Meter::default();
        // SAFETY: by the promise of this function.
        let done = unsafe { comm.direct(&work, &self.pool, &mut meter) };
        self.counters.meter(&meter);
        if let Err(e) = done {
            pending.block.into_iter().for_each(|b| q.cache.put(b));
            return Err(self.refused(q, e));
        }
        self.count(q, index, &work);
        self.counters.ops_direct.add(1);
        self.counters.collectives_launched.add(1);
        self.measure(q, comm);
        let ticket = pending.ticket;
        let mut ops = q.spare.pop().unwrap_or_default();
        ops.push_back(pending);
        let flight = Flight {
            comm: comm.clone(),
            lane: 0,
            first: 0,
            end: 1,
            ops,
            outcome: Some(Outcome {
                done: 1,
                failure: None,
            }),
            direct: true,
            owed: false,
        };
        if nested {
            q.due.push_back(flight);
            self.is_due.store(true, Ordering::Relaxed);
        } else {
            q.flights.push_back(flight);
        }
        Ok(ticket)
    }

    /// A submit that a failed comm refused is a failure that the next flush tells of.
    fn refused(&self, q: &mut Queue<C>, e: Error) -> Error {
        if is_sticky(e.status) {
            q.note(&Arc::new(e.clone()));
        }
        e
    }

    /// Launches the open bucket of a lane; a comm that has failed makes it a failed flight.
    fn launch_lane(&self, q: &mut Queue<C>, index: usize, full: bool) -> Result<()> {
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
        let outcome = outcome.map(|(done, e)| Outcome {
            done,
            failure: Some(Arc::new(e)),
        });
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
    fn complete(&self, q: &mut Queue<C>, index: usize, upto: u64, limit: Option<Instant>) -> bool {
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
    fn hand_out(&self, q: &mut Queue<C>, index: usize) -> Option<(Completion<C>, Option<Block>)> {
        let flight = q.flights.get_mut(index)?;
        let taken = Self::take_op(flight);
        if flight.ops.is_empty() {
            let flight = q.flights.remove(index)?;
            q.spare.push(flight.ops);
        }
        taken.map(|(op, error)| self.completion(q, op, error))
    }

    /// Hands out the next direct op that a callback submitted.
    fn hand_out_due(&self, q: &mut Queue<C>) -> Option<(Completion<C>, Option<Block>)> {
        self.is_due.store(q.due.len() > 1, Ordering::Relaxed);
        let mut flight = q.due.pop_front()?;
        let (op, error) = Self::take_op(&mut flight)?;
        q.spare.push(flight.ops);
        Some(self.completion(q, op, error))
    }

    fn take_op(flight: &mut Flight<C>) -> Option<(Pending<C>, Option<Arc<Error>>)> {
        let op = flight.ops.pop_front()?;
        let number = flight.first;
        flight.first += 1;
        let failed = flight.outcome.as_ref().filter(|o| number >= o.done);
        Some((op, failed.and_then(|o| o.failure.clone())))
    }

    /// What the callback of `op` is told; the op counts as handed back from here on.
    fn completion(
        &self,
        q: &mut Queue<C>,
        op: Pending<C>,
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
            shard: block.map_or(0, |b| b.arm()),
            dtype: op.dtype,
            error,
        };
        (completion, block)
    }

    /// What is known of a ticket.
    fn find(&self, q: &Queue<C>, ticket: u64) -> Result<Found> {
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
enum Found {
    InFlight { comm: u64, lane: u32, upto: u64 },
    Over,
}

/// Whether ranks may differ after such an error, so that the comm is at its end.
pub fn is_sticky(status: Status) -> bool {
    matches!(
        status,
        Status::Desync
            | Status::PeerLost
            | Status::Timeout
            | Status::Aborted
            | Status::Transport
            | Status::Panic
    )
}

impl<C> Drop for Bucketer<C> {
    fn drop(&mut self) {
        let q = self.queue.get_mut().unwrap_or_else(PoisonError::into_inner);
        q.lanes.iter_mut().for_each(queue::Lane::close);
    }
}
