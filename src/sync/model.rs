//! What the group protocol stands on while a model checker runs it: its atomics, a futex whose missed
//! wake-up is a deadlock, and a death that strikes between any two stores.

use std::cell::RefCell;
use std::panic::resume_unwind;
use std::time::Duration;

#[cfg(loom)]
use loom as checker;
#[cfg(shuttle)]
use shuttle as checker;

pub use checker::sync::atomic::{fence, Ordering};
pub use checker::sync::Mutex;
pub use checker::thread;
#[cfg(loom)]
pub use loom::cell::UnsafeCell;

/// What threads of one execution share besides memory. All of them run on one thread of the system.
struct World {
    /// Who sleeps on which word.
    sleepers: Vec<(usize, thread::Thread)>,
    /// Whether sleeps end by themselves, as slices do.
    slices_end: bool,
    /// Who dies, and how many stores it has left.
    mortal: Option<(thread::ThreadId, u32)>,
}

thread_local! {
    static WORLD: RefCell<World> = const {
        RefCell::new(World { sleepers: Vec::new(), slices_end: false, mortal: None })
    };
}

fn world<T>(f: impl FnOnce(&mut World) -> T) -> T {
    WORLD.with_borrow_mut(f)
}

/// The beginning of an execution: nobody sleeps, sleeps last until somebody wakes the sleeper, and
/// nobody dies.
pub fn begin() {
    world(|w| {
        w.sleepers.clear();
        (w.slices_end, w.mortal) = (false, None);
    });
}

/// From here on sleeps end by themselves. What wakes nobody reliably, a death or an abort, is noticed
/// that way; models end slices only after it, so every other lost wake-up stays a deadlock.
pub fn end_slices() {
    let sleepers = world(|w| {
        w.slices_end = true;
        std::mem::take(&mut w.sleepers)
    });
    sleepers.iter().for_each(|(_, thread)| thread.unpark());
}

/// What unwinds a thread that dies.
pub struct Death;

/// The calling thread dies in place of its `stores`-th store from now, counted from 0.
pub fn die_after(stores: u32) {
    let me = thread::current().id();
    world(|w| w.mortal = Some((me, stores)));
}

fn before_store() {
    let Some((who, left)) = world(|w| w.mortal) else {
        return;
    };
    if who != thread::current().id() {
        return;
    }
    world(|w| w.mortal = left.checked_sub(1).map(|left| (who, left)));
    if left == 0 {
        resume_unwind(Box::new(Death));
    }
}

macro_rules! atomic {
    ($name:ident, $value:ty) => {
        /// The checker's atomic, before whose stores a thread may die.
        #[derive(Debug)]
        pub struct $name(checker::sync::atomic::$name);

        #[allow(missing_docs)]
        impl $name {
            pub fn new(value: $value) -> Self {
                Self(checker::sync::atomic::$name::new(value))
            }

            pub fn load(&self, order: Ordering) -> $value {
                self.0.load(order)
            }

            pub fn store(&self, value: $value, order: Ordering) {
                before_store();
                self.0.store(value, order);
            }

            pub fn fetch_add(&self, value: $value, order: Ordering) -> $value {
                before_store();
                self.0.fetch_add(value, order)
            }

            pub fn compare_exchange(
                &self,
                seen: $value,
                next: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                before_store();
                self.0.compare_exchange(seen, next, success, failure)
            }

            pub fn compare_exchange_weak(
                &self,
                seen: $value,
                next: $value,
                success: Ordering,
                failure: Ordering,
            ) -> Result<$value, $value> {
                before_store();
                self.0.compare_exchange_weak(seen, next, success, failure)
            }
        }
    };
}
atomic!(AtomicI32, i32);
atomic!(AtomicU32, u32);
atomic!(AtomicU64, u64);

/// Sleeps on `word` while it is `seen`, until woken. Wakes early once slices end.
pub fn futex_wait(word: &AtomicU32, seen: u32, _slice: Duration) {
    if newest(word) != seen {
        return;
    }
    let me = thread::current();
    let (key, id) = (std::ptr::from_ref(word) as usize, me.id());
    if world(|w| w.slices_end) {
        thread::yield_now();
        return;
    }
    world(|w| w.sleepers.push((key, me)));
    thread::park();
    world(|w| w.sleepers.retain(|(_, t)| t.id() != id));
}

/// The newest value, as the kernel sees it: no other thread may run between this look and the sleep.
#[cfg(loom)]
fn newest(word: &AtomicU32) -> u32 {
    word.0.fetch_add(0, Ordering::Relaxed)
}

/// As above: shuttle's operations let others run after them, too, but for this one.
#[cfg(shuttle)]
fn newest(word: &AtomicU32) -> u32 {
    // SAFETY: all threads of an execution run on this thread of the system.
    unsafe { word.0.raw_load() }
}

/// Wakes all who sleep on `word`.
pub fn futex_wake(word: &AtomicU32) {
    let key = std::ptr::from_ref(word) as usize;
    let woken = world(|w| {
        let (woken, rest) = std::mem::take(&mut w.sleepers)
            .into_iter()
            .partition(|&(at, _)| at == key);
        w.sleepers = rest;
        woken
    });
    let woken: Vec<(usize, thread::Thread)> = woken;
    woken.iter().for_each(|(_, thread)| thread.unpark());
}

/// Seconds of processor time that this thread of the system has used, the same on a crowded machine.
pub fn seconds() -> f64 {
    // SAFETY: zeros are a time; the call fills it in.
    let time = unsafe {
        let mut time: libc::timespec = std::mem::zeroed();
        libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time);
        time
    };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// A cell like loom's, whose accesses are points where another thread may run.
#[cfg(shuttle)]
pub struct UnsafeCell<T>(std::cell::UnsafeCell<T>);

#[cfg(shuttle)]
#[allow(missing_docs)]
impl<T> UnsafeCell<T> {
    pub fn new(value: T) -> Self {
        Self(std::cell::UnsafeCell::new(value))
    }

    pub fn with<R>(&self, f: impl FnOnce(*const T) -> R) -> R {
        thread::yield_now();
        f(self.0.get())
    }

    pub fn with_mut<R>(&self, f: impl FnOnce(*mut T) -> R) -> R {
        thread::yield_now();
        f(self.0.get())
    }
}
