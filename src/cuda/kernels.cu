// The library's device code. src/cuda/kernels.ptx is made from it by tools/make_ptx, and the stand-in
// of the driver in cpp_tests/fakes runs it on the host.
//
// Two families, each with one parameter: a struct of at most 4096 bytes, given by value, that lists
// segments. A block of 256 threads carries out one chunk, 16 KiB of a segment's source, and finds it
// by its number: segment i has the chunks before `end`, from the `end` before it. So the work is even
// whatever the sizes of tensors are, and no launch depends on the device.
//
// pack    copies pieces of tensors into a bucket, in rows, with zeros after a tensor's end. All is in
//         bytes: ops travel in their own type, and reduce is where types are converted.
// reduce  combines rows in rank order and takes the last step: average, scale, accumulate, convert.
//         With one row it is the last step alone.
//
// Addresses may have any alignment. Accesses are of 16 bytes where alignment allows it.

#include "numbers.cuh"

#define THREADS 256u
#define CHUNK 16384u

// ---- Parameters: src/cuda/kernels.rs has the same -----------------------------------------------------

struct PackSegment {
  const u8 *src; // where the bytes lie
  u64 at;     // bytes from dst to where they go
  u64 count;  // bytes; of one row, if flat
  u32 end;    // chunks up to here
  u32 flat;   // 0: a piece; 1 + pad: `rows` rows end to end, without the last `pad` bytes: zeros
};

template <u32 N> struct Pack {
  u8 *dst;
  u64 stride;  // bytes from one row of the bucket to the next
  u32 rows;
  u32 segments;
  PackSegment segment[N];
};

struct ReduceSegment {
  u8 *dst;
  u64 at;     // elements from the beginning of a row
  u64 count;  // elements
  f64 scale;  // 1: none
  u32 end;    // chunks up to here
  u32 output; // the output's type, as rsb_dtype has it, and ACCUMULATE
};

#define AVG 2u
#define MIN 3u
#define MAX 4u
#define ACCUMULATE 0x100u

struct Reduce {
  const u8 *src;
  u64 stride;   // elements from one row to the next
  f64 divisor;  // what the combined value is divided by; 1: nothing
  f64 factor;   // what it is multiplied by next; 1: nothing
  u32 rows;
  u32 op;
  u32 segments;
  u32 reserved;
  ReduceSegment segment[101];
};

static_assert(sizeof(Pack<127>) == 4088 && sizeof(Pack<16>) == 536 && sizeof(Reduce) == 4088, "parameters");

// ---- Moving bytes ---------------------------------------------------------------------------------------

template <class T> DEVICE const T *as(const u8 *p) { return (const T *)p; }
template <class T> DEVICE T *as(u8 *p) { return (T *)p; }
DEVICE u32 low(const u8 *p) { return (u32)(u64)p; }

// Copies by accesses of a T; the addresses agree modulo its size. May be in place.
template <class T> DEVICE void copy_by(const u8 *from, u8 *to, u32 bytes) {
  u32 head = (0u - low(to)) & (u32)(sizeof(T) - 1);
  head = head < bytes ? head : bytes;
  u32 count = (bytes - head) / (u32)sizeof(T);
  u32 tail = head + count * (u32)sizeof(T);
  if (threadIdx.x < head) to[threadIdx.x] = from[threadIdx.x];
  if (threadIdx.x < bytes - tail) to[tail + threadIdx.x] = from[tail + threadIdx.x];
  const T *in = as<T>(from + head);
  T *out = as<T>(to + head);
  // Four loads are under way before the first store.
  for (u32 i = threadIdx.x; i < count; i += 4 * THREADS) {
    T value[4];
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      if (i + k * THREADS < count) value[k] = in[i + k * THREADS];
#pragma unroll
    for (u32 k = 0; k < 4; k++)
      if (i + k * THREADS < count) out[i + k * THREADS] = value[k];
  }
}

DEVICE void copy(const u8 *from, u8 *to, u32 bytes) {
  u32 differ = low(from) ^ low(to);
  if (differ % 16 == 0) copy_by<uint4>(from, to, bytes);
  else if (differ % 8 == 0) copy_by<uint2>(from, to, bytes);
  else if (differ % 4 == 0) copy_by<u32>(from, to, bytes);
  else if (differ % 2 == 0) copy_by<u16>(from, to, bytes);
  else copy_by<u8>(from, to, bytes);
}

// The same, once for all kernels that seldom need it.
static __device__ __noinline__ void copy_apart(const u8 *from, u8 *to, u32 bytes) { copy(from, to, bytes); }

// E elements as they lie in memory, moved in accesses of at most 16 bytes.
template <u32 BYTES> struct Word { typedef uint4 type; };
template <> struct Word<8> { typedef u64 type; };
template <> struct Word<4> { typedef u32 type; };
template <> struct Word<2> { typedef u16 type; };
template <> struct Word<1> { typedef u8 type; };

template <class T, u32 E> union Vector {
  typedef typename Word<E * sizeof(T)>::type W;
  T element[E];
  W word[E * sizeof(T) / sizeof(W)];
};

