//! The open bucket of a lane: rows that fill up side by side, and all memory that their collective
//! will need, had before the first op counts, so that a launch cannot fail for want of it.

use std::sync::Arc;

use super::unit::{Landing, Piece, Unit};
use crate::comm::engine::Kind;
use crate::dtype::{DType, Op};
use crate::error::{Error, Result, Status};
use crate::fingerprint::Chain;
use crate::lane::work::Work;
use crate::lane::LaneId;
use crate::layout::total_bytes;
use crate::memory::{Buffer, Pool};

/// Buckets that a lane keeps: those of two in flight and of an open one, with what belongs to them.
const IDLE: usize = 9;

/// The memory of one bucket.
struct Memory {
    /// Rows, `stride` elements apart.
    send: Buffer,
    /// What the engine delivers.
    landing: Buffer,
    /// The rows in blocks, where a collective cannot take a whole bucket.
    packed: Option<Buffer>,
}

/// How the buckets of a lane travel.
#[derive(Clone, Copy)]
pub struct Route {
    pub kind: Kind,
    pub size: u32,
    pub max_count: usize,
}

/// What one (bucketer, dtype, op) has gathered and not launched.
pub struct BucketLane {
    dtype: DType,
    op: Op,
    pub staged: u64,
    pub done: u64,
    memory: Option<Memory>,
    /// The next bucket's, and its stride.
    next: Option<(Memory, usize)>,
    /// Elements from one row to the next, and elements of each row used.
    stride: usize,
    fill: usize,
    /// What the last bucket took: the next will most likely take as much.
    last: usize,
    pieces: Vec<Piece>,
    /// Buckets that have come back.
    idle: Vec<Buffer>,
    pub dead: bool,
    pub travelling: u32,
}

impl BucketLane {
    pub fn new(dtype: DType, op: Op) -> BucketLane {
        BucketLane {
            dtype,
            op,
            staged: 0,
            done: 0,
            memory: None,
            next: None,
            stride: 0,
            fill: 0,
            last: 0,
            pieces: Vec::new(),
            idle: Vec::new(),
            dead: false,
            travelling: 0,
        }
    }

    /// Type and operation of its ops.
    pub fn types(&self) -> (DType, Op) {
        (self.dtype, self.op)
    }

    /// Forgets everything that is not launched.
    pub fn clear(&mut self) {
        self.pieces.clear();
        self.memory = None;
        self.next = None;
        self.idle.clear();
    }

    /// Frees what is idle.
    pub fn release_buffers(&mut self) {
        self.idle.clear();
        self.next = None;
        self.last = 0;
    }

    /// Takes the memory of a unit back.
    pub fn recycle(&mut self, unit: Unit) {
        if !self.dead {
            self.idle.extend(unit.send.into_iter().chain(unit.recv));
            self.idle.truncate(IDLE);
        }
    }

    /// Memory of at least `bytes`: some that has come back, or new.
    fn buffer(&mut self, pool: &Arc<Pool>, bytes: usize) -> Result<Buffer> {
        let fits = |b: &Buffer| (bytes..=bytes.saturating_mul(2)).contains(&b.len());
        match self.idle.iter().position(fits) {
            Some(index) => Ok(self.idle.swap_remove(index)),
            None => Buffer::new(pool, bytes),
        }
    }

    /// Makes room for `numel` more elements in each row. On error nothing has changed.
    fn reserve(&mut self, numel: usize, route: Route, pool: &Arc<Pool>) -> Result<()> {
        let end = self.fill + numel;
        if self.memory.is_some() && end <= self.stride {
            return Ok(());
        }
        if let Some((memory, stride)) = self.next.take_if(|(_, stride)| end <= *stride) {
            if self.memory.is_none() {
                (self.memory, self.stride) = (Some(memory), stride);
                return Ok(());
            }
        }
        let stride = end.max(self.last).max(self.stride * 2).max(64);
        let memory = self.memory_for(stride, route, pool)?;
        let element = self.dtype.size();
        if let Some(old) = &self.memory {
            for r in 0..route.size as usize {
                // SAFETY: both hold `fill` elements from the start of every row on.
                unsafe {
                    let from = old.send.as_ptr().add(r * self.stride * element);
                    let to = memory.send.as_ptr().add(r * stride * element);
                    to.copy_from_nonoverlapping(from, self.fill * element);
                }
            }
        }
        (self.memory, self.stride) = (Some(memory), stride);
        Ok(())
    }

