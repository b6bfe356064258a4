//! The bucketer's calls: each reads its arguments, plans what is to be done, and drives it.

use std::ffi::c_void;
use std::mem::size_of;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::Duration;

use super::comm::{comm_of, is_live, poison_after_panic};
use super::drive::drive;
use super::read::{given, structure};
use super::submit::{check, Asked, Callback};
use super::{answer, guarded, hook_panics, look_up, too_many};
use crate::bucketer::{Bucketer, Plan, DEFAULT_BUCKET};
use crate::error::{invalid, unsupported, Error, Result, Status};
use crate::ffi::{
    rsb_allocator, rsb_bucketer, rsb_comm, rsb_config, rsb_error, rsb_shard, rsb_stats, rsb_status,
    rsb_submit_args, rsb_ticket,
};
use crate::handle::{Pinned, Table};
use crate::memory::{self, Allocator, Pool, System, ALIGN};

static BUCKETERS: Table<Bucketer<Callback>> = Table::new(0xb2);

#[inline]
fn bucketer_of(handle: *const rsb_bucketer) -> Result<Pinned<'static, Bucketer<Callback>>> {
    look_up(&BUCKETERS, handle as u64, "bucketer", "rsb_bucketer")
}

type Alloc = unsafe extern "C" fn(*mut c_void, usize, usize, i32, *mut c_void) -> *mut c_void;
type Free = unsafe extern "C" fn(*mut c_void, *mut c_void, usize, i32, *mut c_void);

/// The caller's allocator. Released when dropped, once it is armed.
struct Functions {
    ctx: *mut c_void,
    alloc: Alloc,
    free: Free,
    release: Option<unsafe extern "C" fn(*mut c_void)>,
    armed: Arc<AtomicBool>,
}

/// The caller's allocator, for one kind of memory.
struct Hook {
    functions: Arc<Functions>,
    device: i32,
    stream: *mut c_void,
}

// SAFETY: the header asks for an allocator that may be called on any thread.
unsafe impl Send for Functions {}
// SAFETY: as above.
unsafe impl Sync for Functions {}
// SAFETY: as above; a stream is only handed on.
unsafe impl Send for Hook {}
// SAFETY: as above.
unsafe impl Sync for Hook {}

/// Host memory, as the allocator hook names it.
const HOST: i32 = -1;

impl Allocator for Hook {
    fn alloc(&self, bytes: usize) -> *mut u8 {
        let f = &self.functions;
        // SAFETY: the function is the caller's, made for this.
        unsafe { (f.alloc)(f.ctx, bytes, ALIGN, self.device, self.stream) }.cast()
    }

    unsafe fn free(&self, ptr: *mut u8, bytes: usize) {
        let f = &self.functions;
        // SAFETY: `ptr` came from `alloc`, by the promise of this function.
        unsafe { (f.free)(f.ctx, ptr.cast(), bytes, self.device, self.stream) }
    }

    fn on_device(&self, ordinal: i32, stream: *mut c_void) -> Option<Box<dyn Allocator>> {
        Some(Box::new(Hook {
            functions: self.functions.clone(),
            device: ordinal,
            stream,
        }))
    }
}

impl Drop for Functions {
    fn drop(&mut self) {
        if let (true, Some(release)) = (self.armed.load(Ordering::Acquire), self.release) {
            // SAFETY: once, last, and only after create has returned OK.
            unsafe { release(self.ctx) };
        }
    }
}

pub unsafe fn bucketer_create(
    config: *const rsb_config,
    out: *mut *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    let create = || {
        hook_panics();
        given(out, "out")?;
        let mut bucket_bytes = 0;
        let armed = Arc::new(AtomicBool::new(false));
        let mut allocator: Box<dyn Allocator> = Box::new(System);
        if !config.is_null() {
            // SAFETY: the caller keeps the rules of the header.
            let c = unsafe { structure(config, "config")? };
            if c.flags != 0 {
                return Err(unsupported!("config->flags: {:#x}; expected 0", c.flags));
            }
            bucket_bytes = c.bucket_bytes;
            if !c.allocator.is_null() {
                // SAFETY: as above.
                let hook: rsb_allocator = unsafe { structure(c.allocator, "config->allocator")? };
                let missing =
                    |name: &str| invalid!("config->allocator->{name}: NULL; expected a function");
                let functions = Arc::new(Functions {
                    ctx: hook.ctx,
                    alloc: hook.alloc.ok_or_else(|| missing("alloc"))?,
                    free: hook.free.ok_or_else(|| missing("free"))?,
                    release: hook.release,
                    armed: armed.clone(),
                });
                allocator = Box::new(Hook {
                    functions,
                    device: HOST,
                    stream: std::ptr::null_mut(),
                });
            }
        }
        let bucket_bytes = match bucket_bytes {
            0 => Some(DEFAULT_BUCKET),
            bytes => u64::try_from(bytes).ok(),
        };
        let bucketer = Bucketer::new(bucket_bytes, Pool::new(allocator));
        let token = BUCKETERS
            .insert(bucketer)
            .ok_or_else(|| too_many("rsb_bucketer"))?;
        armed.store(true, Ordering::Release);
        // SAFETY: there is room for a handle.
        unsafe { out.write(token as *mut rsb_bucketer) };
        Ok(())
    };
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(create), err) }
}

