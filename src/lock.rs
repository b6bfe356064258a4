//! The lock of the hot path: one atomic exchange to take it, a plain store to let go of it.
//!
//! A submit of one element takes two locks and costs 58 nanoseconds in all; the exchange by which a
//! `std::sync::Mutex` asks at every unlock whether somebody waits would be five more each. Here who lets
//! go only looks whether somebody waits, and may miss one that has come that very moment: so the first
//! sleep is a short slice, as in all waits here ([`crate::comm::patience`]). It knows its holder, which a
//! call from inside asks for, and is never poisoned.

use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

#[cfg(not(any(loom, shuttle)))]
use crate::comm::patience;
use crate::comm::patience::SLICE;

/// A value that one thread at a time may use.
pub struct Lock<T> {
    /// Who has it; 0: nobody.
    holder: AtomicUsize,
    /// How many wait.
    waiting: AtomicU32,
    /// Changed and rung by who lets go while somebody waits.
    bell: AtomicU32,
    value: UnsafeCell<T>,
}

// SAFETY: the value is reached through a guard alone, and there is one at a time.
unsafe impl<T: Send> Sync for Lock<T> {}

/// The right to use a lock's value.
pub struct Guard<'a, T> {
    lock: &'a Lock<T>,
    /// Not for another thread: the holder is this one.
    here: std::marker::PhantomData<*mut ()>,
}

/// Looks in a row before a waiter sleeps.
const LOOKS: u32 = 100;
/// The longest sleep once the first slice is over: who lets go now has long seen that somebody waits.
const LATER: Duration = Duration::from_millis(20);

impl<T> Lock<T> {
    /// A lock that nobody has.
    pub const fn new(value: T) -> Lock<T> {
        Lock {
            holder: AtomicUsize::new(0),
            waiting: AtomicU32::new(0),
            bell: AtomicU32::new(0),
            value: UnsafeCell::new(value),
        }
    }

    /// Waits for the lock and takes it. `who` names the thread, and is not 0 ([`crate::thread::this`]).
    #[inline(always)]
    pub fn lock(&self, who: usize) -> Guard<'_, T> {
        if !self.take(who) {
            self.wait(who);
        }
        Guard {
            lock: self,
            here: std::marker::PhantomData,
        }
    }

    #[inline(always)]
    fn take(&self, who: usize) -> bool {
        self.holder
            .compare_exchange(0, who, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
    }

    #[cold]
    fn wait(&self, who: usize) {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let mut slice = SLICE;
        loop {
            for _ in 0..LOOKS {
                if self.holder.load(Ordering::Relaxed) == 0 && self.take(who) {
                    self.waiting.fetch_sub(1, Ordering::Relaxed);
                    return;
                }
                std::hint::spin_loop();
            }
            let seen = self.bell.load(Ordering::Relaxed);
            if self.holder.load(Ordering::Relaxed) != 0 {
                sleep(&self.bell, seen, slice);
                slice = LATER;
            }
        }
    }

    /// Whether `who` has it.
    #[inline]
    pub fn is_held_by(&self, who: usize) -> bool {
        self.holder.load(Ordering::Relaxed) == who
    }

    /// The value, of which there is no other user.
    pub fn get_mut(&mut self) -> &mut T {
        self.value.get_mut()
    }
}

impl<T> Deref for Guard<'_, T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: there is one guard at a time, and this is it.
        unsafe { &*self.lock.value.get() }
    }
}

impl<T> DerefMut for Guard<'_, T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.lock.value.get() }
    }
}

impl<T> Drop for Guard<'_, T> {
    #[inline(always)]
    fn drop(&mut self) {
        self.lock.holder.store(0, Ordering::Release);
        if self.lock.waiting.load(Ordering::Relaxed) != 0 {
            wake(&self.lock.bell);
        }
    }
}

#[cfg(not(any(loom, shuttle)))]
fn sleep(bell: &AtomicU32, seen: u32, slice: Duration) {
    patience::futex_wait(bell, seen, slice);
}

#[cfg(not(any(loom, shuttle)))]
#[cold]
fn wake(bell: &AtomicU32) {
    patience::ring(bell);
}

/// In a model each of these locks has one user: what is tried there is the protocol between ranks.
#[cfg(any(loom, shuttle))]
fn sleep(_bell: &AtomicU32, _seen: u32, _slice: Duration) {
    unreachable!("a lock of a model has one user");
}

#[cfg(any(loom, shuttle))]
fn wake(_bell: &AtomicU32) {}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time() {
        let lock = Lock::new((0u64, 0u64));
        std::thread::scope(|s| {
            for who in 1..=4 {
                let lock = &lock;
                s.spawn(move || {
                    for round in 0..20_000 {
                        let mut both = lock.lock(who);
                        assert!(lock.is_held_by(who));
                        assert_eq!(both.0, both.1);
                        both.0 += 1;
                        if round % 512 == 0 {
                            std::thread::yield_now();
                        }
                        both.1 += 1;
                    }
                    assert!(!lock.is_held_by(who));
                });
            }
        });
        assert_eq!(*lock.lock(9), (80_000, 80_000));
    }

    #[test]
    fn a_panic_lets_go() {
        let lock = Lock::new(5);
        let thrown = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let mut value = lock.lock(1);
            *value = 6;
            std::panic::resume_unwind(Box::new(()));
        }));
        assert!(thrown.is_err());
        assert_eq!(*lock.lock(2), 6);
    }

    #[test]
    fn a_waiter_sleeps_and_comes_in() {
        let lock = Lock::new(0);
        std::thread::scope(|s| {
            let held = lock.lock(1);
            let waiter = s.spawn(|| *lock.lock(2));
            while lock.waiting.load(Ordering::Relaxed) == 0 {
                std::thread::yield_now();
            }
            assert!(!waiter.is_finished());
            drop(held);
            assert_eq!(waiter.join().expect("no panic"), 0);
        });
        assert_eq!(lock.waiting.load(Ordering::Relaxed), 0);
    }
}
