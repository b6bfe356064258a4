//! Handles as checked tokens: numbers that name an object, not addresses.
//!
//! A token is kind (8 bits) | generation (32) | index (24). The kinds are chosen so that no token is
//! a canonical address: whoever dereferences one faults at once. A look-up pins the slot, so an
//! object removed by another thread lives until the last call that uses it is over. Slots are never
//! given back to the system, so a look-up of anything at all touches only our own memory. There are no
//! locks here, so a fork in the middle of anything leaves the child none that is taken.

use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Deref;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};
use std::sync::Arc;

use crate::fork;

/// Why a token names nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bad {
    /// NULL.
    Null,
    /// Stale, freed, of another kind, or invented.
    Unknown,
    /// It was made before this process was forked off.
    Forked,
}

const FIRST_BITS: u32 = 6;
const SEGMENTS: usize = 18;

/// An array that only grows, in segments that never move, each twice as long as the one before.
///
/// Nothing in it is ever locked: a process forked off while other threads use it finds it usable, but
/// for the indices that they were about to take or to give back.
pub struct Segments<S> {
    parts: [AtomicPtr<Entry<S>>; SEGMENTS],
    /// The stack of idle indices: how often it changed 32 | the top one plus one, 0: none 32.
    idle: AtomicU64,
    /// The first index that was never taken.
    next: AtomicU32,
    owned: PhantomData<S>,
}

#[derive(Default)]
struct Entry<S> {
    item: S,
    /// While the index is idle: the one below it on the stack, plus one.
    below: AtomicU32,
}

impl<S: Default> Segments<S> {
    /// An empty array.
    pub const fn new() -> Segments<S> {
        Segments {
            parts: [const { AtomicPtr::new(ptr::null_mut()) }; SEGMENTS],
            idle: AtomicU64::new(0),
            next: AtomicU32::new(0),
            owned: PhantomData,
        }
    }

    #[inline]
    fn place(index: u32) -> (usize, usize) {
        let n = u64::from(index) + (1 << FIRST_BITS);
        let part = 63 - n.leading_zeros() - FIRST_BITS;
        (part as usize, (n - (1 << (part + FIRST_BITS))) as usize)
    }

    #[inline]
    fn entry(&self, index: u32) -> Option<&Entry<S>> {
        let (part, at) = Self::place(index);
        let start = self.parts.get(part)?.load(Ordering::Acquire);
        // SAFETY: a part that is there has room for every place in it, and stays.
        (!start.is_null()).then(|| unsafe { &*start.add(at) })
    }

    /// The element, if that part of the array exists.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&S> {
        self.entry(index).map(|e| &e.item)
    }

    /// An index that nobody uses; none when there are too many, or no memory for more.
    pub fn take(&self) -> Option<u32> {
        let mut seen = self.idle.load(Ordering::Acquire);
        while let Some(index) = (seen as u32).checked_sub(1) {
            let below = self.entry(index)?.below.load(Ordering::Relaxed);
            match self.exchange_idle(seen, below) {
                Ok(_) => return Some(index),
                Err(now) => seen = now,
            }
        }
        let mut index = self.next.load(Ordering::Relaxed);
        loop {
            self.make_part(Self::place(index).0)?;
            let swap = self.next.compare_exchange_weak(
                index,
                index + 1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
            match swap {
                Ok(_) => return Some(index),
                Err(now) => index = now,
            }
        }
    }

    /// Gives an index back.
    pub fn put(&self, index: u32) {
        let Some(entry) = self.entry(index) else {
            return;
        };
        let mut seen = self.idle.load(Ordering::Acquire);
        loop {
            entry.below.store(seen as u32, Ordering::Relaxed);
            match self.exchange_idle(seen, index + 1) {
                Ok(_) => return,
                Err(now) => seen = now,
            }
        }
    }

    /// Makes `top` the top of the stack, unless it has changed since it was `seen`.
    fn exchange_idle(&self, seen: u64, top: u32) -> Result<u64, u64> {
        // The count tells a stack from one that looks the same: it has other indices below.
        let next = (seen >> 32).wrapping_add(1) << 32 | u64::from(top);
        self.idle
            .compare_exchange_weak(seen, next, Ordering::AcqRel, Ordering::Acquire)
    }

    /// Makes a part of the array, if it is not there.
    fn make_part(&self, part: usize) -> Option<()> {
        let cell = self.parts.get(part)?;
        if !cell.load(Ordering::Acquire).is_null() {
            return Some(());
        }
        let mut entries: Vec<Entry<S>> = Vec::new();
        entries
            .try_reserve_exact(1 << (part as u32 + FIRST_BITS))
            .ok()?;
        entries.resize_with(1 << (part as u32 + FIRST_BITS), Entry::default);
        let fresh = Box::into_raw(entries.into_boxed_slice()).cast();
        let swap =
            cell.compare_exchange(ptr::null_mut(), fresh, Ordering::AcqRel, Ordering::Acquire);
        if swap.is_err() {
            // SAFETY: nobody has seen it.
            unsafe { Self::free_part(part, fresh) };
        }
        Some(())
    }
}

