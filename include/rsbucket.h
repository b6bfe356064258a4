/* SPDX-License-Identifier: MIT OR Apache-2.0
 *
 * rsbucket.h: bucketed reduce-scatter behind a C ABI
 *
 * Generated from src/ffi and cbindgen.toml. To change it, change those and run
 *     RSBUCKET_UPDATE_HEADER=1 cargo test --test header
 *
 * ------------------------------------------------------------------------------------------------
 * What it is
 * ------------------------------------------------------------------------------------------------
 *
 * Training that shards its gradients reduces every tensor over all ranks and leaves each rank with
 * its own part of the result: a reduce-scatter. Most tensors are small, and one collective for each
 * wastes the machine. rsbucket gathers them into buckets, moves a bucket at a time, and calls back
 * once for every tensor, with this rank's part of it.
 *
 *   rsb_comm       one rank's end of a group: threads of a process, processes of a host, or any
 *                  engine (MPI, torch.distributed, a vendor's library) behind a small table
 *   rsb_bucketer   takes the operations, fills and launches the buckets, calls back
 *   rsb_shard      a counted reference that keeps a result's memory
 *
 * A step is: submit every tensor, then flush. The sections below are: version, status, element
 * types and operations, communicators, bucketer, log.
 *
 * ------------------------------------------------------------------------------------------------
 * Linking and loading
 * ------------------------------------------------------------------------------------------------
 *
 * The header is C99 and C++11 and includes <stddef.h> and <stdint.h> only. Link with -lrsbucket.
 * The shared library's versioned name is librsbucket.so.0; the suffix is RSB_ABI_VERSION.
 *
 * To load it at run time, look up each function by its name here, rsb_abi_version first, and go on
 * only if that returns the RSB_ABI_VERSION you were compiled with:
 *
 *   uint32_t (*abi)(void);
 *   void *lib = dlopen("librsbucket.so.0", RTLD_NOW | RTLD_LOCAL);
 *   if (lib == NULL) give_up(dlerror());
 *   *(void **)&abi = dlsym(lib, "rsb_abi_version");
 *   if (abi == NULL || abi() != RSB_ABI_VERSION) give_up("another ABI");
 *
 * ------------------------------------------------------------------------------------------------
 * Example: two processes, each keeps its half of the summed gradient.  ./step 0 & ./step 1
 * ------------------------------------------------------------------------------------------------
 *
 *   #include <rsbucket.h>
 *   #include <stdio.h>
 *   #include <stdlib.h>
 *
 *   static void show(void *rank, const rsb_result *r) {
 *     if (r->status != RSB_OK) printf("rank %s: %s\n", (char *)rank, r->error->message);
 *     else printf("rank %s: its half begins with %g\n", (char *)rank, *(const float *)r->data);
 *   }
 *
 *   int main(int argc, char **argv) {
 *     float grad[4] = {1, 2, 3, 4};
 *     const void *parts[2] = {grad, grad + 2}; // parts[i] goes to rank i: 2 elements each
 *     rsb_comm *comm;
 *     rsb_bucketer *bucketer;
 *     rsb_error err;
 *     if (argc != 2 ||
 *         rsb_comm_create_shm("step", (uint32_t)atoi(argv[1]), 2, NULL, &comm, &err) != RSB_OK ||
 *         rsb_bucketer_create(NULL, &bucketer, &err) != RSB_OK) return 1;
 *     if (rsb_bucketer_reduce_scatter_async(bucketer, comm, parts, 2, RSB_DTYPE_F32, RSB_OP_SUM,
 *                                           show, argv[1], &err) != RSB_OK ||
 *         rsb_bucketer_flush(bucketer, &err) != RSB_OK) fprintf(stderr, "%s\n", err.message);
 *     rsb_bucketer_free(bucketer);
 *     rsb_comm_free(comm);
 *     return 0;
 *   }
 *
 * ------------------------------------------------------------------------------------------------
 * Ten rules for every call
 * ------------------------------------------------------------------------------------------------
 *
 *  1 Order
 *    All ranks of a comm make the same sequence of submit, launch, flush and rsb_comm_all_gather
 *    calls on it: the same numel, dtype, op, scale and tag, on the same bucketer, with the same
 *    bucket_bytes. Bucketers are matched across ranks by the order of their first use on the comm.
 *
 *    Only these calls start communication. So what is launched, and in which order, is a pure
 *    function of that sequence and never of timing. Open buckets are launched in the order of their
 *    first submit. A launch or flush that finds nothing open is no part of the sequence.
 *
 *    Where ranks differ, every rank gets RSB_ERR_DESYNC (on custom and NCCL comms: where there is a
 *    cross-check, see rsb_comm_config.control and RSB_TRANSPORT_ALL_GATHER).
 *
 *    Calls that may wait for peers (rule 9), made on several comms, come in one order on all the
 *    ranks that the comms share, as in MPI. One thread cannot stand for two ranks in such calls.
 *
 *  2 Threads
 *    Every call is memory-safe from any thread; the order that rule 1 asks for is the caller's to
 *    keep. Calls on one bucketer take turns. While a callback of it runs, other threads may submit
 *    to it; their other calls wait. The library holds no lock while user code runs. A const handle
 *    means that the call may run beside others on the same object.
 *
 *  3 Callbacks
 *    A callback runs on the thread that is inside an rsb_bucketer_ call on its bucketer, before
 *    that call returns. Callbacks come bucket by bucket in launch order, in submit order within a
 *    bucket, and never one inside another. Which call runs which:
 *
 *      flush, free       all that are owed
 *      wait              those up to its op
 *      poll              those that are complete
 *      a direct submit   (rule 9) those of the buckets launched before it on its comm, then its own
 *      a call that       while two buckets of that bucketer and comm are in flight: it first
 *      launches          completes the oldest and runs the callbacks of that one
 *
 *    On a device comm a bucket's callbacks run in the call that launches it. So every call but
 *    poll, and a wait whose own time is up, runs its callbacks at the same place of rule 1's
 *    sequence on every rank. Callbacks that submit need that.
 *
 *    A callback may submit (to the next bucket; the callback of a direct op that it submits runs
 *    right after the running one), query, use other bucketers, and call rsb_comm_all_gather. On its
 *    own bucketer and its own thread launch, flush, poll, wait, release_buffers and free return
 *    RSB_ERR_REENTRANT. It waits for other ranks through this library only.
 *
 *    A C++ exception that leaves a callback passes through the rsb_ call to its caller. That op
 *    counts as called; the next call runs the callbacks that are still owed. What other ranks see
 *    of the call is done all the same: buckets are launched, and the op of a submit is accepted.
 *    A callback may fork: in the child, the call around it ends with RSB_ERR_ABORTED when the
 *    callback returns. What a longjmp out of a callback leaves behind is undefined, and so is what
 *    pthread_cancel leaves of a thread that is inside an rsb_ call.
 *
 *    An op is complete when, on a host comm, the bytes are in result->data; on a device comm, when
 *    the work is enqueued and result->data is ready in the order of result->stream (what fails
 *    later shows in rsb_comm_status and in the next call).
 *
 *  4 Once
 *    If a submit returns RSB_OK, its callback, if it has one, runs exactly once: with RSB_OK, with
 *    an error, or with RSB_ERR_CANCELLED. If it returns anything else, the callback never runs: the
 *    op was not accepted, and nothing changed, except that a comm may have failed in the meantime
 *    (rule 5). This holds for direct ops too.
 *
 *  5 Errors
 *    err may be NULL. It is written in full on every return that is not RSB_OK and left alone on
 *    RSB_OK. It owns nothing. A callback may use the same one as the call around it.
 *
 *    Argument errors change nothing. Errors after which ranks may differ are sticky on the comm:
 *    RSB_ERR_DESYNC, PEER_LOST, TIMEOUT, ABORTED, TRANSPORT and PANIC. Every later call on that
 *    comm, on every rank, reports the first cause.
 *
 *    flush returns the first failure since the flush before it, submits that a failed comm refused
 *    included, after all callbacks have run. Work that all ranks had committed before the failure
 *    still completes with RSB_OK. A timeout counts from the start of a wait without progress.
 *
 *  6 Inputs and outputs
 *    Inputs are read before the submit returns (host) or in the order of the op's stream (device).
 *    They may have any alignment. The library keeps no pointer to them, except for
 *    RSB_SUBMIT_BORROW.
 *
 *    output must live until the callback has returned. On a device it is used after what stream
 *    held at submit. It may be this rank's own piece of the input, exactly (same dtype), and
 *    overlaps nothing else. After an error its content is undefined, and on custom and NCCL comms
 *    the engine may use the memory of a direct or lent op until it has been released or aborted.
 *
 *  7 Handles
 *    The pointer types are there for the compiler. The values are checked tokens, not addresses. A
 *    handle that is NULL, stale, freed twice, of another kind or invented gives
 *    RSB_ERR_BAD_HANDLE, never undefined behaviour.
 *
 *  8 Growth
 *    Input structs begin with struct_size, the sizeof that the caller was compiled with. A zero
 *    field means its default. An unknown tail that is not all zero is refused
 *    (RSB_ERR_UNSUPPORTED). Output structs are given with their size. Numbers are never reused.
 *
 *  9 Buckets
 *    A bucket takes bucket_bytes / (comm size * dtype size) elements, rounded down, of each rank's
 *    part. An op that fits waits in the open bucket of its (comm, dtype, op). One that does not fit
 *    into what is left launches that bucket first. A bucket filled to the last element is launched
 *    at once.
 *
 *    An op larger than a whole bucket, and every op when bucketing is off, is direct. On a host
 *    comm a direct op is carried out inside its submit: its callback has run when the submit
 *    returns, before those of earlier ops that still wait. On a device comm it is enqueued in
 *    submit order, at the next launch, flush or full bucket at the latest.
 *
 *    The callback of a waiting op never runs before its bucket is launched. numel 0 is legal:
 *    inputs, flat_input and result->data may then be NULL, and a waiting op waits like any other.
 *
 *    Calls that may wait for peers: flush, wait, free, all_gather, launch, a submit that is direct
 *    or launches, and any submit while the comm's staging is full. Every wait also carries on the
 *    comm's other launched work, without callbacks.
 *
 * 10 Process
 *    Linux 5.1 or later on x86-64 and aarch64; elsewhere shm comms are RSB_ERR_UNSUPPORTED. The
 *    library prints nothing (a panic goes to the logger), installs no signal handler and never ends
 *    the process, but for Rust's abort when an allocation of less than 4 KiB fails. After fork()
 *    the child's handles are dead (RSB_ERR_ABORTED). dlclose() is safe. While a shm comm lives, so
 *    does a small thread of the library's, which takes no signals.
 */

