//! The device memory of a lane: buckets, which are used in turn, and results.
//!
//! A bucket is used again as soon as the device has passed its last use, which is polled. While all of
//! them are under way, the oldest is filled again behind an event: so the memory of a lane is bounded,
//! the host never waits, and a producer's stream does only where it is several buckets ahead.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::cuda::event::Event;
use crate::cuda::memory::Memory;
use crate::cuda::{CUstream, Device};
use crate::error::Result;
use crate::memory::{self, Buffer, Cache, Pool};

/// Buckets of a lane: three under way and an open one.
const SLOTS: usize = 4;

/// The sizes of a slot, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sizes {
    /// Rows to send; 0: they are sent from where they lie.
    pub send: usize,
    /// What an all-to-all delivers; 0: there is none.
    pub exchange: usize,
    /// What a reduce-scatter delivers, where that is no result yet; 0: it is.
    pub scratch: usize,
}

/// Memory of one bucket.
pub struct Slot {
    sizes: Sizes,
    /// Freed in the order of the device's stream of memory.
    buffers: [Option<Buffer>; 3],
    /// The mark after which it may be written.
    pub ready: Arc<Event>,
    /// Whether the device is known to have passed that.
    pub passed: bool,
    /// Work that uses it could not be marked: it must never be used again.
    pub is_lost: bool,
}

impl Slot {
    /// New memory. The context is current.
    pub fn new(device: &Arc<Device>, pool: &Arc<Pool>, sizes: Sizes) -> Result<Slot> {
        let ready = Arc::new(device.event()?);
        let new = |bytes: usize| (bytes > 0).then(|| Buffer::new(pool, bytes)).transpose();
        let slot = Slot {
            sizes,
            buffers: [new(sizes.send)?, new(sizes.exchange)?, new(sizes.scratch)?],
            ready,
            passed: false,
            is_lost: false,
        };
        slot.ready.record(device.memory())?;
        Ok(slot)
    }

    fn at(&self, index: usize) -> *mut u8 {
        self.buffers[index]
            .as_ref()
            .map_or(std::ptr::null_mut(), Buffer::as_ptr)
    }

    /// Where rows are packed.
    pub fn send(&self) -> *mut u8 {
        self.at(0)
    }

    /// Where an all-to-all delivers.
    pub fn exchange(&self) -> *mut u8 {
        self.at(1)
    }

    /// Where a reduce-scatter delivers.
    pub fn scratch(&self) -> *mut u8 {
        self.at(2)
    }

    /// Gives the memory back behind its last use and `marks`. If they cannot be set, the memory stays
    /// taken for good: better than to be written by two.
    pub fn give_back<'a>(self, device: &Device, marks: impl Iterator<Item = &'a Event>) {
        let stream = device.memory();
        let held = |event: &Event| {
            // Once more, in case the first failure was a passing one.
            event.hold(stream).or_else(|_| event.hold(stream)).is_ok()
        };
        let mut safe = self.passed || held(&self.ready);
        for mark in marks {
            safe &= held(mark);
        }
        if !safe || self.is_lost {
            std::mem::forget(self);
        }
    }
}

/// Where a collective or the last step puts results.
pub struct Landing {
    /// The first element.
    pub at: *mut u8,
    /// A reference to the memory, if results stay there; else 0.
    pub token: u64,
    /// Whether the caller's own output is written at once.
    pub is_callers: bool,
}

impl Landing {
    /// Memory that no result stays in.
    pub fn passing(at: *mut u8) -> Landing {
        Landing {
            at,
            token: 0,
            is_callers: false,
        }
    }
}

impl Drop for Landing {
    fn drop(&mut self) {
        if self.token != 0 {
            let _ = memory::release(self.token);
        }
    }
}

/// What a lane has of its bucketer's memory on the device.
pub struct LaneMemory {
    device: Arc<Device>,
    buckets: Arc<Pool>,
    results: Cache,
    idle: VecDeque<Slot>,
    /// Slots that exist, idle or not, that are used in turn.
    slots: usize,
}

impl LaneMemory {
    /// Memory counted with `pool`, and had by its allocator. Results come and go in the order of
    /// `stream`.
    pub fn new(device: &Arc<Device>, pool: &Pool, stream: CUstream) -> LaneMemory {
        let on = |stream: CUstream| {
            let ordinal = device.context().ordinal();
            let hook = pool.allocator().on_device(ordinal, stream.cast());
            pool.beside(Box::new(Memory::new(device, stream, hook)))
        };
        LaneMemory {
            buckets: on(device.memory()),
            results: Cache::new(on(stream)),
            device: device.clone(),
            idle: VecDeque::new(),
            slots: 0,
        }
    }

    /// The pool of buckets.
    pub fn buckets(&self) -> &Arc<Pool> {
        &self.buckets
    }

    /// Memory for a bucket: some whose last use has passed, else new, else what will pass first.
    pub fn slot(&mut self, sizes: Sizes) -> Result<Slot> {
        for slot in self.idle.iter_mut().filter(|s| !s.passed) {
            slot.passed = slot.ready.passed()?;
        }
        let fits = |s: &Slot| s.sizes == sizes;
        let passed = self.idle.iter().position(|s| fits(s) && s.passed);
        let index = match passed {
            Some(index) => Some(index),
            None if self.slots < SLOTS => {
                match Slot::new(&self.device, &self.buckets, sizes) {
                    Ok(slot) => {
                        self.slots += 1;
                        return Ok(slot);
                    }
                    // Less memory than planned: one that is under way will do.
                    Err(e) => Some(self.idle.iter().position(fits).ok_or(e)?),
                }
            }
            None => self.idle.iter().position(fits),
        };
        match index.and_then(|index| self.idle.remove(index)) {
            Some(slot) => Ok(slot),
            None => Slot::new(&self.device, &self.buckets, sizes),
        }
    }

    /// Takes a slot back, whose last use ends with its mark.
    pub fn put(&mut self, slot: Slot) {
        match slot.is_lost {
            true => std::mem::forget(slot),
            false => self.idle.push_back(slot),
        }
    }

    /// Memory that results stay in.
    pub fn landing(&mut self, bytes: usize) -> Result<Landing> {
        let (block, at) = self.results.take(bytes)?;
        Ok(Landing {
            at,
            token: block.arm(),
            is_callers: false,
        })
    }

    /// Gives idle memory back.
    pub fn free_idle(&mut self) {
        self.slots -= self.idle.len();
        for slot in self.idle.drain(..) {
            slot.give_back(&self.device, std::iter::empty());
        }
        self.results.free_idle();
    }
}

impl Drop for LaneMemory {
    fn drop(&mut self) {
        let device = self.device.clone();
        if let Ok(_entered) = device.context().enter_to_end() {
            self.free_idle();
        };
    }
}
