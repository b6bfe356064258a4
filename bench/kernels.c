/* kernels.c: sums for the floors: plain loops that the compiler vectorises, for three generations of x86-64 or for
 * whatever else the machine is; plain stores. */
#include "kernels.h"

#include <stdint.h>

#include "bench.h"
#include "half.h"

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define CLONES
#endif

/* Two and four sources are summed in one loop; other numbers in blocks that stay in the L1 cache. */
enum { BLOCK = 1024 };

#define SUM(name, type, out, wide, load, put)                                                                       \
  CLONES static void name(out *restrict to, const type *const *from, int ranks, size_t numel, wide factor) {        \
    const type *a = from[0], *b = from[ranks > 1 ? 1 : 0];                                                          \
    (void)factor;                                                                                                   \
    if (ranks == 2) {                                                                                               \
      for (size_t i = 0; i < numel; i++) put(to[i], load(a[i]) + load(b[i]));                                       \
    } else if (ranks == 4) {                                                                                        \
      const type *c = from[2], *d = from[3];                                                                        \
      for (size_t i = 0; i < numel; i++) put(to[i], load(a[i]) + load(b[i]) + load(c[i]) + load(d[i]));             \
    } else {                                                                                                        \
      wide sums[BLOCK];                                                                                             \
      for (size_t at = 0; at < numel; at += BLOCK) {                                                                \
        size_t count = numel - at < BLOCK ? numel - at : BLOCK;                                                     \
        for (size_t i = 0; i < count; i++) sums[i] = load(a[at + i]);                                               \
        for (int rank = 1; rank < ranks; rank++) {                                                                  \
          const type *more = from[rank] + at;                                                                       \
          for (size_t i = 0; i < count; i++) sums[i] += load(more[i]);                                              \
        }                                                                                                           \
        for (size_t i = 0; i < count; i++) put(to[at + i], sums[i]);                                                \
      }                                                                                                             \
    }                                                                                                               \
  }

#define PUT(to, sum) (to) = (sum)
#define PUT_F16(to, sum) (to) = f16_from_f32(sum)
#define PUT_BF16(to, sum) (to) = bf16_from_f32(sum)
#define ADD(to, sum) (to) += (sum) * factor

SUM(sum_f32, float, float, float, , PUT)
SUM(sum_f64, double, double, double, , PUT)
SUM(sum_i32, uint32_t, uint32_t, uint32_t, , PUT)
SUM(sum_f16, uint16_t, uint16_t, float, f16_to_f32, PUT_F16)
SUM(sum_bf16, uint16_t, uint16_t, float, bf16_to_f32, PUT_BF16)
SUM(wide_f16, uint16_t, float, float, f16_to_f32, PUT)
SUM(wide_bf16, uint16_t, float, float, bf16_to_f32, PUT)
SUM(add_f32, float, float, float, , ADD)
SUM(add_f16, uint16_t, float, float, f16_to_f32, ADD)
SUM(add_bf16, uint16_t, float, float, bf16_to_f32, ADD)

void bench_sum(int dtype, int last, void *to, const void *const *from, int ranks, size_t numel) {
  float factor = 1.0f / (float)ranks;
  switch (dtype + 8 * last) {
    case BENCH_F32:
    case BENCH_F32 + 8 * BENCH_WIDE: sum_f32(to, (const float *const *)from, ranks, numel, 0); break;
    case BENCH_F64: sum_f64(to, (const double *const *)from, ranks, numel, 0); break;
    case BENCH_I32: sum_i32(to, (const uint32_t *const *)from, ranks, numel, 0); break;
    case BENCH_F16: sum_f16(to, (const uint16_t *const *)from, ranks, numel, 0); break;
    case BENCH_BF16: sum_bf16(to, (const uint16_t *const *)from, ranks, numel, 0); break;
    case BENCH_F16 + 8 * BENCH_WIDE: wide_f16(to, (const uint16_t *const *)from, ranks, numel, 0); break;
    case BENCH_BF16 + 8 * BENCH_WIDE: wide_bf16(to, (const uint16_t *const *)from, ranks, numel, 0); break;
    case BENCH_F32 + 8 * BENCH_ADDED: add_f32(to, (const float *const *)from, ranks, numel, factor); break;
    case BENCH_F16 + 8 * BENCH_ADDED: add_f16(to, (const uint16_t *const *)from, ranks, numel, factor); break;
    case BENCH_BF16 + 8 * BENCH_ADDED: add_bf16(to, (const uint16_t *const *)from, ranks, numel, factor); break;
    default: bench_die("the floors have no kernel for %s with that last step", bench_dtype_name(dtype));
  }
}
