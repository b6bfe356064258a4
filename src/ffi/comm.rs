//! Communicators as C makes and uses them: local, shm, NCCL and custom.
//!
//! # Communicators
//!
//! An rsb_comm is one rank's end of a group. Ranks are numbered 0..size-1. Each rank of a group has
//! its own handle, which any of its threads may use (rules 1 and 2). A host comm moves memory of
//! the processor; local and shm comms are host comms. A device comm moves memory of a GPU in the
//! order of streams: NCCL, and custom transports with RSB_TRANSPORT_DEVICE.

use super::{rsb_dtype, rsb_error, rsb_op, rsb_status};
use std::ffi::{c_char, c_void};
use std::mem::{offset_of, size_of};

/// A handle of a communicator: a checked token (rule 7). Freed with rsb_comm_free.
pub struct rsb_comm {
    _private: [u8; 0],
}

/// How a comm is made. Begin with RSB_COMM_CONFIG_INIT; a NULL config is all defaults. It is read
/// during the call only.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_comm_config {
    /// sizeof(rsb_comm_config).
    pub struct_size: usize,
    /// How long a wait may see no progress, in nanoseconds; then the comm fails with
    /// RSB_ERR_TIMEOUT. 0: 300 s; UINT64_MAX: no limit.
    pub timeout_ns: u64,
    /// RSB_COMM_ bits.
    pub flags: u64,
    /// Device comm: the CUstream or cudaStream_t that produces the inputs; NULL: the default.
    pub stream: *mut c_void,
    /// A name for this comm, NUL-terminated, copied; it stands in errors, logs and traces. May be
    /// NULL.
    pub label: *const c_char,
    /// Device comm: the stream in whose order results become ready; NULL: a stream of ours, which
    /// flush joins into `stream`.
    pub result_stream: *mut c_void,
    /// NCCL and custom comms: a host comm of the same ranks, over which the ranks check each other
    /// (rule 1). It is kept alive. NULL: none.
    pub control: *mut rsb_comm,
    /// Local and shm comms: bytes of shared staging of a rank, equal on all ranks. It is committed
    /// as it is used. 0: 32 MiB.
    pub staging_bytes: usize,
}

const _: () =
    assert!(size_of::<rsb_comm_config>() == 64 && offset_of!(rsb_comm_config, control) == 48);

// C: /** An rsb_comm_config with every field at its default. */
// C: #define RSB_COMM_CONFIG_INIT { sizeof(rsb_comm_config), 0, 0, NULL, NULL, NULL, NULL, 0 }

/// For rsb_comm_config.flags: also on NCCL and custom transports, reduce as local and shm comms
/// always do: an all-to-all, then our own reduction in rank order.
pub const RSB_COMM_EXACT: u64 = 1u64 << 0;

// ## Creating: threads, processes, NCCL

/// Makes a group whose `size` ranks are threads of this process.
///
/// - size: the number of ranks, at least 1.
/// - config: the same for all ranks; may be NULL.
/// - out_comms: room for `size` handles; `out_comms[i]` becomes rank i's. Each is the caller's and
///   is freed by itself. All are made, or none.
///
/// Any thread; never blocks. A rank's thread then uses that rank's handle: one thread cannot stand
/// for two ranks in calls that may wait (rule 1).
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: size is 0, out_comms is NULL, or a field of config has a value that
///   is not accepted.
/// - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
/// - RSB_ERR_UNSUPPORTED: an unknown flag or field of config is set.
/// - RSB_ERR_NO_MEMORY: memory for the group could not be had.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_create_local(
    size: u32,
    config: *const rsb_comm_config,
    out_comms: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_create_local(size, config, out_comms, err) }
}

/// Joins a group whose `size` ranks are processes of this host and user.
///
/// - name: this job's name, the same on all ranks: letters, digits, '.', '_' and '-', at most 64.
///   Nothing is left behind under it, however a process ends; only if all ranks are killed while
///   they meet, the empty file of a socket stays, until a group meets in that directory again
///   (before a reboot; later nobody looks for it).
/// - rank, size: this process's rank, and the number of ranks; each rank joins once.
/// - config: may be NULL; settings that must agree are compared between the ranks.
/// - out_comm: receives the handle, which is the caller's.
///
/// Any thread. Blocks until all ranks have joined, or for the timeout of config.
///
/// The ranks meet in a directory that only this user can enter: $RSBUCKET_RUN_DIR, else
/// $XDG_RUNTIME_DIR, else ~/.cache/rsbucket, else one of ours in the temporary directory. If
/// $RSBUCKET_TOKEN is set, it must be the same on all ranks.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: name is NULL, empty, too long or has other characters; size is 0;
///   rank is not below size; out_comm is NULL; or a field of config has a value that is not
///   accepted.
/// - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
/// - RSB_ERR_UNSUPPORTED: this system has no shm comms (rule 10), or an unknown flag or field of
///   config is set.
/// - RSB_ERR_PERMISSION: the rendezvous was refused: another user, a wrong token, a rank that
///   another process has, or a directory that is not safe.
/// - RSB_ERR_CONFIG_MISMATCH: the ranks came with different settings.
/// - RSB_ERR_TIMEOUT: not all ranks joined in time.
/// - RSB_ERR_PEER_LOST: a rank went while the group was forming.
/// - RSB_ERR_NO_MEMORY: memory for the group could not be had.
/// - RSB_ERR_TRANSPORT: the system refused a call; err->native_code is its errno.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_create_shm(
    name: *const c_char,
    rank: u32,
    size: u32,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_create_shm(name, rank, size, config, out_comm, err) }
}

