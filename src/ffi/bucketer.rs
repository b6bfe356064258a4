//! The bucketer as C makes and uses it: configuration, submits, results, calls that carry work on,
//! shards and counters.
//!
//! # Bucketer
//!
//! A bucketer gathers reduce-scatters into buckets (rule 9), launches them in order (rule 1) and
//! runs the callbacks (rule 3). It works with any number of comms, dtypes and ops at a time: each
//! (comm, dtype, op) has its own open bucket.

use super::{rsb_comm, rsb_dtype, rsb_error, rsb_op, rsb_status};
use std::ffi::c_void;
use std::mem::{offset_of, size_of};

/// A handle of a bucketer: a checked token (rule 7). Freed with rsb_bucketer_free.
pub struct rsb_bucketer {
    _private: [u8; 0],
}

/// A counted reference to the memory of a result (rule 7 holds).
pub struct rsb_shard {
    _private: [u8; 0],
}

/// The name of an accepted op within its bucketer: a number, nothing to free; 0: none.
pub type rsb_ticket = u64;

// ## Creating

/// Where the memory of buckets and results comes from, for instance a caching allocator. alloc and
/// free are called on any thread. device is -1 for host memory, else the CUDA ordinal.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_allocator {
    /// sizeof(rsb_allocator).
    pub struct_size: usize,
    /// The first argument of every function below; the caller's until release.
    pub ctx: *mut c_void,
    /// Returns `bytes` bytes aligned to `align`, or NULL if there are none.
    pub alloc: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            bytes: usize,
            align: usize,
            device: i32,
            stream: *mut c_void,
        ) -> *mut c_void,
    >,
    /// Takes back what alloc gave, with alloc's bytes, device and stream. All use of the memory is
    /// then ordered before, in that stream, which must outlive retained shards.
    pub free: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            ptr: *mut c_void,
            bytes: usize,
            device: i32,
            stream: *mut c_void,
        ),
    >,
    /// ctx is needed no more. Called once, as the last call, if and only if create returned RSB_OK.
    /// May be NULL.
    pub release: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
}

const _: () = assert!(size_of::<rsb_allocator>() == 40 && offset_of!(rsb_allocator, release) == 32);

/// How a bucketer is made. Begin with RSB_CONFIG_INIT. It is copied, and so is the allocator.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_config {
    /// sizeof(rsb_config).
    pub struct_size: usize,
    /// Bytes of one bucket, all ranks' parts together, equal on all ranks. 0: 25 MiB; negative: no
    /// bucketing, every op is direct.
    pub bucket_bytes: i64,
    /// None yet: 0.
    pub flags: u64,
    /// Memory for buckets and results; copied. NULL: built in.
    pub allocator: *const rsb_allocator,
}

const _: () = assert!(size_of::<rsb_config>() == 32 && offset_of!(rsb_config, allocator) == 24);

// C: /** An rsb_config with every field at its default. */
// C: #define RSB_CONFIG_INIT { sizeof(rsb_config), 0, 0, NULL }

/// Makes a bucketer.
///
/// - config: may be NULL: all defaults.
/// - out: receives the handle, which is the caller's.
///
/// Any thread; waits for no peer.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: out is NULL, alloc or free of the allocator is NULL, or a field has
///   a value that is not accepted.
/// - RSB_ERR_UNSUPPORTED: an unknown flag or field is set.
/// - RSB_ERR_NO_MEMORY: memory for the bucketer could not be had.
#[no_mangle]
pub unsafe extern "C" fn rsb_bucketer_create(
    config: *const rsb_config,
    out: *mut *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_create(config, out, err) }
}

// ## Results

/// What a callback gets: the library's, and valid during the callback only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_result {
    /// The size of this struct in the library.
    pub struct_size: usize,
    /// The op's ticket, as rsb_bucketer_submit gave it.
    pub ticket: rsb_ticket,
    /// The op's tag.
    pub tag: u64,
    /// This rank's reduced part, `numel` elements of dtype; NULL on error.
    pub data: *mut c_void,
    /// Elements in data, padding included.
    pub numel: usize,
    /// How many of them came from the caller; the rest is padding.
    pub valid_numel: usize,
    /// Flat input: the element of it where this shard begins (past its end: valid_numel is 0).
    pub offset: usize,
    /// Device: data is ready in this stream's order.
    pub stream: *mut c_void,
    /// The memory of data: retain it to keep data beyond the callback. NULL if output was given.
    pub shard: *mut rsb_shard,
    /// The details of status. Never NULL.
    pub error: *const rsb_error,
    /// RSB_OK, or why there is no result.
    pub status: rsb_status,
    /// The type of data.
    pub dtype: rsb_dtype,
}

