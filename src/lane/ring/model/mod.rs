//! The ring under a model checker: rings of two to four ranks over memory whose every word and row the
//! checker watches, in every order that it allows itself (loom) or in thousands of random ones (shuttle).
//!
//! What runs is [`Ring::stream`] and all below it. Replaced are only the atomics ([`crate::sync`]), the
//! futex, the copy into a chunk and the arithmetic of a reduction.

#[cfg(loom)]
mod loom;
mod scenarios;
#[cfg(shuttle)]
mod shuttle;

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout as Block};
use std::mem::size_of;
use std::panic::{catch_unwind, resume_unwind, AssertUnwindSafe};
use std::sync::Arc;

use super::direct::Stretch;
use super::state::{Chunk, Content, Piece, State};
use super::Ring;
use crate::comm::control::{CallRecord, Detail, Head, Layout, Line, Lone, CALLS};
use crate::comm::group::Group;
use crate::comm::keeper::OWNER_DIED;
use crate::comm::word::Verdict;
use crate::dtype::{DType, Finish, Op};
use crate::error::{Error, Result, Status};
use crate::fingerprint::{Call, CallKind};
use crate::lane::work::Meter;
use crate::layout::Geometry;
use crate::sync::model::{die_after, end_slices, thread, Death, UnsafeCell};
use crate::sync::{AtomicI32, AtomicU32, AtomicU64, Ordering};

/// Bytes of a row: one element, which the checker watches.
const ROW: usize = 192;
type Cell = UnsafeCell<u64>;

/// The memory of a group: where the layout has it, made of the checker's atomics.
struct Memory {
    bases: Vec<*mut u8>,
    verdict: Verdict,
    layout: Layout,
    block: Block,
}

// SAFETY: what the pointers lead to is used as a Group uses it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Memory for `size` ranks with `slots` chunks of staging and `lines` lines each.
    fn new(size: u32, slots: usize, lines: usize) -> Arc<Memory> {
        const { assert!(size_of::<Cell>() <= ROW) };
        let chunk_bytes = ROW * size as usize;
        let lines_at = size_of::<Head>().next_multiple_of(align_of::<Line>());
        let calls_at = lines_at + lines * size_of::<Line>();
        let staging_at = (calls_at + CALLS * size_of::<CallRecord>()).next_multiple_of(64);
        let layout = Layout {
            geometry: Geometry {
                chunks: slots,
                chunk_bytes,
                row_bytes: ROW,
            },
            lines,
            lines_at,
            calls_at,
            staging_at,
            total: staging_at + slots * chunk_bytes,
        };
        let block =
            Block::from_size_align(layout.total, align_of::<Line>()).expect("a small block");
        let base = |_| {
            // SAFETY: the size is not zero; everything is written inside it, at its alignment.
            unsafe {
                let base = alloc_zeroed(block);
                if base.is_null() {
                    handle_alloc_error(block);
                }
                base.cast::<Head>().write(head());
                for i in 0..lines {
                    base.add(lines_at).cast::<Line>().add(i).write(line());
                }
                for i in 0..CALLS {
                    let call = base.add(calls_at).cast::<CallRecord>().add(i);
                    call.write(std::array::from_fn(|_| AtomicU64::new(0)));
                }
                for i in 0..slots * size as usize {
                    let cell = base.add(staging_at + i * ROW);
                    cell.cast::<Cell>().write(Cell::new(0));
                }
                base
            }
        };
        Arc::new(Memory {
            bases: (0..size).map(base).collect(),
            verdict: Verdict::new(),
            layout,
            block,
        })
    }

    /// Rank `rank`'s end.
    fn end(self: &Arc<Memory>, rank: u32) -> Group {
        let commit = |_, _| Ok(());
        // SAFETY: the memory lives as long as the Arc; a rank writes through its own end alone.
        unsafe {
            Group::new(
                rank,
                self.layout,
                self.bases.clone(),
                false,
                &self.verdict,
                Box::new(commit),
                Box::new(self.clone()),
            )
        }
    }

    /// What the kernel does when `rank`'s process has ended.
    fn bury(&self, rank: u32) {
        // SAFETY: every rank's memory begins with its head.
        let head = unsafe { &*self.bases[rank as usize].cast::<Head>() };
        head.alive.0.fetch_add(OWNER_DIED, Ordering::Release);
        end_slices();
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        for base in &self.bases {
            // SAFETY: made by `new` with this block; nobody holds a pointer into it any more.
            unsafe { dealloc(*base, self.block) };
        }
    }
}

fn head() -> Head {
    let word = || AtomicU32::new(0);
    let count = || AtomicU64::new(0);
    Head {
        alive: Lone(word()),
        bell: Lone(word()),
        sleeping: Lone(word()),
        consumed: Lone(count()),
        calls: Lone(count()),
        left: Lone(word()),
        shrinking: Lone(word()),
        detail: Lone(Detail {
            native: AtomicI32::new(0),
            len: word(),
            text: std::array::from_fn(|_| count()),
        }),
    }
}

fn line() -> Line {
    let word = || AtomicU64::new(0);
    Line {
        ready: word(),
        lo: word(),
        hi: word(),
        calls: word(),
        place: word(),
        rows: [],
    }
}

/// What rank `from` puts into chunk `number` for rank `to`.
fn given(from: u32, number: u64, to: u32) -> u64 {
    u64::from(from + 1) + 10 * u64::from(to + 1) + 100 * (number + 1)
}

fn combine(row: u64, next: u64) -> u64 {
    row.wrapping_mul(31).wrapping_add(next)
}

/// What rank `rank` of `size` makes of chunk `number`.
fn expected(size: u32, number: u64, rank: u32) -> u64 {
    (0..size).fold(0, |row, from| combine(row, given(from, number, rank)))
}