impl<S> Segments<S> {
    /// # Safety
    /// `start` was made as this part, and nobody uses it.
    unsafe fn free_part(part: usize, start: *mut Entry<S>) {
        let entries = ptr::slice_from_raw_parts_mut(start, 1 << (part as u32 + FIRST_BITS));
        // SAFETY: by the promise of this function.
        drop(unsafe { Box::from_raw(entries) });
    }
}

impl<S> Drop for Segments<S> {
    fn drop(&mut self) {
        for (part, cell) in self.parts.iter_mut().enumerate() {
            let start = *cell.get_mut();
            if !start.is_null() {
                // SAFETY: made by `make_part`, and nobody else has this array.
                unsafe { Self::free_part(part, start) };
            }
        }
    }
}

impl<S: Default> Default for Segments<S> {
    fn default() -> Self {
        Segments::new()
    }
}

/// Makes a token.
pub const fn token(kind: u8, generation: u32, index: u32) -> u64 {
    (kind as u64) << 56 | (generation as u64) << 24 | index as u64 & 0xff_ffff
}

/// The generation and index of a token of this kind.
#[inline]
pub fn parts(kind: u8, token: u64) -> Option<(u32, u32)> {
    (token >> 56 == u64::from(kind)).then_some(((token >> 24) as u32, token as u32 & 0xff_ffff))
}

const LIVE: u64 = 1;
const FULL: u64 = 2;
const PIN: u64 = 4;
const PINS: u64 = 0xffff_fffc;

/// generation 32 | pins 30 | full 1 | live 1.
struct Slot<T> {
    state: AtomicU64,
    epoch: AtomicU32,
    value: UnsafeCell<Option<Arc<T>>>,
}

impl<T> Default for Slot<T> {
    fn default() -> Self {
        Slot {
            state: AtomicU64::new(0),
            epoch: AtomicU32::new(0),
            value: UnsafeCell::new(None),
        }
    }
}

// SAFETY: `value` is written only by whoever has just taken the index, before LIVE is set, or by the
// one thread that turned FULL off with no pins left; it is read only while pinned.
unsafe impl<T: Send + Sync> Sync for Slot<T> {}

/// All objects of one kind that C holds handles to.
pub struct Table<T: Send + Sync + 'static> {
    kind: u8,
    slots: Segments<Slot<T>>,
}

/// An object that cannot go away while this exists.
pub struct Pinned<'a, T: Send + Sync + 'static> {
    table: &'a Table<T>,
    slot: &'a Slot<T>,
    index: u32,
}

impl<T: Send + Sync> Table<T> {
    /// An empty table. `kind` has its top bits 10 or 01, so that tokens are no addresses.
    pub const fn new(kind: u8) -> Table<T> {
        assert!(kind >> 6 == 1 || kind >> 6 == 2);
        Table {
            kind,
            slots: Segments::new(),
        }
    }