const _: () = assert!(size_of::<rsb_result>() == 88 && offset_of!(rsb_result, dtype) == 84);

/// A callback: called once for an accepted op (rule 4), on the thread and at the time that rule 3
/// says. It must not unwind: rule 3 says what a C++ exception does that leaves it all the same.
pub type rsb_callback =
    Option<unsafe extern "C-unwind" fn(user_data: *mut c_void, result: *const rsb_result)>;

// ## Submitting

/// Submits one reduce-scatter: shorthand for rsb_bucketer_submit with `inputs`.
///
/// - bucketer, comm: what gathers it, and the group it runs on.
/// - inputs: comm size pointers; `inputs[i]`, `numel` elements, is what this rank gives to rank i.
///   Array and elements stay the caller's and are read as rule 6 says.
/// - numel: elements of each input, the same on all ranks. May be 0.
/// - dtype, op: RSB_DTYPE_ and RSB_OP_, the same on all ranks.
/// - callback, user_data: called with the result; callback may be NULL.
///
/// Any thread, callbacks included. May wait for peers, and run callbacks, if the op is direct or
/// launches a bucket, and may wait while the comm's staging is full (rule 9).
///
/// Returns RSB_OK if the op was accepted (rule 4); what fails later is in the callback's result and
/// in the next flush. Else:
/// - RSB_ERR_BAD_HANDLE: bucketer or comm is no live handle.
/// - RSB_ERR_INVALID_ARGUMENT: inputs or one of its pointers is NULL although numel is not 0, or
///   the sizes are too large.
/// - RSB_ERR_UNSUPPORTED: an unknown dtype or op, or AVG of integers.
/// - RSB_ERR_NO_MEMORY: memory for the result, the bucket or the staging could not be had.
/// - the comm's sticky error.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_reduce_scatter_async(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    inputs: *const *const c_void,
    numel: usize,
    dtype: rsb_dtype,
    op: rsb_op,
    callback: rsb_callback,
    user_data: *mut c_void,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe {
        super::imp::bucketer_reduce_scatter_async(
            bucketer, comm, inputs, numel, dtype, op, callback, user_data, err,
        )
    }
}

/// Everything that can be asked of an op. Begin with RSB_SUBMIT_ARGS_INIT.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_submit_args {
    /// sizeof(rsb_submit_args).
    pub struct_size: usize,
    /// comm size pointers, `numel` elements each: `inputs[i]` is what this rank gives to rank i.
    /// Exactly one of inputs and flat_input is given.
    pub inputs: *const *const c_void,
    /// `numel` elements in total, cut into one piece for each rank, of rsb_shard_numel(numel, comm
    /// size) elements; the library pads the tail with zeros.
    pub flat_input: *const c_void,
    /// Where the result goes (rule 6); NULL: library memory, see rsb_result.shard.
    pub output: *mut c_void,
    /// Elements per shard (inputs) or in total (flat_input). May be 0.
    pub numel: usize,
    /// The type of the inputs: RSB_DTYPE_.
    pub dtype: rsb_dtype,
    /// The type of the result, float to float; 0: dtype.
    pub output_dtype: rsb_dtype,
    /// The reduction: RSB_OP_.
    pub op: rsb_op,
    /// RSB_SUBMIT_ bits.
    pub flags: u32,
    /// A factor for results of float types; 0: 1. All is computed in f32 (F64 in or out: in f64),
    /// with scale rounded to that once. Each step is rounded, none is fused:
    ///   acc = op in rank order; AVG: acc / size; acc * scale; ACCUMULATE: output + acc;
    /// then one rounding to output_dtype.
    pub scale: f64,
    /// Which tensor this is: equal on all ranks, and checked across them; 0: none.
    pub tag: u64,
    /// Device: the stream of this op's input; NULL: the comm's.
    pub stream: *mut c_void,
    /// Called with the result; may be NULL.
    pub callback: rsb_callback,
    /// The first argument of callback.
    pub user_data: *mut c_void,
}

const _: () =
    assert!(size_of::<rsb_submit_args>() == 96 && offset_of!(rsb_submit_args, scale) == 56);

// C: /** An rsb_submit_args with every field unset. */
// C: #define RSB_SUBMIT_ARGS_INIT \
// C:   { sizeof(rsb_submit_args), NULL, NULL, NULL, 0, 0, 0, 0, 0, 0.0, 0, NULL, NULL, NULL }