/// Stands for [`crate::reduce::Reduction`]: rows are one watched cell each.
pub struct Reduction;

impl Reduction {
    /// As there.
    pub fn new(_dtype: DType, _op: Op, _ranks: u32) -> Reduction {
        Reduction
    }

    /// Caches are no part of the model.
    pub fn write_past(&mut self, _yes: bool) {}

    /// As there.
    ///
    /// # Safety
    /// As there.
    pub unsafe fn rows(&mut self, rows: &[*const u8], count: usize, _: &Finish, output: *mut u8) {
        assert_eq!(count, 1);
        let row = rows.iter().fold(0, |row, cell| {
            // SAFETY: rows begin with a cell; the checker finds out whether it may be read.
            combine(row, unsafe { (*cell.cast::<Cell>()).with(|value| *value) })
        });
        // SAFETY: by the promise of this function.
        unsafe { output.cast::<u64>().write(row) };
    }
}

/// One op: its chunks, of one element each, and the caller's name for it.
#[derive(Clone, Copy)]
struct Ask {
    chunks: usize,
    tag: u64,
}

impl Ask {
    fn call(&self) -> Call {
        Call {
            tag: self.tag,
            ..Call::bare(CallKind::AllGather, 0, 0, self.chunks as u64)
        }
    }
}

/// `N` ops of the same length.
fn asks<const N: usize>(chunks: usize) -> [Ask; N] {
    std::array::from_fn(|i| Ask {
        chunks,
        tag: i as u64,
    })
}

/// How a rank's ops ended.
#[derive(Debug, PartialEq)]
struct Story {
    ops: Vec<Result<()>>,
    reduced: u64,
}

/// Fills slot `slot` of a rank's own memory with its rows of chunk `number`.
fn fill_rows(group: &Group, slot: u32, number: u64) {
    for to in 0..group.size() {
        let row = group.own_chunk(slot).wrapping_add(to as usize * ROW);
        // SAFETY: the row is inside the chunk and begins with a cell.
        let cell = unsafe { &*row.cast::<Cell>() };
        // SAFETY: the checker finds out whether it may be written.
        cell.with_mut(|value| unsafe { *value = given(group.rank(), number, to) });
    }
}

/// A rank that has published the first chunk of `ask` and does nothing else.
fn away(memory: &Arc<Memory>, rank: u32, ask: &Ask) -> Ring {
    let ring = Ring::new(memory.end(rank), None);
    fill_rows(ring.group(), 0, 0);
    let mut st = ring.lock();
    ring.accept(&mut st, &ask.call());
    let chunk = Chunk {
        slot: Some(0),
        lane: None,
        ops_end: 0,
        fill: 8,
        inline: false,
        content: Content::Nothing,
    };
    st.publish(ring.group(), chunk);
    drop(st);
    ring
}

/// Carries out the ops of one rank, and checks every result.
fn live(ring: &Ring, ops: &[Ask]) -> Story {
    let (rank, size) = (ring.group().rank(), ring.group().size());
    let mut number = 0;
    let mut carry_out = |ask: &Ask| {
        let mut output = vec![0u64; ask.chunks];
        let place = output.as_mut_ptr();
        let first = number;
        let fill = |_: &mut State, s: Stretch, _: &mut Meter| {
            fill_rows(ring.group(), s.slot, number);
            number += 1;
            Content::Rows {
                dtype: DType::F64,
                op: Op::Sum,
                pieces: vec![Piece {
                    at: 0,
                    count: s.count,
                    output: place.wrapping_add(s.from).cast(),
                    own: std::ptr::null(),
                    finish: Finish::plain(DType::F64),
                    past: false,
                }],
            }
        };
        let result = ring.stream(&ask.call(), ask.chunks, 1, 8, &mut Meter::default(), fill);
        for (i, value) in output.iter().enumerate() {
            // A chunk of a failed op is reduced in full or not at all.
            let good = expected(size, first + i as u64, rank);
            assert!(*value == good || *value == 0 && result.is_err());
        }
        result
    };
    let ops = ops.iter().map(&mut carry_out).collect();
    let reduced = ring.lock().reduced;
    Story { ops, reduced }
}

/// A rank on a thread of its own; it leaves no story if it dies.
struct Rank {
    ring: Arc<Ring>,
    thread: thread::JoinHandle<Option<Story>>,
}

impl Rank {
    /// Starts rank `rank`. If `stores` says so it dies in place of the store after so many.
    fn start(memory: &Arc<Memory>, rank: u32, ops: &[Ask], stores: Option<u32>) -> Rank {
        let ring = Arc::new(Ring::new(memory.end(rank), None));
        let (own, memory, ops) = (ring.clone(), memory.clone(), ops.to_vec());
        let run = move || {
            if let Some(stores) = stores {
                die_after(stores);
            }
            let story = catch_unwind(AssertUnwindSafe(|| live(&own, &ops)));
            match story {
                Ok(story) => Some(story),
                Err(e) if e.is::<Death>() => {
                    memory.bury(rank);
                    None
                }
                Err(e) => resume_unwind(e),
            }
        };
        Rank {
            ring,
            thread: spawn(run),
        }
    }

    fn join(self) -> (Arc<Ring>, Option<Story>) {
        let story = self.thread.join().expect("no rank panics");
        (self.ring, story)
    }
}

fn spawn<T: Send + 'static>(run: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
    let builder = thread::Builder::new().stack_size(256 << 10);
    builder.spawn(run).expect("a thread of the checker")
}

/// One of several causes, with a text of more than one word of a report.
fn cause(i: usize) -> Error {
    let text = format!("{i}{i}{i}, {i}{i}{i}, {i}{i}");
    Error::new(Status::Aborted, text).native(i as i32 + 1)
}