    /// Takes an object in and names it; none when there are too many.
    pub fn insert(&self, value: Arc<T>) -> Option<u64> {
        let index = self.slots.take()?;
        let slot = self.slots.get(index)?;
        // SAFETY: the index was idle: the slot is neither live nor full, so nobody reads the value.
        unsafe { *slot.value.get() = Some(value) };
        slot.epoch.store(fork::epoch(), Ordering::Relaxed);
        let mut seen = slot.state.load(Ordering::Relaxed);
        loop {
            // Look-ups of stale tokens may be pinning right now: their pins stay.
            let generation = ((seen >> 32) as u32).wrapping_add(1);
            let next = u64::from(generation) << 32 | seen & PINS | FULL | LIVE;
            let swap =
                slot.state
                    .compare_exchange_weak(seen, next, Ordering::Release, Ordering::Relaxed);
            match swap {
                Ok(_) => return Some(token(self.kind, generation, index)),
                Err(now) => seen = now,
            }
        }
    }

    /// The object that `token` names, pinned.
    #[inline(always)]
    pub fn get(&self, token: u64) -> Result<Pinned<'_, T>, Bad> {
        let pinned = self.get_inherited(token)?;
        if pinned.slot.epoch.load(Ordering::Relaxed) != fork::epoch() {
            return Err(Bad::Forked);
        }
        Ok(pinned)
    }

    /// As [`Table::get`], also what was made before this process was forked off.
    #[inline(always)]
    pub fn get_inherited(&self, token: u64) -> Result<Pinned<'_, T>, Bad> {
        if token == 0 {
            return Err(Bad::Null);
        }
        let (generation, index) = parts(self.kind, token).ok_or(Bad::Unknown)?;
        let slot = self.slots.get(index).ok_or(Bad::Unknown)?;
        let seen = slot.state.fetch_add(PIN, Ordering::Acquire);
        let pinned = Pinned {
            table: self,
            slot,
            index,
        };
        if (seen >> 32) as u32 != generation || seen & LIVE == 0 {
            return Err(Bad::Unknown);
        }
        Ok(pinned)
    }

    /// Whether `token` names an object right now, which another thread may change at once. Costs less than
    /// [`Table::get`], where something else keeps the object alive.
    #[inline]
    pub fn is_live(&self, token: u64) -> bool {
        let slot = parts(self.kind, token).and_then(|(generation, index)| {
            let slot = self.slots.get(index)?;
            let seen = slot.state.load(Ordering::Acquire);
            ((seen >> 32) as u32 == generation && seen & LIVE != 0).then_some(slot)
        });
        slot.is_some_and(|slot| slot.epoch.load(Ordering::Relaxed) == fork::epoch())
    }

    /// Makes the token name nothing any more. Of several callers exactly one gets the object.
    pub fn remove(&self, token: u64) -> Result<Arc<T>, Bad> {
        self.get(token)
            .and_then(|pinned| Self::unname(pinned, token))
    }

    /// As [`Table::remove`], also what was made before this process was forked off.
    pub fn remove_inherited(&self, token: u64) -> Result<Arc<T>, Bad> {
        self.get_inherited(token)
            .and_then(|pinned| Self::unname(pinned, token))
    }

    fn unname(pinned: Pinned<'_, T>, token: u64) -> Result<Arc<T>, Bad> {
        let generation = token >> 24 & 0xffff_ffff;
        let mut seen = pinned.slot.state.load(Ordering::Relaxed);
        while seen >> 32 == generation && seen & LIVE != 0 {
            let swap = pinned.slot.state.compare_exchange_weak(
                seen,
                seen & !LIVE,
                Ordering::AcqRel,
                Ordering::Relaxed,
            );
            match swap {
                Ok(_) => return Ok(pinned.arc()),
                Err(now) => seen = now,
            }
        }
        Err(Bad::Unknown)
    }
}

impl<T: Send + Sync> Pinned<'_, T> {
    /// Another owner of the object.
    pub fn arc(&self) -> Arc<T> {
        // SAFETY: pinned and checked live by `get`: the value is there and is not changed.
        match unsafe { &*self.slot.value.get() } {
            Some(value) => value.clone(),
            None => unreachable!("a live slot holds a value"),
        }
    }
}

impl<T: Send + Sync> Deref for Pinned<'_, T> {
    type Target = T;

    #[inline]
    fn deref(&self) -> &T {
        // SAFETY: pinned and checked live by `get`: the value is there and is not changed.
        match unsafe { &*self.slot.value.get() } {
            Some(value) => value,
            None => unreachable!("a live slot holds a value"),
        }
    }
}

