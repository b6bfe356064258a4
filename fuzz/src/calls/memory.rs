//! Where a rank's bucketers come from, and an allocator for them that may run dry.

use std::alloc::{alloc as get, dealloc, Layout};
use std::cell::Cell;
use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use crate::rules::call;

const ALIGN: usize = 64;

pub struct Memory {
    /// None: the library's own.
    counts: Option<Box<Counts>>,
}

struct Counts {
    left: Cell<u32>,
    live: Cell<usize>,
    made: Cell<u32>,
    released: Cell<u32>,
}

impl Memory {
    /// `good`: how many allocations go well; none: no allocator of ours.
    pub fn new(good: Option<u32>) -> Memory {
        let counts = |good| {
            Box::new(Counts {
                left: Cell::new(good),
                live: Cell::new(0),
                made: Cell::new(0),
                released: Cell::new(0),
            })
        };
        Memory {
            counts: good.map(counts),
        }
    }

    pub fn bucketer(&self, bucket_bytes: i64) -> *mut rsb_bucketer {
        let counts = self.counts.as_deref();
        let hook = rsb_allocator {
            struct_size: size_of::<rsb_allocator>(),
            ctx: counts.map_or(ptr::null_mut(), |c| ptr::from_ref(c).cast_mut().cast()),
            alloc: Some(alloc),
            free: Some(free),
            release: Some(release),
        };
        let config = rsb_config {
            struct_size: size_of::<rsb_config>(),
            bucket_bytes,
            flags: 0,
            allocator: if counts.is_some() { &hook } else { ptr::null() },
        };
        let mut bucketer = ptr::null_mut();
        // SAFETY: as the header asks for it.
        let made = call(|err| unsafe { rsb_bucketer_create(&config, &mut bucketer, err) });
        assert_eq!(made, RSB_OK);
        if let Some(c) = counts {
            c.made.set(c.made.get() + 1);
        }
        bucketer
    }

    /// Everything came back, and every bucketer let go of the allocator.
    pub fn end(&self) {
        if let Some(c) = &self.counts {
            assert_eq!((c.live.get(), c.released.get()), (0, c.made.get()));
        }
    }
}

/// # Safety
/// `ctx` is a rank's counts, used on its thread alone.
unsafe fn counts<'a>(ctx: *mut c_void) -> &'a Counts {
    // SAFETY: by the promise of this function.
    unsafe { &*ctx.cast() }
}

unsafe extern "C" fn alloc(
    ctx: *mut c_void,
    bytes: usize,
    align: usize,
    device: i32,
    _: *mut c_void,
) -> *mut c_void {
    // SAFETY: the ctx that was given.
    let c = unsafe { counts(ctx) };
    assert!(device == -1 && bytes > 0 && align <= ALIGN && align.is_power_of_two());
    if c.left.get() == 0 {
        return ptr::null_mut();
    }
    c.left.set(c.left.get() - 1);
    c.live.set(c.live.get() + bytes);
    // SAFETY: a layout of at least a byte.
    unsafe { get(Layout::from_size_align(bytes, ALIGN).unwrap()).cast() }
}

unsafe extern "C" fn free(
    ctx: *mut c_void,
    at: *mut c_void,
    bytes: usize,
    device: i32,
    _: *mut c_void,
) {
    // SAFETY: the ctx that was given; from `alloc`, as many bytes.
    unsafe {
        let c = counts(ctx);
        assert!(device == -1 && !at.is_null());
        c.live.set(c.live.get() - bytes);
        dealloc(at.cast(), Layout::from_size_align(bytes, ALIGN).unwrap());
    }
}

unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: the ctx that was given.
    let c = unsafe { counts(ctx) };
    c.released.set(c.released.get() + 1);
}