#ifndef RSBUCKET_H
#define RSBUCKET_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* =================================================================================================
 * Version
 * =================================================================================================
 *
 * The macros say which header a program was compiled with, the functions which library it runs
 * with. Functions of this section may be called from any thread, at any time; they never block and
 * cannot fail.
 */

#define RSB_VERSION_MAJOR  0  /**< Major version of this header. */
#define RSB_VERSION_MINOR  1  /**< Minor version: new functions, fields and numbers. */
#define RSB_VERSION_PATCH  0  /**< Patch version: corrections only. */
#define RSB_ABI_VERSION   0u  /**< The ABI of this header, and the SONAME's suffix:
                                   librsbucket.so.0. */

/** The version of the loaded library, as major << 16 | minor << 8 | patch. */
uint32_t rsb_version(void);

/** The ABI of the loaded library. A program may use it only if this is the RSB_ABI_VERSION that the
 * program was compiled with.
 */
uint32_t rsb_abi_version(void);

/** The version of the loaded library as text, such as "0.1.0". Static: never freed, never NULL. */
const char *rsb_version_string(void);

/* ---- Features -------------------------------------------------------------------------------- */

#define RSB_FEATURE_SHM  (UINT64_C(1) << 0)  /**< rsb_comm_create_shm works. */
#define RSB_FEATURE_CUDA (UINT64_C(1) << 1)  /**< Device memory works. */
#define RSB_FEATURE_NCCL (UINT64_C(1) << 2)  /**< rsb_comm_wrap_nccl works. */

/** What works here: RSB_FEATURE_ bits. A bit is set where the part is built into the loaded library
 * and usable on this machine.
 */
uint64_t rsb_features(void);

/* =================================================================================================
 * Status and errors
 * =================================================================================================
 *
 * Every call that can fail returns an rsb_status, and most fill in an rsb_error for the details
 * (rule 5). A call's comment lists what it returns and why. Three things are said once, here:
 *
 * - Any call that takes a handle may return RSB_ERR_ABORTED in the child of a fork (rule 10).
 * - Any call may return RSB_ERR_PANIC, which reports a bug in rsbucket.
 * - "The comm's sticky error" stands for the first cause of the comm's failure, one of TIMEOUT,
 *   PEER_LOST, DESYNC, ABORTED, TRANSPORT and PANIC (rule 5).
 */

/** How a call ended: 0 is success, a negative number an error, a positive one "not done yet". */
typedef int32_t rsb_status;

#define RSB_OK                     0  /**< Success. */
#define RSB_PENDING                1  /**< A wait's own time is up, the op lives on. */
#define RSB_ERR_INVALID_ARGUMENT  -1  /**< An argument has a value that the call does not accept.
                                           Nothing changed. */
#define RSB_ERR_BAD_HANDLE        -2  /**< A handle is NULL, stale, freed twice, of another kind or
                                           invented. */
