//! Communicators: create, query, all-gather, abort, free.

use std::ffi::{c_char, c_void};
use std::sync::atomic::Ordering;
use std::sync::Arc;
use std::time::Duration;

use super::engine::Transport;
use super::read::{given, overlap, structure, text};
use super::{answer, guarded, hook_panics, look_up, too_many};
use crate::comm::nccl::Library;
use crate::cuda::driver::Driver;
use crate::error::{invalid, unsupported, Result, Status};
use crate::ffi::{
    rsb_comm, rsb_comm_config, rsb_error, rsb_status, rsb_transport, RSB_COMM_EXACT,
    RSB_FEATURE_CUDA, RSB_FEATURE_NCCL, RSB_TRANSPORT_DEVICE,
};
use crate::handle::{Pinned, Table};
use crate::lane::{Endpoint, Options};
use crate::layout::total_bytes;
use crate::log;

static COMMS: Table<Endpoint> = Table::new(0xb1);

/// The comm of a handle.
#[inline]
pub fn comm_of(handle: *const rsb_comm) -> Result<Pinned<'static, Endpoint>> {
    look_up(&COMMS, handle as u64, "comm", "rsb_comm")
}

/// Whether a handle names a comm right now.
#[inline]
pub fn is_live(handle: *const rsb_comm) -> bool {
    COMMS.is_live(handle as u64)
}

fn insert(end: Arc<Endpoint>) -> Result<*mut rsb_comm> {
    let named = end.clone();
    let token = COMMS.insert(end).ok_or_else(|| too_many("rsb_comm"))?;
    named.rename(token);
    Ok(token as *mut rsb_comm)
}

/// The handle of a comm that a fuzz target has made of its own memory.
#[cfg(fuzzing)]
pub fn handle_of(end: Arc<Endpoint>) -> *mut rsb_comm {
    insert(end).unwrap_or(std::ptr::null_mut())
}

/// # Safety
/// `config` is NULL or points to what its struct_size says.
unsafe fn options(config: *const rsb_comm_config) -> Result<Options> {
    let mut options = Options::default();
    if config.is_null() {
        return Ok(options);
    }
    // SAFETY: by the promise of this function; any bytes make the struct.
    let c = unsafe { structure(config, "config")? };
    if c.flags & !RSB_COMM_EXACT != 0 {
        return Err(unsupported!(
            "config->flags: {:#x}; expected bits of {RSB_COMM_EXACT:#x}",
            c.flags
        ));
    }
    (options.stream, options.result_stream) = (c.stream, c.result_stream);
    options.timeout = match c.timeout_ns {
        0 => options.timeout,
        u64::MAX => None,
        ns => Some(Duration::from_nanos(ns)),
    };
    options.exact = c.flags & RSB_COMM_EXACT != 0;
    // SAFETY: the label is NULL or NUL-terminated.
    options.label = unsafe { text(c.label) }
        .unwrap_or_default()
        .chars()
        .take(64)
        .collect();
    options.staging_bytes = c.staging_bytes;
    if !c.control.is_null() {
        options.control =
            Some(look_up(&COMMS, c.control as u64, "config->control", "rsb_comm")?.arc());
    }
    Ok(options)
}

pub unsafe fn comm_create_local(
    size: u32,
    config: *const rsb_comm_config,
    out_comms: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    let create = || {
        hook_panics();
        given(out_comms, "out_comms")?;
        // SAFETY: the caller keeps the rules of the header.
        let options = unsafe { options(config)? };
        let mut handles = Vec::new();
        for end in Endpoint::local(size, &options)? {
            match insert(end) {
                Ok(handle) => handles.push(handle),
                Err(e) => {
                    handles.iter().for_each(|&h| drop(COMMS.remove(h as u64)));
                    return Err(e);
                }
            }
        }
        for (i, handle) in handles.into_iter().enumerate() {
            // SAFETY: there is room for `size` handles.
            unsafe { out_comms.add(i).write(handle) };
        }
        log::write(
            log::Level::Info,
            "comm",
            format_args!("{size} ranks as threads"),
        );
        Ok(())
    };
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(create), err) }
}

/// Makes this rank's end of a group that lives on `what`, and names it.
///
/// # Safety
/// The caller keeps the rules of the header.
unsafe fn create(
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
    what: &str,
    end: impl FnOnce(&Options) -> Result<Arc<Endpoint>>,
) -> rsb_status {
    let create = || {
        hook_panics();
        given(out_comm, "out_comm")?;
        // SAFETY: by the promise of this function.
        let end = end(&unsafe { options(config)? })?;
        let (rank, size) = (end.rank(), end.size());
        let handle = insert(end)?;
        // Before the handle is told: a logger could free it.
        log::write(
            log::Level::Info,
            "comm",
            format_args!("rank {rank} of {size} {what}"),
        );
        // SAFETY: there is room for a handle.
        unsafe { out_comm.write(handle) };
        Ok(())
    };
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(create), err) }
}

