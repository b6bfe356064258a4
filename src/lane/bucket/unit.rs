//! One bucket under way on an engine: the check of ranks, then the payload, then the results.

use crate::comm::engine::{Collective, Kind};
use crate::dtype::{DType, Finish, Op};
use crate::fingerprint::{Chain, Words};
use crate::lane::work::Meter;
use crate::lane::LaneId;
use crate::memory::Buffer;
use crate::reduce::Reduction;

use std::collections::VecDeque;
use std::time::Instant;

/// One op inside a bucket.
#[derive(Clone, Copy)]
pub struct Piece {
    /// First element in the row.
    pub at: usize,
    /// Elements.
    pub count: usize,
    /// Where the result goes; null: nobody wants it any more.
    pub output: *mut u8,
    /// The op's last step.
    pub finish: Finish,
}

/// One collective and its request.
pub struct Part {
    pub collective: Collective,
    pub request: Option<usize>,
    pub done: bool,
}

/// Collectives that belong together and are started one after the other.
#[derive(Default)]
pub struct Parts {
    list: Vec<Part>,
    started: usize,
}

impl Parts {
    pub fn push(&mut self, collective: Collective) {
        self.list.push(Part {
            collective,
            request: None,
            done: false,
        });
    }

    /// The next to start.
    pub fn unstarted(&mut self) -> Option<&mut Part> {
        self.list.get_mut(self.started)
    }

    pub fn count_started(&mut self) {
        self.started += 1;
    }

    pub fn all_started(&self) -> bool {
        self.started == self.list.len()
    }

    pub fn all_done(&self) -> bool {
        self.list.iter().all(|p| p.done)
    }

    pub fn open(&mut self) -> impl Iterator<Item = &mut Part> {
        self.list.iter_mut().filter(|p| p.request.is_some())
    }
}

/// Where an engine puts what it delivers.
pub enum Landing {
    /// Where the caller wants the result: nothing is left to do.
    Output(*mut u8),
    /// Memory of ours.
    Buffer(Buffer),
}

/// How far a unit is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// The ranks' lines are compared.
    Check,
    /// They differ: the calls since the last agreement are exchanged, to name the first.
    Explain,
    /// The payload is under way.
    Payload,
}

/// What rank r says in the check: its chain.
pub const LINE_WORDS: usize = 3;

/// A bucket, a direct op or an all-gather under way.
pub struct Unit {
    pub stage: Stage,
    pub chain: Chain,
    pub lane: Option<LaneId>,
    pub ops_end: u64,
    /// Gathered in the stages before the payload; `own` must not move while it is sent.
    pub own: Vec<u64>,
    pub all: Vec<u64>,
    pub parts: Parts,
    pub payload: Parts,
    /// Elements of each row, and of one block of it.
    pub count: usize,
    pub block: usize,
    pub dtype: DType,
    pub op: Op,
    pub pieces: Vec<Piece>,
    pub send: Option<Buffer>,
    pub recv: Option<Buffer>,
    /// Where the bytes of an all-gather go that landed in `recv`, block by block.
    pub gather: Option<*mut u8>,
    /// Rows of each block that the engine delivers: 1, or one from every rank.
    pub rows: usize,
}

impl Unit {
    pub fn new(chain: Chain, lane: Option<LaneId>, ops_end: u64) -> Unit {
        Unit {
            stage: Stage::Payload,
            chain,
            lane,
            ops_end,
            own: Vec::new(),
            all: Vec::new(),
            parts: Parts::default(),
            payload: Parts::default(),
            count: 0,
            block: 1,
            dtype: DType::U8,
            op: Op::Sum,
            pieces: Vec::new(),
            send: None,
            recv: None,
            gather: None,
            rows: 1,
        }
    }

    /// The collectives of the present stage.
    pub fn current(&mut self) -> &mut Parts {
        match self.stage {
            Stage::Payload => &mut self.payload,
            _ => &mut self.parts,
        }
    }

    /// Makes `own` what is gathered next into `all`, in collectives of at most `max` bytes.
    pub fn gather_words(&mut self, stage: Stage, own: Vec<u64>, size: u32, max: usize) {
        let bytes = own.len() * 8;
        self.stage = stage;
        self.own = own;
        self.all = vec![0; self.own.len() * size as usize];
        self.parts = Parts::default();
        let mut done = 0;
        while done < bytes {
            // Parts of `max` bytes land rank-major one after the other: see `words_of`.
            let count = (bytes - done).min(max);
            self.parts.push(Collective {
                kind: Kind::AllGather,
                send: self.own.as_ptr().cast::<u8>().wrapping_add(done),
                recv: self
                    .all
                    .as_mut_ptr()
                    .cast::<u8>()
                    .wrapping_add(done * size as usize),
                count,
                dtype: DType::U8,
                op: Op::Sum,
                stride: count,
                stream: std::ptr::null_mut(),
            });
            done += count;
        }
    }

