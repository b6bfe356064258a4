/* gpu.h: what the checks of bench/gpu share: the driver and NCCL, loaded at run time, ranks as threads, and how a
 * check ends. scripts/gpu_check runs each in a process of its own, so that one that hangs or spoils its GPU is one
 * line. */
#ifndef BENCH_GPU_H
#define BENCH_GPU_H

#include <stdbool.h>
#include <stdint.h>

#include "rsbucket.h"

/* Their interfaces, as the stand-ins have them written down. */
#include "../../cpp_tests/fakes/cuda_driver.h"
#include "../../cpp_tests/fakes/nccl_api.h"

#define GPU_DRIVER(X)                                                                                        \
  X(cuInit) X(cuGetErrorName) X(cuDeviceGetCount) X(cuDeviceGetName) X(cuDevicePrimaryCtxRetain)             \
  X(cuCtxPushCurrent_v2) X(cuCtxPopCurrent_v2) X(cuDevicePrimaryCtxRelease_v2) X(cuMemAlloc_v2)              \
  X(cuMemFree_v2) X(cuMemHostAlloc) X(cuMemFreeHost) X(cuMemcpyHtoD_v2) X(cuMemcpyDtoHAsync_v2)              \
  X(cuMemcpyDtoDAsync_v2) X(cuMemsetD8Async) X(cuStreamCreate) X(cuStreamDestroy_v2) X(cuStreamSynchronize)  \
  X(cuEventCreate) X(cuEventDestroy_v2) X(cuEventRecord) X(cuEventElapsedTime) X(cuStreamWaitEvent)          \
  X(cuStreamBeginCapture_v2) X(cuStreamEndCapture) X(cuGraphDestroy)
#define GPU_NCCL(X)                                                                                          \
  X(ncclGetVersion) X(ncclGetUniqueId) X(ncclCommInitRank) X(ncclCommDestroy) X(ncclCommAbort)               \
  X(ncclGroupStart) X(ncclGroupEnd) X(ncclReduceScatter)
#define GPU_FIELD(name) __typeof__(name) *name;

typedef struct {
  GPU_DRIVER(GPU_FIELD)
  GPU_NCCL(GPU_FIELD)
} gpu_calls;
extern gpu_calls gpu;
/* Devices; the name of the first; whether it is the stand-in's, whose times mean nothing. */
extern int gpu_devices;
extern char gpu_name[256];
extern bool gpu_is_fake;

/* ---- How a check ends: one line on stdout, and the process with it --------------------------------- */

_Noreturn void gpu_end(const char *state, const char *format, ...) __attribute__((format(printf, 2, 3)));
#define GPU_OK(...) gpu_end("ok", __VA_ARGS__)
#define GPU_FAILED(...) gpu_end("FAILED", __VA_ARGS__)
#define GPU_SKIPPED(...) gpu_end("skipped", __VA_ARGS__)
/* A figure that has a goal; on the stand-ins no figure means anything. */
#define GPU_GOAL(met, ...) gpu_end(gpu_is_fake || (met) ? "ok" : "missed", __VA_ARGS__)
/* Ends the check as failed unless the driver's or NCCL's code is 0, or the library's RSB_OK. */
void gpu_must(int code, const char *what);
#define GPU_MUST(function, ...) gpu_must(gpu.function(__VA_ARGS__), #function)
void gpu_check(rsb_status status, const rsb_error *err, const char *what);

/* ---- Ranks ------------------------------------------------------------------------------------------ */

typedef struct {
  int rank, size, device;
  CUcontext context;
  CUstream stream, result; /* of inputs; in whose order results are ready */
  ncclComm_t nccl;
  void *arg;
} gpu_rank;

/* Loads the driver, or ends the check as skipped. Every check's first call. */
void gpu_start(void);
/* Loads NCCL, or skips. How many ranks it have here: one for each GPU, or two on one
 * GPU from 2.30 on; at most `most`, and $GPU_TABLE_RANKS. */
int gpu_ranks(int most);
/* fn on `size` ranks, each a thread with its device's context current and a communicator. Ranks that share a GPU must
 * not allocate or free while another's collective waits for them: gpu_meet is between. */
void gpu_run(int size, void (*fn)(gpu_rank *), void *arg);
void gpu_meet(void);
/* What a rank has without NCCL: its device's context, current, and streams; and their end. */
void gpu_begin(gpu_rank *rank);
void gpu_finish(gpu_rank *rank);

/* ---- Little helpers ---------------------------------------------------------------------------------- */

CUdeviceptr gpu_memory(size_t bytes);
/* A number that depends on all of these; a factor in [-1, 1) that does. */
uint64_t gpu_hash(uint64_t a, uint64_t b, uint64_t c);
double gpu_random(uint64_t a, uint64_t b, uint64_t c);
double gpu_seconds(void);
float gpu_ms(CUevent from, CUevent to);
/* The middle one of `count` values, which are sorted by this. */
double gpu_median(double *values, int count);
CUevent gpu_event(void);
/* An engine of `size` ranks for a comm on this GPU alone. For each collective it records `packed`, copies `bytes` from
 * one memory to another `copies` times in the place of communication, and records `sent`. */
typedef struct {
  CUevent packed, sent;
  CUdeviceptr from, to;
  size_t bytes;
  int copies;
  CUstream stream; /* the comm's, as its last collective named it */
} gpu_engine;
rsb_comm *gpu_alone(gpu_engine *engine, const gpu_rank *rank, uint32_t size);
rsb_bucketer *gpu_bucketer(int64_t bucket_bytes);
/* Submits a flat input of f32 for a sum. */
void gpu_submit(rsb_bucketer *bucketer, rsb_comm *comm, CUdeviceptr input, CUdeviceptr output, size_t numel,
                uint32_t flags);

/* ---- The checks ----------------------------------------------------------------------------------------- */

void check_values(void), check_exact(void), check_captures(void);
void check_pack(void), check_submit(void), check_shapes(void), check_overlap(void);
void check_absent(void), check_killed(void), check_sticky(void);

#endif
