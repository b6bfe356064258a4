//! The bucketer: takes ops, fills buckets, launches them in one order on all ranks, and hands every
//! accepted op back exactly once.
//!
//! What is launched, and when, follows from the sequence of calls alone (rule 1). No lock is held
//! while a caller's code runs: a call is a [`Turn`] that hands out finished ops one by one, and the
//! caller runs its callback between two steps. So an exception may pass, a callback may submit, and
//! what is still owed stays in the queue for the next call.

mod device;
mod hand;
mod plan;
mod queue;
mod stats;
mod take;
mod turn;

#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::plan::Plan;
pub use self::queue::Pending;
use self::queue::Queue;
pub use self::stats::Counters;
pub use self::turn::Turn;
use crate::error::{Error, Result, Status};
use crate::fingerprint::CallKind;
use crate::lane::work::Work;
use crate::lane::Endpoint;
use crate::lock::{Guard, Lock};
use crate::memory::{Cache, Pool};
use crate::thread;

/// Default of `bucket_bytes`.
pub const DEFAULT_BUCKET: u64 = 25 << 20;

/// Buckets of one bucketer and comm that may be in flight when another is launched.
const IN_FLIGHT: usize = 2;

/// One op as the caller asks for it, checked against the comm.
#[derive(Clone, Copy)]
pub struct Ask<C> {
    /// What is asked. The bucketer adds its own part: its number, and memory for the result if
    /// `output` is null.
    pub work: Work,
    /// Comes back with the result.
    pub payload: C,
}

/// An op that is not checked yet: what a submit has before it knows the comm.
pub trait Asks<C> {
    /// The op, if it is of a plain kind, as most are, and nothing is wrong with it for a rank of so many, but
    /// for how large it is.
    fn plain(&self, place: (u32, u32)) -> Option<Ask<C>>;
    /// The op, checked against its comm.
    fn check(&self, comm: &Endpoint) -> Result<Ask<C>>;
}

/// A finished op, for its callback.
pub struct Completion<'a, C> {
    /// The op.
    pub op: &'a Pending<C>,
    /// Why it failed, if it did.
    pub error: Option<&'a Error>,
}

/// Takes ops of type-erased memory; `C` is what comes back with each.
pub struct Bucketer<C> {
    /// Upper bits of its tickets.
    nonce: u64,
    bucket_bytes: Option<u64>,
    pool: Arc<Pool>,
    /// Held by the call that runs callbacks.
    turn: Lock<()>,
    /// Whether a callback has submitted direct ops, whose callbacks come right after it.
    is_due: AtomicBool,
    /// Whether it has been used on device comms.
    devices: AtomicBool,
    queue: Lock<Queue<C>>,
    counters: Counters,
}

type Held<'a, C> = Guard<'a, Queue<C>>;

const TICKET_BITS: u32 = 40;

impl<C: Copy + Send> Bucketer<C> {
    /// A bucketer. `bucket_bytes`: none turns bucketing off.
    pub fn new(bucket_bytes: Option<u64>, pool: Arc<Pool>) -> Arc<Bucketer<C>> {
        static NONCES: AtomicU64 = AtomicU64::new(1);
        Arc::new(Bucketer {
            nonce: NONCES.fetch_add(1, Ordering::Relaxed) << TICKET_BITS,
            bucket_bytes,
            queue: Lock::new(Queue::new(Cache::new(pool.clone()))),
            pool,
            turn: Lock::new(()),
            is_due: AtomicBool::new(false),
            devices: AtomicBool::new(false),
            counters: Counters::default(),
        })
    }

    #[inline(always)]
    fn lock(&self) -> Held<'_, C> {
        self.queue.lock(thread::this())
    }

    /// Refuses a call that an allocator function makes while this bucketer waits for it.
    #[inline(always)]
    pub fn refuse_inner_call(&self) -> Result<()> {
        if self.queue.is_held_by(thread::this()) {
            return Err(inner_call());
        }
        Ok(())
    }

    /// Whether this thread is inside a call of this bucketer, that is: in a callback.
    #[inline]
    pub fn is_running_here(&self) -> bool {
        self.turn.is_held_by(thread::this())
    }

    #[inline]
    fn refuse_reentry(&self, what: &str) -> Result<()> {
        self.refuse_inner_call()?;
        if self.is_running_here() {
            return Err(reentry(what));
        }
        Ok(())
    }

    /// Its numbers; and the bytes it holds, now and at most.
    pub fn stats(&self) -> (&Counters, u64, u64) {
        let (now, peak) = self.pool.bytes();
        (&self.counters, now, peak)
    }

    /// Begins a call: what one of the functions below has planned.
    #[inline(always)]
    pub fn turn<'a>(&'a self, plan: Plan<'a, C>) -> Turn<'a, C> {
        Turn::new(self, plan)
    }

    /// Takes an op. The turn runs the callbacks that are due, and ends with the ticket.
    ///
    /// # Safety
    /// The pointers of `ask` are as the contract's rule 6 says.
    pub unsafe fn submit<'a>(comm: &'a Arc<Endpoint>, ask: &'a Ask<C>) -> Plan<'a, C> {
        Plan::Submit {
            comm,
            ask,
            ticket: 0,
        }
    }

    /// Starts the communication of all open buckets.
    pub fn launch(&self) -> Result<Plan<'static, C>> {
        self.refuse_reentry("launch")?;
        self.refuse_captures()?;
        Ok(Plan::launch(CallKind::Launch))
    }

    /// Launches, completes and hands back everything.
    pub fn flush(&self) -> Result<Plan<'static, C>> {
        self.refuse_reentry("flush")?;
        self.refuse_captures()?;
        Ok(Plan::launch(CallKind::Flush))
    }

    /// Hands back what is complete, without waiting for peers.
    pub fn poll(&self) -> Result<Plan<'static, C>> {
        self.refuse_reentry("poll")?;
        Ok(Plan::Poll { looked: false })
    }

    /// Hands back everything up to the op of `ticket`. `timeout`: none waits for the comm's own.
    pub fn wait(&self, ticket: u64, timeout: Option<Duration>) -> Result<Plan<'static, C>> {
        self.refuse_reentry("wait")?;
        self.refuse_captures()?;
        Ok(Plan::Wait {
            ticket,
            limit: timeout.and_then(|t| Instant::now().checked_add(t)),
            found: None,
        })
    }

    /// Completes what is launched, cancels the rest, hands all of it back; then nothing is left.
    pub fn close(&self) -> Result<Plan<'static, C>> {
        self.refuse_reentry("free")?;
        Ok(Plan::Close)
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
        let _turn = self.turn.lock(thread::this());
        let mut q = self.lock();
        if !q.is_idle() {
            let text = "release_buffers: ops are pending; expected a flush before";
            return Err(Error::new(Status::Busy, text));
        }
        q.results.free_idle();
        for lane in &q.lanes {
            if let Some(comm) = lane.comm.upgrade() {
                comm.release_buffers(lane.id);
            }
        }
        Ok(())
    }
}

#[cold]
fn inner_call() -> Error {
    let text = "bucketer: called by its own allocator; expected no call while it allocates";
    Error::new(Status::Reentrant, text)
}

#[cold]
fn reentry(what: &str) -> Error {
    let text = format!(
        "{what}: called by a callback of the same bucketer; expected it after the callback"
    );
    Error::new(Status::Reentrant, text)
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
        let lanes = &mut self.queue.get_mut().lanes;
        lanes.iter_mut().for_each(queue::Lane::close);
    }
}
