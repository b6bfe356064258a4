// The oracle. Floats are computed in float or double variables, one rounding a step, as the header says;
// f16 and bf16 are rounded by arithmetic, not by the library's conversions.
#include "values.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace values {
namespace {

/// `x` to the nearest number with `precision` bits, whose least exponent gives steps of 2^`least`.
double round_to(double x, int precision, int least, double largest) {
  if (x == 0.0 || !std::isfinite(x)) {
    return x;
  }
  int exponent = 0;
  std::frexp(x, &exponent);
  const int step = std::max(exponent - precision, least);
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(x, -step)), step);
  return std::fabs(rounded) > largest ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

double round_f16(double x) { return round_to(x, 11, -24, 65504.0); }
double round_bf16(double x) { return round_to(x, 8, -133, std::ldexp(255.0, 120)); }

uint16_t encode_f16(double x) {
  const double y = round_f16(x);
  const uint16_t sign = std::signbit(y) ? 0x8000 : 0;
  const double a = std::fabs(y);
  if (std::isnan(y)) {
    return 0x7E00;
  }
  if (std::isinf(a)) {
    return static_cast<uint16_t>(sign | 0x7C00);
  }
  if (a < std::ldexp(1.0, -14)) {
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(a, 24)));
  }
  int exponent = 0;
  const double fraction = std::frexp(a, &exponent);  // in [0.5, 1)
  const auto mantissa = static_cast<uint16_t>(std::ldexp(fraction, 11)) & 0x3FF;
  return static_cast<uint16_t>(sign | ((exponent + 14) << 10) | mantissa);
}

double decode_f16(uint16_t bits) {
  const int exponent = (bits >> 10) & 31;
  const int mantissa = bits & 0x3FF;
  double a = 0.0;
  if (exponent == 31) {
    a = mantissa != 0 ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
  } else if (exponent == 0) {
    a = std::ldexp(mantissa, -24);
  } else {
    a = std::ldexp(mantissa + 1024, exponent - 25);
  }
  return (bits & 0x8000) != 0 ? -a : a;
}

uint16_t encode_bf16(double x) {
  const auto f = static_cast<float>(round_bf16(x));  // exact
  uint32_t bits = 0;
  std::memcpy(&bits, &f, sizeof bits);
  return std::isnan(f) ? uint16_t{0x7FC0} : static_cast<uint16_t>(bits >> 16);
}