// An element by itself need not be aligned: it is then moved byte by byte.
static __device__ __noinline__ u64 load_bytes(const u8 *from, u32 bytes) {
  u64 value = 0;
#pragma unroll 1
  for (u32 k = 0; k < bytes; k++) value |= (u64)from[k] << (8 * k);
  return value;
}

static __device__ __noinline__ void store_bytes(u64 value, u8 *into, u32 bytes) {
#pragma unroll 1
  for (u32 k = 0; k < bytes; k++) into[k] = (u8)(value >> (8 * k));
}

template <class T, u32 E> DEVICE void load(const u8 *from, Vector<T, E> *into) {
  typedef typename Vector<T, E>::W W;
  if constexpr (E == 1) {
    if (low(from) % sizeof(T) != 0) {
      into->word[0] = (W)load_bytes(from, sizeof(T));
      return;
    }
  }
#pragma unroll
  for (u32 k = 0; k < E * sizeof(T) / sizeof(W); k++) into->word[k] = as<W>(from)[k];
}

template <class T, u32 E> DEVICE void store(const Vector<T, E> &from, u8 *into) {
  typedef typename Vector<T, E>::W W;
  if constexpr (E == 1) {
    if (low(into) % sizeof(T) != 0) {
      store_bytes(from.word[0], into, sizeof(T));
      return;
    }
  }
#pragma unroll
  for (u32 k = 0; k < E * sizeof(T) / sizeof(W); k++) as<W>(into)[k] = from.word[k];
}

// Whether E elements at once may be moved here.
template <class T, u32 E> DEVICE bool fits(u32 address) {
  return address % sizeof(typename Vector<T, E>::W) == 0;
}

// The segment that has this block's chunk.
template <class P> DEVICE u32 find(const P &p) {
  u32 low = 0, high = p.segments - 1;
  while (low < high) {
    u32 middle = (low + high) / 2;
    if (blockIdx.x < p.segment[middle].end) high = middle;
    else low = middle + 1;
  }
  return low;
}

DEVICE u64 least_of(u64 a, u64 b) { return a < b ? a : b; }

// ---- Pack -------------------------------------------------------------------------------------------------

// What a block packs: `count` bytes, the first `real` of them from memory, then zeros.
struct Piece {
  const u8 *from;
  u8 *to;
  u32 count;
  u32 real;
};

template <class P> DEVICE Piece piece_of(const P &p) {
  u32 i = find(p);
  PackSegment s = p.segment[i];
  u32 chunk = blockIdx.x - (i == 0 ? 0 : p.segment[i - 1].end);
  const u8 *from = s.src;
  u8 *to = p.dst + s.at;
  u64 real = s.count;
  if (s.flat != 0) {
    u32 chunks = (u32)((s.count + CHUNK - 1) / CHUNK);
    u64 row = chunk / chunks;
    chunk -= (u32)row * chunks;
    u64 before = row * s.count, total = p.rows * s.count - (s.flat - 1);
    real = total > before ? total - before : 0;
    from += before;
    to += row * p.stride;
  }
  u64 begin = (u64)chunk * CHUNK;
  u32 count = (u32)least_of(s.count - begin, CHUNK);
  Piece piece;
  piece.from = from + begin;
  piece.to = to + begin;
  piece.count = count;
  piece.real = real > begin ? (u32)least_of(real - begin, count) : 0;
  return piece;
}

DEVICE void zeros(u8 *to, u32 bytes) {
#pragma unroll 1
  for (u32 i = threadIdx.x; i < bytes; i += THREADS) to[i] = 0;
}

template <class P> DEVICE void pack(const P &p) {
  Piece piece = piece_of(p);
  if (piece.real > 0) copy(piece.from, piece.to, piece.real);
  zeros(piece.to + piece.real, piece.count - piece.real);
}

// ---- Reduce -----------------------------------------------------------------------------------------------

// What a block reduces: `count` elements at `src` of every row.
struct Job {
  const u8 *src;
  u64 stride;  // bytes
  u8 *dst;
  u32 count;
  bool accumulate;
  f64 scale;
};

#define COMBINE(OP) \
  _Pragma("unroll") for (u32 e = 0; e < E; e++) acc[e] = OP(acc[e], value[e])

