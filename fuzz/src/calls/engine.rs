//! An engine in one thread, whose other ranks give what we give: every row that comes is our own.
//!
//! It moves the bytes when a request ends, not when it starts, so memory that the library gives away
//! too early is seen by the sanitizer; and it notes every breach of what the header promises it.

use std::ffi::c_void;
use std::ptr;

use rsbucket::ffi::*;

use super::values::{reduce, width};

/// The code that it fails with.
pub const CODE: i32 = 77;

pub struct Engine {
    pub size: usize,
    pub rank: usize,
    /// Tests before a request ends.
    pub delay: u32,
    /// How many starts and tests go well.
    pub good: u32,
    pub failed: bool,
    pub released: u32,
    open: Vec<(usize, rsb_coll, u32)>,
    started: usize,
}

impl Engine {
    pub fn new(size: usize, rank: usize, delay: u32, good: u32) -> Box<Engine> {
        Box::new(Engine {
            size,
            rank,
            delay,
            good,
            failed: false,
            released: 0,
            open: Vec::new(),
            started: 0,
        })
    }

    pub fn table(self: &mut Box<Engine>, flags: u64, dtypes: u64, most: usize) -> rsb_transport {
        rsb_transport {
            struct_size: size_of::<rsb_transport>(),
            flags,
            ctx: ptr::from_mut::<Engine>(self).cast(),
            start: Some(start),
            test: Some(test),
            abort: None,
            release: Some(release),
            reduce_dtypes: dtypes,
            max_count: most,
            describe: None,
        }
    }

    fn works(&mut self) -> bool {
        assert!(!self.failed && self.released == 0, "used after its end");
        self.failed = self.good == 0;
        self.good = self.good.saturating_sub(1);
        !self.failed
    }

    /// Carries one collective out.
    unsafe fn carry_out(&self, coll: &rsb_coll) {
        let bytes = coll.count * width(coll.dtype);
        let (send, recv) = (coll.send.cast::<u8>(), coll.recv.cast::<u8>());
        // SAFETY: both have what the header says, until the request ends.
        unsafe {
            let own = match coll.kind {
                RSB_COLL_ALL_GATHER => send,
                _ => send.add(self.rank * bytes),
            };
            if coll.kind == RSB_COLL_REDUCE_SCATTER {
                let row = std::slice::from_raw_parts(own, bytes);
                let out = reduce(coll.dtype, coll.op, row, self.size);
                recv.copy_from_nonoverlapping(out.as_ptr(), bytes);
            } else {
                // Each rank's place, our own last: it may be where the bytes come from.
                let row = std::slice::from_raw_parts(own, bytes).to_vec();
                (0..self.size).for_each(|r| recv.add(r * bytes).copy_from(row.as_ptr(), bytes));
            }
        }
    }
}

/// # Safety
/// `ctx` is the engine that the table was made of.
unsafe fn engine<'a>(ctx: *mut c_void) -> &'a mut Engine {
    // SAFETY: by the promise of this function; one call at a time.
    unsafe { &mut *ctx.cast() }
}

unsafe extern "C" fn start(
    ctx: *mut c_void,
    coll: *const rsb_coll,
    request: *mut *mut c_void,
) -> i32 {
    // SAFETY: as the header says.
    let (engine, coll) = unsafe { (engine(ctx), coll.read()) };
    assert!(engine.open.len() < 4 && (1..=3).contains(&coll.kind));
    if !engine.works() {
        return CODE;
    }
    engine.started += 1;
    engine.open.push((engine.started, coll, engine.delay));
    // SAFETY: as above.
    unsafe { request.write(engine.started as *mut c_void) };
    0
}

unsafe extern "C" fn test(ctx: *mut c_void, request: *mut c_void, done: *mut i32) -> i32 {
    // SAFETY: as the header says.
    let engine = unsafe { engine(ctx) };
    let at = engine.open.iter().position(|o| o.0 == request as usize);
    let at = at.expect("a request that is open");
    if !engine.works() {
        return CODE;
    }
    let (_, coll, left) = &mut engine.open[at];
    if *left > 0 {
        *left -= 1;
        return 0;
    }
    let coll = *coll;
    engine.open.remove(at);
    // SAFETY: as the header says.
    unsafe {
        engine.carry_out(&coll);
        done.write(1);
    }
    0
}

unsafe extern "C" fn release(ctx: *mut c_void) {
    // SAFETY: as the header says.
    unsafe { engine(ctx) }.released += 1;
}