/// output += result. Needs output.
pub const RSB_SUBMIT_ACCUMULATE: u32 = 1u32;
/// The inputs stay as they are until the callback (device: until result->stream has passed), so
/// that they need no copy. Not compared across ranks.
pub const RSB_SUBMIT_BORROW: u32 = 2u32;

/// Submits one reduce-scatter.
///
/// - bucketer, comm: what gathers it, and the group it runs on.
/// - args: the op; read during the call. What it points to: rule 6.
/// - out_ticket: receives the op's ticket, for rsb_bucketer_wait; may be NULL. It is written as soon
///   as the op is accepted: before its callback, and also if an older op's callback throws (rule 3).
///
/// Any thread, callbacks included. May wait for peers, and run callbacks, if the op is direct or
/// launches a bucket, and may wait while the comm's staging is full (rule 9).
///
/// Returns RSB_OK if the op was accepted (rule 4); what fails later is in the callback's result and
/// in the next flush. Else:
/// - RSB_ERR_BAD_HANDLE: bucketer or comm is no live handle.
/// - RSB_ERR_INVALID_ARGUMENT: args is NULL; both inputs and flat_input are given, or neither
///   although numel is not 0; a pointer of inputs is NULL although numel is not 0; ACCUMULATE
///   without output; output overlaps an input in a way that rule 6 does not allow; the sizes are
///   too large; or a field has a value that is not accepted.
/// - RSB_ERR_UNSUPPORTED: an unknown dtype, op, flag or field; AVG, scale or another output_dtype
///   with integers.
/// - RSB_ERR_NO_MEMORY: memory for the result, the bucket or the staging could not be had.
/// - the comm's sticky error.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_submit(
    bucketer: *mut rsb_bucketer,
    comm: *mut rsb_comm,
    args: *const rsb_submit_args,
    out_ticket: *mut rsb_ticket,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_submit(bucketer, comm, args, out_ticket, err) }
}

/// Elements of a shard of a flat input: numel / comm_size, rounded up; 0 if comm_size is 0. Any
/// thread; never blocks.
#[no_mangle]
pub unsafe extern "C" fn rsb_shard_numel(numel: usize, comm_size: u32) -> usize {
    match comm_size {
        0 => 0,
        size => numel.div_ceil(size as usize),
    }
}

// ## Carrying on

/// Starts the bucketer's open buckets, in the order of their first submit, and the direct ops that
/// wait on device comms. Completing them is left to the calls below, but for what rule 3 says.
///
/// Any thread; not in a callback of this bucketer. May wait for peers and run callbacks (rules 3
/// and 9).
///
/// Returns RSB_OK, also if nothing was open, or:
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer.
/// - the sticky error of a comm with an open bucket; other comms' buckets are launched all the
///   same.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_launch(
    bucketer: *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_launch(bucketer, err) }
}

/// Launches what is open, completes everything and runs every callback that is owed.
///
/// Any thread; not in a callback of this bucketer. Waits for peers, each wait up to the comm's
/// timeout without progress.
///
/// Returns RSB_OK if nothing failed since the flush before it, or, after all callbacks have run:
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle; nothing was done.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer; nothing was done.
/// - the first failure since the flush before it: a comm's sticky error. Submits that a failed comm
///   refused count.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_flush(
    bucketer: *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_flush(bucketer, err) }
}

/// Runs the callbacks of the launched ops that are complete. Launches nothing.
///
/// - out_completed: receives how many ops this call completed; may be NULL.
///
/// Any thread; not in a callback of this bucketer. Never waits for peers.
///
/// Returns RSB_OK, also if nothing was complete, or:
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer.
/// - the sticky error of a comm whose ops ended in this call.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_poll(
    bucketer: *mut rsb_bucketer,
    out_completed: *mut usize,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_poll(bucketer, out_completed, err) }
}

/// Waits until the callback of one op has returned, and runs those before it. Launches nothing.
///
/// - ticket: the op.
/// - timeout_ns: this call's own time, in nanoseconds; 0: poll; UINT64_MAX: the comm's timeout.
///
/// Any thread; not in a callback of this bucketer. May wait for peers.
///
/// Returns RSB_OK once the callback has returned, or:
/// - RSB_PENDING: timeout_ns is up; the op lives on.
/// - RSB_ERR_NOT_LAUNCHED: the op is still in an open bucket, or, direct on a device comm, waits for
///   the next launch.
/// - RSB_ERR_INVALID_ARGUMENT: ticket is no ticket of this bucketer.
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer.
/// - the op's error, if it failed, until the next flush.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_wait(
    bucketer: *mut rsb_bucketer,
    ticket: rsb_ticket,
    timeout_ns: u64,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_wait(bucketer, ticket, timeout_ns, err) }
}

