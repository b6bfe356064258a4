/* kernels.h: the arithmetic of the floors. */
#ifndef BENCH_KERNELS_H
#define BENCH_KERNELS_H

#include <stddef.h>

/* What becomes of the sum: SAME, written in the inputs' type; WIDE, written as f32; ADDED, its average added to f32. */
enum bench_last { BENCH_SAME, BENCH_WIDE, BENCH_ADDED };

/* to[i] = from[0][i] + from[1][i] + ..., in rank order; f16 and bf16 in f32, rounded once. WIDE and ADDED take f32, f16
 * and bf16. */
void bench_sum(int dtype, int last, void *to, const void *const *from, int ranks, size_t numel);

#endif
