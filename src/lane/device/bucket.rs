//! An open bucket in device memory: where each op's rows lie in it, so that the collective can take it
//! as it is, however full it is.
//!
//! A collective wants its rows close together, but how long they will be is known only at the launch,
//! when they have been packed. So a bucket is laid out as it was filled at the same place of the round
//! before, which for a training loop is exact. What comes beyond goes into further segments, each
//! rank-major by itself and a collective of its own in the same group.

use super::memory::{Landing, Slot};
use crate::comm::engine::{Collective, Kind};
use crate::cuda::event::Event;
use crate::cuda::kernels::{Copy, Part, Rows};
use crate::cuda::CUstream;
use crate::dtype::{DType, Finish, Op};
use crate::error::Result;
use crate::lane::work::{self, Work};
use crate::lane::LaneId;
use crate::thread;

/// A segment beyond the expected is this part of a bucket, so that little of the last one is wasted.
const PART: usize = 8;
/// But not less than so many elements a row.
const LEAST: usize = 4096;

/// How ops of a lane travel.
#[derive(Clone, Copy)]
pub struct Route {
    pub kind: Kind,
    pub size: u32,
    pub max_count: usize,
    /// The engine takes rows that are not close together.
    pub strided: bool,
    pub stream: CUstream,
}

/// Elements `first..first + width` of every row, rank-major.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Segment {
    first: usize,
    width: usize,
}

/// Where the elements of an op lie in one segment.
struct Stretch {
    segment: Segment,
    /// First element of the op, and its place in the segment.
    from: usize,
    within: usize,
    count: usize,
}

/// One op inside.
struct Piece {
    at: usize,
    count: usize,
    finish: Finish,
    /// Where the result goes; null: it stays where the collective lands.
    output: *mut u8,
}

/// `CU_STREAM_PER_THREAD`: a name for another stream in each thread.
const PER_THREAD: usize = 2;

/// A stream that inputs come from, and the event after which they may be taken.
pub struct Producer {
    pub stream: CUstream,
    /// Whose it is, where that is a matter of the thread; else 0.
    thread: u64,
    pub event: Event,
}

/// Pieces to pack, with the stride and number of rows that the kernel is told for some of them.
pub type Copies = Vec<(Option<(usize, u32)>, Copy)>;

/// A bucket that fills up, or the one op of a direct one.
pub struct Bucket {
    pub dtype: DType,
    pub op: Op,
    /// Elements of each row that it takes, and that are taken.
    capacity: usize,
    pub fill: usize,
    /// What it will most likely hold.
    expected: usize,
    segments: Vec<Segment>,
    pieces: Vec<Piece>,
    pub slot: Slot,
    /// Where the rows are sent from: its own memory, or a direct op's as it lies.
    base: *const u8,
    pub landing: Landing,
    pub producers: Vec<Producer>,
    /// Borrowed inputs, packed at the launch.
    pub lent: Copies,
    /// Its lane, and its place among the buckets of the round.
    pub lane: LaneId,
    pub number: usize,
}

// SAFETY: the pointers are to memory that lives until the bucket's work has passed (rule 6), and the
// lane's lock lets one thread at a time use them.
unsafe impl Send for Bucket {}

impl Bucket {
    /// An empty one for `capacity` elements a row, sent from `base`.
    pub fn new(
        (dtype, op): (DType, Op),
        (capacity, expected): (usize, usize),
        base: *const u8,
        slot: Slot,
        landing: Landing,
    ) -> Bucket {
        Bucket {
            dtype,
            op,
            capacity,
            fill: 0,
            expected: expected.min(capacity),
            segments: Vec::new(),
            pieces: Vec::new(),
            base,
            slot,
            landing,
            producers: Vec::new(),
            lent: Vec::new(),
            lane: 0,
            number: 0,
        }
    }

    /// Whether no op is in it yet.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Whether its rows are not packed, but sent from the caller's memory.
    pub fn is_sent_as_it_lies(&self) -> bool {
        self.base != self.slot.send().cast_const()
    }

    /// Lays it out for `elements` a row, before the first op.
    pub fn expect(&mut self, elements: usize) {
        self.expected = elements.min(self.capacity);
    }

    /// Gives an op its place; and the address of its result, if that stays where it lands.
    pub fn place(&mut self, work: &Work, output: *mut u8, max_count: usize) -> *mut u8 {
        let end = self.fill + work.numel;
        let mut covered = self.segments.last().map_or(0, |s| s.first + s.width);
        while covered < end {
            let width = match self.expected.checked_sub(covered) {
                Some(left) if left > 0 => left,
                _ => (self.capacity / PART)
                    .max(LEAST)
                    .min(self.capacity - covered),
            };
            let width = width.min(max_count);
            assert!(width > 0, "an op beyond the bucket's capacity");
            self.segments.push(Segment {
                first: covered,
                width,
            });
            covered += width;
        }
        self.pieces.push(Piece {
            at: self.fill,
            count: work.numel,
            finish: work.finish,
            output,
        });
        let lands = self.landing.at.wrapping_add(self.fill * work.dtype.size());
        self.fill = end;
        lands
    }