double decode_bf16(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float f = 0;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

template <typename T>
void put(T value, unsigned char *at) {
  std::memcpy(at, &value, sizeof value);
}

template <typename T>
T get(const unsigned char *at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

/// One step of an operation on floats; NaN in either operand gives NaN.
template <typename T>
T step(rsb_op op, T a, T b) {
  switch (op) {
    case RSB_OP_SUM:
    case RSB_OP_AVG:
      return a + b;
    case RSB_OP_PROD:
      return a * b;
    case RSB_OP_MIN:
      return std::isnan(a) || (!std::isnan(b) && a <= b) ? a : b;
    default:
      return std::isnan(a) || (!std::isnan(b) && a >= b) ? a : b;
  }
}

template <typename T>
void reduce_float(const Reduction &r, const std::vector<const unsigned char *> &inputs,
                  const unsigned char *accumulate, unsigned char *out) {
  const rsb_dtype target = r.output_dtype != 0 ? r.output_dtype : r.dtype;
  T acc = static_cast<T>(load(r.dtype, inputs[0]));
  for (size_t i = 1; i < inputs.size(); ++i) {
    acc = step(r.op, acc, static_cast<T>(load(r.dtype, inputs[i])));
  }
  if (r.op == RSB_OP_AVG) {
    acc = acc / static_cast<T>(inputs.size());
  }
  if (r.scale != 0.0) {
    acc = acc * static_cast<T>(r.scale);
  }
  if (accumulate != nullptr) {
    acc = static_cast<T>(load(target, accumulate)) + acc;
  }
  store(target, static_cast<double>(acc), out);
}

/// Integers wrap: the arithmetic is done on 64 unsigned bits and cut.
uint64_t bits_of(rsb_dtype dtype, const unsigned char *at) {
  switch (dtype) {
    case RSB_DTYPE_I32:
      return static_cast<uint64_t>(static_cast<int64_t>(get<int32_t>(at)));
    case RSB_DTYPE_I64:
      return get<uint64_t>(at);
    case RSB_DTYPE_U8:
      return *at;
    default:
      return static_cast<uint64_t>(static_cast<int64_t>(get<int8_t>(at)));
  }
}

void put_bits(rsb_dtype dtype, uint64_t bits, unsigned char *at) {
  switch (dtype) {
    case RSB_DTYPE_I32:
      return put(static_cast<uint32_t>(bits), at);
    case RSB_DTYPE_I64:
      return put(bits, at);
    default:
      return put(static_cast<uint8_t>(bits), at);
  }
}

void reduce_integer(const Reduction &r, const std::vector<const unsigned char *> &inputs,
                    const unsigned char *accumulate, unsigned char *out) {
  uint64_t acc = bits_of(r.dtype, inputs[0]);
  for (size_t i = 1; i < inputs.size(); ++i) {
    const uint64_t x = bits_of(r.dtype, inputs[i]);
    const bool less = static_cast<int64_t>(x) < static_cast<int64_t>(acc);
    switch (r.op) {
      case RSB_OP_SUM:
        acc += x;
        break;
      case RSB_OP_PROD:
        acc *= x;
        break;
      case RSB_OP_MIN:
        acc = less ? x : acc;
        break;
      default:
        acc = less ? acc : x;
    }
  }
  put_bits(r.dtype, accumulate != nullptr ? bits_of(r.dtype, accumulate) + acc : acc, out);
}

}  // namespace

const std::vector<rsb_dtype> kAllDtypes = {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_F16, RSB_DTYPE_BF16,
                                           RSB_DTYPE_I32, RSB_DTYPE_I64, RSB_DTYPE_U8,  RSB_DTYPE_I8};
const std::vector<rsb_op> kAllOps = {RSB_OP_SUM, RSB_OP_AVG, RSB_OP_MIN, RSB_OP_MAX, RSB_OP_PROD};

std::string dtype_name(rsb_dtype dtype) {
  const char *const names[] = {"none", "F32", "F64", "F16", "BF16", "I32", "I64", "U8", "I8"};
  return names[dtype <= RSB_DTYPE_I8 ? dtype : 0];
}

std::string op_name(rsb_op op) {
  const char *const names[] = {"none", "SUM", "AVG", "MIN", "MAX", "PROD"};
  return names[op <= RSB_OP_PROD ? op : 0];
}

size_t size_of(rsb_dtype dtype) {
  const size_t sizes[] = {0, 4, 8, 2, 2, 4, 8, 1, 1};
  return sizes[dtype <= RSB_DTYPE_I8 ? dtype : 0];
}

bool is_float(rsb_dtype dtype) { return dtype >= RSB_DTYPE_F32 && dtype <= RSB_DTYPE_BF16; }

bool takes(rsb_dtype dtype, rsb_op op) { return op != RSB_OP_AVG || is_float(dtype); }

uint64_t hash(uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (const uint64_t x : {a, b, c, d}) {
    h = (h ^ x) * 0xBF58476D1CE4E5B9u;
    h ^= h >> 29;
    h *= 0x94D049BB133111EBu;
    h ^= h >> 32;
  }
  return h;
}

void store(rsb_dtype dtype, double x, unsigned char *at) {
  switch (dtype) {
    case RSB_DTYPE_F32:
      return put(static_cast<float>(x), at);
    case RSB_DTYPE_F64:
      return put(x, at);
    case RSB_DTYPE_F16:
      return put(encode_f16(x), at);
    case RSB_DTYPE_BF16:
      return put(encode_bf16(x), at);
    default:
      return put_bits(dtype, static_cast<uint64_t>(static_cast<int64_t>(x)), at);
  }
}

double load(rsb_dtype dtype, const unsigned char *at) {
  switch (dtype) {
    case RSB_DTYPE_F32:
      return get<float>(at);
    case RSB_DTYPE_F64:
      return get<double>(at);
    case RSB_DTYPE_F16:
      return decode_f16(get<uint16_t>(at));
    case RSB_DTYPE_BF16:
      return decode_bf16(get<uint16_t>(at));
    default:
      return static_cast<double>(static_cast<int64_t>(bits_of(dtype, at)));
  }
}

void fill(Data data, rsb_dtype dtype, rsb_op op, const Place &place, unsigned char *at) {
  const uint64_t h = hash(place.seed, (uint64_t{place.from} << 32) | place.to, place.position, dtype);
  if (data == Data::kExact) {
    const double factors[] = {1.0, 2.0, -1.0, 0.5};  // their products are powers of two
    const double counts[] = {1.0, 2.0, 3.0, 5.0};    // products wrap
    if (op == RSB_OP_PROD) {
      store(dtype, is_float(dtype) ? factors[h % 4] : counts[h % 4], at);
    } else {
      store(dtype, static_cast<double>(h % 17) - (dtype == RSB_DTYPE_U8 ? 0.0 : 8.0), at);
    }
  } else if (is_float(dtype)) {
    // A full mantissa, and few exponents so that products of eight stay in range of f16.
    const double mantissa = 1.0 + static_cast<double>(h >> 12) * 0x1p-52;
    const int exponent = static_cast<int>((h >> 1) % 3) - 2;
    store(dtype, ((h & 1) != 0 ? -1.0 : 1.0) * std::ldexp(mantissa, exponent), at);
  } else {
    put_bits(dtype, h, at);
  }
}

Bytes piece(Data data, rsb_dtype dtype, rsb_op op, uint64_t seed, uint32_t from, uint32_t to, size_t numel) {
  const size_t width = size_of(dtype);
  Bytes bytes(numel * width);
  for (size_t i = 0; i < numel; ++i) {
    fill(data, dtype, op, {seed, from, to, i}, bytes.data() + i * width);
  }
  return bytes;
}

void reduce(const Reduction &reduction, const std::vector<const unsigned char *> &inputs,
            const unsigned char *accumulate, unsigned char *out) {
  if (!is_float(reduction.dtype)) {
    reduce_integer(reduction, inputs, accumulate, out);
  } else if (reduction.dtype == RSB_DTYPE_F64 || reduction.output_dtype == RSB_DTYPE_F64) {
    reduce_float<double>(reduction, inputs, accumulate, out);
  } else {
    reduce_float<float>(reduction, inputs, accumulate, out);
  }
}

Bytes shard(const Reduction &reduction, Data data, uint64_t seed, uint32_t rank, uint32_t size, size_t numel,
            const Bytes &accumulate) {
  std::vector<Bytes> pieces;
  for (uint32_t from = 0; from < size; ++from) {
    pieces.push_back(piece(data, reduction.dtype, reduction.op, seed, from, rank, numel));
  }
  const size_t in = size_of(reduction.dtype);
  const size_t out = size_of(reduction.output_dtype != 0 ? reduction.output_dtype : reduction.dtype);
  Bytes result(numel * out);
  std::vector<const unsigned char *> inputs(size);
  for (size_t i = 0; i < numel; ++i) {
    for (uint32_t from = 0; from < size; ++from) {
      inputs[from] = pieces[from].data() + i * in;
    }
    reduce(reduction, inputs, accumulate.empty() ? nullptr : accumulate.data() + i * out,
           result.data() + i * out);
  }
  return result;
}

}  // namespace values
