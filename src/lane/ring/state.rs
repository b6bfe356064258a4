//! What one rank knows about its chunks: which are open, which travel, which are reduced.
//!
//! Everything here happens under the ring's lock and never waits. Chunks are published in the order
//! of the comm's sequence and reduced in that order; a chunk's memory is free again once all ranks
//! have reduced it, and the most recently freed is used first, so that little memory stays hot.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use super::carry::carry_out;
use super::desync;
use super::pack::Lent;
use crate::comm::control::INLINE;
use crate::comm::group::{Group, Stall};
use crate::comm::word::Fate;
use crate::dtype::{DType, Finish, Op};
use crate::error::{Error, Status};
use crate::fingerprint::{Chain, Words};
use crate::lane::work::{Meter, Work};
use crate::lane::{take_place, LaneId};

/// A stretch of one op inside a chunk.
pub struct Piece {
    /// Byte offset in the row.
    pub at: usize,
    /// Elements.
    pub count: usize,
    /// Where the result goes.
    pub output: *mut u8,
    /// This rank's own row, if it is read from the caller's memory; null: it was staged.
    pub own: *const u8,
    /// The op's last step.
    pub finish: Finish,
    /// Whether the result is written past the caches.
    pub past: bool,
}

/// What becomes of a chunk's bytes.
pub enum Content {
    /// Row r belongs to rank r: its pieces are reduced.
    Rows {
        /// Type of the elements.
        dtype: DType,
        /// How they are reduced.
        op: Op,
        /// What lies in them.
        pieces: Vec<Piece>,
    },
    /// A whole op of ranks that are threads: each reads its row of everybody's input.
    Lent {
        /// This rank's op; its line says where it is.
        work: *const Work,
    },
    /// The same bytes for everybody: a part of an all-gather.
    Gather {
        /// Where this part of rank 0's bytes goes.
        output: *mut u8,
        /// From one rank's place to the next.
        stride: usize,
        /// Bytes.
        bytes: usize,
    },
    /// No bytes: ranks only meet.
    Nothing,
}

/// A chunk of this rank.
pub struct Chunk {
    /// Its memory; none yet, or no bytes.
    pub slot: Option<u32>,
    /// The lane it belongs to; none: a direct op or an all-gather.
    pub lane: Option<LaneId>,
    /// Ops of the lane that are complete with it.
    pub ops_end: u64,
    /// Bytes used of each row.
    pub fill: usize,
    /// Whether its rows lie in its line.
    pub inline: bool,
    /// What is in it.
    pub content: Content,
}

impl Chunk {
    /// Where it lies, as peers are told.
    fn place(&self) -> Option<u64> {
        match self.content {
            Content::Lent { work } => Some(work as u64),
            _ if self.inline => Some(INLINE),
            _ => self.slot.map(u64::from),
        }
    }
}

/// The chunks of one (bucketer, dtype, op).
pub struct RingLane {
    pub dtype: DType,
    pub op: Op,
    /// Ops staged in full.
    pub staged: u64,
    /// Ops reduced in full.
    pub reduced: u64,
    /// The part-full chunk.
    pub open: Option<Chunk>,
    /// What is still to be copied into it.
    pub lent: Vec<Lent>,
    /// Chunks published and not reduced.
    pub travelling: u32,
    /// Nobody asks for it any more.
    pub dead: bool,
}

impl RingLane {
    /// Adds a whole op to the open chunk, which is filled up to `fill` bytes of each row by it.
    #[inline(always)]
    pub fn add(&mut self, piece: Piece, fill: usize) {
        self.staged += 1;
        if let Some(chunk) = &mut self.open {
            chunk.ops_end = self.staged;
            chunk.fill = fill;
            if let Content::Rows { pieces, .. } = &mut chunk.content {
                pieces.push(piece);
            }
        }
    }
}

/// The state of one rank's ring.
pub struct State {
    /// Number of the next chunk to publish.
    pub next: u64,
    /// Chunks reduced.
    pub reduced: u64,
    /// Everything asked so far.
    pub chain: Chain,
    /// Bucketers that have used this comm.
    pub ordinals: u32,
    /// Published chunks whose memory is not free yet, oldest first.
    pub(super) closed: VecDeque<Chunk>,
    /// How many of them have memory.
    pub(super) slotted: usize,
    pub(super) free: Vec<u32>,
    pub(super) fresh: u32,
    /// Lanes with an open chunk, oldest first.
    pub open: VecDeque<LaneId>,
    pub lanes: Vec<Option<RingLane>>,
    spare: Vec<Vec<Piece>>,
    rows: Vec<*const u8>,
    sources: Vec<*const u8>,
    /// The rank whose line was missing last.
    awaited: u32,
    /// How far the slowest rank was when it was last waited for in vain, and how many chunks travelled.
    pub(super) stuck: Option<(u64, usize)>,
    /// Whether peers that sleep are still to be woken for what was stored.
    untold: bool,
    /// The first cause, once all that was committed before it is reduced.
    pub failure: Option<Arc<Error>>,
}