// ## Keeping results, giving memory back

/// Takes one more reference to a result's memory, so that result->data outlives the callback, and
/// the bucketer and comm too. Every retain needs one rsb_shard_release.
///
/// On local and shm comms a shard holds its own memory alone; on others its whole bucket's output
/// (to keep a little, give `output`).
///
/// Any thread; waits for no peer. Returns shard, or NULL for a bad handle.
#[no_mangle]
pub unsafe extern "C" fn rsb_shard_retain(shard: *mut rsb_shard) -> *mut rsb_shard {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::shard_retain(shard) }
}

/// Gives one reference back; the last one frees the memory. Device: result->stream must be ordered
/// after the last use. Any thread; waits for no peer. NULL and bad handles are ignored.
#[no_mangle]
pub unsafe extern "C" fn rsb_shard_release(shard: *mut rsb_shard) {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::shard_release(shard) }
}

/// Gives this bucketer's memory back: buffer_bytes is then 0 but for retained shards. The next
/// submit takes it again. A comm's staging stays.
///
/// Any thread; not in a callback of this bucketer. Local: it waits for no peer and is safe on one
/// rank alone.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_BUSY: ops are pending; nothing was given back.
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer.
#[no_mangle]
pub unsafe extern "C" fn rsb_bucketer_release_buffers(
    bucketer: *mut rsb_bucketer,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_release_buffers(bucketer, err) }
}

/// Ends the bucketer and runs every callback that is owed: ops that were not launched end with
/// RSB_ERR_CANCELLED; launched ones complete, or end when the comm does. Retained shards live on.
///
/// Any thread; not in a callback of this bucketer. May wait for peers, for launched ops. NULL is
/// fine.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_BAD_HANDLE: bucketer is neither NULL nor a live handle.
/// - RSB_ERR_REENTRANT: called in a callback of this bucketer, which stays alive.
#[no_mangle]
pub unsafe extern "C-unwind" fn rsb_bucketer_free(bucketer: *mut rsb_bucketer) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_free(bucketer) }
}

// ## Counters

/// What a bucketer has done since it was made.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct rsb_stats {
    /// Ops accepted.
    pub ops_submitted: u64,
    /// Ops that ended with RSB_OK.
    pub ops_completed: u64,
    /// Ops that ended otherwise.
    pub ops_failed: u64,
    /// Ops that went through a bucket.
    pub ops_bucketed: u64,
    /// Ops that were direct.
    pub ops_direct: u64,
    /// Buckets and direct ops that were started.
    pub collectives_launched: u64,
    /// Buckets launched because they were full, or the next op did not fit.
    pub flushes_full: u64,
    /// Buckets launched by rsb_bucketer_launch or rsb_bucketer_flush.
    pub flushes_explicit: u64,
    /// Bytes of input that came from the caller.
    pub payload_bytes: u64,
    /// Bytes of zeros that padded flat inputs.
    pub padding_bytes: u64,
    /// Bytes of input copied into buckets or staging.
    pub copied_bytes: u64,
    /// Bytes of bucket and result memory held now, retained shards included.
    pub buffer_bytes: u64,
    /// The largest value that buffer_bytes had.
    pub buffer_bytes_peak: u64,
    /// Nanoseconds spent copying inputs.
    pub pack_ns: u64,
    /// Nanoseconds spent waiting for peers, but for waits of about a microsecond at most.
    pub wait_ns: u64,
    /// Nanoseconds spent reducing.
    pub reduce_ns: u64,
    /// Nanoseconds spent in callbacks; those that are quick for long are timed now and then, for all.
    pub callback_ns: u64,
    /// The largest committed staging of this rank, in bytes, of the comms that were used.
    pub staging_bytes_peak: u64,
}

const _: () =
    assert!(size_of::<rsb_stats>() == 144 && offset_of!(rsb_stats, staging_bytes_peak) == 136);

/// Reads the counters. They are read one by one: together they are no snapshot while other threads
/// work.
///
/// - out, out_size: the caller's struct and its sizeof. A field that either side does not know is
///   left out, and bytes of out beyond the library's struct are set to 0.
///
/// Any thread; waits for no peer.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
/// - RSB_ERR_INVALID_ARGUMENT: out is NULL.
#[no_mangle]
pub unsafe extern "C" fn rsb_bucketer_stats(
    bucketer: *const rsb_bucketer,
    out: *mut rsb_stats,
    out_size: usize,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::bucketer_stats(bucketer, out, out_size) }
}
