/* group.h: the ranks of rsb_perf: threads or processes with one shared mapping, a barrier between them, and the state
 * that the library's pass and the floors' passes work on. */
#ifndef BENCH_GROUP_H
#define BENCH_GROUP_H

#include <stdatomic.h>

#include "bench.h"

/* How many barriers a rank has reached, whether it sleeps, and what those sleep on who wait for it. */
typedef struct {
  _Alignas(128) _Atomic uint64_t reached;
  _Alignas(128) _Atomic uint32_t asleep;
  _Atomic uint32_t bell;
} bench_line;

/* Notes of a workload, one a form of the library's calls, and how long each may be. */
enum { BENCH_NOTES = 6, BENCH_NOTE = 160 };

/* Made before the ranks start. What it points to is shared by them, in threads and in processes. */
typedef struct {
  int ranks;
  bool threads;
  int spins;              /* of a wait before it sleeps; 0 where ranks outnumber cores: it yields */
  size_t staging_stride;  /* bytes of a rank's staging: two slots of one piece of every row */
  char *staging;
  size_t input_stride;    /* processes: bytes of the copy of a rank's inputs that all can read; 0: no copies */
  char *inputs;
  bench_line *lines;
  bench_sample *samples;
  char (*notes)[BENCH_NOTE]; /* BENCH_NOTES a workload, which rank 0 may fill for the report */
  bench_memory *memories;    /* one a workload, by rank 0 */
} bench_group;

/* One rank. */
typedef struct bench_rank {
  const bench_options *opt;
  bench_group *group;
  int rank;
  uint64_t barriers, pieces; /* counted since the start */
  const bench_workload *work;
  char *in, *out;              /* arenas, this rank's own memory */
  size_t out_bytes;
  const void **shards;         /* where the last pass left the shard of each tensor */
  const char **readable;       /* the inputs of every rank, as all can read them */
  void *library;               /* state of the library's pass */
} bench_rank;

/* Makes the shared memory for the largest of the workloads; `samples`: how many in all. */
bench_group bench_group_make(const bench_options *opt, const bench_workload *works, size_t count, size_t samples);

/* Runs `body` on all ranks and waits for them. It ends the program if one of them fails. */
void bench_group_run(bench_group *group, bench_rank *ranks, void (*body)(bench_rank *));

/* Returns once all ranks have called it: spins briefly, then yields. */
void bench_barrier(bench_rank *me);

/* Two slots of one piece of every rank's row are a rank's staging. */
static inline char *bench_staging(const bench_rank *me, int rank, uint64_t slot, int row) {
  size_t piece = me->opt->piece_bytes, rows = (size_t)me->group->ranks;
  return me->group->staging + (size_t)rank * me->group->staging_stride + (slot * rows + (size_t)row) * piece;
}

/* ---- The floors: what a reduce-scatter of the workload costs at least ------------------------ */

/* Every rank copies all rows into the staging, piece by piece, and sums its own row from there. */
void bench_floor_staged(bench_rank *me);

/* The same with another last step: the sum written as f32; the average added to f32. */
void bench_floor_staged_wide(bench_rank *me);
void bench_floor_staged_added(bench_rank *me);

/* As the first, but a rank's own row is read from its input. */
void bench_floor_own_row(bench_rank *me);

/* No copies: all ranks can read all inputs, and each sums its own shards. */
void bench_floor_in_place(bench_rank *me);

/* The barrier alone. */
void bench_floor_barrier(bench_rank *me);

#endif