#define RSB_ERR_UNSUPPORTED       -3  /**< An unknown dtype, op, flag or field, or a part that is
                                           not built in. */
#define RSB_ERR_NO_MEMORY         -4  /**< Memory could not be had. */
#define RSB_ERR_BUSY              -5  /**< The object is in use. */
#define RSB_ERR_NOT_LAUNCHED      -6  /**< A wait on an op that is still in an open bucket. */
#define RSB_ERR_REENTRANT         -7  /**< A call that a callback must not make on its own bucketer
                                           (rule 3). */
#define RSB_ERR_CANCELLED         -8  /**< The bucketer was freed before the op was launched. */
#define RSB_ERR_PERMISSION        -9  /**< The rendezvous was refused: another user, or a wrong
                                           token. */
#define RSB_ERR_CONFIG_MISMATCH  -10  /**< Ranks joined with different settings. */
#define RSB_ERR_TIMEOUT          -20  /**< A wait saw no progress for the comm's timeout. This error
                                           and those below are sticky on the comm (rule 5). */
#define RSB_ERR_PEER_LOST        -21  /**< A rank's process is gone; rsb_error.peer says which. */
#define RSB_ERR_DESYNC           -22  /**< Ranks submitted different work (rule 1). */
#define RSB_ERR_ABORTED          -23  /**< rsb_comm_abort ended the group, or the handle crossed a
                                           fork. */
#define RSB_ERR_TRANSPORT        -24  /**< The engine failed; rsb_error.native_code is its own
                                           code. */
#define RSB_ERR_PANIC            -99  /**< A bug in rsbucket. */

/** The name of a status, such as "RSB_ERR_TIMEOUT"; "RSB_UNKNOWN" for a number that is none.
 * Static: never freed, never NULL. Any thread; never blocks.
 */
const char *rsb_status_name(rsb_status status);

/* ---- The details of an error ----------------------------------------------------------------- */

/** What went wrong, in the caller's memory: 256 bytes, a size that never changes. It owns nothing,
 * needs no initialization and may be reused. Rule 5 says when it is written.
 */
typedef struct rsb_error {
  /** The status that the call returned. */
  rsb_status status;
  /** The engine's or the system's own code: ncclResult_t, CUresult, errno, MPI; 0: none. */
  int32_t native_code;
  /** The rank to blame; -1: unknown. */
  int32_t peer;
  /** Always 0. */
  uint32_t reserved;
  /** One sentence for a human: UTF-8, NUL-terminated, cut where it does not fit. */
  char message[240];
} rsb_error;

/* =================================================================================================
 * Element types and operations
 * =================================================================================================
 *
 * How results are computed. Local and shm comms, and every comm with RSB_COMM_EXACT, reduce in
 * rank order 0..size-1, F16 and BF16 in f32 with one rounding at the end: the same bits for every
 * bucket size, run and transport. Elsewhere the engine's own order and accumulation hold. Integers
 * wrap. rsb_submit_args.scale says how scaling, accumulating and converting join in.
 */

/** The type of an element: one of RSB_DTYPE_. Other numbers are refused (RSB_ERR_UNSUPPORTED). */
typedef uint32_t rsb_dtype;

#define RSB_DTYPE_F32  1u  /**< IEEE 754 binary32, 4 bytes. */
#define RSB_DTYPE_F64  2u  /**< IEEE 754 binary64, 8 bytes. */
#define RSB_DTYPE_F16  3u  /**< IEEE 754 binary16, 2 bytes. */
#define RSB_DTYPE_BF16 4u  /**< bfloat16, the upper half of a binary32, 2 bytes. */
#define RSB_DTYPE_I32  5u  /**< int32_t, 4 bytes. */
#define RSB_DTYPE_I64  6u  /**< int64_t, 8 bytes. */
#define RSB_DTYPE_U8   7u  /**< uint8_t, 1 byte. */
#define RSB_DTYPE_I8   8u  /**< int8_t, 1 byte. */

/** Bytes of one element; 0 for a number that is no dtype. Any thread; never blocks. */
size_t rsb_dtype_size(rsb_dtype dtype);

/* ---- Operations ------------------------------------------------------------------------------ */

/** What a reduction does with the values of the ranks: one of RSB_OP_. Other numbers are refused
 * (RSB_ERR_UNSUPPORTED).
 */
typedef uint32_t rsb_op;

#define RSB_OP_SUM  1u  /**< The sum. */
#define RSB_OP_AVG  2u  /**< The sum, then / size in f32 (F64: in f64). Float types only. */
#define RSB_OP_MIN  3u  /**< The least value; NaN in any rank gives NaN. */
#define RSB_OP_MAX  4u  /**< The greatest value; NaN in any rank gives NaN. */
#define RSB_OP_PROD 5u  /**< The product. */

/* =================================================================================================
 * Communicators
 * =================================================================================================
 *
 * An rsb_comm is one rank's end of a group. Ranks are numbered 0..size-1. Each rank of a group has
 * its own handle, which any of its threads may use (rules 1 and 2). A host comm moves memory of
 * the processor; local and shm comms are host comms. A device comm moves memory of a GPU in the
 * order of streams: NCCL, and custom transports with RSB_TRANSPORT_DEVICE.
 */

/** A handle of a communicator: a checked token (rule 7). Freed with rsb_comm_free. */
typedef struct rsb_comm rsb_comm;

/** How a comm is made. Begin with RSB_COMM_CONFIG_INIT; a NULL config is all defaults. It is read
 * during the call only.
 */
typedef struct rsb_comm_config {
  /** sizeof(rsb_comm_config). */
  size_t struct_size;
  /** How long a wait may see no progress, in nanoseconds; then the comm fails with
   * RSB_ERR_TIMEOUT. 0: 300 s; UINT64_MAX: no limit. */
  uint64_t timeout_ns;
  /** RSB_COMM_ bits. */
  uint64_t flags;
  /** Device comm: the CUstream or cudaStream_t that produces the inputs; NULL: the default. */
  void *stream;
  /** A name for this comm, NUL-terminated, copied; it stands in errors, logs and traces. May be
   * NULL. */
  const char *label;
  /** Device comm: the stream in whose order results become ready; NULL: a stream of ours, which
   * flush joins into `stream`. */
  void *result_stream;
  /** NCCL and custom comms: a host comm of the same ranks, over which the ranks check each other
   * (rule 1). It is kept alive. NULL: none. */
  rsb_comm *control;
  /** Local and shm comms: bytes of shared staging of a rank, equal on all ranks. It is committed
   * as it is used. 0: 32 MiB. */
  size_t staging_bytes;
} rsb_comm_config;

/** An rsb_comm_config with every field at its default. */
#define RSB_COMM_CONFIG_INIT { sizeof(rsb_comm_config), 0, 0, NULL, NULL, NULL, NULL, 0 }