/// Makes a device comm of an ncclComm_t that the caller has made.
///
/// - nccl_comm: borrowed; it must outlive the rsb_comm. The library is the copy of libnccl that the
///   process has loaded already, else $RSBUCKET_NCCL_LIB, else libnccl.so.2.
/// - config: may be NULL.
/// - out_comm: receives the handle, which is the caller's.
///
/// Any thread; waits for no peer and not for the device. It works in the context that is current if
/// that is of nccl_comm's device, else in the device's primary context. After a failure nccl_comm is
/// its owner's to abort.
///
/// Inputs and outputs of its ops are memory of that device. An op is packed on its stream when it is
/// submitted, so that its memory may be used again in that stream's order. With RSB_SUBMIT_BORROW
/// its whole bucket is packed at the launch, and a direct op whose rows lie one after the other is
/// sent as it lies. No call waits for the device. Streams that are being captured into a CUDA graph
/// are refused with RSB_ERR_UNSUPPORTED before anything is enqueued. The environment variable
/// ENABLE_NCCL_BASE_COLLECTIVES=0 makes every reduce-scatter a group of reduces. MIN and MAX of
/// floats are exchanged and combined here, since NCCL's own pass a NaN over.
///
/// NCCL's rules for nccl_comm hold: no other call on it at the same time as a call that enqueues
/// (submit, launch, flush, rsb_comm_all_gather), and none of these between an ncclGroupStart and
/// ncclGroupEnd of the caller's, where NCCL enqueues nothing until the latter. In the first
/// collectives of a communicator NCCL may keep such a call waiting until all ranks have come. The
/// rsb_comm is freed before nccl_comm is destroyed or aborted.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: nccl_comm or out_comm is NULL; a stream is of another device or
///   context; or a field of config has a value that is not accepted.
/// - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
/// - RSB_ERR_UNSUPPORTED: no CUDA driver (11.2 or later), no libnccl (2.10 or later), or a device
///   below compute capability 7.0; err->message says what was looked for and where. Or an unknown
///   flag or field of config is set.
/// - RSB_ERR_NO_MEMORY: memory for the comm could not be had.
/// - RSB_ERR_TRANSPORT: the driver or NCCL failed; err->native_code is its code.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_wrap_nccl(
    nccl_comm: *mut c_void,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_wrap_nccl(nccl_comm, config, out_comm, err) }
}

// ## Creating: any engine
//
// A transport lets the library run on an engine of the caller's: MPI, torch.distributed, a vendor's
// library. It is a table of functions that start and test collectives.
//
// Its functions are called on any thread that is inside an rsb_ call, one call at a time per comm
// (two comms in two threads: two at a time). Only abort may come at any time beside another.
//
// start: coll is valid during the call; its send and recv until the request has ended, or release
// has returned. All ranks start the same collectives in the same order. Up to 4 requests are open
// at once, and they may end in any order. A non-zero return means: no request.
//
// test: *done = 1, or a non-zero return, ends the request; it is not named again. After abort, or
// the comm's first failure, open requests are not tested any more: release ends them.
//
// A non-zero return of start or test becomes RSB_ERR_TRANSPORT with that native_code.
//
// Device: start enqueues on coll->stream, in the context that was current at create, and *done
// means enqueued.