// SAFETY: the pointers are to callers' memory that stays valid until the piece is reduced or
// dropped (rule 6), and the ring's lock lets one thread at a time use them.
unsafe impl Send for State {}

/// Chunks smaller than this are not timed: reading the clock would cost more than it tells.
const TIMED: usize = 16 << 10;

impl State {
    pub fn new() -> State {
        State {
            next: 0,
            reduced: 0,
            chain: Chain::default(),
            ordinals: 0,
            closed: VecDeque::new(),
            slotted: 0,
            free: Vec::new(),
            fresh: 0,
            open: VecDeque::new(),
            lanes: Vec::new(),
            spare: Vec::new(),
            rows: Vec::new(),
            sources: Vec::new(),
            awaited: 0,
            stuck: None,
            untold: false,
            failure: None,
        }
    }

    #[inline]
    pub fn lane(&mut self, id: LaneId) -> &mut RingLane {
        match self.lanes.get_mut(id as usize) {
            Some(Some(lane)) => lane,
            _ => unreachable!("a lane is used between its opening and its closing"),
        }
    }

    pub fn open_lane(&mut self, dtype: DType, op: Op) -> LaneId {
        let lane = RingLane {
            dtype,
            op,
            staged: 0,
            reduced: 0,
            open: None,
            lent: Vec::new(),
            travelling: 0,
            dead: false,
        };
        take_place(&mut self.lanes, lane)
    }

    /// Forgets where the lane's results go. Its open chunk keeps its place, since peers may still
    /// have it open: what is published, and when, is a function of the sequence alone.
    pub fn close_lane(&mut self, group: &Group, id: LaneId) {
        let State {
            lanes,
            closed,
            spare,
            ..
        } = self;
        let Some(Some(lane)) = lanes.get_mut(id as usize) else {
            return;
        };
        // The caller's inputs are the caller's again, and peers are told what they were.
        lane.pack(group, &mut Meter::default());
        lane.dead = true;
        let own = closed.iter_mut().filter(|c| c.lane == Some(id));
        own.chain(lane.open.as_mut())
            .for_each(|chunk| empty(chunk, spare));
        self.bury(id);
    }

    fn bury(&mut self, id: LaneId) {
        let lane = self.lane(id);
        if lane.dead && lane.open.is_none() && lane.travelling == 0 {
            self.lanes[id as usize] = None;
        }
    }

    /// Takes one call into the sequence.
    #[inline]
    pub fn record(&mut self, group: &Group, words: &Words) {
        group.record(self.chain.calls, words);
        self.chain.extend(words);
    }

    pub fn pieces(&mut self) -> Vec<Piece> {
        // Room for a usual chunk at once: lists that grow one by one, as seldom used ones come to their first
        // full chunk, look like a leak for hours.
        self.spare.pop().unwrap_or_else(|| Vec::with_capacity(64))
    }

    /// Opens a chunk for a lane that has none.
    pub fn open(&mut self, id: LaneId, slot: Option<u32>) {
        let pieces = self.pieces();
        let lane = self.lane(id);
        lane.open = Some(Chunk {
            slot,
            lane: Some(id),
            ops_end: lane.staged,
            fill: 0,
            inline: false,
            content: Content::Rows {
                dtype: lane.dtype,
                op: lane.op,
                pieces,
            },
        });
        self.open.push_back(id);
    }

    pub(super) fn first_closed(&self) -> u64 {
        self.next - self.closed.len() as u64
    }

    /// Publishes a chunk; a line is free. Its number. `progress` follows, before anybody waits.
    #[inline(always)]
    pub fn publish(&mut self, group: &Group, chunk: Chunk) -> u64 {
        let seq = self.next;
        self.closed.push_back(chunk);
        let Some(chunk) = self.closed.back_mut() else {
            return seq;
        };
        let lane = chunk.lane;
        if let (Some(_), Some(slot)) = (lane, chunk.slot) {
            if group.inline_stride(chunk.fill).is_some() {
                group.put_inline(seq, slot, chunk.fill);
                chunk.inline = true;
                chunk.slot = None;
                self.free.push(slot);
            }
        }
        group.publish(seq, &self.chain, chunk.place());
        let slotted = chunk.slot.is_some();
        self.slotted += usize::from(slotted);
        self.next += 1;
        if let Some(id) = lane {
            self.lane(id).travelling += 1;
        }
        self.untold = true;
        if slotted {
            // What is reduced next may take long.
            self.tell(group);
        }
        seq
    }

    /// Wakes the peers that sleep for what this rank has stored.
    #[inline]
    fn tell(&mut self, group: &Group) {
        if std::mem::take(&mut self.untold) {
            group.wake_sleepers();
        }
    }

    /// What this rank waits for when it waits: the first missing line, or the slowest reader.
    /// None: nothing any more.
    pub fn stall(&self, group: &Group) -> Option<Stall> {
        if self.reduced < self.next {
            let seq = self.reduced;
            let mut ranks = 0..group.size();
            return ranks
                .find(|&r| !group.is_published(r, seq))
                .map(|rank| Stall::Line { rank, seq });
        }
        let (rank, count) = group.slowest();
        let seq = self.first_closed();
        (count <= seq).then_some(Stall::Consumed { rank, seq })
    }