#define RSB_COMM_EXACT (UINT64_C(1) << 0)  /**< For rsb_comm_config.flags: also on NCCL and custom
                                                transports, reduce as local and shm comms always do:
                                                an all-to-all, then our own reduction in rank
                                                order. */

/* ---- Creating: threads, processes, NCCL ------------------------------------------------------ */

/** Makes a group whose `size` ranks are threads of this process.
 *
 * - size: the number of ranks, at least 1.
 * - config: the same for all ranks; may be NULL.
 * - out_comms: room for `size` handles; `out_comms[i]` becomes rank i's. Each is the caller's and
 *   is freed by itself. All are made, or none.
 *
 * Any thread; never blocks. A rank's thread then uses that rank's handle: one thread cannot stand
 * for two ranks in calls that may wait (rule 1).
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: size is 0, out_comms is NULL, or a field of config has a value that
 *   is not accepted.
 * - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
 * - RSB_ERR_UNSUPPORTED: an unknown flag or field of config is set.
 * - RSB_ERR_NO_MEMORY: memory for the group could not be had.
 */
rsb_status rsb_comm_create_local(uint32_t size,
                                 const rsb_comm_config *config,
                                 rsb_comm **out_comms,
                                 rsb_error *err);

/** Joins a group whose `size` ranks are processes of this host and user.
 *
 * - name: this job's name, the same on all ranks: letters, digits, '.', '_' and '-', at most 64.
 *   Nothing is left behind under it, however a process ends; only if all ranks are killed while
 *   they meet, the empty file of a socket stays, until a group meets in that directory again
 *   (before a reboot; later nobody looks for it).
 * - rank, size: this process's rank, and the number of ranks; each rank joins once.
 * - config: may be NULL; settings that must agree are compared between the ranks.
 * - out_comm: receives the handle, which is the caller's.
 *
 * Any thread. Blocks until all ranks have joined, or for the timeout of config.
 *
 * The ranks meet in a directory that only this user can enter: $RSBUCKET_RUN_DIR, else
 * $XDG_RUNTIME_DIR, else ~/.cache/rsbucket, else one of ours in the temporary directory. If
 * $RSBUCKET_TOKEN is set, it must be the same on all ranks.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: name is NULL, empty, too long or has other characters; size is 0;
 *   rank is not below size; out_comm is NULL; or a field of config has a value that is not
 *   accepted.
 * - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
 * - RSB_ERR_UNSUPPORTED: this system has no shm comms (rule 10), or an unknown flag or field of
 *   config is set.
 * - RSB_ERR_PERMISSION: the rendezvous was refused: another user, a wrong token, a rank that
 *   another process has, or a directory that is not safe.
 * - RSB_ERR_CONFIG_MISMATCH: the ranks came with different settings.
 * - RSB_ERR_TIMEOUT: not all ranks joined in time.
 * - RSB_ERR_PEER_LOST: a rank went while the group was forming.
 * - RSB_ERR_NO_MEMORY: memory for the group could not be had.
 * - RSB_ERR_TRANSPORT: the system refused a call; err->native_code is its errno.
 */
rsb_status rsb_comm_create_shm(const char *name,
                               uint32_t rank,
                               uint32_t size,
                               const rsb_comm_config *config,
                               rsb_comm **out_comm,
                               rsb_error *err);

/** Makes a device comm of an ncclComm_t that the caller has made.
 *
 * - nccl_comm: borrowed; it must outlive the rsb_comm. The library is the copy of libnccl that the
 *   process has loaded already, else $RSBUCKET_NCCL_LIB, else libnccl.so.2.
 * - config: may be NULL.
 * - out_comm: receives the handle, which is the caller's.
 *
 * Any thread; waits for no peer and not for the device. It works in the context that is current if
 * that is of nccl_comm's device, else in the device's primary context. After a failure nccl_comm is
 * its owner's to abort.
 *
 * Inputs and outputs of its ops are memory of that device. An op is packed on its stream when it is
 * submitted, so that its memory may be used again in that stream's order. With RSB_SUBMIT_BORROW
 * its whole bucket is packed at the launch, and a direct op whose rows lie one after the other is
 * sent as it lies. No call waits for the device. Streams that are being captured into a CUDA graph
 * are refused with RSB_ERR_UNSUPPORTED before anything is enqueued. The environment variable
 * ENABLE_NCCL_BASE_COLLECTIVES=0 makes every reduce-scatter a group of reduces. MIN and MAX of
 * floats are exchanged and combined here, since NCCL's own pass a NaN over.
 *
 * NCCL's rules for nccl_comm hold: no other call on it at the same time as a call that enqueues
 * (submit, launch, flush, rsb_comm_all_gather), and none of these between an ncclGroupStart and
 * ncclGroupEnd of the caller's, where NCCL enqueues nothing until the latter. In the first
 * collectives of a communicator NCCL may keep such a call waiting until all ranks have come. The
 * rsb_comm is freed before nccl_comm is destroyed or aborted.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: nccl_comm or out_comm is NULL; a stream is of another device or
 *   context; or a field of config has a value that is not accepted.
 * - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
 * - RSB_ERR_UNSUPPORTED: no CUDA driver (11.2 or later), no libnccl (2.10 or later), or a device
 *   below compute capability 7.0; err->message says what was looked for and where. Or an unknown
 *   flag or field of config is set.
 * - RSB_ERR_NO_MEMORY: memory for the comm could not be had.
 * - RSB_ERR_TRANSPORT: the driver or NCCL failed; err->native_code is its code.
 */
rsb_status rsb_comm_wrap_nccl(void *nccl_comm,
                              const rsb_comm_config *config,
                              rsb_comm **out_comm,
                              rsb_error *err);

/* ---- Creating: any engine -----------------------------------------------------------------------
 *
 * A transport lets the library run on an engine of the caller's: MPI, torch.distributed, a vendor's
 * library. It is a table of functions that start and test collectives.
 *
 * Its functions are called on any thread that is inside an rsb_ call, one call at a time per comm
 * (two comms in two threads: two at a time). Only abort may come at any time beside another.
 *
 * start: coll is valid during the call; its send and recv until the request has ended, or release
 * has returned. All ranks start the same collectives in the same order. Up to 4 requests are open
 * at once, and they may end in any order. A non-zero return means: no request.
 *
 * test: *done = 1, or a non-zero return, ends the request; it is not named again. After abort, or
 * the comm's first failure, open requests are not tested any more: release ends them.
 *
 * A non-zero return of start or test becomes RSB_ERR_TRANSPORT with that native_code.
 *
 * Device: start enqueues on coll->stream, in the context that was current at create, and *done
 * means enqueued.
 */

#define RSB_COLL_REDUCE_SCATTER 1u  /**< Reduce over the ranks; rank i gets part i. */
#define RSB_COLL_ALL_TO_ALL     2u  /**< Part i goes to rank i. It moves bytes only: dtype is there
                                         for its size. */
