/* rng.h - one small random generator (splitmix64), so that a run is the same on every host. */
#ifndef RNG_H
#define RNG_H

#include <stddef.h>
#include <stdint.h>

static inline uint64_t rng_next(uint64_t *state) {
  uint64_t x = (*state += UINT64_C(0x9e3779b97f4a7c15));
  x = (x ^ (x >> 30)) * UINT64_C(0xbf58476d1ce4e5b9);
  x = (x ^ (x >> 27)) * UINT64_C(0x94d049bb133111eb);
  return x ^ (x >> 31);
}

/* Uniform in [-1, 1). */
static inline float rng_uniform(uint64_t *state) {
  return (float)(rng_next(state) >> 40) / (float)(1 << 23) - 1.0f;
}

/* Fills order[0..count) with a random permutation of 0..count-1. */
static inline void rng_permutation(size_t *order, size_t count, uint64_t *state) {
  for (size_t i = 0; i < count; i++) {
    size_t j = (size_t)(rng_next(state) % (i + 1));
    order[i] = order[j];
    order[j] = i;
  }
}

#endif
