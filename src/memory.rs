//! Memory that results and buckets live in: taken from the caller's allocator or the system's,
//! recycled while a bucketer lives, and counted while somebody retains it.
//!
//! A result's memory is a block with a permanent slot in a global table; its token changes with each
//! use, so a stale shard handle is noticed. The owner of a block is whoever turned its count to 0.

use std::cell::UnsafeCell;
use std::ffi::c_void;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use crate::error::{Error, Result, Status};
use crate::fork;
use crate::handle::{self, Bad, Segments};
use crate::prefetch::prefetch;

/// Every block and bucket starts on such a border.
pub const ALIGN: usize = 64;

/// Where memory comes from. Called from any thread.
pub trait Allocator: Send + Sync {
    /// `bytes` > 0 aligned to [`ALIGN`]; null: none.
    fn alloc(&self, bytes: usize) -> *mut u8;
    /// Gives memory back.
    ///
    /// # Safety
    /// `ptr` came from `alloc(bytes)` of the same allocator, once.
    unsafe fn free(&self, ptr: *mut u8, bytes: usize);
    /// The same allocator for memory of a device, in the order of a stream; none: it has none.
    fn on_device(&self, _ordinal: i32, _stream: *mut c_void) -> Option<Box<dyn Allocator>> {
        None
    }
}

/// The system's allocator.
pub struct System;

fn system_layout(bytes: usize) -> Option<std::alloc::Layout> {
    std::alloc::Layout::from_size_align(bytes, ALIGN).ok()
}

impl Allocator for System {
    fn alloc(&self, bytes: usize) -> *mut u8 {
        match system_layout(bytes) {
            // SAFETY: callers ask for more than 0 bytes.
            Some(layout) => unsafe { std::alloc::alloc(layout) },
            None => std::ptr::null_mut(),
        }
    }

    unsafe fn free(&self, ptr: *mut u8, bytes: usize) {
        if let Some(layout) = system_layout(bytes) {
            // SAFETY: by the promise of this function, with the layout that alloc used.
            unsafe { std::alloc::dealloc(ptr, layout) }
        }
    }
}

/// Bytes that a bucketer has now, and the most it ever had.
#[derive(Default)]
struct Usage {
    bytes: AtomicU64,
    peak: AtomicU64,
}

/// The memory of one bucketer, in use or idle.
pub struct Pool {
    allocator: Box<dyn Allocator>,
    usage: Arc<Usage>,
    /// Blocks that others than the bucketer have released, waiting to be used again: the last one's index plus
    /// one, and from slot to slot those before; or `LEAN`.
    returned: AtomicU32,
}

/// No block: the end of the returned ones.
const NONE: u32 = 0;
/// Released memory goes back to the allocator at once.
const LEAN: u32 = u32::MAX;

impl Pool {
    /// An empty pool.
    pub fn new(allocator: Box<dyn Allocator>) -> Arc<Pool> {
        Pool::counted(allocator, Arc::default())
    }

    /// A pool of the same bucketer over memory of another kind, counted with it.
    pub fn beside(&self, allocator: Box<dyn Allocator>) -> Arc<Pool> {
        Pool::counted(allocator, self.usage.clone())
    }

    fn counted(allocator: Box<dyn Allocator>, usage: Arc<Usage>) -> Arc<Pool> {
        Arc::new(Pool {
            allocator,
            usage,
            returned: AtomicU32::new(NONE),
        })
    }

    /// Where its memory comes from.
    pub fn allocator(&self) -> &dyn Allocator {
        self.allocator.as_ref()
    }

    /// Bytes that the bucketer has now, and the most it ever had.
    pub fn bytes(&self) -> (u64, u64) {
        (
            self.usage.bytes.load(Ordering::Relaxed),
            self.usage.peak.load(Ordering::Relaxed),
        )
    }

    fn alloc(&self, bytes: usize) -> Result<*mut u8> {
        let ptr = self.allocator.alloc(bytes);
        if ptr.is_null() {
            let text = format!("the allocator has no {bytes} bytes for a result or a bucket");
            return Err(Error::new(Status::NoMemory, text));
        }
        let now = self.usage.bytes.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64;
        self.usage.peak.fetch_max(now, Ordering::Relaxed);
        Ok(ptr)
    }