    /// Elements `at..at + count` of each row, segment by segment.
    fn stretches(&self, at: usize, count: usize) -> impl Iterator<Item = Stretch> + '_ {
        let end = at + count;
        self.segments.iter().filter_map(move |&segment| {
            let from = at.max(segment.first);
            let upto = end.min(segment.first + segment.width);
            (from < upto).then(|| Stretch {
                segment,
                from: from - at,
                within: from - segment.first,
                count: upto - from,
            })
        })
    }

    /// How to pack the op that was placed last.
    ///
    /// # Safety
    /// The pieces of `work` are there to be read.
    pub unsafe fn copies(&self, work: &Work, out: &mut Copies) {
        let Some(piece) = self.pieces.last() else {
            return;
        };
        let (size, element) = (work.size, work.dtype.size());
        for stretch in self.stretches(piece.at, piece.count) {
            let Stretch {
                segment,
                from,
                within,
                count,
            } = stretch;
            let place = |r: u32| {
                (segment.first * size as usize + r as usize * segment.width + within) * element
            };
            if let (work::Rows::Flat { data, total }, true) = (work.rows, count == work.numel) {
                let lacking = (work.numel * size as usize - total) * element;
                let rows = Copy::rows(data, place(0), count * element, lacking);
                out.push((Some((segment.width * element, size)), rows));
                continue;
            }
            for r in 0..size {
                // SAFETY: by the promise of this function.
                let (row, valid) = unsafe { work.row(r) };
                let row = row.wrapping_add(from * element);
                let (bytes, real) = (count * element, valid.saturating_sub(from).min(count));
                out.push(match (count - real) * element {
                    0 => (None, Copy::piece(row, place(r), bytes)),
                    lacking => (Some((0, 1)), Copy::rows(row, place(r), bytes, lacking)),
                });
            }
        }
    }

    /// The collectives that move it: whole rows where little of them is empty.
    pub fn collectives(&self, route: &Route) -> Vec<Collective> {
        let element = self.dtype.size();
        let size = route.size as usize;
        let used = self.stretches(0, self.fill);
        used.map(|s| {
            let width = s.segment.width;
            let count = match route.strided && s.count < width - width / PART {
                true => s.count,
                false => width,
            };
            let start = s.segment.first * element;
            let recv = match route.kind {
                Kind::AllToAll => self.slot.exchange().wrapping_add(start * size),
                _ => self.landing.at.wrapping_add(start),
            };
            Collective {
                kind: route.kind,
                send: self.base.wrapping_add(start * size),
                recv,
                count,
                dtype: self.dtype,
                // AVG is a sum that our last step divides.
                op: if self.op == Op::Avg { Op::Sum } else { self.op },
                stride: width,
                stream: route.stream.cast(),
            }
        })
        .collect()
    }

    /// What is left to do with what the collectives deliver.
    pub fn reductions(&self, route: &Route, moved: &[Collective]) -> Vec<(Rows, Vec<Part>)> {
        let rows = |source: *const u8, stride, count| Rows {
            source,
            stride,
            count,
            op: self.op,
            dtype: self.dtype,
            size: route.size,
        };
        if route.kind != Kind::AllToAll {
            let plain = Finish::plain(self.dtype);
            let needed = |p: &&Piece| {
                let stays = p.output.is_null() || self.landing.is_callers;
                !(p.count == 0 || stays && p.finish == plain && self.op != Op::Avg)
            };
            let part = |p: &Piece| Part::new(self.target(p, 0), p.at, p.count, &p.finish);
            let parts: Vec<Part> = self.pieces.iter().filter(needed).map(part).collect();
            return Vec::from_iter(
                (!parts.is_empty()).then(|| (rows(self.landing.at, 0, 1), parts)),
            );
        }
        let mut all = Vec::new();
        for (segment, c) in self.segments.iter().zip(moved) {
            let mut parts = Vec::new();
            for p in &self.pieces {
                for s in self
                    .stretches(p.at, p.count)
                    .filter(|s| s.segment == *segment)
                {
                    let to = self.target(p, s.from);
                    parts.push(Part::new(to, s.within, s.count, &p.finish));
                }
            }
            all.push((rows(c.recv, c.count, route.size), parts));
        }
        all
    }

    /// Where element `from` of a piece's result goes.
    fn target(&self, p: &Piece, from: usize) -> *mut u8 {
        match p.output.is_null() {
            true => self
                .landing
                .at
                .wrapping_add((p.at + from) * self.dtype.size()),
            false => p.output.wrapping_add(from * p.finish.output.size()),
        }
    }

    /// The event of a producer's stream; and whether it is new.
    pub fn producer(
        &mut self,
        stream: CUstream,
        event: impl FnOnce() -> Result<Event>,
    ) -> Result<(usize, bool)> {
        let thread = match stream as usize {
            PER_THREAD => thread::number(),
            _ => 0,
        };
        let known = |p: &Producer| p.stream == stream && p.thread == thread;
        if let Some(index) = self.producers.iter().position(known) {
            return Ok((index, false));
        }
        let event = event()?;
        self.producers.push(Producer {
            stream,
            thread,
            event,
        });
        Ok((self.producers.len() - 1, true))
    }
}
