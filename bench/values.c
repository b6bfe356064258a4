/* values.c: fills inputs with values that vary by rank, tensor, position and round, and checks results bit by bit.
 *
 * The values are small integers (for products: powers of two), so that the combination of all ranks is exact before the
 * one rounding that the type may need. */
#include <string.h>

#include "bench.h"
#include "half.h"

static const struct {
  const char *name;
  size_t size;
} dtypes[] = {{"f32", 4}, {"f16", 2}, {"bf16", 2}, {"f64", 8}, {"i32", 4}};

static const char *const ops[] = {"sum", "avg", "min", "max", "prod"};

const char *bench_dtype_name(int dtype) {
  return dtypes[dtype].name;
}

size_t bench_dtype_size(int dtype) {
  return dtypes[dtype].size;
}

const char *bench_op_name(int op) {
  return ops[op];
}

static uint32_t seed_of(int rank, size_t tensor, int round) {
  uint64_t x = (uint64_t)tensor * 0x9e3779b97f4a7c15u + (uint64_t)rank * 0xbf58476d1ce4e5b9u + (uint64_t)round * 77731u;
  x ^= x >> 31;
  x *= 0x94d049bb133111ebu;
  return (uint32_t)(x >> 32);
}

static inline int value_at(uint32_t seed, size_t index, int op) {
  uint32_t hash = (uint32_t)index * 2654435761u + seed;
  if (op == BENCH_PROD) return (hash >> 31 ? 2 : 1) * (hash >> 30 & 1 ? 1 : -1);
  return (int)(hash >> 26) - 32;
}

/* CASE(dtype, its C type, the conversion to it) for each dtype. */
#define FOR_EACH_TYPE(dtype, CASE)                \
  switch (dtype) {                                \
    CASE(BENCH_F32, float, (float))               \
    CASE(BENCH_F16, uint16_t, f16_from_f32)       \
    CASE(BENCH_BF16, uint16_t, bf16_from_f32)     \
    CASE(BENCH_F64, double, (double))             \
    CASE(BENCH_I32, int32_t, (int32_t))           \
    default:                                      \
      bench_die("dtype %d: unknown", dtype);      \
  }

void bench_fill(void *to, int dtype, int op, int rank, size_t tensor, size_t numel, size_t valid, int round) {
  uint32_t seed = seed_of(rank, tensor, round);
#define FILL(name, type, convert)                                            \
  case name:                                                                 \
    for (size_t i = 0; i < valid; i++) {                                     \
      ((type *)to)[i] = convert((float)value_at(seed, i, op));               \
    }                                                                        \
    break;
  FOR_EACH_TYPE(dtype, FILL)
#undef FILL
  size_t size = bench_dtype_size(dtype);
  memset((char *)to + valid * size, 0, (numel - valid) * size);
}

enum { BLOCK = 512 };

/* What all ranks make of `count` elements from `first` on: exact, but for AVG's division, which rounds once. */
static void expect(double *want, const uint32_t *seeds, int dtype, int op, int ranks, size_t first, size_t count) {
  float all[BLOCK];
  for (size_t i = 0; i < count; i++) all[i] = (float)value_at(seeds[0], first + i, op);
  for (int rank = 1; rank < ranks; rank++) {
    uint32_t seed = seeds[rank];
    for (size_t i = 0; i < count; i++) {
      float value = (float)value_at(seed, first + i, op);
      switch (op) {
        case BENCH_MIN: all[i] = value < all[i] ? value : all[i]; break;
        case BENCH_MAX: all[i] = value > all[i] ? value : all[i]; break;
        case BENCH_PROD: all[i] *= value; break;
        default: all[i] += value;
      }
    }
  }
  double divisor = op == BENCH_AVG ? ranks : 1;
  for (size_t i = 0; i < count; i++) {
    want[i] = dtype == BENCH_F64 ? all[i] / divisor : (double)(all[i] / (float)divisor);
  }
}

static float before_at(size_t index) {
  return (float)(index % 61);
}

void bench_fill_before(float *to, size_t numel) {
  for (size_t i = 0; i < numel; i++) to[i] = before_at(i);
}

/* Checks `numel` results of a tensor: they begin at its element `first`, `valid` of them are no padding, and they lie at
 * `place` of the outputs. The index of the first wrong one, or numel. */
static size_t check(const void *got, const bench_expected *expected, int ranks, size_t tensor, size_t first,
                    size_t numel, size_t valid, size_t place, int round) {
  int dtype = expected->dtype, op = expected->op;
  uint32_t seeds[ranks];
  double want[BLOCK];
  for (int rank = 0; rank < ranks; rank++) seeds[rank] = seed_of(rank, tensor, round);
  for (size_t at = 0; at < numel; at += BLOCK) {
    size_t count = numel - at < BLOCK ? numel - at : BLOCK;
    size_t filled = at >= valid ? 0 : valid - at < count ? valid - at : count;
    expect(want, seeds, dtype, op, ranks, first + at, filled);
    for (size_t i = filled; i < count; i++) want[i] = 0;
    for (size_t i = 0; expected->added && i < count; i++) want[i] += before_at(place + at + i);
#define CHECK(name, type, convert)                                            \
  case name:                                                                  \
    for (size_t i = 0; i < count; i++) {                                      \
      if (((const type *)got)[at + i] != convert(want[i])) return at + i;     \
    }                                                                         \
    break;
    FOR_EACH_TYPE(dtype, CHECK)
#undef CHECK
  }
  return numel;
}

void bench_fill_inputs(const bench_options *opt, const bench_workload *work, void *in, int rank, int round) {
  size_t size = bench_dtype_size(opt->dtype);
  for (size_t t = 0; t < work->count; t++) {
    const bench_tensor *tensor = &work->tensors[t];
    bench_fill((char *)in + tensor->in * size, opt->dtype, opt->op, rank, t, tensor->shard * (size_t)opt->ranks,
               tensor->numel, round);
  }
}

void bench_check_outputs(const bench_options *opt, const bench_workload *work, const bench_expected *expected,
                         const void *const *shards, int rank, int round, const char *who) {
  for (size_t t = 0; t < work->count; t++) {
    const bench_tensor *tensor = &work->tensors[t];
    size_t first = tensor->shard * (size_t)rank;
    size_t left = tensor->numel > first ? tensor->numel - first : 0;
    size_t wrong = check(shards[t], expected, opt->ranks, t, first, tensor->shard,
                         left < tensor->shard ? left : tensor->shard, tensor->out, round);
    if (wrong < tensor->shard) {
      bench_die("%s, workload %s: rank %d's shard of tensor %zu is wrong at element %zu of %zu", who, work->name, rank,
                t, wrong, tensor->shard);
    }
  }
}