#define RSB_COLL_ALL_GATHER     3u  /**< Every rank gets what all gave, in rank order. */

/** One collective, as a transport sees it. */
typedef struct rsb_coll {
  /** The size of this struct in the library. */
  size_t struct_size;
  /** What this rank gives. REDUCE_SCATTER and ALL_TO_ALL: comm size * count elements, rank-major
   * (first all for rank 0). ALL_GATHER: count elements. */
  const void *send;
  /** What this rank gets. REDUCE_SCATTER: count elements. ALL_TO_ALL and ALL_GATHER: comm size *
   * count elements, rank-major. */
  void *recv;
  /** Elements of dtype. */
  size_t count;
  /** One of RSB_COLL_. */
  uint32_t kind;
  /** The type of the elements. */
  rsb_dtype dtype;
  /** SUM, MIN, MAX or PROD; AVG is done by the library. */
  rsb_op op;
  /** Always 0. */
  uint32_t reserved;
  /** Device transports: the stream to enqueue on. */
  void *stream;
} rsb_coll;

/* ---- The transport's table ------------------------------------------------------------------- */

/** It has RSB_COLL_REDUCE_SCATTER. This or ALL_TO_ALL is needed. */
#define RSB_TRANSPORT_REDUCE_SCATTER (UINT64_C(1) << 0)
/** It has RSB_COLL_ALL_TO_ALL. That is enough for every dtype and op: the library reduces locally,
 * exactly.
 */
#define RSB_TRANSPORT_ALL_TO_ALL (UINT64_C(1) << 1)
/** It has RSB_COLL_ALL_GATHER, for the cross-check of ranks and for rsb_comm_all_gather. */
#define RSB_TRANSPORT_ALL_GATHER (UINT64_C(1) << 2)
/** It moves device memory, in the order of streams. */
#define RSB_TRANSPORT_DEVICE (UINT64_C(1) << 8)

/** An engine. The struct is copied; ctx stays the caller's until release. */
typedef struct rsb_transport {
  /** sizeof(rsb_transport). */
  size_t struct_size;
  /** RSB_TRANSPORT_ bits: what the engine can do. */
  uint64_t flags;
  /** The first argument of every function below. */
  void *ctx;
  /** Starts `coll` and sets *request to a value that names it. Must not block. Returns 0, or the
   * engine's own code. */
  int32_t (*start)(void *ctx, const rsb_coll *coll, void **request);
  /** Carries `request` on and sets *done to 1 if it has ended. Must not block. Returns 0, or the
   * engine's own code. */
  int32_t (*test)(void *ctx, void *request, int32_t *done);
  /** The group is ending: stop what can be stopped. Any thread, any time. May be NULL. */
  void (*abort)(void *ctx);
  /** The comm is gone and needs ctx no more. Called once, as the last call, if and only if create
   * returned RSB_OK. */
  void (*release)(void *ctx);
  /** The dtypes that REDUCE_SCATTER takes, as bits 1 << RSB_DTYPE_; 0: all. The rest goes through
   * ALL_TO_ALL. */
  uint64_t reduce_dtypes;
  /** The largest rsb_coll.count, in elements; 0: any. */
  size_t max_count;
  /** Writes what `code` means into text, which has room for `size` bytes; it becomes part of
   * rsb_error.message. May be NULL. */
  void (*describe)(void *ctx, int32_t code, char *text, size_t size);
} rsb_transport;

/** Makes a comm that runs on an engine of the caller's: MPI (rsbucket/mpi.h), torch.distributed, a
 * vendor's library.
 *
 * - transport: the engine; copied.
 * - rank, size: this rank, and the number of ranks.
 * - config: may be NULL.
 * - out_comm: receives the handle, which is the caller's.
 *
 * Any thread; communicates nothing and waits for no peer. Unless it returns RSB_OK, none of the
 * transport's functions is called, release included.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: transport or out_comm is NULL; start, test or release is NULL;
 *   neither REDUCE_SCATTER nor ALL_TO_ALL is among the flags; size is 0; rank is not below size;
 *   or a field has a value that is not accepted.
 * - RSB_ERR_BAD_HANDLE: config->control is given and is no live handle.
 * - RSB_ERR_UNSUPPORTED: an unknown flag or field of transport or config is set; RSB_COMM_EXACT
 *   without ALL_TO_ALL; or RSB_TRANSPORT_DEVICE without RSB_FEATURE_CUDA.
 * - RSB_ERR_NO_MEMORY: memory for the comm could not be had.
 */
rsb_status rsb_comm_create_custom(const rsb_transport *transport,
                                  uint32_t rank,
                                  uint32_t size,
                                  const rsb_comm_config *config,
                                  rsb_comm **out_comm,
                                  rsb_error *err);

/* ---- Using and ending ------------------------------------------------------------------------ */

/** This rank, 0..size-1; UINT32_MAX for a bad handle. Any thread; waits for no peer. */
uint32_t rsb_comm_rank(const rsb_comm *comm);

/** The number of ranks; 0 for a bad handle. Any thread; waits for no peer. */
uint32_t rsb_comm_size(const rsb_comm *comm);

/** The sticky first cause of the comm's failure, with its details in err. Any thread; waits for no
 * peer.
 *
 * Returns RSB_OK as long as the comm has not failed, or:
 * - RSB_ERR_BAD_HANDLE: comm is no live handle.
 * - the comm's sticky error.
 */
rsb_status rsb_comm_status(const rsb_comm *comm, rsb_error *err);

/** Gives every rank what all ranks gave. It is the sharded step's other half, so that an embedded
 * comm is enough for a whole training step.
 *
 * - input: `bytes` bytes, the same number on every rank. May be this rank's place in output.
 * - output: size * bytes bytes, in rank order. Both stay the caller's. After an error on a custom
 *   comm the engine may use them until it has been released or aborted, as rule 6 has it for ops.
 * - bytes: 0 makes it a barrier; input and output may then be NULL.
 *
 * Any thread, callbacks included. Blocks until all ranks have come (device: in the order of the
 * comm's stream). It takes its place in rule 1's order, leaves open buckets open and runs no
 * callback.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_BAD_HANDLE: comm is no live handle.
 * - RSB_ERR_INVALID_ARGUMENT: input or output is NULL, they overlap in another way, or size *
 *   bytes is too large.
 * - RSB_ERR_UNSUPPORTED: a custom transport without RSB_TRANSPORT_ALL_GATHER.
 * - RSB_ERR_NO_MEMORY: memory for the exchange could not be had.
 * - the comm's sticky error.
 */
rsb_status rsb_comm_all_gather(rsb_comm *comm,
                               const void *input,
                               void *output,
                               size_t bytes,
                               rsb_error *err);

