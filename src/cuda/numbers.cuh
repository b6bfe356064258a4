// Element types and their arithmetic on the device, the same bits as src/reduce on the host: sums in
// f32 (f64 where the input or the output is), every step rounded by itself, one rounding to the
// output's type, every computed NaN the canonical quiet one.
//
// No header of CUDA's is included, so that NVRTC takes this alone, and a host compiler too, once it
// has been given the built-ins that are used (__float_as_uint, __fadd_rn, ...). Arithmetic is written
// with those: unlike operators they are never contracted to a fused multiply-add.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef int i32;
typedef long long i64;
typedef float f32;
typedef double f64;

#define DEVICE static __device__ __forceinline__

// A binary16 number, as its bits.
struct f16 {
  u16 bits;
};

// A bfloat16 number, the upper half of a binary32, as its bits.
struct bf16 {
  u16 bits;
};

// ---- Conversions: see src/reduce/float.rs --------------------------------------------------------

DEVICE f32 quiet(f32 v) { return v != v ? __uint_as_float(0x7fc00000u) : v; }
DEVICE f64 quiet(f64 v) { return v != v ? __longlong_as_double(0x7ff8000000000000ll) : v; }

// The difference of the exponents' biases of binary32 and binary16, in place.
#define REBIAS (112u << 23)

DEVICE f32 to_f32(f32 v) { return v; }
DEVICE f32 to_f32(bf16 v) { return __uint_as_float((u32)v.bits << 16); }
DEVICE f32 to_f32(f16 v) {
  u32 magnitude = (u32)(v.bits & 0x7fff) << 13;
  // Times 2^112, by which a binary16's exponent read as a binary32's is too small.
  u32 scaled = __float_as_uint(__fmul_rn(__uint_as_float(magnitude), __uint_as_float((127u << 23) + REBIAS)));
  // The greatest exponent stays the greatest.
  u32 special = magnitude < (0x7c00u << 13) ? 0 : 0x7f800000u;
  return __uint_as_float(scaled | special | (u32)(v.bits & 0x8000) << 16);
}

