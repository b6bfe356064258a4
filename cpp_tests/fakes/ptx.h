// What PTX's instructions do, for the C++ that ptx_to_cc makes of the kernels: those that they use, after the
// PTX ISA manual. A register is an unsigned integer of its width, also where it holds a float.
//
// Stricter than the host: an access must be aligned to its size, or the launch ends with
// CUDA_ERROR_MISALIGNED_ADDRESS, and a float's operation that gives NaN gives the device's, 0x7fffffff.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace ptx {

typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef uint8_t u8;

/// What a register holds before it is set.
enum : unsigned { UNSET = 0x5a };

/// A kernel: called for each thread with the parameters' address.
struct Entry {
  const char *name;
  void (*run)(u64 params, u32 tid_x, u32 ctaid_x);
};
/// All of them, and then one without a name.
extern const Entry ENTRIES[];
/// FNV-1a of the text that they were made of.
extern const u64 TEXT;
/// Set by an access that is not aligned: its address.
extern thread_local u64 misaligned;

// ---- Memory ---------------------------------------------------------------------------------------------

template <size_t N> inline bool aligned(u64 at) {
  if (at % N == 0) return true;
  misaligned = at;
  return false;
}

template <class T, class... R> inline void load(u64 at, R &...into) {
  T value[sizeof...(R)] = {};
  if (aligned<sizeof value>(at)) memcpy(value, (const void *)at, sizeof value);
  const T *next = value;
  // Signed ones fill a wider register with their sign.
  ((into = (R)*next++), ...);
}

template <class T, class... R> inline void store(u64 at, R... from) {
  const T value[] = {(T)from...};
  if (aligned<sizeof value>(at)) memcpy((void *)at, value, sizeof value);
}

#define LOAD(SPACE, NAME, T) \
  template <class... R> inline void ld_##SPACE##_##NAME(u64 at, R &...into) { load<T>(at, into...); }
#define STORE(NAME, T) \
  template <class... R> inline void st_global_##NAME(u64 at, R... from) { store<T>(at, from...); }
#define BOTH(NAME, T) LOAD(global, NAME, T) STORE(NAME, T)
BOTH(u8, u8) BOTH(u16, u16) BOTH(u32, u32) BOTH(u64, u64) BOTH(f32, u32) BOTH(f64, u64)
BOTH(v2_u32, u32) BOTH(v4_u32, u32) BOTH(v2_u64, u64) BOTH(v2_f64, u64) BOTH(v4_f32, u32)
LOAD(global, s8, s8)
LOAD(param, u32, u32) LOAD(param, u64, u64) LOAD(param, f64, u64) LOAD(param, b64, u64) LOAD(param, v2_u32, u32)
inline u64 cvta_to_global_u64(u64 at) { return at; }

// ---- Integers -------------------------------------------------------------------------------------------

#define TWO(NAME, T, WHAT) inline T NAME(T a, T b) { return (T)(WHAT); }
#define SIGNED(NAME, U, S, WHAT) \
  inline U NAME(U x, U y) { S a = (S)x, b = (S)y; return (U)(WHAT); }
TWO(add_s16, u16, a + b) TWO(add_s32, u32, a + b) TWO(add_s64, u64, a + b)
TWO(sub_s32, u32, a - b) TWO(sub_s64, u64, a - b)
TWO(mul_lo_s16, u16, (u32)a * b) TWO(mul_lo_s32, u32, a * b) TWO(mul_lo_s64, u64, a * b)
inline u64 mul_wide_u32(u32 a, u32 b) { return (u64)a * b; }
TWO(div_u32, u32, b == 0 ? ~0u : a / b)
inline u32 neg_s32(u32 a) { return 0u - a; }
TWO(min_u16, u16, a < b ? a : b) TWO(min_u32, u32, a < b ? a : b) TWO(min_u64, u64, a < b ? a : b)
TWO(max_u16, u16, a > b ? a : b) TWO(max_u64, u64, a > b ? a : b)
SIGNED(min_s16, u16, s16, a < b ? a : b) SIGNED(min_s32, u32, s32, a < b ? a : b) SIGNED(min_s64, u64, s64, a < b ? a : b)
SIGNED(max_s16, u16, s16, a > b ? a : b) SIGNED(max_s32, u32, s32, a > b ? a : b) SIGNED(max_s64, u64, s64, a > b ? a : b)