impl<T: Send + Sync> Drop for Pinned<'_, T> {
    #[inline]
    fn drop(&mut self) {
        let left = self.slot.state.fetch_sub(PIN, Ordering::AcqRel) - PIN;
        if left & (PINS | FULL | LIVE) != FULL {
            return;
        }
        // Removed, and the last pin is gone: one of those who see this empties the slot.
        let emptied = left & !FULL;
        let swap =
            self.slot
                .state
                .compare_exchange(left, emptied, Ordering::AcqRel, Ordering::Relaxed);
        if swap.is_ok() {
            // SAFETY: turning FULL off with no pins left made this thread the only one to touch it.
            let value = unsafe { (*self.slot.value.get()).take() };
            self.table.slots.put(self.index);
            drop(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_name_one_object_until_it_is_removed() {
        let table: Table<u32> = Table::new(0xb1);
        let tokens: Vec<u64> = (0..500)
            .map(|i| table.insert(Arc::new(i)).expect("room"))
            .collect();
        for (i, &t) in tokens.iter().enumerate() {
            assert_eq!(*table.get(t).expect("live"), i as u32);
            assert_ne!(t >> 47, 0, "a canonical address");
        }
        let pinned = table.get(tokens[7]).expect("live");
        assert_eq!(table.remove(tokens[7]).map(|v| *v), Ok(7));
        assert_eq!(*pinned, 7, "alive while pinned");
        assert!(table.get(tokens[7]).is_err());
        assert_eq!(table.remove(tokens[7]).err(), Some(Bad::Unknown));
        drop(pinned);
        let again = table.insert(Arc::new(1000)).expect("room");
        assert_ne!(again, tokens[7]);
        assert!(table.get(tokens[7]).is_err());
        assert_eq!(table.get(0).err(), Some(Bad::Null));
        for odd in [
            1,
            0xdead_beef,
            u64::MAX,
            again ^ 1 << 60,
            again + (1 << 24),
            again | 0xff_ffff,
        ] {
            assert_eq!(table.get(odd).err(), Some(Bad::Unknown), "{odd:#x}");
        }
    }

    #[test]
    fn the_object_dies_with_the_last_user() {
        let table: Table<u32> = Table::new(0xb1);
        let value = Arc::new(5);
        let token = table.insert(value.clone()).expect("room");
        let pinned = table.get(token).expect("live");
        drop(table.remove(token));
        assert_eq!(Arc::strong_count(&value), 2);
        drop(pinned);
        assert_eq!(Arc::strong_count(&value), 1);
    }

    #[test]
    fn an_index_is_with_one_user_at_a_time() {
        let array: Segments<AtomicU32> = Segments::new();
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for round in 0..2000 {
                        let taken: Vec<u32> = (0..1 + round % 90)
                            .map(|_| array.take().expect("room"))
                            .collect();
                        for &i in &taken {
                            let users = array.get(i).expect("made").fetch_add(1, Ordering::Relaxed);
                            assert_eq!(users, 0, "index {i}");
                        }
                        for &i in &taken {
                            array.get(i).expect("made").store(0, Ordering::Relaxed);
                            array.put(i);
                        }
                    }
                });
            }
        });
        // All of them are idle again, and no more were made than were in use at once.
        let made = array.next.load(Ordering::Relaxed);
        assert!(made <= 4 * 90, "{made}");
        let mut all: Vec<u32> = (0..made).map(|_| array.take().expect("room")).collect();
        all.sort_unstable();
        assert!(all.into_iter().eq(0..made));
    }

    #[test]
    fn one_of_many_removers_wins() {
        let table: Table<u32> = Table::new(0xb1);
        for round in 0..200 {
            let token = table.insert(Arc::new(round)).expect("room");
            let wins: usize = std::thread::scope(|s| {
                let threads: Vec<_> = (0..4)
                    .map(|_| s.spawn(|| (table.get(token).is_ok(), table.remove(token).is_ok()).1))
                    .collect();
                threads
                    .into_iter()
                    .map(|t| t.join().expect("no panic") as usize)
                    .sum()
            });
            assert_eq!(wins, 1);
        }
    }
}
