//! Which process this is: handles made before a fork are dead in the child.
//!
//! A page that the kernel wipes in a forked child (MADV_WIPEONFORK) tells, at the price of one load,
//! even where the fork was a raw clone that no handler sees.

use std::sync::atomic::{AtomicPtr, AtomicU32, Ordering};

/// Grows with every generation of processes that uses the library.
static EPOCH: AtomicU32 = AtomicU32::new(0);
/// A word that is 0 in a fresh child.
static MARK: AtomicPtr<AtomicU32> = AtomicPtr::new(std::ptr::null_mut());

/// The number of this process among its ancestors that used the library.
#[inline]
pub fn epoch() -> u32 {
    let mark = MARK.load(Ordering::Acquire);
    if !mark.is_null() {
        // SAFETY: once set, it points to a page that is never unmapped.
        let seen = unsafe { (*mark).load(Ordering::Relaxed) };
        if seen != 0 {
            return seen;
        }
    }
    renew(mark)
}

#[cold]
fn renew(mut mark: *mut AtomicU32) -> u32 {
    if mark.is_null() {
        let fresh = page();
        mark = match MARK.compare_exchange(
            std::ptr::null_mut(),
            fresh,
            Ordering::AcqRel,
            Ordering::Acquire,
        ) {
            Ok(_) => fresh,
            Err(other) => other,
        };
    }
    let next = EPOCH.fetch_add(1, Ordering::Relaxed) + 1;
    // SAFETY: as in `epoch`.
    let word = unsafe { &*mark };
    match word.compare_exchange(0, next, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => next,
        Err(other) => other,
    }
}

/// A word in a page of its own. Without the kernel's help (no page, no wiping) forks go unnoticed.
fn page() -> *mut AtomicU32 {
    static FALLBACK: AtomicU32 = AtomicU32::new(0);
    let fallback = std::ptr::from_ref(&FALLBACK).cast_mut();
    #[cfg(target_os = "linux")]
    // SAFETY: a fresh anonymous mapping of our own; a page is large enough for the word.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if at != libc::MAP_FAILED {
            libc::madvise(at, 4096, libc::MADV_WIPEONFORK);
            return at.cast();
        }
    }
    fallback
}
