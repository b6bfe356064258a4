//! What a bucketer holds: open buckets in the order of their first op, buckets in flight in the order
//! of their launch, and the ops in them.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::sync::{Arc, Weak};

use super::Completion;
use crate::dtype::{DType, Op};
use crate::error::Error;
use crate::lane::{Endpoint, LaneId};
use crate::memory::{Block, Cache};

/// An accepted op. `C` is what the caller wants back with the result.
pub struct Pending<C> {
    pub ticket: u64,
    pub tag: u64,
    pub payload: C,
    pub data: *mut u8,
    /// The result's memory, if it is ours.
    pub block: Option<Block>,
    /// Device comm: a reference to the result's memory, if it is ours; else 0.
    pub shard: u64,
    /// Device comm: in whose order the result is ready.
    pub stream: *mut c_void,
    pub numel: usize,
    pub valid: usize,
    pub offset: usize,
    pub dtype: DType,
}

/// The ops that go together.
pub type Ops<C> = VecDeque<Pending<C>>;

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
    /// Ops that a call took out to hand them back, and did not come to, because a callback threw.
    pub owed: VecDeque<(Completion<C>, Option<Block>)>,
    /// Ops that failed since the last flush, for `wait`.
    pub failed: Vec<(u64, Arc<Error>)>,
    /// The first failure since the last flush.
    pub first_failure: Option<Arc<Error>>,
    pub cache: Cache,
    pub closing: bool,
    /// Memory for the result of the op that is being taken, had before anything changed,
    /// and its bytes.
    pub reserved: Option<(Block, usize)>,
    pub spare: Vec<Ops<C>>,
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
            cache,
            closing: false,
            reserved: None,
            spare: Vec::new(),
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
        let order = |lane: &Lane<C>| lane.open.as_ref().map(|o| o.order).filter(|&o| o < limit);
        let open = self
            .lanes
            .iter()
            .enumerate()
            .filter_map(|(i, l)| order(l).map(|o| (o, i)));
        open.min().map(|(_, index)| index)
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

    /// Notes a failure for the next flush.
    pub fn note(&mut self, error: &Arc<Error>) {
        self.first_failure.get_or_insert_with(|| error.clone());
    }
}
