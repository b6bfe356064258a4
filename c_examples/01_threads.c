/* 01_threads.c - the smallest whole program: four ranks as threads of one process.
 *
 * Each rank needs a thread of its own. A flush waits for the other ranks, so a thread that stood for two of them would
 * wait for itself. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

#include "rsbucket.h"

enum { RANKS = 4, TENSORS = 3, NUMEL_MAX = 4 };

struct rank {
  rsb_comm *comm;
  float shards[TENSORS][NUMEL_MAX]; /* what the callbacks got */
};

static void check(rsb_status status, const rsb_error *err, const char *what) {
  if (status == RSB_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, rsb_status_name(status), err->message);
  exit(EXIT_FAILURE);
}

static size_t numel_of(size_t tensor) {
  return tensor + 2;
}

/* Runs in this rank's own thread, inside rsb_bucketer_flush. result->data is valid during the call only. */
static void on_shard(void *user_data, const rsb_result *result) {
  float *shard = user_data;
  check(result->status, result->error, "a reduce-scatter failed");
  for (size_t i = 0; i < result->numel; i++) shard[i] = ((const float *)result->data)[i];
}

static void *run_rank(void *argument) {
  struct rank *rank = argument;
  uint32_t me = rsb_comm_rank(rank->comm);
  rsb_bucketer *bucketer;
  rsb_error err;
  check(rsb_bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");

  for (size_t t = 0; t < TENSORS; t++) {
    float pieces[RANKS][NUMEL_MAX];
    const void *inputs[RANKS]; /* inputs[r] is what this rank gives to rank r */
    for (uint32_t r = 0; r < RANKS; r++) {
      for (size_t i = 0; i < numel_of(t); i++) pieces[r][i] = (float)(100 * (t + 1) + 10 * r + i) + (float)me / 4;
      inputs[r] = pieces[r];
    }
    /* The pieces are copied before the call returns, so this memory may go out of scope. */
    check(rsb_bucketer_reduce_scatter_async(bucketer, rank->comm, inputs, numel_of(t), RSB_DTYPE_F32, RSB_OP_SUM,
                                            on_shard, rank->shards[t], &err),
          &err, "rsb_bucketer_reduce_scatter_async");
  }
  /* Three tensors, one collective: they share a bucket, which is launched here. */
  check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
  rsb_bucketer_free(bucketer);
  rsb_comm_free(rank->comm);
  return NULL;
}

int main(void) {
  static struct rank ranks[RANKS];
  rsb_comm *comms[RANKS];
  pthread_t threads[RANKS];
  rsb_error err;
  check(rsb_comm_create_local(RANKS, NULL, comms, &err), &err, "rsb_comm_create_local");
  for (size_t r = 0; r < RANKS; r++) {
    ranks[r].comm = comms[r];
    if (pthread_create(&threads[r], NULL, run_rank, &ranks[r]) != 0) {
      fprintf(stderr, "cannot start the thread of rank %zu\n", r);
      return EXIT_FAILURE;
    }
  }
  for (size_t r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);

  printf("%d ranks, each on a thread of its own (one thread cannot stand for two)\n", RANKS);
  for (size_t r = 0; r < RANKS; r++) {
    for (size_t t = 0; t < TENSORS; t++) {
      printf("rank %zu, tensor %zu:", r, t);
      for (size_t i = 0; i < numel_of(t); i++) printf(" %g", (double)ranks[r].shards[t][i]);
      putchar('\n');
    }
  }
  return EXIT_SUCCESS;
}
