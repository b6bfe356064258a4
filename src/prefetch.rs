//! Brings memory near while the thread goes on with something else, where the CPU has an instruction for it.

/// Fetches `bytes` bytes from `from` on, which may be anywhere, into the cache nearest to this core.
#[inline(always)]
pub fn prefetch(from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(64) {
        line(from.wrapping_add(at));
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn line(at: *const u8) {
    use std::arch::x86_64::{_mm_prefetch, _MM_HINT_T0};
    // SAFETY: a hint, which never faults; every CPU of this target has it.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn line(_at: *const u8) {}