#[allow(clippy::too_many_arguments)]
pub unsafe fn bucketer_reduce_scatter_async(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    inputs: *const *const c_void,
    numel: usize,
    dtype: u32,
    op: u32,
    callback: crate::ffi::rsb_callback,
    user_data: *mut c_void,
    err: *mut rsb_error,
) -> rsb_status {
    let args = rsb_submit_args {
        struct_size: size_of::<rsb_submit_args>(),
        inputs,
        flat_input: std::ptr::null(),
        output: std::ptr::null_mut(),
        numel,
        dtype,
        output_dtype: 0,
        op,
        flags: 0,
        scale: 0.0,
        tag: 0,
        stream: std::ptr::null_mut(),
        callback,
        user_data,
    };
    // SAFETY: the caller keeps the rules of the header.
    unsafe { answer(submit(bucketer, comm, Ok(&args), std::ptr::null_mut()), err) }
}

pub unsafe fn bucketer_submit(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    args: *const rsb_submit_args,
    out_ticket: *mut rsb_ticket,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        let exact = args.is_aligned()
            && !args.is_null()
            && (*args).struct_size == size_of::<rsb_submit_args>();
        let args = if exact { Ok(&*args) } else { Err(args) };
        answer(submit(bucketer, comm, args, out_ticket), err)
    }
}

/// Submits what `args` says: a struct of this version, or anything else, to be read with care.
///
/// # Safety
/// The caller keeps the rules of the header.
#[inline]
unsafe fn submit(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    args: std::result::Result<&rsb_submit_args, *const rsb_submit_args>,
    out_ticket: *mut rsb_ticket,
) -> Result<()> {
    let fitting = guarded(|| {
        let held = bucketer_of(bucketer)?;
        held.refuse_inner_call()?;
        let Ok(args) = args else { return Ok(None) };
        if !is_live(comm) {
            return Ok(None);
        }
        // SAFETY: by the promise of this function; the rest is rule 6.
        unsafe { held.submit_fitting(comm as u64, &Asked::new(args)) }.transpose()
    });
    match fitting {
        Ok(Some(ticket)) => {
            if !out_ticket.is_null() {
                // SAFETY: by the promise of this function; any alignment.
                unsafe { out_ticket.write_unaligned(ticket) };
            }
            Ok(())
        }
        // SAFETY: by the promise of this function.
        Ok(None) => unsafe { submit_any(bucketer, comm, args, out_ticket) },
        Err(e) => {
            if let (Status::Panic, Ok(held)) = (e.status, bucketer_of(bucketer)) {
                held.poison(&e.message);
            }
            Err(e)
        }
    }
}

/// A submit that may have more to do than to put an op into a bucket.
///
/// # Safety
/// As for `submit`.
#[inline(never)]
unsafe fn submit_any(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    args: std::result::Result<&rsb_submit_args, *const rsb_submit_args>,
    out_ticket: *mut rsb_ticket,
) -> Result<()> {
    let (bucketer, comm) = guarded(|| Ok((bucketer_of(bucketer)?, comm_of(comm)?)))?;
    let ask = guarded(|| {
        // SAFETY: by the promise of this function.
        unsafe {
            match args {
                Ok(args) => check(&comm, args),
                Err(args) => check(&comm, &structure(args, "args")?),
            }
        }
    });
    let submitted = ask.and_then(|ask| {
        // SAFETY: checked; the rest is rule 6.
        unsafe { drive(&bucketer, Bucketer::submit(&comm.arc(), &ask), out_ticket) }
    });
    poison_after_panic(&comm, submitted).map(drop)
}

