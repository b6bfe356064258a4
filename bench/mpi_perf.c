/* mpi_perf.c: the workloads of rsb_perf over MPI, in the two ways that a program without rsbucket has: one blocking
 * MPI_Reduce_scatter_block a tensor, and buckets packed by hand with one call a bucket.
 *
 * It favours MPI where the two differ: results land in memory that is allocated and touched, without callbacks; buckets
 * are planned once and received where their results belong; tails of tensors are padded before the clock starts. */
#include <mpi.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

/* A run of tensors that goes through one call; more than one: packed. */
typedef struct {
  size_t first, count, shard; /* shard: elements of a rank */
} bucket;

typedef struct {
  const bench_options *opt;
  const bench_workload *work;
  MPI_Datatype type;
  MPI_Op op;
  int rank;
  char *in, *out, *packed;
  bucket *plan;
  size_t buckets;
} state;

static void *allocate(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory) bench_die("no memory for %zu bytes", bytes);
  memset(memory, 0, bytes);
  return memory;
}

/* Cuts the tensors into buckets as rsbucket does; a tensor that is larger than a bucket goes by itself, unpacked. */
static void make_plan(state *s) {
  size_t size = bench_dtype_size(s->opt->dtype), ranks = (size_t)s->opt->ranks;
  size_t bytes = s->opt->bucket_bytes > 0 ? (size_t)s->opt->bucket_bytes : (size_t)25 << 20;
  size_t most = bytes / (ranks * size);
  s->plan = allocate(s->work->count * sizeof *s->plan);
  s->buckets = 0;
  for (size_t t = 0; t < s->work->count; t++) {
    size_t shard = s->work->tensors[t].shard;
    bucket *last = s->buckets ? &s->plan[s->buckets - 1] : NULL;
    if (last && last->shard + shard <= most) {
      last->count++;
      last->shard += shard;
    } else {
      s->plan[s->buckets++] = (bucket){t, 1, shard};
    }
  }
  s->packed = allocate(bytes);
}

static void reduce_scatter(const state *s, const char *from, char *to, size_t numel) {
  MPI_Reduce_scatter_block(from, to, (int)numel, s->type, s->op, MPI_COMM_WORLD);
}

static void one_by_one(const state *s) {
  size_t size = bench_dtype_size(s->opt->dtype);
  for (int call = 0; call < s->work->calls; call++) {
    for (size_t t = 0; t < s->work->count; t++) {
      const bench_tensor *tensor = &s->work->tensors[t];
      reduce_scatter(s, s->in + tensor->in * size, s->out + tensor->out * size, tensor->shard);
    }
  }
}

static void in_buckets(const state *s) {
  size_t size = bench_dtype_size(s->opt->dtype), ranks = (size_t)s->opt->ranks;
  for (int call = 0; call < s->work->calls; call++) {
    for (const bucket *b = s->plan; b < s->plan + s->buckets; b++) {
      const bench_tensor *first = &s->work->tensors[b->first];
      for (size_t t = 0; b->count > 1 && t < b->count; t++) {
        const bench_tensor *tensor = first + t;
        for (size_t rank = 0; rank < ranks; rank++) {
          memcpy(s->packed + (rank * b->shard + tensor->out - first->out) * size,
                 s->in + (tensor->in + rank * tensor->shard) * size, tensor->shard * size);
        }
      }
      reduce_scatter(s, b->count > 1 ? s->packed : s->in + first->in * size, s->out + first->out * size, b->shard);
    }
  }
}

static const struct {
  const char *key, *label;
  void (*pass)(const state *);
} ways[] = {{"one-by-one", "MPI, one call a tensor", one_by_one}, {"buckets", "MPI, packed buckets", in_buckets}};
enum { WAYS = 2 };

static void checked_pass(const state *s, int way, int round) {
  size_t size = bench_dtype_size(s->opt->dtype);
  const void **shards = allocate(s->work->count * sizeof *shards);
  for (size_t t = 0; t < s->work->count; t++) shards[t] = s->out + s->work->tensors[t].out * size;
  bench_fill_inputs(s->opt, s->work, s->in, s->rank, round);
  memset(s->out, 0x5a, s->work->out_numel * size);
  ways[way].pass(s);
  const bench_expected expected = {s->opt->dtype, s->opt->op, false};
  bench_check_outputs(s->opt, s->work, &expected, shards, s->rank, round, ways[way].label);
  free(shards);
}

