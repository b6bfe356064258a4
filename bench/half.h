/* half.h: f16 and bf16 from and to f32 in integer arithmetic, which compilers vectorise everywhere. For values that are
 * finite and zero or normal, as the benchmark's are; rounding to nearest even. */
#ifndef BENCH_HALF_H
#define BENCH_HALF_H

#include <stdint.h>
#include <string.h>

static inline float half_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t half_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

static inline float bf16_to_f32(uint16_t value) {
  return half_float((uint32_t)value << 16);
}

static inline uint16_t bf16_from_f32(float value) {
  uint32_t bits = half_bits(value);
  return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

static inline float f16_to_f32(uint16_t value) {
  float magnitude = half_float((uint32_t)(value & 0x7fff) << 13) * 0x1p112f;
  return half_float(half_bits(magnitude) | (uint32_t)(value & 0x8000) << 16);
}

static inline uint16_t f16_from_f32(float value) {
  uint32_t bits = half_bits(value), magnitude = bits & 0x7fffffff;
  uint32_t rebased = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  return (uint16_t)((bits >> 16 & 0x8000) | (magnitude < (113u << 23) ? 0 : rebased));
}

#endif