/// One collective, as a transport sees it.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_coll {
    /// The size of this struct in the library.
    pub struct_size: usize,
    /// What this rank gives. REDUCE_SCATTER and ALL_TO_ALL: comm size * count elements, rank-major
    /// (first all for rank 0). ALL_GATHER: count elements.
    pub send: *const c_void,
    /// What this rank gets. REDUCE_SCATTER: count elements. ALL_TO_ALL and ALL_GATHER: comm size *
    /// count elements, rank-major.
    pub recv: *mut c_void,
    /// Elements of dtype.
    pub count: usize,
    /// One of RSB_COLL_.
    pub kind: u32,
    /// The type of the elements.
    pub dtype: rsb_dtype,
    /// SUM, MIN, MAX or PROD; AVG is done by the library.
    pub op: rsb_op,
    /// Always 0.
    pub reserved: u32,
    /// Device transports: the stream to enqueue on.
    pub stream: *mut c_void,
}

const _: () = assert!(size_of::<rsb_coll>() == 56 && offset_of!(rsb_coll, stream) == 48);

/// Reduce over the ranks; rank i gets part i.
pub const RSB_COLL_REDUCE_SCATTER: u32 = 1u32;
/// Part i goes to rank i. It moves bytes only: dtype is there for its size.
pub const RSB_COLL_ALL_TO_ALL: u32 = 2u32;
/// Every rank gets what all gave, in rank order.
pub const RSB_COLL_ALL_GATHER: u32 = 3u32;

// ## The transport's table

/// An engine. The struct is copied; ctx stays the caller's until release.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct rsb_transport {
    /// sizeof(rsb_transport).
    pub struct_size: usize,
    /// RSB_TRANSPORT_ bits: what the engine can do.
    pub flags: u64,
    /// The first argument of every function below.
    pub ctx: *mut c_void,
    /// Starts `coll` and sets *request to a value that names it. Must not block. Returns 0, or the
    /// engine's own code.
    pub start: Option<
        unsafe extern "C" fn(
            ctx: *mut c_void,
            coll: *const rsb_coll,
            request: *mut *mut c_void,
        ) -> i32,
    >,
    /// Carries `request` on and sets *done to 1 if it has ended. Must not block. Returns 0, or the
    /// engine's own code.
    pub test:
        Option<unsafe extern "C" fn(ctx: *mut c_void, request: *mut c_void, done: *mut i32) -> i32>,
    /// The group is ending: stop what can be stopped. Any thread, any time. May be NULL.
    pub abort: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// The comm is gone and needs ctx no more. Called once, as the last call, if and only if create
    /// returned RSB_OK.
    pub release: Option<unsafe extern "C" fn(ctx: *mut c_void)>,
    /// The dtypes that REDUCE_SCATTER takes, as bits 1 << RSB_DTYPE_; 0: all. The rest goes through
    /// ALL_TO_ALL.
    pub reduce_dtypes: u64,
    /// The largest rsb_coll.count, in elements; 0: any.
    pub max_count: usize,
    /// Writes what `code` means into text, which has room for `size` bytes; it becomes part of
    /// rsb_error.message. May be NULL.
    pub describe:
        Option<unsafe extern "C" fn(ctx: *mut c_void, code: i32, text: *mut c_char, size: usize)>,
}

const _: () =
    assert!(size_of::<rsb_transport>() == 80 && offset_of!(rsb_transport, describe) == 72);

/// It has RSB_COLL_REDUCE_SCATTER. This or ALL_TO_ALL is needed.
pub const RSB_TRANSPORT_REDUCE_SCATTER: u64 = 1u64 << 0;
/// It has RSB_COLL_ALL_TO_ALL. That is enough for every dtype and op: the library reduces locally,
/// exactly.
pub const RSB_TRANSPORT_ALL_TO_ALL: u64 = 1u64 << 1;
/// It has RSB_COLL_ALL_GATHER, for the cross-check of ranks and for rsb_comm_all_gather.
pub const RSB_TRANSPORT_ALL_GATHER: u64 = 1u64 << 2;
/// It moves device memory, in the order of streams.
pub const RSB_TRANSPORT_DEVICE: u64 = 1u64 << 8;

/// Makes a comm that runs on an engine of the caller's: MPI (rsbucket/mpi.h), torch.distributed, a
/// vendor's library.
///
/// - transport: the engine; copied.
/// - rank, size: this rank, and the number of ranks.
/// - config: may be NULL.
/// - out_comm: receives the handle, which is the caller's.
///
/// Any thread; communicates nothing and waits for no peer. Unless it returns RSB_OK, none of the
/// transport's functions is called, release included.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_INVALID_ARGUMENT: transport or out_comm is NULL; start, test or release is NULL;
///   neither REDUCE_SCATTER nor ALL_TO_ALL is among the flags; size is 0; rank is not below size;
///   or a field has a value that is not accepted.
/// - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
/// - RSB_ERR_UNSUPPORTED: an unknown flag or field of transport or config is set; RSB_COMM_EXACT
///   without ALL_TO_ALL; or RSB_TRANSPORT_DEVICE without RSB_FEATURE_CUDA.
/// - RSB_ERR_NO_MEMORY: memory for the comm could not be had.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_create_custom(
    transport: *const rsb_transport,
    rank: u32,
    size: u32,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_create_custom(transport, rank, size, config, out_comm, err) }
}

