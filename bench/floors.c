/* floors.c: how fast a reduce-scatter of a workload could be on this machine, with the library's costs left out: no
 * calls, callbacks, checks or handles; only the copies, the sums, and a barrier where ranks depend on each other.
 *
 * The row of a rank is what all ranks hold for it: its shards of all tensors, one after the other. The staged floors
 * move rows in pieces through two slots a rank, which stay in the cache. One barrier a piece is enough: a rank fills a
 * slot again after the next piece's barrier, which its peers reach when they have read this piece; so slots alternate
 * across passes too. */
#include <string.h>

#include "group.h"
#include "kernels.h"

/* A walk along the row: the part of it that lies in [at, end) and in one tensor. */
typedef struct {
  const bench_tensor *tensor;
  size_t at, end;
} walk;

/* The next part: how many elements, and where in its shard it begins. 0 at the end. */
static size_t next_part(walk *w, size_t *within) {
  while (w->at < w->end) {
    size_t last = w->tensor->out + w->tensor->shard;
    if (last <= w->at) {
      w->tensor++;
      continue;
    }
    *within = w->at - w->tensor->out;
    return (last < w->end ? last : w->end) - w->at;
  }
  return 0;
}

static const char *input_of(const bench_rank *me, const char *arena, const bench_tensor *tensor, int row,
                            size_t within) {
  return arena + (tensor->in + (size_t)row * tensor->shard + within) * bench_dtype_size(me->opt->dtype);
}

static void pack_row(bench_rank *me, walk w, uint64_t slot, int row) {
  size_t size = bench_dtype_size(me->opt->dtype);
  char *to = bench_staging(me, me->rank, slot, row);
  for (size_t within, count; (count = next_part(&w, &within)) > 0; w.at += count) {
    memcpy(to, input_of(me, me->in, w.tensor, row, within), count * size);
    to += count * size;
  }
}

static void sum_own_row(bench_rank *me, walk w, uint64_t slot, bool own_from_input, int last) {
  size_t size = bench_dtype_size(me->opt->dtype), out_size = last == BENCH_SAME ? size : sizeof(float), begin = w.at;
  const void *from[me->group->ranks];
  for (size_t within, count; (count = next_part(&w, &within)) > 0; w.at += count) {
    for (int rank = 0; rank < me->group->ranks; rank++) {
      from[rank] = bench_staging(me, rank, slot, me->rank) + (w.at - begin) * size;
    }
    if (own_from_input) from[me->rank] = input_of(me, me->in, w.tensor, me->rank, within);
    bench_sum(me->opt->dtype, last, me->out + w.at * out_size, from, me->group->ranks, count);
  }
}

static void staged(bench_rank *me, bool own_from_input, int last) {
  size_t piece = me->opt->piece_bytes / bench_dtype_size(me->opt->dtype), end = me->work->out_numel;
  const bench_tensor *tensor = me->work->tensors;
  for (size_t at = 0; at < end; at += piece) {
    uint64_t slot = me->pieces++ & 1;
    while (tensor->out + tensor->shard <= at) tensor++;
    walk w = {tensor, at, end - at < piece ? end : at + piece};
    for (int row = 0; row < me->group->ranks; row++) {
      if (row != me->rank || !own_from_input) pack_row(me, w, slot, row);
    }
    bench_barrier(me);
    sum_own_row(me, w, slot, own_from_input, last);
  }
}

void bench_floor_staged(bench_rank *me) {
  for (int call = 0; call < me->work->calls; call++) staged(me, false, BENCH_SAME);
}

void bench_floor_staged_wide(bench_rank *me) {
  for (int call = 0; call < me->work->calls; call++) staged(me, false, BENCH_WIDE);
}

void bench_floor_staged_added(bench_rank *me) {
  for (int call = 0; call < me->work->calls; call++) staged(me, false, BENCH_ADDED);
}

void bench_floor_own_row(bench_rank *me) {
  for (int call = 0; call < me->work->calls; call++) staged(me, true, BENCH_SAME);
}

void bench_floor_in_place(bench_rank *me) {
  size_t size = bench_dtype_size(me->opt->dtype);
  const void *from[me->group->ranks];
  for (int call = 0; call < me->work->calls; call++) {
    bench_barrier(me);
    for (size_t t = 0; t < me->work->count; t++) {
      const bench_tensor *tensor = &me->work->tensors[t];
      for (int rank = 0; rank < me->group->ranks; rank++) {
        from[rank] = input_of(me, me->readable[rank], tensor, me->rank, 0);
      }
      bench_sum(me->opt->dtype, BENCH_SAME, me->out + tensor->out * size, from, me->group->ranks, tensor->shard);
    }
    /* Inputs may change after a call. */
    bench_barrier(me);
  }
}

void bench_floor_barrier(bench_rank *me) {
  for (int call = 0; call < me->work->calls; call++) bench_barrier(me);
}
