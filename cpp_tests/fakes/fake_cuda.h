// What tests ask of the stand-ins beside the real interfaces: look at what went wrong, set what shall go
// wrong, reach device memory. The stand-ins hold their users to the rules; whatever breaks one is a
// breach, which is counted, and printed at the end of the process, which then ends with status 86.
//
// Environment, read once; the functions below change the same at run time:
//   RSB_FAKE_CUDA_SEED=n        seed of the delays
//   RSB_FAKE_CUDA_DELAY_US=n    longest delay before a piece of work (100; 0: none)
//   RSB_FAKE_CUDA_DEVICES=n     devices (2)
//   RSB_FAKE_CUDA_MEMORY=bytes  what a device has (1 GiB)
//   RSB_FAKE_CUDA_VERSION=n     driver's version (12080)
//   RSB_FAKE_CUDA_MAY_WAIT=1    the host may wait for the device: a program of a user's (0: a breach)
//   RSB_FAKE_CUDA_FAIL=spec     see fake_cuda_fail
//   RSB_FAKE_CUDA_KERNELS=source  the kernels' source, compiled for the host, in place of their PTX
//   RSB_FAKE_NCCL_VERSION=n     NCCL's version (23007)
//   RSB_FAKE_NCCL_HANG_MS=n     when a collective that not all ranks come to is given up (20000)
#ifndef RSB_FAKES_FAKE_CUDA_H
#define RSB_FAKES_FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

#include "cuda_driver.h"
#include "nccl_api.h"

#ifdef __cplusplus
extern "C" {
#endif

// ---- Breaches ----------------------------------------------------------------------------------------

// How many rules were broken since the last fake_cuda_forgive.
int fake_cuda_breaches(void);
// The text of breach `i`; NULL past the end. Valid until fake_cuda_forgive.
const char *fake_cuda_breach(int i);
// Forgets them: a test that has broken a rule on purpose.
void fake_cuda_forgive(void);
// Counts what has not been given back as breaches: streams, events, modules, memory, retained contexts, graphs,
// communicators. Waits for work under way first. Also done at the end of the process. Returns fake_cuda_breaches().
int fake_cuda_check_leaks(void);
// While on, what was not given back is no breach: a device that has failed may keep what work may still use.
void fake_cuda_allow_leaks(int on);

// ---- Errors to order ------------------------------------------------------------------------------------

// "NAME:N=CODE" lets the N-th call of function NAME from now on return CODE; "NAME:N~CODE" lets it succeed, and
// what it enqueued fail (a launch, a copy, a set, a host function, NCCL's collectives). NAME may be *, for any driver
// function, or nccl*, for any of NCCL's. Several, with commas. NULL or "" takes all back and counts from 0. Codes that
// real ones make sticky stay on the context (700, 719, ...). Returns 0, or -1 if the text is wrong.
int fake_cuda_fail(const char *spec);
// How often NAME (or * or nccl*) was called since the last fake_cuda_fail.
uint64_t fake_cuda_calls(const char *name);
// Whether all errors of the last fake_cuda_fail have happened.
int fake_cuda_failed(void);
// Heals every context: no sticky error any more.
void fake_cuda_heal(void);
// Lets ncclCommGetAsyncError of `comm` say `code` from now on.
void fake_nccl_async_error(ncclComm_t comm, ncclResult_t code);
// While on, ranks may differ in their calls, and collectives may be given up, without a breach.
void fake_nccl_allow_mismatch(int on);

// ---- Time -------------------------------------------------------------------------------------------------

void fake_cuda_seed(uint64_t seed);
void fake_cuda_delay_us(unsigned longest);
// Holds back all work of a stream until it is let go: what is enqueued behind it stays undone.
void fake_cuda_hold(CUstream stream);
void fake_cuda_let_go(CUstream stream);
// Waits for a stream's, or all, work, as a test's program may (for the library it is a breach to synchronize).
void fake_cuda_wait(CUstream stream);
void fake_cuda_wait_all(void);
// Whether all work of a stream is done.
int fake_cuda_idle(CUstream stream);

// ---- Memory -----------------------------------------------------------------------------------------------

// Where the host reaches device memory: device addresses themselves fault. NULL: no device memory.
void *fake_cuda_reach(CUdeviceptr ptr);
// Live bytes of all devices: cuMemAlloc and cuMemAllocAsync.
size_t fake_cuda_live_bytes(void);
// Notes an access of work that a test enqueues by cuLaunchHostFunc, so that its order is checked too: call it
// right before that, with the same stream.
void fake_cuda_touch(CUstream stream, CUdeviceptr ptr, size_t bytes, int write);

// ---- Contexts ---------------------------------------------------------------------------------------------

// Depth of this thread's context stack.
int fake_cuda_stack_depth(void);
// Live objects: streams, events, modules; retained counts of all primary contexts.
int fake_cuda_live_streams(void);
int fake_cuda_live_events(void);
int fake_cuda_live_modules(void);
int fake_cuda_retained(void);

#ifdef __cplusplus
}
#endif
#endif
