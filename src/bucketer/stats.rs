//! What a bucketer has done, in numbers that any thread may read while it works.

use std::sync::atomic::{AtomicU64, Ordering};

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
        self.wait_ns.add(meter.wait_ns);
        self.reduce_ns.add(meter.reduce_ns);
    }
}