// ## Using and ending

/// This rank, 0..size-1; UINT32_MAX for a bad handle. Any thread; waits for no peer.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_rank(comm: *const rsb_comm) -> u32 {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_rank(comm) }
}

/// The number of ranks; 0 for a bad handle. Any thread; waits for no peer.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_size(comm: *const rsb_comm) -> u32 {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_size(comm) }
}

/// The sticky first cause of the comm's failure, with its details in err. Any thread; waits for no
/// peer.
///
/// Returns RSB_OK as long as the comm has not failed, or:
/// - RSB_ERR_BAD_HANDLE: comm is no live handle.
/// - the comm's sticky error.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_status(comm: *const rsb_comm, err: *mut rsb_error) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_status(comm, err) }
}

/// Gives every rank what all ranks gave. It is the sharded step's other half, so that an embedded
/// comm is enough for a whole training step.
///
/// - input: `bytes` bytes, the same number on every rank. May be this rank's place in output.
/// - output: size * bytes bytes, in rank order. Both stay the caller's. After an error on a custom
///   comm the engine may use them until it has been released or aborted, as rule 6 has it for ops.
/// - bytes: 0 makes it a barrier; input and output may then be NULL.
///
/// Any thread, callbacks included. Blocks until all ranks have come (device: in the order of the
/// comm's stream). It takes its place in rule 1's order, leaves open buckets open and runs no
/// callback.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_BAD_HANDLE: comm is no live handle.
/// - RSB_ERR_INVALID_ARGUMENT: input or output is NULL, they overlap in another way, or size *
///   bytes is too large.
/// - RSB_ERR_UNSUPPORTED: a custom transport without RSB_TRANSPORT_ALL_GATHER.
/// - RSB_ERR_NO_MEMORY: memory for the exchange could not be had.
/// - the comm's sticky error.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_all_gather(
    comm: *mut rsb_comm,
    input: *const c_void,
    output: *mut c_void,
    bytes: usize,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_all_gather(comm, input, output, bytes, err) }
}

/// Forms a smaller comm of the survivors of a lost peer; ranks are dense, in the old order. For
/// local and shm comms, only after RSB_ERR_PEER_LOST (else RSB_ERR_INVALID_ARGUMENT).
///
/// - comm: the failed comm; it stays the caller's.
/// - config: may be NULL.
/// - out_comm: receives the new handle, which is the caller's.
///
/// All survivors call it. It blocks for them, up to the timeout, and may be tried again. Peers that
/// free their comm while others go on count as lost, too ("left"); freeing when no rank needs
/// another any more is no error.
///
/// Returns RSB_OK, or:
/// - RSB_ERR_BAD_HANDLE: comm is no live handle.
/// - RSB_ERR_INVALID_ARGUMENT: comm has not failed with RSB_ERR_PEER_LOST; out_comm is NULL; or a
///   field of config has a value that is not accepted.
/// - RSB_ERR_UNSUPPORTED: comm is on a transport, or an unknown flag or field of config is set.
/// - RSB_ERR_TIMEOUT: a rank that is alive has not come; err->peer names it by its old number.
/// - RSB_ERR_CONFIG_MISMATCH: the survivors came with different settings.
/// - RSB_ERR_PEER_LOST: another rank went, and the time is up.
/// - RSB_ERR_PERMISSION, RSB_ERR_NO_MEMORY, RSB_ERR_TRANSPORT: as for rsb_comm_create_shm.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_shrink(
    comm: *mut rsb_comm,
    config: *const rsb_comm_config,
    out_comm: *mut *mut rsb_comm,
    err: *mut rsb_error,
) -> rsb_status {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_shrink(comm, config, out_comm, err) }
}

/// Ends the group: every rank's calls on it, those that wait included, report RSB_ERR_ABORTED (or
/// the failure that came first). Any thread; never blocks. A bad handle is ignored.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_abort(comm: *mut rsb_comm) {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_abort(comm) }
}

/// Gives the handle back. It is dead at once. Ops that have not been called back keep the comm
/// alive, idle bucketers do not. To peers that still need this rank it has left (see
/// rsb_comm_shrink). Any thread; waits for no peer. NULL and bad handles are ignored.
#[no_mangle]
pub unsafe extern "C" fn rsb_comm_free(comm: *mut rsb_comm) {
    // SAFETY: the caller keeps the rules of the header.
    unsafe { super::imp::comm_free(comm) }
}
