/* kernels.h: the arithmetic of the floors. */
#ifndef BENCH_KERNELS_H
#define BENCH_KERNELS_H

#include <stddef.h>

/* to[i] = from[0][i] + from[1][i] + ..., in rank order; f16 and bf16 in f32, rounded once. */
void bench_sum(int dtype, void *to, const void *const *from, int ranks, size_t numel);

#endif
