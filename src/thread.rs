//! What one thread knows of itself: whether it runs our code, and a number that names it.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// A number that names this thread while it lives.
#[inline]
pub fn this() -> usize {
    INSIDE.with(|inside| std::ptr::from_ref(inside) as usize)
}

/// A number that no other thread of this process has or had; never 0.
pub fn number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    thread_local! {
        static NUMBER: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    NUMBER.with(|number| *number)
}

/// Whether this thread runs our code right now, and not a callback: then a panic is ours.
pub fn is_inside() -> bool {
    INSIDE.get()
}

/// Runs our code.
#[inline]
pub fn inside<T>(body: impl FnOnce() -> T) -> T {
    INSIDE.with(|inside| {
        let outer = inside.replace(true);
        let result = body();
        inside.set(outer);
        result
    })
}