/** Forms a smaller comm of the survivors of a lost peer; ranks are dense, in the old order. For
 * local and shm comms, only after RSB_ERR_PEER_LOST (else RSB_ERR_INVALID_ARGUMENT).
 *
 * - comm: the failed comm; it stays the caller's.
 * - config: may be NULL.
 * - out_comm: receives the new handle, which is the caller's.
 *
 * All survivors call it. It blocks for them, up to the timeout, and may be tried again. Peers that
 * free their comm while others go on count as lost, too ("left"); freeing when no rank needs
 * another any more is no error.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_BAD_HANDLE: comm is no live handle.
 * - RSB_ERR_INVALID_ARGUMENT: comm has not failed with RSB_ERR_PEER_LOST; out_comm is NULL; or a
 *   field of config has a value that is not accepted.
 * - RSB_ERR_UNSUPPORTED: comm is on a transport, or an unknown flag or field of config is set.
 * - RSB_ERR_TIMEOUT: a rank that is alive has not come; err->peer names it by its old number.
 * - RSB_ERR_CONFIG_MISMATCH: the survivors came with different settings.
 * - RSB_ERR_PEER_LOST: another rank went, and the time is up.
 * - RSB_ERR_PERMISSION, RSB_ERR_NO_MEMORY, RSB_ERR_TRANSPORT: as for rsb_comm_create_shm.
 */
rsb_status rsb_comm_shrink(rsb_comm *comm,
                           const rsb_comm_config *config,
                           rsb_comm **out_comm,
                           rsb_error *err);

/** Ends the group: every rank's calls on it, those that wait included, report RSB_ERR_ABORTED (or
 * the failure that came first). Any thread; never blocks. A bad handle is ignored.
 */
void rsb_comm_abort(rsb_comm *comm);

/** Gives the handle back. It is dead at once. Ops that have not been called back keep the comm
 * alive, idle bucketers do not. To peers that still need this rank it has left (see
 * rsb_comm_shrink). Any thread; waits for no peer. NULL and bad handles are ignored.
 */
void rsb_comm_free(rsb_comm *comm);

/* =================================================================================================
 * Bucketer
 * =================================================================================================
 *
 * A bucketer gathers reduce-scatters into buckets (rule 9), launches them in order (rule 1) and
 * runs the callbacks (rule 3). It works with any number of comms, dtypes and ops at a time: each
 * (comm, dtype, op) has its own open bucket.
 */

/** A handle of a bucketer: a checked token (rule 7). Freed with rsb_bucketer_free. */
typedef struct rsb_bucketer rsb_bucketer;

/** A counted reference to the memory of a result (rule 7 holds). */
typedef struct rsb_shard rsb_shard;

/** The name of an accepted op within its bucketer: a number, nothing to free; 0: none. */
typedef uint64_t rsb_ticket;

/* ---- Creating -------------------------------------------------------------------------------- */

/** Where the memory of buckets and results comes from, for instance a caching allocator. alloc and
 * free are called on any thread. device is -1 for host memory, else the CUDA ordinal.
 */
typedef struct rsb_allocator {
  /** sizeof(rsb_allocator). */
  size_t struct_size;
  /** The first argument of every function below; the caller's until release. */
  void *ctx;
  /** Returns `bytes` bytes aligned to `align`, or NULL if there are none. */
  void *(*alloc)(void *ctx, size_t bytes, size_t align, int32_t device, void *stream);
  /** Takes back what alloc gave, with alloc's bytes, device and stream. All use of the memory is
   * then ordered before, in that stream, which must outlive retained shards. */
  void (*free)(void *ctx, void *ptr, size_t bytes, int32_t device, void *stream);
  /** ctx is needed no more. Called once, as the last call, if and only if create returned RSB_OK.
   * May be NULL. */
  void (*release)(void *ctx);
} rsb_allocator;

/** How a bucketer is made. Begin with RSB_CONFIG_INIT. It is copied, and so is the allocator. */
typedef struct rsb_config {
  /** sizeof(rsb_config). */
  size_t struct_size;
  /** Bytes of one bucket, all ranks' parts together, equal on all ranks. 0: 25 MiB; negative: no
   * bucketing, every op is direct. */
  int64_t bucket_bytes;
  /** None yet: 0. */
  uint64_t flags;
  /** Memory for buckets and results; copied. NULL: built in. */
  const rsb_allocator *allocator;
} rsb_config;

/** An rsb_config with every field at its default. */
#define RSB_CONFIG_INIT { sizeof(rsb_config), 0, 0, NULL }

/** Makes a bucketer.
 *
 * - config: may be NULL: all defaults.
 * - out: receives the handle, which is the caller's.
 *
 * Any thread; waits for no peer.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: out is NULL, alloc or free of the allocator is NULL, or a field has
 *   a value that is not accepted.
 * - RSB_ERR_UNSUPPORTED: an unknown flag or field is set.
 * - RSB_ERR_NO_MEMORY: memory for the bucketer could not be had.
 */
rsb_status rsb_bucketer_create(const rsb_config *config, rsb_bucketer **out, rsb_error *err);

/* ---- Results --------------------------------------------------------------------------------- */

/** What a callback gets: the library's, and valid during the callback only. */
typedef struct rsb_result {
  /** The size of this struct in the library. */
  size_t struct_size;
  /** The op's ticket, as rsb_bucketer_submit gave it. */
  rsb_ticket ticket;
  /** The op's tag. */
  uint64_t tag;
  /** This rank's reduced part, `numel` elements of dtype; NULL on error. */
  void *data;
  /** Elements in data, padding included. */
  size_t numel;
  /** How many of them came from the caller; the rest is padding. */
  size_t valid_numel;
  /** Flat input: the element of it where this shard begins (past its end: valid_numel is 0). */
  size_t offset;
  /** Device: data is ready in this stream's order. */
  void *stream;
  /** The memory of data: retain it to keep data beyond the callback. NULL if output was given. */
  rsb_shard *shard;
  /** The details of status. Never NULL. */
  const rsb_error *error;
  /** RSB_OK, or why there is no result. */
  rsb_status status;
  /** The type of data. */
  rsb_dtype dtype;
} rsb_result;

/** A callback: called once for an accepted op (rule 4), on the thread and at the time that rule 3
 * says. It must not unwind: rule 3 says what a C++ exception does that leaves it all the same.
 */
typedef void (*rsb_callback)(void *user_data, const rsb_result *result);

/* ---- Submitting ------------------------------------------------------------------------------ */