    /// # Safety
    /// `ptr` came from `alloc(bytes)` of this pool, once.
    unsafe fn free(&self, ptr: *mut u8, bytes: usize) {
        self.usage.bytes.fetch_sub(bytes as u64, Ordering::Relaxed);
        // SAFETY: by the promise of this function.
        unsafe { self.allocator.free(ptr, bytes) }
    }

    /// Takes back a block that its owner has released. The pool may be gone once it is done.
    fn give_back(&self, index: u32) {
        let mut seen = self.returned.load(Ordering::Relaxed);
        while seen != LEAN {
            slot(index).below.store(seen, Ordering::Relaxed);
            let swap = self.returned.compare_exchange_weak(
                seen,
                index + 1,
                Ordering::Release,
                Ordering::Relaxed,
            );
            match swap {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
        free_block(index);
    }

    /// Takes all returned blocks; `next` is what releases find from here on.
    fn take_returned(&self, next: u32) -> impl Iterator<Item = u32> {
        let first = match self.returned.swap(next, Ordering::Acquire) {
            LEAN => NONE,
            first => first,
        };
        let below = |&index: &u32| slot(index).below.load(Ordering::Relaxed).checked_sub(1);
        std::iter::successors(first.checked_sub(1), below)
    }
}

/// Memory that is freed when dropped: a bucket.
pub struct Buffer {
    ptr: *mut u8,
    bytes: usize,
    pool: Arc<Pool>,
}

// SAFETY: the buffer owns its memory, and the pool may be used from any thread.
unsafe impl Send for Buffer {}

impl Buffer {
    /// At least one byte of memory, not initialised.
    pub fn new(pool: &Arc<Pool>, bytes: usize) -> Result<Buffer> {
        let bytes = bytes.max(1);
        Ok(Buffer {
            ptr: pool.alloc(bytes)?,
            bytes,
            pool: pool.clone(),
        })
    }

    /// Where it begins.
    pub fn as_ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// How long it is.
    pub fn len(&self) -> usize {
        self.bytes
    }

    /// Never: a buffer has at least one byte.
    pub fn is_empty(&self) -> bool {
        false
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        // SAFETY: allocated by `new` from this pool, and freed only here.
        unsafe { self.pool.free(self.ptr, self.bytes) }
    }
}

/// The kind byte of shard tokens.
pub const SHARD_KIND: u8 = 0xb3;

/// A block's slot: generation 32 | count 32. With count 0 the block belongs to its pool.
#[derive(Default)]
#[repr(align(64))]
struct Slot {
    state: AtomicU64,
    /// Of the process whose block it is.
    epoch: AtomicU32,
    /// While it is among the returned ones: the one before it, plus one.
    below: AtomicU32,
    place: UnsafeCell<Place>,
}

#[derive(Default)]
struct Place {
    ptr: usize,
    bytes: usize,
    class: u32,
    pool: Option<Arc<Pool>>,
}

// SAFETY: `place` is written only by the owner of an idle index, and by the thread that frees the
// block after its count turned 0; in between it is only read.
unsafe impl Sync for Slot {}

static SLOTS: Segments<Slot> = Segments::new();
const MAX_COUNT: u64 = 1 << 30;

/// Memory of one result, owned by the bucketer until it is armed.
#[derive(Clone, Copy)]
pub struct Block {
    slot: &'static Slot,
    index: u32,
    class: u32,
}

fn slot(index: u32) -> &'static Slot {
    match SLOTS.get(index) {
        Some(slot) => slot,
        None => unreachable!("a block's slot exists"),
    }
}

impl Block {
    /// The block of an index whose place is readable: idle and of this cache, or alive.
    fn of(index: u32) -> Block {
        let slot = slot(index);
        // SAFETY: by the condition above.
        let class = unsafe { (*slot.place.get()).class };
        Block { slot, index, class }
    }

    /// Where it begins.
    #[inline]
    pub fn ptr(&self) -> *mut u8 {
        // SAFETY: a block stays allocated while its owner holds it: its place is readable.
        unsafe { (*self.slot.place.get()).ptr as *mut u8 }
    }

    /// Has its count brought near.
    #[inline]
    pub fn prefetch(&self) {
        prefetch(std::ptr::from_ref(self.slot).cast(), 1);
    }

