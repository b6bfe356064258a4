//! What a bucketer holds: open buckets in the order of their first op, buckets in flight in the order
//! of their launch, and the ops in them.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Weak};

use super::hand::Hand;
use super::stats::Stopwatch;
use crate::dtype::{DType, Op};
use crate::error::{Error, Result, Status};
use crate::lane::work::Work;
use crate::lane::{Endpoint, LaneId};
use crate::memory::{self, Block, Cache};

/// An accepted op. `C` is what the caller wants back with the result.
pub struct Pending<C> {
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
    /// Names the memory while the callback runs, if it is ours; else 0. On a device comm: a reference to it
    /// from the beginning.
    pub shard: u64,
    /// Device comm: in whose order the result is ready.
    pub stream: *mut c_void,
    /// The result's memory, if it is ours.
    pub(super) block: Option<Block>,
    /// Type of the result.
    pub dtype: DType,
}

/// The ops that go together.
pub type Ops<C> = Vec<Pending<C>>;

/// An open bucket.
pub struct Open<C> {
    pub comm: Arc<Endpoint>,
    /// Its place among open buckets: when its first op came.
    pub order: u64,
    /// Elements of each rank's part that are taken.
    pub used: usize,
    pub ops: Ops<C>,
}

/// Where ops of one (comm, dtype, op) gather.
pub struct Lane<C> {
    pub comm: Weak<Endpoint>,
    pub comm_id: u64,
    pub id: LaneId,
    pub dtype: DType,
    pub op: Op,
    /// Elements of each rank's part that a bucket takes; none: no bucketing.
    pub capacity: Option<usize>,
    /// The bucketer's number on the comm; none before its first op there.
    pub ordinal: Option<u32>,
    /// Ops that this lane has taken.
    pub taken: u64,
    /// The comm's staging when it was last measured.
    pub staging: u64,
    pub open: Option<Open<C>>,
    pub closed: bool,
}

impl<C> Lane<C> {
    /// Takes the lane off its comm, once.
    pub fn close(&mut self) {
        if !std::mem::replace(&mut self.closed, true) {
            if let Some(comm) = self.comm.upgrade() {
                comm.close_lane(self.id);
            }
        }
    }
}

/// How a bucket ended: its lane's first `done` ops are fine, `failure` holds for the rest.
pub struct Outcome {
    pub done: u64,
    pub failure: Option<Arc<Error>>,
}

/// A launched bucket, or a direct op that is done.
pub struct Flight<C> {
    pub comm: Arc<Endpoint>,
    pub lane: LaneId,
    /// The lane's number of the first op in `ops`, counted from 0, and of the one past the last.
    pub first: u64,
    pub end: u64,
    pub ops: Ops<C>,
    pub outcome: Option<Outcome>,
    pub direct: bool,
    /// A call has begun to hand back all that was launched, and a callback has thrown.
    pub owed: bool,
}

/// A comm that this bucketer has used.
pub struct Use {
    pub comm: Weak<Endpoint>,
    pub comm_id: u64,
    /// The bucketer's number on it, counted by first use.
    pub ordinal: u32,
    pub staging: u64,
}

/// Lists that are kept for the ops of later buckets.
const SPARE: usize = 8;

/// Everything behind the bucketer's lock.
pub struct Queue<C> {
    pub tickets: u64,
    pub orders: u64,
    pub uses: Vec<Use>,
    pub lanes: Vec<Lane<C>>,
    /// The lane of the last submit: most often the next one's, too.
    pub recent: usize,
    pub flights: VecDeque<Flight<C>>,
    /// Direct ops that a callback submitted: theirs run right after the running one.
    pub due: VecDeque<Flight<C>>,
    /// What calls took out to hand it back, and did not come to, because a callback threw.
    pub owed: VecDeque<Hand<C>>,
    /// Ops that failed since the last flush, for `wait`.
    pub failed: Vec<(u64, Arc<Error>)>,
    /// The first failure since the last flush.
    pub first_failure: Option<Arc<Error>>,
    pub results: Results,
    pub closing: bool,
    pub stopwatch: Stopwatch,
    spare: Vec<Ops<C>>,
}

/// Memory for results.
pub struct Results {
    pub cache: Cache,
    /// Memory for the result of the op that is being taken, had before anything changed, and its bytes.
    pub reserved: Option<(Block, usize)>,
}

impl Results {
    /// Memory for an op's result, if the op brings none.
    #[inline]
    pub fn take_for(&mut self, work: &mut Work) -> Result<Option<Block>> {
        if !work.output.is_null() {
            return Ok(None);
        }
        let bytes = work.numel * work.finish.output.size();
        let (block, at) = match self.reserved {
            None => self.cache.take(bytes)?,
            Some(_) => self.take_reserved(bytes)?,
        };
        work.output = at;
        work.output_is_ours = true;
        Ok(Some(block))
    }

    /// What is reserved, unless an op that came in between needs another size.
    #[cold]
    fn take_reserved(&mut self, bytes: usize) -> Result<(Block, *mut u8)> {
        let reserved = self.reserved.take();
        match reserved.filter(|(_, had)| *had == bytes) {
            Some((block, _)) => Ok((block, block.ptr())),
            None => {
                reserved.into_iter().for_each(|(b, _)| self.cache.put(b));
                self.cache.take(bytes)
            }
        }
    }