pub unsafe fn comm_create_shm(
    name: *const c_char,
    rank: u32,
    size: u32,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        create(config, out_comm, err, "processes", |options| {
            let name =
                text(name).ok_or_else(|| invalid!("name: NULL; expected this job's name"))?;
            Endpoint::shm(&name, rank, size, options)
        })
    }
}

/// What of the GPU's side is usable: libcuda and libnccl are looked for, and loaded.
pub fn features() -> u64 {
    let usable = guarded(|| {
        Driver::get()?;
        Ok(RSB_FEATURE_CUDA | Library::get().map_or(0, |_| RSB_FEATURE_NCCL))
    });
    usable.unwrap_or(0)
}

pub unsafe fn comm_wrap_nccl(
    nccl_comm: *mut c_void,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        create(config, out_comm, err, "on NCCL", |options| {
            Endpoint::nccl(nccl_comm, options)
        })
    }
}

pub unsafe fn comm_create_custom(
    transport: *const rsb_transport,
    rank: u32,
    size: u32,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    let mut armed = None;
    // SAFETY: the caller keeps the rules of the header.
    let status = unsafe {
        create(config, out_comm, err, "on a transport", |options| {
            let table = structure(transport, "transport")?;
            let (engine, abilities) = Transport::new(table)?;
            armed = Some(engine.armed());
            let (engine, place) = (Box::new(engine), (rank, size));
            match table.flags & RSB_TRANSPORT_DEVICE {
                0 => Endpoint::custom(engine, abilities, place, options),
                _ => Endpoint::device(engine, abilities, place, options),
            }
        })
    };
    if let (Some(armed), true) = (armed, status == Status::Ok.code()) {
        armed.store(true, Ordering::Release);
    }
    status
}

pub unsafe fn comm_rank(comm: *const rsb_comm) -> u32 {
    guarded(|| Ok(comm_of(comm)?.rank())).unwrap_or(u32::MAX)
}

pub unsafe fn comm_size(comm: *const rsb_comm) -> u32 {
    guarded(|| Ok(comm_of(comm)?.size())).unwrap_or(0)
}

pub unsafe fn comm_status(comm: *const rsb_comm, err: *mut rsb_error) -> rsb_status {
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(|| comm_of(comm)?.status()), err) }
}

pub unsafe fn comm_all_gather(
    comm: *mut rsb_comm,
    input: *const c_void,
    output: *mut c_void,
    bytes: usize,
    err: *mut rsb_error,
) -> rsb_status {
    let gather = || {
        let comm = comm_of(comm)?;
        let (input, output) = (input.cast::<u8>(), output.cast::<u8>());
        let size = comm.size();
        let Some(all) = total_bytes(bytes, size, 1) else {
            return Err(invalid!(
                "bytes: {bytes} for each of {size} ranks is more than memory can hold"
            ));
        };
        if bytes > 0 {
            given(input, "input")?;
            given(output, "output")?;
            let place = output.wrapping_add(comm.rank() as usize * bytes);
            if input != place.cast_const() && overlap(input, bytes, output, all) {
                return Err(invalid!(
                    "output: overlaps input; expected no overlap, or input at rank {}'s place",
                    comm.rank()
                ));
            }
        }
        // SAFETY: checked above; the rest is the header's rule.
        let gathered = guarded(|| unsafe { comm.all_gather(input, output, bytes) });
        poison_after_panic(&comm, gathered)
    };
    // SAFETY: err is NULL or may be written.
    unsafe { answer(guarded(gather), err) }
}

/// A panic leaves ranks different: the comm ends with it.
pub fn poison_after_panic<T>(comm: &Endpoint, result: Result<T>) -> Result<T> {
    if let Err(e) = &result {
        if e.status == Status::Panic {
            comm.poison(&e.message);
        }
    }
    result
}

pub unsafe fn comm_shrink(
    comm: *mut rsb_comm,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        match guarded(|| comm_of(comm)) {
            Ok(comm) => create(config, out_comm, err, "left", |o| comm.shrink(o)),
            Err(e) => answer(Err(e), err),
        }
    }
}

pub unsafe fn comm_abort(comm: *mut rsb_comm) {
    let _ = guarded(|| {
        comm_of(comm)?.abort();
        Ok(())
    });
}

pub unsafe fn comm_free(comm: *mut rsb_comm) {
    let _ = guarded(|| {
        drop(COMMS.remove(comm as u64));
        Ok(())
    });
}