#define BITWISE(NAME, T) TWO(and_##NAME, T, a & b) TWO(or_##NAME, T, a | b) TWO(xor_##NAME, T, a ^ b)
BITWISE(b16, u16) BITWISE(b32, u32) BITWISE(b64, u64) BITWISE(pred, bool)
inline u32 not_b32(u32 a) { return ~a; }
inline bool not_pred(bool a) { return !a; }
// Shifts by the width and more leave nothing.
inline u32 shl_b32(u32 a, u32 n) { return n < 32 ? a << n : 0; }
inline u64 shl_b64(u64 a, u32 n) { return n < 64 ? a << n : 0; }
inline u32 shr_u32(u32 a, u32 n) { return n < 32 ? a >> n : 0; }
inline u64 shr_u64(u64 a, u32 n) { return n < 64 ? a >> n : 0; }
/// Four of the eight bytes of {b, a}, as the nibbles of `select` name them; with bit 3 of one, its sign alone.
inline u32 prmt_b32(u32 a, u32 b, u32 select) {
  u64 bytes = (u64)b << 32 | a;
  u32 value = 0;
  for (u32 i = 0; i < 4; i++) {
    u32 nibble = select >> (4 * i) & 15, byte = (u32)(bytes >> (8 * (nibble & 7))) & 0xff;
    if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
    value |= byte << (8 * i);
  }
  return value;
}

// ---- Floats ---------------------------------------------------------------------------------------------

template <class To, class From> inline To bits(From from) {
  static_assert(sizeof(To) == sizeof from, "the same width");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
inline float f32(u32 a) { return bits<float>(a); }
inline double f64(u64 a) { return bits<double>(a); }
inline u32 result(float v) { return v != v ? 0x7fffffffu : bits<u32>(v); }
inline u64 result(double v) { return v != v ? 0xfff8000000000000ull : bits<u64>(v); }

#define ROUNDED(NAME, OP)                                                           \
  inline u32 NAME##_rn_f32(u32 a, u32 b) { return result((float)(f32(a) OP f32(b))); } \
  inline u64 NAME##_rn_f64(u64 a, u64 b) { return result((double)(f64(a) OP f64(b))); }
ROUNDED(add, +) ROUNDED(mul, *) ROUNDED(div, /)

// ---- Moves, choices, conversions ------------------------------------------------------------------------

#define MOVE(NAME, T) inline T mov_##NAME(T a) { return a; }
MOVE(pred, bool) MOVE(u16, u16) MOVE(u32, u32) MOVE(u64, u64) MOVE(b32, u32) MOVE(b64, u64) MOVE(f32, u32)
inline void mov_b32(u32 a, u16 &low, u16 &high) { low = (u16)a, high = (u16)(a >> 16); }

#define SELECT(NAME, T) inline T selp_##NAME(T a, T b, bool p) { return p ? a : b; }
SELECT(b32, u32) SELECT(u32, u32) SELECT(f32, u32) SELECT(f64, u64)

#define COMPARE(NAME, T, WHAT) inline bool setp_##NAME(T a, T b) { return WHAT; }
COMPARE(eq_b32, u32, a == b) COMPARE(eq_b64, u64, a == b) COMPARE(eq_s32, u32, a == b) COMPARE(eq_s64, u64, a == b)
COMPARE(ne_s32, u32, a != b) COMPARE(ne_s64, u64, a != b)
COMPARE(lt_u16, u16, a < b) COMPARE(lt_u32, u32, a < b) COMPARE(ge_u32, u32, a >= b)
COMPARE(gt_u32, u32, a > b) COMPARE(gt_u64, u64, a > b)
COMPARE(lt_f32, u32, f32(a) < f32(b)) COMPARE(gt_f32, u32, f32(a) > f32(b))
COMPARE(nan_f32, u32, f32(a) != f32(a) || f32(b) != f32(b))
COMPARE(eq_f64, u64, f64(a) == f64(b)) COMPARE(neu_f64, u64, !(f64(a) == f64(b)))
COMPARE(lt_f64, u64, f64(a) < f64(b)) COMPARE(gt_f64, u64, f64(a) > f64(b))
COMPARE(nan_f64, u64, f64(a) != f64(a) || f64(b) != f64(b))

inline u32 cvt_u32_u16(u16 a) { return a; }
inline u16 cvt_u16_u32(u32 a) { return (u16)a; }
inline u16 cvt_u16_u64(u64 a) { return (u16)a; }
inline u32 cvt_u32_u64(u64 a) { return (u32)a; }
inline u64 cvt_u64_u32(u32 a) { return a; }
inline u16 cvt_s16_s8(u16 a) { return (u16)(s16)(s8)a; }
inline u32 cvt_rn_f32_f64(u64 a) { return result((float)f64(a)); }
inline u64 cvt_f64_f32(u32 a) { return result((double)f32(a)); }

} // namespace ptx