    /// What rank `rank` gave to the last gathering.
    pub fn words_of(&self, rank: u32, size: u32, max: usize) -> Vec<u64> {
        let bytes = self.own.len() * 8;
        let all: Vec<u8> = self.all.iter().flat_map(|w| w.to_ne_bytes()).collect();
        let mut mine = Vec::with_capacity(bytes);
        let mut done = 0;
        while done < bytes {
            let count = (bytes - done).min(max);
            let at = done * size as usize + rank as usize * count;
            mine.extend_from_slice(&all[at..at + count]);
            done += count;
        }
        mine.chunks_exact(8)
            .map(|b| u64::from_ne_bytes(std::array::from_fn(|i| b[i])))
            .collect()
    }

    /// Bytes of what an engine delivers for `count` elements a row.
    pub fn landing_bytes(&self, kind: Kind, size: u32) -> usize {
        let rows = if kind == Kind::AllToAll {
            size as usize
        } else {
            1
        };
        rows * self.count * self.dtype.size()
    }

    /// Plans the payload: `count` elements a row at `send`, rank-major in blocks of `block`.
    ///
    /// # Safety
    /// `send` holds size * count elements until the unit is dropped or the op over; so does what
    /// `landing` names, for `landing_bytes`.
    pub unsafe fn plan(&mut self, kind: Kind, send: *const u8, size: u32, landing: Landing) {
        let element = self.dtype.size();
        let rows = if kind == Kind::AllToAll {
            size as usize
        } else {
            1
        };
        self.rows = rows;
        let recv = match landing {
            Landing::Output(output) => output,
            Landing::Buffer(buffer) => {
                let at = buffer.as_ptr();
                self.recv = Some(buffer);
                at
            }
        };
        // AVG is a sum that our last step divides.
        let op = if self.op == Op::Avg { Op::Sum } else { self.op };
        let mut done = 0;
        while done < self.count {
            let count = (self.count - done).min(self.block);
            // SAFETY: `done` is inside the rows, so both stay inside their memory.
            let (send, recv) = unsafe {
                (
                    send.add(done * size as usize * element),
                    recv.add(done * rows * element),
                )
            };
            self.payload.push(Collective {
                kind,
                send,
                recv,
                count,
                dtype: self.dtype,
                op,
                stride: count,
                stream: std::ptr::null_mut(),
            });
            done += count;
        }
    }

    /// Sorts the blocks of an all-gather into rank order.
    ///
    /// # Safety
    /// `from` holds size * count bytes in blocks, `to` takes as many.
    unsafe fn gather_out(&self, from: *const u8, to: *mut u8, size: usize) {
        let mut done = 0;
        while done < self.count {
            let count = (self.count - done).min(self.block);
            for r in 0..size {
                // SAFETY: block by block, rank-major, both are inside their memory.
                unsafe {
                    let part = from.add(done * size + r * count);
                    part.copy_to_nonoverlapping(to.add(r * self.count + done), count);
                }
            }
            done += count;
        }
    }

    /// Writes the results of all ops from what the engine delivered.
    ///
    /// # Safety
    /// The payload is done; the outputs of all pieces are valid.
    pub unsafe fn deliver(&self, size: u32, sources: &mut Vec<*const u8>, meter: &mut Meter) {
        // Without memory of ours the engine has put the result where it belongs.
        let Some(recv) = &self.recv else { return };
        if let Some(output) = self.gather {
            // SAFETY: all ranks' bytes have landed, and the output has room for them.
            unsafe { self.gather_out(recv.as_ptr(), output, size as usize) };
            return;
        }
        let start = Instant::now();
        let element = self.dtype.size();
        let rows = self.rows;
        let mut reduction = Reduction::new(self.dtype, self.op, size);
        for piece in self.pieces.iter().filter(|p| !p.output.is_null()) {
            let mut done = 0;
            while done < piece.count {
                let at = piece.at + done;
                let (first, within) = (at / self.block * self.block, at % self.block);
                let width = (self.count - first).min(self.block);
                let count = (piece.count - done).min(width - within);
                sources.clear();
                // SAFETY: block `first` holds `rows` rows of `width` elements one after the other.
                let base = unsafe { recv.as_ptr().add(first * rows * element) };
                sources.extend((0..rows).map(|r| {
                    base.wrapping_add((r * width + within) * element)
                        .cast_const()
                }));
                // SAFETY: every source holds `count` elements, the output the piece's.
                unsafe {
                    let output = piece.output.add(done * piece.finish.output.size());
                    reduction.rows(sources, count, &piece.finish, output);
                }
                done += count;
            }
        }
        meter.reduce_ns += start.elapsed().as_nanos() as u64;
    }
}

/// Calls as they are exchanged: present, then their words.
pub const CALL_WORDS: usize = 6;

/// The first `n` of the calls that are kept, for [`Stage::Explain`]; zeros where there are fewer.
pub fn call_words(kept: &VecDeque<Words>, n: usize) -> Vec<u64> {
    let mut words: Vec<u64> = kept
        .iter()
        .take(n)
        .flat_map(|w| [&[1u64], w.as_slice()].concat())
        .collect();
    words.resize(n * CALL_WORDS, 0);
    words
}