// E elements from element `i` on; more than one at once for sums alone.
template <class In, class Out, u32 E> DEVICE void reduce_at(const Reduce &p, const Job &job, u32 i) {
  typedef typename Accumulator<In, Out>::type A;
  const u8 *src = job.src + i * sizeof(In);
  u8 *dst = job.dst + i * sizeof(Out);
  Vector<In, E> in;
  A acc[E];
  load<In, E>(src, &in);
#pragma unroll
  for (u32 e = 0; e < E; e++) widen(in.element[e], &acc[e]);
#pragma unroll 1
  for (u32 r = 1; r < p.rows; r++) {
    src += job.stride;
    load<In, E>(src, &in);
    A value[E];
#pragma unroll
    for (u32 e = 0; e < E; e++) widen(in.element[e], &value[e]);
    if (E > 1 || p.op <= AVG) COMBINE(sum);
    else if (p.op == MIN) COMBINE(least);
    else if (p.op == MAX) COMBINE(greatest);
    else COMBINE(prod);
  }
  if (p.divisor != 1.0) {
#pragma unroll
    for (u32 e = 0; e < E; e++) acc[e] = divided(acc[e], p.divisor);
  }
#pragma unroll 1
  for (u32 step = 0; step < 2; step++) {
    f64 by = step == 0 ? p.factor : job.scale;
    if (by == 1.0) continue;
#pragma unroll
    for (u32 e = 0; e < E; e++) acc[e] = times(acc[e], by);
  }
  Vector<Out, E> out;
  if (job.accumulate) {
    load<Out, E>(dst, &out);
#pragma unroll
    for (u32 e = 0; e < E; e++) {
      A held;
      widen(out.element[e], &held);
      acc[e] = sum(acc[e], held);
    }
  }
#pragma unroll
  for (u32 e = 0; e < E; e++) narrow(acc[e], &out.element[e]);
  store<Out, E>(out, dst);
}

// How many elements of In a thread reduces at once: 16 bytes of them where the result has the same
// type or one of the two is f32, in sums. The rare ones are not worth the code.
template <class In, class Out> struct Width { enum { E = 1 }; };
template <class T> struct Width<T, T> { enum { E = 16 / sizeof(T) }; };
template <> struct Width<f16, f32> { enum { E = 8 }; };
template <> struct Width<bf16, f32> { enum { E = 8 }; };
template <> struct Width<f32, f16> { enum { E = 4 }; };
template <> struct Width<f32, bf16> { enum { E = 4 }; };

template <class In, class Out> DEVICE void reduce_to(const Reduce &p, Job job, u64 begin) {
  const u32 E = Width<In, Out>::E;
  job.dst += begin * sizeof(Out);
  bool wide = p.op <= AVG && fits<In, E>(low(job.src) | (u32)job.stride) && fits<Out, E>(low(job.dst));
  u32 whole = wide ? job.count / E * E : 0;
#pragma unroll 1
  for (u32 i = threadIdx.x * E; i < whole; i += THREADS * E) reduce_at<In, Out, E>(p, job, i);
#pragma unroll 1
  for (u32 i = whole + threadIdx.x; i < job.count; i += THREADS) reduce_at<In, Out, 1>(p, job, i);
}

// The output's number in rsb_dtype if floats go in, which may be converted to other floats; else 0.
template <class T> struct Float { enum { CODE = 0 }; };
template <> struct Float<f32> { enum { CODE = 1 }; };
template <> struct Float<f64> { enum { CODE = 2 }; };
template <> struct Float<f16> { enum { CODE = 3 }; };
template <> struct Float<bf16> { enum { CODE = 4 }; };

template <class In> DEVICE void reduce(const Reduce &p) {
  u32 i = find(p);
  const ReduceSegment &s = p.segment[i];
  u32 width = CHUNK / (u32)sizeof(In);
  u64 begin = (u64)(blockIdx.x - (i == 0 ? 0 : p.segment[i - 1].end)) * width;
  u32 output = s.output % ACCUMULATE;
  Job job;
  job.src = p.src + (s.at + begin) * sizeof(In);
  job.stride = p.stride * sizeof(In);
  job.dst = s.dst;
  job.count = (u32)least_of(s.count - begin, width);
  job.accumulate = s.output >= ACCUMULATE;
  job.scale = s.scale;
  const u32 own = Float<In>::CODE;
  bool same = own == 0 || output == own;
  bool plain = p.divisor == 1.0 && p.factor == 1.0 && job.scale == 1.0 && !job.accumulate;
  // One row that needs no arithmetic is copied bit for bit, NaNs as they are.
  if (same && plain && p.rows == 1) {
    copy_apart(job.src, job.dst + begin * sizeof(In), job.count * (u32)sizeof(In));
  } else if constexpr (own == 0) {
    reduce_to<In, In>(p, job, begin);
  } else {
    if (output == Float<f32>::CODE) reduce_to<In, f32>(p, job, begin);
    else if (output == Float<f64>::CODE) reduce_to<In, f64>(p, job, begin);
    else if (output == Float<f16>::CODE) reduce_to<In, f16>(p, job, begin);
    else reduce_to<In, bf16>(p, job, begin);
  }
}

// ---- Entry points -------------------------------------------------------------------------------------------

#ifndef GIVEN
#define GIVEN(T) const __grid_constant__ T
#endif

#define PACK(NAME, N) \
  extern "C" __global__ void __launch_bounds__(THREADS) NAME(GIVEN(Pack<N>) p) { pack(p); }
PACK(rsb_pack, 127)
PACK(rsb_pack_few, 16)

#define REDUCE(T) \
  extern "C" __global__ void __launch_bounds__(THREADS) rsb_reduce_##T(GIVEN(Reduce) p) { reduce<T>(p); }
REDUCE(f32)
REDUCE(f64)
REDUCE(f16)
REDUCE(bf16)
REDUCE(i32)
REDUCE(i64)
REDUCE(u8)
REDUCE(i8)