    /// Counts one reference, and names it.
    #[inline]
    pub fn arm(&self) -> u64 {
        let generation = self.slot.state.load(Ordering::Relaxed) >> 32;
        self.slot
            .state
            .store(generation << 32 | 1, Ordering::Release);
        handle::token(SHARD_KIND, generation as u32, self.index)
    }
}

/// The slot of a shard's token, its generation and its index.
fn named(token: u64) -> std::result::Result<(&'static Slot, u32, u32), Bad> {
    if token == 0 {
        return Err(Bad::Null);
    }
    let (generation, index) = handle::parts(SHARD_KIND, token).ok_or(Bad::Unknown)?;
    let slot = SLOTS.get(index).ok_or(Bad::Unknown)?;
    // A child of a fork has its parent's results to read, and must not count them: the locks of their
    // pools may be taken.
    match slot.epoch.load(Ordering::Relaxed) {
        epoch if epoch != 0 && epoch != fork::epoch() => Err(Bad::Forked),
        _ => Ok((slot, generation, index)),
    }
}

/// Changes the state of a live shard as `change` says of its count, which is not 0.
#[inline]
fn recount(
    slot: &Slot,
    generation: u32,
    change: impl Fn(u64) -> Option<u64>,
) -> std::result::Result<u64, Bad> {
    let mut seen = slot.state.load(Ordering::Relaxed);
    loop {
        let count = seen & 0xffff_ffff;
        if (seen >> 32) as u32 != generation || count == 0 {
            return Err(Bad::Unknown);
        }
        let count = change(count).ok_or(Bad::Unknown)?;
        let next = match count {
            // The last reference: the token dies with it.
            0 => u64::from(generation.wrapping_add(1)) << 32,
            _ => u64::from(generation) << 32 | count,
        };
        match slot
            .state
            .compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Relaxed)
        {
            Ok(_) => return Ok(count),
            Err(now) => seen = now,
        }
    }
}

/// Drops one reference; how many are left.
#[inline]
fn drop_one(slot: &Slot, generation: u32) -> std::result::Result<u64, Bad> {
    recount(slot, generation, |count| Some(count - 1))
}

/// Counts one more reference to a shard.
pub fn retain(token: u64) -> std::result::Result<(), Bad> {
    let (slot, generation, _) = named(token)?;
    let more = |count| (count < MAX_COUNT).then_some(count + 1);
    recount(slot, generation, more).map(drop)
}

/// Gives one reference back; the last one gives the memory back to its pool. Any thread.
pub fn release(token: u64) -> std::result::Result<(), Bad> {
    let (slot, generation, index) = named(token)?;
    if drop_one(slot, generation)? == 0 {
        // SAFETY: the count turned 0 here, so the block is ours, and its place is readable.
        if let Some(pool) = unsafe { &(*slot.place.get()).pool } {
            pool.give_back(index);
        }
    }
    Ok(())
}

/// Gives an idle block's memory back to its allocator, and its slot to the table.
fn free_block(index: u32) {
    // SAFETY: the block is idle and ours alone: nobody reads or writes its place.
    let place = unsafe { std::mem::take(&mut *slot(index).place.get()) };
    if let Some(pool) = place.pool {
        // SAFETY: the place holds what `Cache::take` allocated from this pool.
        unsafe { pool.free(place.ptr as *mut u8, place.bytes) };
    }
    SLOTS.put(index);
}

/// Eight classes a doubling: at most an eighth is wasted, and steady work always fits again.
#[inline]
fn class_of(bytes: usize) -> (usize, usize) {
    let bytes = bytes.max(ALIGN);
    let log = (bytes - 1).ilog2() as usize;
    let shift = log.saturating_sub(3);
    let steps = ((bytes - 1) >> shift) + 1;
    (log * 8 + steps - ((1 << log) >> shift) - 1, steps << shift)
}

/// The idle blocks that a bucketer can use without a lock.
pub struct Cache {
    pool: Arc<Pool>,
    /// By class; beside each block, where it begins: its slot is seldom in a cache when it is taken.
    idle: Vec<Vec<(Block, usize)>>,
}

impl Cache {
    /// An empty cache over `pool`.
    pub fn new(pool: Arc<Pool>) -> Cache {
        Cache {
            pool,
            idle: Vec::new(),
        }
    }

    /// The pool.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// A block of at least `bytes`, recycled or new, and where it begins.
    #[inline]
    pub fn take(&mut self, bytes: usize) -> Result<(Block, *mut u8)> {
        let (class, size) = class_of(bytes);
        match self.idle.get_mut(class).and_then(Vec::pop) {
            Some((block, at)) => Ok((block, at as *mut u8)),
            None => self.make(class, size).map(|block| (block, block.ptr())),
        }
    }