/// Plans a call on a bucketer and runs it.
///
/// # Safety
/// The caller keeps the rules of the header.
unsafe fn run(
    handle: *mut rsb_bucketer,
    plan: impl FnOnce(&Bucketer<Callback>) -> Result<Plan<'static, Callback>>,
) -> Result<u64> {
    let (bucketer, plan) = guarded(|| {
        let bucketer = bucketer_of(handle)?;
        let plan = plan(&bucketer)?;
        Ok((bucketer, plan))
    })?;
    // SAFETY: by the promise of this function.
    unsafe { drive(&bucketer, plan, std::ptr::null_mut()) }
}

pub unsafe fn bucketer_launch(bucketer: *mut rsb_bucketer, err: *mut rsb_error) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { answer(run(bucketer, |b| b.launch()).map(drop), err) }
}

pub unsafe fn bucketer_flush(bucketer: *mut rsb_bucketer, err: *mut rsb_error) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { answer(run(bucketer, |b| b.flush()).map(drop), err) }
}

pub unsafe fn bucketer_poll(
    bucketer: *mut rsb_bucketer,
    out_completed: *mut usize,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        let polled = run(bucketer, |b| b.poll());
        if let (Ok(count), false) = (&polled, out_completed.is_null()) {
            out_completed.write_unaligned(*count as usize);
        }
        answer(polled.map(drop), err)
    }
}

pub unsafe fn bucketer_wait(
    bucketer: *mut rsb_bucketer,
    ticket: rsb_ticket,
    timeout_ns: u64,
    err: *mut rsb_error,
) -> rsb_status {
    let timeout = (timeout_ns != u64::MAX).then(|| Duration::from_nanos(timeout_ns));
    // SAFETY: the caller keeps the rules of the header.
    unsafe { answer(run(bucketer, |b| b.wait(ticket, timeout)).map(drop), err) }
}

pub unsafe fn shard_retain(shard: *mut rsb_shard) -> *mut rsb_shard {
    match guarded(|| Ok(memory::retain(shard as u64))) {
        Ok(Ok(())) => shard,
        _ => std::ptr::null_mut(),
    }
}

pub unsafe fn shard_release(shard: *mut rsb_shard) {
    let _ = guarded(|| Ok(memory::release(shard as u64)));
}

pub unsafe fn bucketer_release_buffers(
    bucketer: *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(|| bucketer_of(bucketer)?.release_buffers()), err) }
}

pub unsafe fn bucketer_free(handle: *mut rsb_bucketer) -> rsb_status {
    if handle.is_null() {
        return Status::Ok.code();
    }
    // SAFETY: the caller keeps the rules of the header.
    let closed = unsafe { run(handle, |b| b.close()) }.and_then(|_| {
        guarded(|| {
            let gone = |_| Error::new(Status::BadHandle, "bucketer: freed by another thread");
            BUCKETERS.remove(handle as u64).map(drop).map_err(gone)
        })
    });
    // SAFETY: there is no error struct to write.
    unsafe { answer(closed, std::ptr::null_mut()) }
}

pub unsafe fn bucketer_stats(
    bucketer: *const rsb_bucketer,
    out: *mut rsb_stats,
    out_size: usize,
) -> rsb_status {
    let read = || {
        let bucketer = bucketer_of(bucketer)?;
        given(out, "out")?;
        let (c, buffer_bytes, buffer_bytes_peak) = bucketer.stats();
        let stats = rsb_stats {
            ops_submitted: c.ops_submitted(),
            ops_completed: c.ops_completed.get(),
            ops_failed: c.ops_failed.get(),
            ops_bucketed: c.ops_bucketed.get(),
            ops_direct: c.ops_direct.get(),
            collectives_launched: c.collectives_launched.get(),
            flushes_full: c.flushes_full.get(),
            flushes_explicit: c.flushes_explicit.get(),
            payload_bytes: c.payload_bytes.get(),
            padding_bytes: c.padding_bytes.get(),
            copied_bytes: c.copied_bytes.get(),
            buffer_bytes,
            buffer_bytes_peak,
            pack_ns: c.pack_ns.get(),
            wait_ns: c.wait_ns.get(),
            reduce_ns: c.reduce_ns.get(),
            callback_ns: c.callback_ns.get(),
            staging_bytes_peak: c.staging_bytes_peak.get(),
        };
        let known = out_size.min(size_of::<rsb_stats>());
        // SAFETY: `out` has `out_size` bytes; what this version does not know is zeroed.
        unsafe {
            std::ptr::from_ref(&stats)
                .cast::<u8>()
                .copy_to_nonoverlapping(out.cast(), known);
            out.cast::<u8>().add(known).write_bytes(0, out_size - known);
        }
        Ok(())
    };
    // SAFETY: there is no error struct to write.
    unsafe { answer(guarded(read), std::ptr::null_mut()) }
}
