/* So many rounds of 1,000 ops of one element on two ranks of one thread, callbacks included: what
 * count_instructions runs under callgrind. */
#include <rsbucket.h>
#include <stdlib.h>

static void count(void *done, const rsb_result *result) { *(long *)done += result->status == RSB_OK; }

int main(int argc, char **argv) {
  enum { RANKS = 2, OPS = 1000 };
  const int rounds = argc > 1 ? atoi(argv[1]) : 1;
  rsb_comm *comms[RANKS];
  rsb_bucketer *bucketers[RANKS];
  const float input[RANKS] = {1, 2};
  const void *rows[RANKS] = {&input[0], &input[1]};
  long done = 0;
  int rank, round, op;
  if (rsb_comm_create_local(RANKS, NULL, comms, NULL) != RSB_OK) return 1;
  for (rank = 0; rank < RANKS; ++rank)
    if (rsb_bucketer_create(NULL, &bucketers[rank], NULL) != RSB_OK) return 1;
  for (round = 0; round < rounds; ++round) {
    for (rank = 0; rank < RANKS; ++rank) {
      for (op = 0; op < OPS; ++op)
        if (rsb_bucketer_reduce_scatter_async(bucketers[rank], comms[rank], rows, 1, RSB_DTYPE_F32, RSB_OP_SUM, count,
                                              &done, NULL) != RSB_OK)
          return 1;
      if (rsb_bucketer_launch(bucketers[rank], NULL) != RSB_OK) return 1;
    }
    for (rank = 0; rank < RANKS; ++rank)
      if (rsb_bucketer_flush(bucketers[rank], NULL) != RSB_OK) return 1;
  }
  for (rank = 0; rank < RANKS; ++rank) {
    rsb_bucketer_free(bucketers[rank]);
    rsb_comm_free(comms[rank]);
  }
  return done != (long)RANKS * OPS * rounds;
}
