//! What a bucketer has done, in numbers that any thread may read while it works.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::lane::work::Meter;

/// A counter that one thread at a time adds to, and any may read.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds; callers take turns (the bucketer's lock, or that of who runs callbacks).
    #[inline]
    pub fn add(&self, n: u64) {
        self.0.store(self.get().wrapping_add(n), Ordering::Relaxed);
    }

    /// Raises it to `n` if it is less.
    pub fn raise(&self, n: u64) {
        if n > self.get() {
            self.0.fetch_max(n, Ordering::Relaxed);
        }
    }

    /// Its value now.
    #[inline]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Times callbacks. Two looks at a clock cost more than a quick callback, so after some quick ones in a row
/// one in [`SAMPLE`] counts for all, until one is not quick.
#[derive(Default)]
pub struct Stopwatch {
    start: Option<Instant>,
    /// Quick ones in a row.
    quick: u64,
}

/// Quick ones in a row before not all of them are timed, and how many one counts for then.
const MANY: u64 = 16;
const SAMPLE: u64 = 16;
/// What is quick.
const QUICK: u64 = 2000;

impl Stopwatch {
    /// Callbacks begin.
    #[inline]
    pub fn begin(&mut self) {
        if self.quick < MANY || self.quick.is_multiple_of(SAMPLE) {
            self.start = Some(Instant::now());
        } else {
            self.quick += 1;
        }
    }

    /// They are over, if any had begun: nanoseconds to count for them.
    #[inline]
    pub fn end(&mut self) -> u64 {
        self.start.take().map_or(0, |start| {
            let spent = start.elapsed().as_nanos() as u64;
            let times = if self.quick < MANY { 1 } else { SAMPLE };
            self.quick = if spent < QUICK { self.quick + 1 } else { 0 };
            spent * times
        })
    }
}

/// The counters of one bucketer; their meaning is that of `rsb_stats`.
#[derive(Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub ops_completed: Counter,
    pub ops_failed: Counter,
    pub ops_bucketed: Counter,
    pub ops_direct: Counter,
    pub collectives_launched: Counter,
    pub flushes_full: Counter,
    pub flushes_explicit: Counter,
    pub payload_bytes: Counter,
    pub padding_bytes: Counter,
    pub copied_bytes: Counter,
    pub pack_ns: Counter,
    pub wait_ns: Counter,
    pub reduce_ns: Counter,
    pub callback_ns: Counter,
    pub staging_bytes_peak: Counter,
}

impl Counters {
    /// Ops that were accepted.
    pub fn ops_submitted(&self) -> u64 {
        self.ops_bucketed.get() + self.ops_direct.get()
    }

    /// Takes in what a call on a comm cost.
    pub fn meter(&self, meter: &Meter) {
        self.copied_bytes.add(meter.copied);
        self.pack_ns.add(meter.pack_ns);
        self.wait_ns.add(meter.wait_ns);
        self.reduce_ns.add(meter.reduce_ns);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn slow_callbacks_are_all_timed_and_quick_ones_now_and_then() {
        let mut watch = Stopwatch::default();
        assert_eq!(watch.end(), 0, "none had begun");
        let timed = |watch: &mut Stopwatch| {
            watch.begin();
            let timed = watch.start.is_some();
            watch.end();
            timed
        };
        // A machine may be slow now and then: what counts is the longest row of quick ones.
        let all = (0..100_000).filter(|_| timed(&mut watch)).count();
        assert!(all >= 100_000 / SAMPLE as usize && all < 100_000, "{all}");
        let slow = |watch: &mut Stopwatch| {
            watch.begin();
            let timed = watch.start.is_some();
            std::thread::sleep(Duration::from_micros(10));
            (timed, watch.end())
        };
        while !slow(&mut watch).0 {}
        for _ in 0..20 {
            let (timed, spent) = slow(&mut watch);
            assert!(timed && spent >= 10_000);
        }
    }
}