    #[cold]
    fn make(&mut self, class: usize, size: usize) -> Result<Block> {
        self.reclaim();
        if let Some((block, _)) = self.idle.get_mut(class).and_then(Vec::pop) {
            return Ok(block);
        }
        let ptr = self.pool.alloc(size)?;
        let Some(index) = SLOTS.take() else {
            // SAFETY: allocated two lines above.
            unsafe { self.pool.free(ptr, size) };
            return Err(Error::new(Status::NoMemory, "too many results are alive"));
        };
        let place = Place {
            ptr: ptr as usize,
            bytes: size,
            class: class as u32,
            pool: Some(self.pool.clone()),
        };
        slot(index).epoch.store(fork::epoch(), Ordering::Relaxed);
        // SAFETY: the index was idle: nobody reads its place.
        unsafe { *slot(index).place.get() = place };
        Ok(Block::of(index))
    }

    /// Takes back a block that was not armed.
    #[inline]
    pub fn put(&mut self, block: Block) {
        self.put_at(block, block.ptr());
    }

    #[inline]
    fn put_at(&mut self, block: Block, at: *mut u8) {
        let class = block.class as usize;
        if self.idle.len() <= class {
            self.idle.resize_with(class + 1, Vec::new);
        }
        self.idle[class].push((block, at as usize));
    }

    /// Drops the reference that [`Block::arm`] counted. If nobody retained the block it is idle again.
    #[inline]
    pub fn settle(&mut self, block: Block, token: u64) {
        // Retained: its last release returns it to the pool. Or the caller released a reference that it
        // did not have: the block went back by itself.
        if matches!(drop_one(block.slot, (token >> 24) as u32), Ok(0)) {
            self.put(block);
        }
    }

    fn reclaim(&mut self) {
        for index in self.pool.take_returned(NONE) {
            self.put(Block::of(index));
        }
    }

    /// Gives all idle memory back; what is retained goes back when it is released.
    pub fn free_idle(&mut self) {
        let returned = self.pool.take_returned(LEAN);
        let idle = self.idle.drain(..).flatten().map(|(block, _)| block.index);
        idle.chain(returned).for_each(free_block);
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.free_idle();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_fit_and_waste_little() {
        for bytes in (0..5000).chain([1 << 20, (1 << 20) + 1, 123_456_789]) {
            let (class, size) = class_of(bytes);
            assert!(size >= bytes && size >= ALIGN);
            assert!(
                size <= bytes.max(ALIGN) + bytes / 8 + 1,
                "{bytes} in {size}"
            );
            assert_eq!(class_of(size), (class, size));
        }
        // Classes grow with sizes, and no two sizes share one.
        let mut last = (usize::MAX, 0);
        for bytes in 1..100_000 {
            let now = class_of(bytes);
            if now != last {
                assert!(last.0 == usize::MAX || now.0 > last.0 && now.1 > last.1);
                last = now;
            }
        }
    }

    #[test]
    fn blocks_are_recycled_and_counted() {
        let pool = Pool::new(Box::new(System));
        let mut cache = Cache::new(pool.clone());
        let first = cache.take(1000).expect("memory").0;
        let token = first.arm();
        cache.settle(first, token);
        assert!(retain(token).is_err(), "stale");
        let again = cache.take(1000).expect("memory").0;
        assert_eq!(again.ptr(), first.ptr());
        let held = again.arm();
        assert_ne!(held, token);
        retain(held).expect("live");
        cache.settle(again, held);
        let other = cache.take(1000).expect("memory").0;
        assert_ne!(other.ptr(), again.ptr(), "retained memory is not reused");
        cache.put(other);
        cache.free_idle();
        assert_eq!(pool.bytes().0, class_of(1000).1 as u64);
        release(held).expect("live");
        assert_eq!(pool.bytes().0, 0);
        assert_eq!(release(held), Err(Bad::Unknown));
        assert_eq!(release(0), Err(Bad::Null));
    }

    #[test]
    fn a_retained_shard_outlives_its_bucketer() {
        let pool = Pool::new(Box::new(System));
        let mut cache = Cache::new(pool.clone());
        let block = cache.take(64).expect("memory").0;
        let token = block.arm();
        retain(token).expect("live");
        cache.settle(block, token);
        drop(cache);
        assert_eq!(pool.bytes().0, 64);
        release(token).expect("live");
        assert_eq!(pool.bytes().0, 0);
    }
}
