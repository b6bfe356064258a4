//! How a rank waits: briefly spinning, then giving the core away, then asleep in short slices.
//!
//! With more ranks than cores a spinning rank keeps the very peer from running that it waits for,
//! so there it yields at once. Strangers may want that core too: who yields to one gets it back a slice of time
//! later, or eight, who sleeps as soon as the peer has come. No wait depends on a wake-up alone: a slice ends after half a
//! millisecond, and the caller looks again (deaths, aborts, its deadline).

use std::sync::atomic;
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
/// A core that was given away and comes back later than this was a stranger's: peers wait too, soon.
const LATE: Duration = Duration::from_millis(2);
/// How often in a row it came back late. Once may be a peer's long work.
static TIMES_LATE: atomic::AtomicU32 = atomic::AtomicU32::new(0);
/// How many waits to come in this process sleep where they would yield, once it was late twice.
static NAPS_DUE: atomic::AtomicU32 = atomic::AtomicU32::new(0);
/// So many wake-ups, of 25 microseconds, cost about what two such yields do, of 4 to 32 milliseconds.
const NAPS: u32 = 1000;

/// One wait: from its start, or from the last progress, to now.
pub struct Patience {
    spin: bool,
    fresh: bool,
    naps: bool,
    since: Option<Instant>,
}

impl Patience {
    /// The beginning of a wait; with `spin` each rank has a core.
    pub fn new(spin: bool) -> Patience {
        Patience {
            spin,
            fresh: true,
            naps: false,
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
            self.naps = nap_is_due();
        }
        let now = Instant::now();
        let since = *self.since.get_or_insert(now);
        if !self.naps && now.duration_since(since) < YIELD_FOR {
            for _ in 0..8 {
                std::thread::yield_now();
                if ready() {
                    break;
                }
            }
            note_yields(now.elapsed());
        } else {
            sleep(SLICE);
        }
    }
}

/// Notes that some yields, one after the other, took `time`. Threads that come at once may lose a count: these are
/// rough ones.
fn note_yields(time: Duration) {
    if time < LATE {
        TIMES_LATE.store(0, atomic::Ordering::Relaxed);
    } else if TIMES_LATE.fetch_add(1, atomic::Ordering::Relaxed) > 0 {
        NAPS_DUE.store(NAPS, atomic::Ordering::Relaxed);
    }
}

/// Takes one of the naps that are due.
fn nap_is_due() -> bool {
    let due = NAPS_DUE.load(atomic::Ordering::Relaxed);
    if due > 0 {
        NAPS_DUE.store(due - 1, atomic::Ordering::Relaxed);
    }
    due > 0
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

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    /// Whether the first pause of a wait for nothing sleeps.
    fn sleeps_at_once(spin: bool) -> bool {
        let mut slept = false;
        Patience::new(spin).pause(|| false, |_| slept = true);
        slept
    }

    #[test]
    fn once_the_core_came_back_late_twice_waits_sleep() {
        // Other tests yield too, and may take a nap or clear the count in between.
        let told = (0..1000).any(|_| {
            note_yields(Duration::ZERO);
            NAPS_DUE.store(0, atomic::Ordering::Relaxed);
            note_yields(LATE);
            let once = NAPS_DUE.load(atomic::Ordering::Relaxed);
            note_yields(LATE);
            once == 0 && NAPS_DUE.load(atomic::Ordering::Relaxed) > 0
        });
        assert!(told, "two late yields mean naps");
        assert!(sleeps_at_once(true));
        assert!(sleeps_at_once(false));
        note_yields(Duration::ZERO);
        NAPS_DUE.store(0, atomic::Ordering::Relaxed);
    }
}