static bench_sample timed_pass(const state *s, int way) {
  bench_sample sample;
  MPI_Barrier(MPI_COMM_WORLD);
  sample.cpu = bench_cpu(true);
  sample.begin = bench_now();
  ways[way].pass(s);
  sample.end = bench_now();
  sample.cpu = bench_cpu(true) - sample.cpu;
  return sample;
}

/* Timed passes of a turn: fewer where an MPI is so slow that a turn would take more than two seconds. */
static int affordable_iters(const state *s, int way) {
  bench_sample first = timed_pass(s, way);
  int64_t most = INT64_C(2000000000) / (first.end - first.begin + 1);
  int iters = bench_iters(s->opt, s->work);
  iters = most < 1 ? 1 : most < iters ? (int)most : iters;
  MPI_Bcast(&iters, 1, MPI_INT, 0, MPI_COMM_WORLD);
  return iters;
}

/* All ranks' samples of one way, in the order that bench_join wants; on rank 0. */
static bench_sample *gathered(const state *s, const bench_sample *mine, int passes) {
  bench_sample *all = allocate((size_t)passes * (size_t)s->opt->ranks * sizeof *all);
  for (int pass = 0; pass < passes; pass++) {
    MPI_Gather(&mine[pass], sizeof *mine, MPI_BYTE, &all[(size_t)pass * (size_t)s->opt->ranks], sizeof *mine, MPI_BYTE,
               0, MPI_COMM_WORLD);
  }
  return all;
}

static void run_workload(state *s) {
  const bench_options *opt = s->opt;
  size_t size = bench_dtype_size(opt->dtype);
  s->in = allocate(s->work->in_numel * size);
  s->out = allocate(s->work->out_numel * size);
  make_plan(s);
  int iters[WAYS];
  bench_sample *samples[WAYS];
  for (int way = 0; way < WAYS; way++) {
    checked_pass(s, way, 0);
    iters[way] = affordable_iters(s, way);
    samples[way] = allocate((size_t)opt->rounds * (size_t)iters[way] * sizeof(bench_sample));
    for (int pass = 0; pass < opt->warmup; pass++) timed_pass(s, way);
  }
  for (int round = 0; round < opt->rounds; round++) {
    for (int way = 0; way < WAYS; way++) {
      timed_pass(s, way);
      for (int pass = 0; pass < iters[way]; pass++) {
        samples[way][round * iters[way] + pass] = timed_pass(s, way);
        if (opt->check) checked_pass(s, way, 1);
      }
    }
  }
  bench_series series[WAYS];
  for (int way = 0; way < WAYS; way++) {
    checked_pass(s, way, 1);
    bench_sample *all = gathered(s, samples[way], opt->rounds * iters[way]);
    series[way] = bench_join(ways[way].key, ways[way].label, false, opt->rounds, iters[way], all, opt->ranks);
    free(all);
    free(samples[way]);
  }
  if (s->rank == 0) {
    bench_print(opt, s->work, "processes", series, WAYS);
    bench_json_add(s->work, series, WAYS, NULL);
  }
  free(s->in);
  free(s->out);
  free(s->packed);
  free(s->plan);
}

int main(int argc, char **argv) {
  MPI_Init(&argc, &argv);
  bench_options opt = bench_parse(argc, argv, "mpi_perf");
  state s = {.opt = &opt};
  MPI_Comm_rank(MPI_COMM_WORLD, &s.rank);
  MPI_Comm_size(MPI_COMM_WORLD, &opt.ranks);
  const MPI_Datatype types[] = {MPI_FLOAT, MPI_DATATYPE_NULL, MPI_DATATYPE_NULL, MPI_DOUBLE, MPI_INT32_T};
  const MPI_Op ops[] = {MPI_SUM, MPI_OP_NULL, MPI_MIN, MPI_MAX, MPI_PROD};
  s.type = types[opt.dtype];
  s.op = ops[opt.op];
  if (s.type == MPI_DATATYPE_NULL || s.op == MPI_OP_NULL) {
    bench_die("MPI has no %s of %s", bench_op_name(opt.op), bench_dtype_name(opt.dtype));
  }
  size_t count;
  const bench_workload *works = bench_workloads(&opt, &count);
  char version[MPI_MAX_LIBRARY_VERSION_STRING];
  int length;
  MPI_Get_library_version(version, &length);
  version[strcspn(version, ",\n")] = '\0';
  if (s.rank == 0) {
    printf("%s, %d ranks\n", version, opt.ranks);
    bench_json_open(&opt, "mpi_perf", version, "processes");
  }
  for (size_t w = 0; w < count; w++) {
    s.work = &works[w];
    run_workload(&s);
  }
  if (s.rank == 0) bench_json_close();
  MPI_Finalize();
  return 0;
}