/** Everything that can be asked of an op. Begin with RSB_SUBMIT_ARGS_INIT. */
typedef struct rsb_submit_args {
  /** sizeof(rsb_submit_args). */
  size_t struct_size;
  /** comm size pointers, `numel` elements each: `inputs[i]` is what this rank gives to rank i.
   * Exactly one of inputs and flat_input is given. */
  const void *const *inputs;
  /** `numel` elements in total, cut into one piece for each rank, of rsb_shard_numel(numel, comm
   * size) elements; the library pads the tail with zeros. */
  const void *flat_input;
  /** Where the result goes (rule 6); NULL: library memory, see rsb_result.shard. */
  void *output;
  /** Elements per shard (inputs) or in total (flat_input). May be 0. */
  size_t numel;
  /** The type of the inputs: RSB_DTYPE_. */
  rsb_dtype dtype;
  /** The type of the result, float to float; 0: dtype. */
  rsb_dtype output_dtype;
  /** The reduction: RSB_OP_. */
  rsb_op op;
  /** RSB_SUBMIT_ bits. */
  uint32_t flags;
  /** A factor for results of float types; 0: 1. All is computed in f32 (F64 in or out: in f64),
   * with scale rounded to that once. Each step is rounded, none is fused:
   *   acc = op in rank order; AVG: acc / size; acc * scale; ACCUMULATE: output + acc;
   * then one rounding to output_dtype. */
  double scale;
  /** Which tensor this is: equal on all ranks, and checked across them; 0: none. */
  uint64_t tag;
  /** Device: the stream of this op's input; NULL: the comm's. */
  void *stream;
  /** Called with the result; may be NULL. */
  rsb_callback callback;
  /** The first argument of callback. */
  void *user_data;
} rsb_submit_args;

/** Submits one reduce-scatter: shorthand for rsb_bucketer_submit with `inputs`.
 *
 * - bucketer, comm: what gathers it, and the group it runs on.
 * - inputs: comm size pointers; `inputs[i]`, `numel` elements, is what this rank gives to rank i.
 *   Array and elements stay the caller's and are read as rule 6 says.
 * - numel: elements of each input, the same on all ranks. May be 0.
 * - dtype, op: RSB_DTYPE_ and RSB_OP_, the same on all ranks.
 * - callback, user_data: called with the result; callback may be NULL.
 *
 * Any thread, callbacks included. May wait for peers, and run callbacks, if the op is direct or
 * launches a bucket, and may wait while the comm's staging is full (rule 9).
 *
 * Returns RSB_OK if the op was accepted (rule 4); what fails later is in the callback's result and
 * in the next flush. Else:
 * - RSB_ERR_BAD_HANDLE: bucketer or comm is no live handle.
 * - RSB_ERR_INVALID_ARGUMENT: inputs or one of its pointers is NULL although numel is not 0, or
 *   the sizes are too large.
 * - RSB_ERR_UNSUPPORTED: an unknown dtype or op, or AVG of integers.
 * - RSB_ERR_NO_MEMORY: memory for the result, the bucket or the staging could not be had.
 * - the comm's sticky error.
 */
rsb_status rsb_bucketer_reduce_scatter_async(rsb_bucketer *bucketer,
                                             rsb_comm *comm,
                                             const void *const *inputs,
                                             size_t numel,
                                             rsb_dtype dtype,
                                             rsb_op op,
                                             rsb_callback callback,
                                             void *user_data,
                                             rsb_error *err);

/** An rsb_submit_args with every field unset. */
#define RSB_SUBMIT_ARGS_INIT \
  { sizeof(rsb_submit_args), NULL, NULL, NULL, 0, 0, 0, 0, 0, 0.0, 0, NULL, NULL, NULL }

#define RSB_SUBMIT_ACCUMULATE 1u  /**< output += result. Needs output. */
#define RSB_SUBMIT_BORROW     2u  /**< The inputs stay as they are until the callback (device: until
                                       result->stream has passed), so that they need no copy. Not
                                       compared across ranks. */

/** Submits one reduce-scatter.
 *
 * - bucketer, comm: what gathers it, and the group it runs on.
 * - args: the op; read during the call. What it points to: rule 6.
 * - out_ticket: receives the op's ticket, for rsb_bucketer_wait; may be NULL. It is written as soon
 *   as the op is accepted: before its callback, and also if an older op's callback throws (rule 3).
 *
 * Any thread, callbacks included. May wait for peers, and run callbacks, if the op is direct or
 * launches a bucket, and may wait while the comm's staging is full (rule 9).
 *
 * Returns RSB_OK if the op was accepted (rule 4); what fails later is in the callback's result and
 * in the next flush. Else:
 * - RSB_ERR_BAD_HANDLE: bucketer or comm is no live handle.
 * - RSB_ERR_INVALID_ARGUMENT: args is NULL; both inputs and flat_input are given, or neither
 *   although numel is not 0; a pointer of inputs is NULL although numel is not 0; ACCUMULATE
 *   without output; output overlaps an input in a way that rule 6 does not allow; the sizes are
 *   too large; or a field has a value that is not accepted.
 * - RSB_ERR_UNSUPPORTED: an unknown dtype, op, flag or field; AVG, scale or another output_dtype
 *   with integers.
 * - RSB_ERR_NO_MEMORY: memory for the result, the bucket or the staging could not be had.
 * - the comm's sticky error.
 */
rsb_status rsb_bucketer_submit(rsb_bucketer *bucketer,
                               rsb_comm *comm,
                               const rsb_submit_args *args,
                               rsb_ticket *out_ticket,
                               rsb_error *err);

/** Elements of a shard of a flat input: numel / comm_size, rounded up; 0 if comm_size is 0. Any
 * thread; never blocks.
 */
size_t rsb_shard_numel(size_t numel, uint32_t comm_size);

/* ---- Carrying on ----------------------------------------------------------------------------- */

/** Starts the bucketer's open buckets, in the order of their first submit, and the direct ops that
 * wait on device comms. Completing them is left to the calls below, but for what rule 3 says.
 *
 * Any thread; not in a callback of this bucketer. May wait for peers and run callbacks (rules 3
 * and 9).
 *
 * Returns RSB_OK, also if nothing was open, or:
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer.
 * - the sticky error of a comm with an open bucket; other comms' buckets are launched all the
 *   same.
 */
rsb_status rsb_bucketer_launch(rsb_bucketer *bucketer, rsb_error *err);

/** Launches what is open, completes everything and runs every callback that is owed.
 *
 * Any thread; not in a callback of this bucketer. Waits for peers, each wait up to the comm's
 * timeout without progress.
 *
 * Returns RSB_OK if nothing failed since the flush before it, or, after all callbacks have run:
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle; nothing was done.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer; nothing was done.
 * - the first failure since the flush before it: a comm's sticky error. Submits that a failed comm
 *   refused count.
 */
rsb_status rsb_bucketer_flush(rsb_bucketer *bucketer, rsb_error *err);

/** Runs the callbacks of the launched ops that are complete. Launches nothing.
 *
 * - out_completed: receives how many ops this call completed; may be NULL.
 *
 * Any thread; not in a callback of this bucketer. Never waits for peers.
 *
 * Returns RSB_OK, also if nothing was complete, or:
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer.
 * - the sticky error of a comm whose ops ended in this call.
 */
