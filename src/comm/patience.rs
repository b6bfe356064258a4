//! How a rank waits: briefly spinning, then giving the core away, then asleep in short slices.
//!
//! With more ranks than cores a spinning rank keeps the very peer from running that it waits for,
//! so there it yields at once. No wait depends on a wake-up alone: a slice ends after half a
//! millisecond, and the caller looks again (deaths, aborts, its deadline).

use std::time::{Duration, Instant};

#[cfg(any(loom, shuttle))]
pub use crate::sync::model::{futex_wait, futex_wake};
use crate::sync::{AtomicU32, Ordering, MODEL};

/// The longest sleep without a look around.
pub const SLICE: Duration = Duration::from_micros(500);
const SPINS: u32 = 1000;
/// The first of them, about a microsecond, in which nobody looks at a clock.
const GLANCE: u32 = 32;
const YIELD_FOR: Duration = Duration::from_millis(if MODEL { 0 } else { 1 });

/// One wait: from its start, or from the last progress, to now.
pub struct Patience {
    spin: bool,
    fresh: bool,
    since: Option<Instant>,
}

impl Patience {
    /// The beginning of a wait; with `spin` each rank has a core.
    pub fn new(spin: bool) -> Patience {
        Patience {
            spin,
            fresh: true,
            since: None,
        }
    }

    /// Whether `ranks` ranks of this host can all run at once.
    pub fn may_spin(ranks: u32) -> bool {
        !MODEL && std::thread::available_parallelism().is_ok_and(|n| n.get() >= ranks as usize)
    }

    /// Something moved: timeouts count from here.
    pub fn progress(&mut self) {
        self.fresh = true;
        self.since = None;
    }

    /// How long nothing has moved.
    pub fn waited(&self) -> Duration {
        self.since.map_or(Duration::ZERO, |t| t.elapsed())
    }

    /// The beginning of a wait, too short to be worth two looks at a clock. Whether it was enough.
    #[inline]
    pub fn glance(&self, ready: impl Fn() -> bool) -> bool {
        self.fresh && self.spin && spin(GLANCE, ready)
    }

    /// Waits a little: until `ready` or the end of a slice. `sleep` is what sleeping means here.
    pub fn pause(&mut self, ready: impl Fn() -> bool, sleep: impl FnOnce(Duration)) {
        if self.fresh {
            self.fresh = false;
            if self.spin && spin(SPINS, &ready) {
                return;
            }
        }
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() < YIELD_FOR {
            for _ in 0..8 {
                std::thread::yield_now();
                if ready() {
                    return;
                }
            }
        } else {
            sleep(SLICE);
        }
    }
}

#[inline]
fn spin(times: u32, ready: impl Fn() -> bool) -> bool {
    for _ in 0..times {
        if ready() {
            return true;
        }
        std::hint::spin_loop();
    }
    false
}

/// Sleeps on `word` while it is `seen`, at most `slice`. May wake early.
#[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
pub fn futex_wait(word: &AtomicU32, seen: u32, slice: Duration) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: slice.subsec_nanos().into(),
    };
    // SAFETY: FUTEX_WAIT only reads the word, which is borrowed, and the timespec.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAIT,
            seen,
            &time,
            0,
            0,
        )
    };
}

/// Wakes all who sleep on `word`.
#[cfg(all(target_os = "linux", not(any(loom, shuttle))))]
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: FUTEX_WAKE uses the address as a key; it is borrowed.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            std::ptr::from_ref(word),
            libc::FUTEX_WAKE,
            i32::MAX,
            0,
            0,
            0,
        )
    };
}

/// Sleeps a slice.
#[cfg(not(any(target_os = "linux", loom, shuttle)))]
pub fn futex_wait(_word: &AtomicU32, _seen: u32, slice: Duration) {
    std::thread::sleep(slice);
}

/// Nothing to do: sleepers look again after their slice.
#[cfg(not(any(target_os = "linux", loom, shuttle)))]
pub fn futex_wake(_word: &AtomicU32) {}

/// Changes a bell, so that nobody falls asleep on the old value, and wakes who sleeps.
pub fn ring(bell: &AtomicU32) {
    bell.fetch_add(1, Ordering::Release);
    futex_wake(bell);
}