    /// Has the memory of the next bucket, for `numel` elements a row at least.
    pub fn prepare_next(&mut self, numel: usize, route: Route, pool: &Arc<Pool>) -> Result<()> {
        if self.next.as_ref().is_none_or(|(_, stride)| *stride < numel) {
            let stride = numel.max(self.fill).max(64);
            self.next = Some((self.memory_for(stride, route, pool)?, stride));
        }
        Ok(())
    }

    fn memory_for(&mut self, stride: usize, route: Route, pool: &Arc<Pool>) -> Result<Memory> {
        let (size, element) = (route.size, self.dtype.size());
        let Some(bytes) = total_bytes(stride, size, element) else {
            let text = format!(
                "a bucket of {stride} elements for {size} ranks is more than memory can hold"
            );
            return Err(Error::new(Status::NoMemory, text));
        };
        let landing = if route.kind == Kind::AllToAll {
            bytes
        } else {
            stride * element
        };
        let split = stride > route.max_count;
        Ok(Memory {
            send: self.buffer(pool, bytes)?,
            landing: self.buffer(pool, landing)?,
            packed: split.then(|| self.buffer(pool, bytes)).transpose()?,
        })
    }

    /// Packs an op. On error nothing has changed.
    ///
    /// # Safety
    /// The input of `work` is readable.
    pub unsafe fn add(&mut self, work: &Work, route: Route, pool: &Arc<Pool>) -> Result<()> {
        self.reserve(work.numel, route, pool)?;
        let element = self.dtype.size();
        if let Some(memory) = &self.memory {
            for r in 0..route.size {
                let at = (r as usize * self.stride + self.fill) * element;
                // SAFETY: the row has room for `numel` more elements; the bucket is ours alone.
                unsafe { work.copy_row(r, 0, work.numel, memory.send.as_ptr().add(at)) };
            }
        }
        self.pieces.push(Piece {
            at: self.fill,
            count: work.numel,
            output: work.output,
            finish: work.finish,
        });
        self.fill += work.numel;
        self.staged += 1;
        Ok(())
    }

    /// The bucket as one unit, ready to travel; none: it is empty.
    pub fn take(&mut self, id: LaneId, chain: Chain, route: Route) -> Option<Unit> {
        let memory = self.memory.take()?;
        let mut unit = Unit::new(chain, Some(id), self.staged);
        (unit.dtype, unit.op) = (self.dtype, self.op);
        unit.pieces = std::mem::take(&mut self.pieces);
        unit.count = self.fill;
        unit.block = route.max_count.min(self.fill.max(1));
        (self.last, self.fill) = (self.fill, 0);
        let stride = std::mem::take(&mut self.stride);
        let element = unit.dtype.size();
        let rows = memory.send.as_ptr();
        let packed = memory.packed.filter(|_| unit.block < unit.count);
        // SAFETY: the bucket holds size rows, `stride` apart, with `count` elements each; what they
        // are packed into, and what the engine delivers into, were reserved for `stride` of them.
        unsafe {
            let send = match packed {
                Some(packed) => {
                    pack(&unit, route.size, packed.as_ptr(), |r, at, n, to| {
                        let from = rows.add((r as usize * stride + at) * element);
                        to.copy_from_nonoverlapping(from, n * element);
                    });
                    packed
                }
                None => {
                    for r in 1..route.size as usize {
                        let to = rows.add(r * unit.count * element);
                        rows.add(r * stride * element)
                            .copy_to(to, unit.count * element);
                    }
                    memory.send
                }
            };
            let from = send.as_ptr();
            unit.send = Some(send);
            unit.plan(
                route.kind,
                from,
                route.size,
                Landing::Buffer(memory.landing),
            );
        }
        Some(unit)
    }
}

/// Lays rows out rank-major in blocks: `copy(rank, from, count, to)` copies a stretch of a row.
///
/// # Safety
/// `to` has room for all rows of the unit.
pub unsafe fn pack(unit: &Unit, size: u32, to: *mut u8, copy: impl Fn(u32, usize, usize, *mut u8)) {
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