    /// Gives idle memory back.
    pub fn free_idle(&mut self) {
        let reserved = self.reserved.take();
        reserved.into_iter().for_each(|(b, _)| self.cache.put(b));
        self.cache.free_idle();
    }
}

// SAFETY: the pointers are to results' memory, which is ours or, by rule 6, valid until the callback
// has returned; the bucketer's lock lets one thread at a time use them.
unsafe impl<C: Send> Send for Queue<C> {}

impl<C> Queue<C> {
    pub fn new(cache: Cache) -> Queue<C> {
        Queue {
            tickets: 0,
            orders: 0,
            uses: Vec::new(),
            lanes: Vec::new(),
            recent: 0,
            flights: VecDeque::new(),
            due: VecDeque::new(),
            owed: VecDeque::new(),
            failed: Vec::new(),
            first_failure: None,
            results: Results {
                cache,
                reserved: None,
            },
            closing: false,
            stopwatch: Stopwatch::default(),
            spare: Vec::new(),
        }
    }

    /// Opens a bucket of a lane; it counts once an op is in it ([`Queue::opened`]).
    pub fn open(&mut self, index: usize, comm: Arc<Endpoint>) {
        self.lanes[index].open = Some(Open {
            comm,
            order: self.orders + 1,
            used: 0,
            ops: self.spare.pop().unwrap_or_default(),
        });
    }

    /// The first op has come into a lane's bucket, or has been refused.
    pub fn opened(&mut self, index: usize) {
        let open = &mut self.lanes[index].open;
        match open.as_ref().map(|o| (o.ops.len(), o.order)) {
            Some((0, _)) => {
                let ops = open.take().map(|o| o.ops);
                self.spare.extend(ops);
            }
            Some((_, order)) => self.orders = self.orders.max(order),
            None => {}
        }
    }

    /// A list for ops, used before if there is one.
    pub fn list(&mut self) -> Ops<C> {
        self.spare.pop().unwrap_or_default()
    }

    /// Takes back the list of ops that are over.
    pub fn recycle(&mut self, mut ops: Ops<C>) {
        ops.clear();
        if ops.capacity() > 0 && self.spare.len() < SPARE {
            self.spare.push(ops);
        }
    }

    /// The bucketer's number on a comm it has used.
    pub fn ordinal(&self, comm_id: u64) -> Option<u32> {
        self.uses
            .iter()
            .find(|u| u.comm_id == comm_id)
            .map(|u| u.ordinal)
    }

    /// Buckets of a comm in flight.
    pub fn in_flight(&self, comm_id: u64) -> usize {
        self.flights
            .iter()
            .filter(|f| !f.direct && f.comm.id() == comm_id)
            .count()
    }

    /// The oldest flight of a comm.
    pub fn oldest(&self, comm_id: u64) -> Option<usize> {
        self.flights.iter().position(|f| f.comm.id() == comm_id)
    }

    /// The open bucket that was opened first, of those opened before `limit`.
    pub fn first_open(&self, limit: u64) -> Option<usize> {
        let (order, index) = self.next_open(0)?;
        (order < limit).then_some(index)
    }

    /// The open bucket that was opened first, of those opened after number `after`: its number, and its
    /// lane.
    pub fn next_open(&self, after: u64) -> Option<(u64, usize)> {
        let order = |lane: &Lane<C>| lane.open.as_ref().map(|o| o.order).filter(|&o| o > after);
        let open = self.lanes.iter().enumerate();
        open.filter_map(|(i, l)| order(l).map(|o| (o, i))).min()
    }

    /// The number of the open bucket of a comm that was opened first.
    pub fn oldest_open(&self, comm_id: u64) -> Option<u64> {
        let open = self.lanes.iter().filter(|l| l.comm_id == comm_id);
        open.filter_map(|l| l.open.as_ref().map(|o| o.order)).min()
    }

    /// Whether a call ended by an exception owes callbacks that the next call runs first.
    pub fn owes(&self) -> bool {
        !self.owed.is_empty()
            || !self.due.is_empty()
            || self.flights.front().is_some_and(|f| f.owed)
    }

    /// Whether ops are pending.
    pub fn is_idle(&self) -> bool {
        self.flights.is_empty()
            && self.due.is_empty()
            && self.owed.is_empty()
            && self.lanes.iter().all(|l| l.open.is_none())
    }

    /// Forgets comms that are gone.
    pub fn forget_dead(&mut self) {
        self.lanes
            .retain(|l| l.open.is_some() || l.comm.strong_count() > 0);
        self.uses.retain(|u| u.comm.strong_count() > 0);
        self.recent = 0;
    }

    /// Ops end with an error: their memory goes back, and `wait` and the next flush tell of it.
    pub fn fail(&mut self, ops: &mut Ops<C>, from: usize, error: &Arc<Error>) {
        if error.status != Status::Cancelled && from < ops.len() {
            self.note(error);
        }
        for op in ops.iter_mut().skip(from) {
            op.data = std::ptr::null_mut();
            let block = op.block.take();
            block.into_iter().for_each(|b| self.results.cache.put(b));
            if op.shard != 0 {
                let _ = memory::release(std::mem::take(&mut op.shard));
            }
            self.failed.push((op.ticket, error.clone()));
        }
    }

    /// Notes a failure for the next flush.
    pub fn note(&mut self, error: &Arc<Error>) {
        self.first_failure.get_or_insert_with(|| error.clone());
    }
}