    /// Reduces every chunk that all ranks have published; notices the end of the group.
    pub fn progress(&mut self, group: &Group, meter: &mut Meter) {
        let before = self.reduced;
        loop {
            // Looked at first: what was committed before the end has all its lines by then. What
            // cannot be carried out now never will be, whatever the word says.
            let ended = group.has_ended();
            while self.failure.is_none() && self.reduced < self.next && self.step(group, meter) {}
            if ended && self.failure.is_none() {
                self.fail(group);
            }
            if ended || !group.has_ended() {
                break;
            }
        }
        if self.reduced > before {
            group.set_consumed(self.reduced);
            self.untold = true;
        }
        self.tell(group);
    }

    fn step(&mut self, group: &Group, meter: &mut Meter) -> bool {
        let seq = self.reduced;
        if !group.is_published(self.awaited, seq) {
            self.mourn(group, seq);
            return false;
        }
        let index = (seq - self.first_closed()) as usize;
        let mut slots = std::mem::take(&mut self.rows);
        slots.clear();
        let mut agreed = true;
        let mut possible = true;
        for rank in 0..group.size() {
            let Some(line) = group.published(rank, seq) else {
                self.awaited = rank;
                self.rows = slots;
                self.mourn(group, seq);
                return false;
            };
            agreed &= group.rank() == rank || self.same(group, seq, &line.chain);
            let mine = &self.closed[index];
            let place = line.place.and_then(|place| match mine.content {
                // Only a rank that agrees has lent, and only among threads.
                Content::Lent { .. } if agreed => Some(place as *const u8),
                _ if mine.inline => (place == INLINE).then(|| group.inline_rows(rank, seq)),
                _ => group.chunk(rank, place),
            });
            possible &= place.is_some() == line.place.is_some();
            possible &= place.is_some() == mine.place().is_some();
            slots.push(place.unwrap_or(std::ptr::null()));
        }
        self.rows = slots;
        if !agreed {
            group.abort(&desync::describe(group, seq));
        } else if !possible {
            let text = format!("chunk {seq}: a rank published a place that does not exist");
            group.abort(&Error::new(Status::Transport, text));
        } else if group.commit(seq) == Fate::Committed {
            self.finish(group, index, meter);
            return true;
        }
        // Over: `progress` finds out whether the chunk was committed before.
        false
    }

    /// Ends the group if a rank is gone that has not published chunk `seq` before. Any rank: the awaited
    /// one may be alive and stay away for long, or for ever.
    fn mourn(&self, group: &Group, seq: u64) {
        if let Some(gone) = group.lost(|rank| !group.is_published(rank, seq)) {
            group.abort(&gone);
        }
    }

    /// Whether a peer's line says what this rank's own line for the chunk says.
    fn same(&self, group: &Group, seq: u64, theirs: &Chain) -> bool {
        group
            .published(group.rank(), seq)
            .is_some_and(|own| own.chain == *theirs)
    }

    fn finish(&mut self, group: &Group, index: usize, meter: &mut Meter) {
        let State {
            closed,
            rows,
            sources,
            lanes,
            spare,
            ..
        } = self;
        let chunk = &mut closed[index];
        let start = (chunk.fill >= TIMED).then(Instant::now);
        // SAFETY: the chunk is committed: every rank's rows are complete and stay until all have
        // consumed it; outputs and own rows are valid until their op is done (rule 6).
        unsafe { carry_out(group, chunk, rows, sources) };
        if let Some(start) = start {
            meter.reduce_ns += start.elapsed().as_nanos() as u64;
        }
        empty(chunk, spare);
        let (id, ops_end) = (chunk.lane, chunk.ops_end);
        self.reduced += 1;
        if let Some(id) = id {
            if let Some(Some(lane)) = lanes.get_mut(id as usize) {
                lane.reduced = ops_end;
                lane.travelling -= 1;
            }
            self.bury(id);
        }
    }

    /// The group has ended and everything committed is reduced: nothing else will be.
    fn fail(&mut self, group: &Group) {
        let State {
            closed,
            lanes,
            spare,
            ..
        } = self;
        let lanes = lanes.iter_mut().flatten();
        let open = lanes.filter_map(|lane| {
            lane.lent.clear();
            lane.open.as_mut()
        });
        closed
            .iter_mut()
            .chain(open)
            .for_each(|chunk| empty(chunk, spare));
        let unknown = || Error::new(Status::Aborted, "the group has ended");
        self.failure = Some(Arc::new(group.cause().unwrap_or_else(unknown)));
    }
}

/// Drops what a chunk points to; the chunk itself keeps its place and its memory.
fn empty(chunk: &mut Chunk, spare: &mut Vec<Vec<Piece>>) {
    if let Content::Rows { pieces, .. } = std::mem::replace(&mut chunk.content, Content::Nothing) {
        let mut pieces = pieces;
        pieces.clear();
        if spare.len() < 64 {
            spare.push(pieces);
        }
    }
}