rsb_status rsb_bucketer_poll(rsb_bucketer *bucketer, size_t *out_completed, rsb_error *err);

/** Waits until the callback of one op has returned, and runs those before it. Launches nothing.
 *
 * - ticket: the op.
 * - timeout_ns: this call's own time, in nanoseconds; 0: poll; UINT64_MAX: the comm's timeout.
 *
 * Any thread; not in a callback of this bucketer. May wait for peers.
 *
 * Returns RSB_OK once the callback has returned, or:
 * - RSB_PENDING: timeout_ns is up; the op lives on.
 * - RSB_ERR_NOT_LAUNCHED: the op is still in an open bucket, or, direct on a device comm, waits for
 *   the next launch.
 * - RSB_ERR_INVALID_ARGUMENT: ticket is no ticket of this bucketer.
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer.
 * - the op's error, if it failed, until the next flush.
 */
rsb_status rsb_bucketer_wait(rsb_bucketer *bucketer,
                             rsb_ticket ticket,
                             uint64_t timeout_ns,
                             rsb_error *err);

/* ---- Keeping results, giving memory back ----------------------------------------------------- */

/** Takes one more reference to a result's memory, so that result->data outlives the callback, and
 * the bucketer and comm too. Every retain needs one rsb_shard_release.
 *
 * On local and shm comms a shard holds its own memory alone; on others its whole bucket's output
 * (to keep a little, give `output`).
 *
 * Any thread; waits for no peer. Returns shard, or NULL for a bad handle.
 */
rsb_shard *rsb_shard_retain(rsb_shard *shard);

/** Gives one reference back; the last one frees the memory. Device: result->stream must be ordered
 * after the last use. Any thread; waits for no peer. NULL and bad handles are ignored.
 */
void rsb_shard_release(rsb_shard *shard);

/** Gives this bucketer's memory back: buffer_bytes is then 0 but for retained shards. The next
 * submit takes it again. A comm's staging stays.
 *
 * Any thread; not in a callback of this bucketer. Local: it waits for no peer and is safe on one
 * rank alone.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_BUSY: ops are pending; nothing was given back.
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer.
 */
rsb_status rsb_bucketer_release_buffers(rsb_bucketer *bucketer, rsb_error *err);

/** Ends the bucketer and runs every callback that is owed: ops that were not launched end with
 * RSB_ERR_CANCELLED; launched ones complete, or end when the comm does. Retained shards live on.
 *
 * Any thread; not in a callback of this bucketer. May wait for peers, for launched ops. NULL is
 * fine.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_BAD_HANDLE: bucketer is neither NULL nor a live handle.
 * - RSB_ERR_REENTRANT: called in a callback of this bucketer, which stays alive.
 */
rsb_status rsb_bucketer_free(rsb_bucketer *bucketer);

/* ---- Counters -------------------------------------------------------------------------------- */

/** What a bucketer has done since it was made. */
typedef struct rsb_stats {
  /** Ops accepted. */
  uint64_t ops_submitted;
  /** Ops that ended with RSB_OK. */
  uint64_t ops_completed;
  /** Ops that ended otherwise. */
  uint64_t ops_failed;
  /** Ops that went through a bucket. */
  uint64_t ops_bucketed;
  /** Ops that were direct. */
  uint64_t ops_direct;
  /** Buckets and direct ops that were started. */
  uint64_t collectives_launched;
  /** Buckets launched because they were full, or the next op did not fit. */
  uint64_t flushes_full;
  /** Buckets launched by rsb_bucketer_launch or rsb_bucketer_flush. */
  uint64_t flushes_explicit;
  /** Bytes of input that came from the caller. */
  uint64_t payload_bytes;
  /** Bytes of zeros that padded flat inputs. */
  uint64_t padding_bytes;
  /** Bytes of input copied into buckets or staging. */
  uint64_t copied_bytes;
  /** Bytes of bucket and result memory held now, retained shards included. */
  uint64_t buffer_bytes;
  /** The largest value that buffer_bytes had. */
  uint64_t buffer_bytes_peak;
  /** Nanoseconds spent copying inputs. */
  uint64_t pack_ns;
  /** Nanoseconds spent waiting for peers, but for waits of about a microsecond at most. */
  uint64_t wait_ns;
  /** Nanoseconds spent reducing. */
  uint64_t reduce_ns;
  /** Nanoseconds spent in callbacks; those that are quick for long are timed now and then, for all.
   */
  uint64_t callback_ns;
  /** The largest committed staging of this rank, in bytes, of the comms that were used. */
  uint64_t staging_bytes_peak;
} rsb_stats;

/** Reads the counters. They are read one by one: together they are no snapshot while other threads
 * work.
 *
 * - out, out_size: the caller's struct and its sizeof. A field that either side does not know is
 *   left out, and bytes of out beyond the library's struct are set to 0.
 *
 * Any thread; waits for no peer.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_BAD_HANDLE: bucketer is no live handle.
 * - RSB_ERR_INVALID_ARGUMENT: out is NULL.
 */
rsb_status rsb_bucketer_stats(const rsb_bucketer *bucketer, rsb_stats *out, size_t out_size);

/* =================================================================================================
 * Log
 * =================================================================================================
 *
 * The library prints nothing. Whoever wants to hear from it sets a logger; there is one per
 * process.
 */

#define RSB_LOG_ERROR 1  /**< Something failed; a panic (rule 10). */
#define RSB_LOG_WARN  2  /**< Something is unusual; work goes on. */
#define RSB_LOG_INFO  3  /**< What happens seldom. */
#define RSB_LOG_DEBUG 4  /**< What happens often. */

/** A logger. level is one of RSB_LOG_; target is the part of the library that speaks; message is
 * UTF-8. Both texts are NUL-terminated and valid during the call only. It is called on any thread,
 * on several at once, and calls no function of this library. It must not unwind.
 */
typedef void (*rsb_log_fn)(void *user_data, int32_t level, const char *target, const char *message);

/** Sets the process's logger, in place of the one before.
 *
 * - fn: called with each message whose level is at most max_level; NULL: no logger.
 * - user_data: the first argument of fn; the caller's until release.
 * - release: called with user_data once, after the last use of this logger; may be NULL. If the
 *   call fails it is not called, and the logger before stays.
 * - max_level: one of RSB_LOG_.
 *
 * Any thread; waits for no peer.
 *
 * Returns RSB_OK, or:
 * - RSB_ERR_INVALID_ARGUMENT: fn is given and max_level is none of RSB_LOG_.
 */
rsb_status rsb_set_logger(rsb_log_fn fn,
                          void *user_data,
                          void (*release)(void *),
                          int32_t max_level);

#ifdef __cplusplus
}
#endif

#endif /* RSBUCKET_H */