DEVICE void from_f32(f32 v, f32 *out) { *out = quiet(v); }
DEVICE void from_f32(f32 v, bf16 *out) {
  u32 bits = __float_as_uint(quiet(v));
  out->bits = (u16)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DEVICE void from_f32(f32 v, f16 *out) {
  u32 bits = __float_as_uint(v);
  u32 magnitude = bits & 0x7fffffffu;
  u32 normal = (magnitude - REBIAS + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // In the sum with 0.5 the last place is 2^-24, the unit of a subnormal: the addition rounds.
  u32 subnormal = __float_as_uint(__fadd_rn(__uint_as_float(magnitude), 0.5f)) - 0x3f000000u;
  u32 finite = magnitude < REBIAS + (1u << 23) ? subnormal : normal;
  u32 bounded = magnitude < REBIAS + (31u << 23) ? finite : 0x7c00;
  out->bits = (u16)(magnitude > 0x7f800000u ? 0x7e00 : bounded | ((bits >> 16) & 0x8000));
}

// `v` in f32, an inexact one rounded to the neighbour with an odd last bit: rounding the result to
// 16 bits is then rounding `v` once.
DEVICE f32 to_odd(f64 v) {
  f32 nearest = __double2float_rn(v);
  u64 mask = 0x7fffffffffffffffull;
  f64 back = __longlong_as_double((i64)(mask & (u64)__double_as_longlong((f64)nearest)));
  f64 exact = __longlong_as_double((i64)(mask & (u64)__double_as_longlong(v)));
  u32 bits = __float_as_uint(nearest);
  // From an even neighbour the odd one lies on the other side of `v`. A NaN compares as neither.
  u32 even = ~bits & 1;
  return __uint_as_float(bits + (even & (u32)(back < exact)) - (even & (u32)(back > exact)));
}

// ---- Accumulators: widen to them, combine, narrow from them ---------------------------------------

// In what inputs of `In` are combined for outputs of `Out`.
template <class In, class Out> struct Accumulator { typedef f32 type; };
template <class In> struct Accumulator<In, f64> { typedef f64 type; };
template <class Out> struct Accumulator<f64, Out> { typedef f64 type; };
template <> struct Accumulator<f64, f64> { typedef f64 type; };
template <> struct Accumulator<i32, i32> { typedef i32 type; };
template <> struct Accumulator<i64, i64> { typedef i64 type; };
template <> struct Accumulator<u8, u8> { typedef u8 type; };
template <> struct Accumulator<i8, i8> { typedef i8 type; };

template <class In> DEVICE void widen(In v, f32 *out) { *out = to_f32(v); }
template <class In> DEVICE void widen(In v, f64 *out) { *out = (f64)to_f32(v); }
DEVICE void widen(f64 v, f64 *out) { *out = v; }
DEVICE void widen(i32 v, i32 *out) { *out = v; }
DEVICE void widen(i64 v, i64 *out) { *out = v; }
DEVICE void widen(u8 v, u8 *out) { *out = v; }
DEVICE void widen(i8 v, i8 *out) { *out = v; }

template <class Out> DEVICE void narrow(f32 v, Out *out) { from_f32(v, out); }
template <class Out> DEVICE void narrow(f64 v, Out *out) { from_f32(to_odd(v), out); }
DEVICE void narrow(f64 v, f32 *out) { *out = quiet(__double2float_rn(v)); }
DEVICE void narrow(f64 v, f64 *out) { *out = quiet(v); }
DEVICE void narrow(i32 v, i32 *out) { *out = v; }
DEVICE void narrow(i64 v, i64 *out) { *out = v; }
DEVICE void narrow(u8 v, u8 *out) { *out = v; }
DEVICE void narrow(i8 v, i8 *out) { *out = v; }

DEVICE f32 sum(f32 a, f32 b) { return __fadd_rn(a, b); }
DEVICE f64 sum(f64 a, f64 b) { return __dadd_rn(a, b); }
DEVICE f32 prod(f32 a, f32 b) { return __fmul_rn(a, b); }
DEVICE f64 prod(f64 a, f64 b) { return __dmul_rn(a, b); }

// Integers wrap.
DEVICE i32 sum(i32 a, i32 b) { return (i32)((u32)a + (u32)b); }
DEVICE i64 sum(i64 a, i64 b) { return (i64)((u64)a + (u64)b); }
DEVICE u8 sum(u8 a, u8 b) { return (u8)(a + b); }
DEVICE i8 sum(i8 a, i8 b) { return (i8)(a + b); }
DEVICE i32 prod(i32 a, i32 b) { return (i32)((u32)a * (u32)b); }
DEVICE i64 prod(i64 a, i64 b) { return (i64)((u64)a * (u64)b); }
DEVICE u8 prod(u8 a, u8 b) { return (u8)(a * b); }
DEVICE i8 prod(i8 a, i8 b) { return (i8)(a * b); }

template <class T> DEVICE T least(T a, T b) { return b < a ? b : a; }
template <class T> DEVICE T greatest(T a, T b) { return b > a ? b : a; }

// NaN if either is, -0 below +0. Neither less nor greater: equal, where the bits differ in the sign
// of zero only, and -0 has more of them; or a NaN, which stays one under more bits.
DEVICE f32 least(f32 a, f32 b) {
  f32 either = __uint_as_float(__float_as_uint(a) | __float_as_uint(b));
  return a < b ? a : a > b ? b : either;
}
DEVICE f64 least(f64 a, f64 b) {
  f64 either = __longlong_as_double(__double_as_longlong(a) | __double_as_longlong(b));
  return a < b ? a : a > b ? b : either;
}
// As `least`, with the sign turned.
DEVICE f32 greatest(f32 a, f32 b) {
  u32 sign = 0x80000000u;
  f32 either = __uint_as_float(((__float_as_uint(a) ^ sign) | (__float_as_uint(b) ^ sign)) ^ sign);
  return a > b ? a : a < b ? b : either;
}
DEVICE f64 greatest(f64 a, f64 b) {
  i64 sign = (i64)0x8000000000000000ull;
  f64 either = __longlong_as_double(((__double_as_longlong(a) ^ sign) | (__double_as_longlong(b) ^ sign)) ^ sign);
  return a > b ? a : a < b ? b : either;
}

DEVICE f32 divided(f32 v, f64 by) { return __fdiv_rn(v, __double2float_rn(by)); }
DEVICE f64 divided(f64 v, f64 by) { return __ddiv_rn(v, by); }
DEVICE f32 times(f32 v, f64 by) { return __fmul_rn(v, __double2float_rn(by)); }
DEVICE f64 times(f64 v, f64 by) { return __dmul_rn(v, by); }
// Integers are neither averaged nor scaled.
template <class T> DEVICE T divided(T v, f64) { return v; }
template <class T> DEVICE T times(T v, f64) { return v; }
