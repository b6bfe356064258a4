//! An engine made of the function pointers of an `rsb_transport`.

use std::ffi::{c_char, c_void};
use std::mem::size_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;

use crate::comm::engine::{Abilities, Collective, Engine};
use crate::error::{invalid, unsupported, Result};
use crate::ffi::{
    rsb_coll, rsb_transport, RSB_TRANSPORT_ALL_GATHER, RSB_TRANSPORT_ALL_TO_ALL,
    RSB_TRANSPORT_DEVICE, RSB_TRANSPORT_REDUCE_SCATTER,
};

type Start = unsafe extern "C" fn(*mut c_void, *const rsb_coll, *mut *mut c_void) -> i32;
type Test = unsafe extern "C" fn(*mut c_void, *mut c_void, *mut i32) -> i32;

/// The caller's engine. It is released when dropped, once it is armed: that is, after its create has
/// succeeded.
pub struct Transport {
    ctx: *mut c_void,
    start: Start,
    test: Test,
    release: unsafe extern "C" fn(*mut c_void),
    table: rsb_transport,
    armed: Arc<AtomicBool>,
}

// SAFETY: the header says that calls come from any thread, one at a time but for abort.
unsafe impl Send for Transport {}
// SAFETY: as above; the bucket lane's lock lets one thread at a time in.
unsafe impl Sync for Transport {}

impl Transport {
    /// Checks a table; and what it says it can do.
    pub fn new(table: rsb_transport) -> Result<(Transport, Abilities)> {
        let known = RSB_TRANSPORT_REDUCE_SCATTER
            | RSB_TRANSPORT_ALL_TO_ALL
            | RSB_TRANSPORT_ALL_GATHER
            | RSB_TRANSPORT_DEVICE;
        let flags = table.flags;
        if flags & !known != 0 {
            return Err(unsupported!(
                "transport->flags: {flags:#x}; expected bits of {known:#x}"
            ));
        }
        if flags & (RSB_TRANSPORT_REDUCE_SCATTER | RSB_TRANSPORT_ALL_TO_ALL) == 0 {
            return Err(invalid!(
                "transport->flags: {flags:#x}; expected REDUCE_SCATTER or ALL_TO_ALL"
            ));
        }
        let missing = |name: &str| invalid!("transport->{name}: NULL; expected a function");
        let transport = Transport {
            ctx: table.ctx,
            start: table.start.ok_or_else(|| missing("start"))?,
            test: table.test.ok_or_else(|| missing("test"))?,
            release: table.release.ok_or_else(|| missing("release"))?,
            table,
            armed: Arc::new(AtomicBool::new(false)),
        };
        let abilities = Abilities {
            reduce_scatter: flags & RSB_TRANSPORT_REDUCE_SCATTER != 0,
            all_to_all: flags & RSB_TRANSPORT_ALL_TO_ALL != 0,
            all_gather: flags & RSB_TRANSPORT_ALL_GATHER != 0,
            reduce_dtypes: table.reduce_dtypes,
            max_count: if table.max_count == 0 {
                usize::MAX
            } else {
                table.max_count
            },
            strided: false,
            keeps_nan: true,
        };
        Ok((transport, abilities))
    }

    /// Set to true, the engine is the library's to release.
    pub fn armed(&self) -> Arc<AtomicBool> {
        self.armed.clone()
    }
}

impl Engine for Transport {
    unsafe fn start(&self, c: &Collective) -> std::result::Result<usize, i32> {
        let coll = rsb_coll {
            struct_size: size_of::<rsb_coll>(),
            send: c.send.cast(),
            recv: c.recv.cast(),
            count: c.count,
            kind: c.kind as u32,
            dtype: c.dtype as u32,
            op: c.op as u32,
            reserved: 0,
            stream: c.stream,
        };
        let mut request = std::ptr::null_mut();
        // SAFETY: the function is the caller's, made for this; coll lives during the call.
        match unsafe { (self.start)(self.ctx, &coll, &mut request) } {
            0 => Ok(request as usize),
            code => Err(code),
        }
    }

    fn test(&self, request: usize) -> std::result::Result<bool, i32> {
        let mut done = 0;
        // SAFETY: the request came from `start` and has not ended.
        match unsafe { (self.test)(self.ctx, request as *mut c_void, &mut done) } {
            0 => Ok(done != 0),
            code => Err(code),
        }
    }

    fn abort(&self) {
        if let Some(abort) = self.table.abort {
            // SAFETY: allowed on any thread at any time.
            unsafe { abort(self.ctx) };
        }
    }

    fn describe(&self, code: i32) -> String {
        let Some(describe) = self.table.describe else {
            return "the transport has no words for it".into();
        };
        let mut text = [0u8; 160];
        // SAFETY: the text has the size that is given; one byte stays ours, for the end.
        unsafe {
            describe(
                self.ctx,
                code,
                text.as_mut_ptr().cast::<c_char>(),
                text.len() - 1,
            )
        };
        let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
        String::from_utf8_lossy(&text[..end]).into_owned()
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        if self.armed.load(Ordering::Acquire) {
            // SAFETY: once, last, and only after create has returned OK.
            unsafe { (self.release)(self.ctx) };
        }
    }
}
