/* ends.c: how comms on a GPU end: a rank that stays away, one whose process is killed, memory that is gone. Each must
 * become an error in time, and nothing may hang. */
#define _GNU_SOURCE
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "gpu.h"

enum { NUMEL = 1 << 20 };

/* What a comm says once it says more than RSB_OK; and after how long. */
static rsb_status fails(rsb_comm *comm, rsb_error *err, double *seconds) {
  double begin = gpu_seconds();
  rsb_status status = RSB_OK;
  while (status == RSB_OK && gpu_seconds() - begin < 30) {
    status = rsb_comm_status(comm, err);
    sched_yield();
  }
  *seconds = gpu_seconds() - begin;
  return status;
}

/* A round of all ranks, whose first one sets up NCCL's connections; then rank 0 goes on alone, as `leave` makes the
 * other one stay away. */
static void alone_after_a_round(gpu_rank *r, void (*leave)(void), rsb_status *status, double *seconds) {
  CUdeviceptr in = gpu_memory(NUMEL * sizeof(float));
  GPU_MUST(cuMemsetD8Async, in, 0, NUMEL * sizeof(float), r->stream);
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = r->stream;
  config.result_stream = r->result;
  config.timeout_ns = gpu_is_fake ? 300000000 : 2000000000;
  rsb_comm *comm;
  rsb_error err;
  gpu_check(rsb_comm_wrap_nccl(r->nccl, &config, &comm, &err), &err, "rsb_comm_wrap_nccl");
  rsb_bucketer *bucketer = gpu_bucketer(0);
  for (int round = 0; round < 2; round++) {
    gpu_submit(bucketer, comm, in, 0, NUMEL, 0);
    gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
    if (round == 0) GPU_MUST(cuStreamSynchronize, r->result);
    if (r->rank != 0) {
      leave();
      break;
    }
  }
  if (r->rank == 0) {
    *status = fails(comm, &err, seconds);
    rsb_status after = rsb_bucketer_flush(bucketer, &err);
    if (*status != RSB_OK && after != *status)
      GPU_FAILED("%s, then a flush says %s", rsb_status_name(*status), rsb_status_name(after));
  }
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  /* The communicator is its owner's to abort: only then its kernel ends. */
  GPU_MUST(ncclCommAbort, r->nccl);
  r->nccl = NULL;
  GPU_MUST(cuStreamSynchronize, r->result);
  GPU_MUST(cuStreamSynchronize, r->stream);
  GPU_MUST(cuMemFree_v2, in);
}

static struct {
  rsb_status status;
  double seconds;
} seen;

static void report(bool transport_too) {
  bool expected = seen.status == RSB_ERR_TIMEOUT || (transport_too && seen.status == RSB_ERR_TRANSPORT);
  if (!expected) GPU_FAILED("%s after %.1f s", rsb_status_name(seen.status), seen.seconds);
  GPU_OK("%s after %.1f s; nothing hangs", rsb_status_name(seen.status), seen.seconds);
}

static void absent(gpu_rank *r) {
  /* The other rank is here, and does not call: until rank 0 has seen it. */
  alone_after_a_round(r, gpu_meet, &seen.status, &seen.seconds);
}

static void meet_at_the_end(gpu_rank *r) {
  absent(r);
  if (r->rank == 0) gpu_meet();
}

void check_absent(void) {
  gpu_start();
  int size = gpu_ranks(2);
  if (size < 2) GPU_SKIPPED("one GPU, and NCCL before 2.30");
  gpu_run(size, meet_at_the_end, NULL);
  report(false);
}

static void die(void) { raise(SIGKILL); }

void check_killed(void) {
  int pipes[2];
  gpu_must(pipe(pipes), "pipe");
  pid_t child = fork(); /* before the driver is loaded, which does not live through it */
  if (child < 0) GPU_SKIPPED("no process can be made");
  if (child > 0) gpu_start();
  ncclUniqueId id;
  if (child == 0) {
    /* Its end is not the check's, and the parent's is its own. */
    close(STDOUT_FILENO);
    close(pipes[1]);
    if (read(pipes[0], &id, sizeof id) != (ssize_t)sizeof id) _Exit(EXIT_FAILURE);
    gpu_start();
    (void)gpu_ranks(2);
  } else {
    if (gpu_is_fake || gpu_ranks(2) < 2) {
      kill(child, SIGKILL);
      waitpid(child, NULL, 0);
      GPU_SKIPPED(gpu_is_fake ? "ranks of the stand-ins are threads" : "one GPU, and NCCL before 2.30");
    }
    GPU_MUST(ncclGetUniqueId, &id);
    if (write(pipes[1], &id, sizeof id) != (ssize_t)sizeof id) GPU_FAILED("write");
  }
  gpu_rank r = {.rank = child == 0, .size = 2, .device = child == 0 && gpu_devices > 1};
  gpu_begin(&r);
  GPU_MUST(ncclCommInitRank, &r.nccl, 2, id, r.rank);
  alone_after_a_round(&r, die, &seen.status, &seen.seconds);
  report(true);
}

static void on_result(void *status, const rsb_result *result) {
  if (result->status != RSB_OK) *(rsb_status *)status = result->status;
}

void check_sticky(void) {
  gpu_start();
  if (gpu_is_fake) GPU_SKIPPED("reading freed memory; the stand-ins' own test is cpp_cuda_failures");
  gpu_rank r = {.size = 1};
  gpu_begin(&r);
  gpu_engine engine = {0};
  rsb_comm *comm = gpu_alone(&engine, &r, 1);
  rsb_bucketer *bucketer = gpu_bucketer(0);
  CUdeviceptr gone = gpu_memory((size_t)1 << 26);
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  rsb_status told = RSB_OK;
  rsb_error err;
  args.flat_input = (void *)(uintptr_t)gone;
  args.numel = NUMEL;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  args.flags = RSB_SUBMIT_BORROW;
  args.callback = on_result;
  args.user_data = &told;
  gpu_check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  GPU_MUST(cuMemFree_v2, gone);
  gpu_check(rsb_bucketer_launch(bucketer, &err), &err, "rsb_bucketer_launch");
  double seconds;
  rsb_status status = fails(comm, &err, &seconds);
  rsb_error native = err;
  (void)rsb_bucketer_submit(bucketer, comm, &args, NULL, &err);
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  if (status != RSB_ERR_TRANSPORT) GPU_FAILED("%s after %.1f s", rsb_status_name(status), seconds);
  GPU_OK("%s, code %d, after %.3f s; the callback said %s", rsb_status_name(status), (int)native.native_code, seconds,
         rsb_status_name(told));
}
