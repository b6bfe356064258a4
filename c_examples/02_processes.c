/* 02_processes.c - ranks as processes of this host: callbacks, a shard kept beyond its callback, and errors.
 *
 * The processes are forked before the first rsb_ call: a library's state does not survive a fork. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "rsbucket.h"

enum { RANKS = 3, NUMEL = 8 };

static void check(rsb_status status, const rsb_error *err, const char *what) {
  if (status == RSB_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, rsb_status_name(status), err->message);
  exit(EXIT_FAILURE);
}

/* What a callback leaves for the code after the flush. */
struct seen {
  FILE *out;
  rsb_shard *shard; /* our reference; data lives as long as it */
  const float *data;
  size_t count;
};

static void on_mean(void *user_data, const rsb_result *result) {
  struct seen *seen = user_data;
  fprintf(seen->out, "  callback: tag %u, %s", (unsigned)result->tag, rsb_status_name(result->status));
  if (result->status == RSB_OK) {
    /* 8 elements for 3 ranks: shards of 3, the last one padded with a zero. */
    fprintf(seen->out, ", %zu of %zu elements valid, from element %zu on", result->valid_numel, result->numel,
            result->offset);
    seen->shard = rsb_shard_retain(result->shard);
    seen->data = result->data;
    seen->count = result->valid_numel;
  }
  fputc('\n', seen->out);
}

static void run_rank(const char *job, uint32_t rank, FILE *out) {
  rsb_comm *comm;
  rsb_bucketer *bucketer;
  rsb_error err;
  struct seen seen = {out, NULL, NULL, 0};
  check(rsb_comm_create_shm(job, rank, RANKS, NULL, &comm, &err), &err, "rsb_comm_create_shm");
  check(rsb_bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");
  fprintf(out, "rank %u of %u\n", (unsigned)rsb_comm_rank(comm), (unsigned)rsb_comm_size(comm));

  float gradient[NUMEL];
  for (size_t i = 0; i < NUMEL; i++) gradient[i] = (float)(10 * i + 3 * rank);
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.flat_input = gradient;
  args.numel = NUMEL;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_AVG;
  args.tag = 7;
  args.callback = on_mean;
  args.user_data = &seen;
  check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");

  /* The callback is over; the retained shard still holds the result. */
  fprintf(out, "  kept:");
  for (size_t i = 0; i < seen.count; i++) fprintf(out, " %g", (double)seen.data[i]);
  fputc('\n', out);
  rsb_shard_release(seen.shard);

  /* A call that is refused changes nothing, and its callback never runs. */
  const int32_t counts[NUMEL] = {0};
  rsb_submit_args mean_of_integers = args;
  mean_of_integers.flat_input = counts;
  mean_of_integers.dtype = RSB_DTYPE_I32;
  rsb_status status = rsb_bucketer_submit(bucketer, comm, &mean_of_integers, NULL, &err);
  fprintf(out, "  refused: %s: %s\n", rsb_status_name(status), err.message);

  /* An accepted op has its callback exactly once, here with an error: its bucket was never launched. */
  args.tag = 8;
  check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  status = rsb_bucketer_free(bucketer);
  if (status != RSB_OK) fprintf(out, "  rsb_bucketer_free: %s\n", rsb_status_name(status));
  rsb_comm_free(comm);
}

int main(void) {
  int outputs[RANKS], failed = 0;
  pid_t children[RANKS];
  char job[64];
  snprintf(job, sizeof job, "example-%ld", (long)getpid()); /* the same name for all ranks of this run */
  for (uint32_t rank = 0; rank < RANKS; rank++) {
    int ends[2];
    if (pipe(ends) != 0 || (children[rank] = fork()) < 0) {
      perror("cannot start a rank");
      return EXIT_FAILURE; /* ranks that wait for this one give up by their timeout */
    }
    if (children[rank] == 0) {
      close(ends[0]);
      FILE *out = fdopen(ends[1], "w");
      if (out == NULL) return EXIT_FAILURE;
      run_rank(job, rank, out);
      return fclose(out) == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
    }
    close(ends[1]);
    outputs[rank] = ends[0];
  }
  /* The ranks ran side by side; what they wrote is shown one after the other. */
  for (uint32_t rank = 0; rank < RANKS; rank++) {
    char text[1024];
    ssize_t count;
    int status;
    while ((count = read(outputs[rank], text, sizeof text)) > 0) fwrite(text, 1, (size_t)count, stdout);
    close(outputs[rank]);
    failed |= waitpid(children[rank], &status, 0) < 0 || !WIFEXITED(status) || WEXITSTATUS(status) != EXIT_SUCCESS;
  }
  return failed ? EXIT_FAILURE : EXIT_SUCCESS;
}
