// The library's kernels, made for the host in two ways: from the PTX that ships (ptx_to_cc), and from its source.
// A launch runs the first, or the second with RSB_FAKE_CUDA_KERNELS=source. What a launch accesses is read off the
// source's parameters.
#include <cstdlib>
#include <cstring>

#include "machine.h"
#include "ptx.h"

// What the source takes from CUDA.
#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(N)
#define GIVEN(T) const T & // by reference: a thread is a call here
#pragma GCC diagnostic ignored "-Wunknown-pragmas"

namespace {

struct Place {
  unsigned x, y, z;
};
thread_local Place threadIdx, blockIdx;

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class To, class From> To bits(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}
float __uint_as_float(unsigned v) { return bits<float>(v); }
unsigned __float_as_uint(float v) { return bits<unsigned>(v); }
double __longlong_as_double(long long v) { return bits<double>(v); }
long long __double_as_longlong(double v) { return bits<long long>(v); }
float __fadd_rn(float a, float b) { return a + b; }
float __fmul_rn(float a, float b) { return a * b; }
float __fdiv_rn(float a, float b) { return a / b; }
double __dadd_rn(double a, double b) { return a + b; }
double __dmul_rn(double a, double b) { return a * b; }
double __ddiv_rn(double a, double b) { return a / b; }
float __double2float_rn(double v) { return (float)v; }

namespace source {
#include "../../src/cuda/kernels.cu"
} // namespace source

using source::Float;
using source::Pack;
using source::Reduce;

// ---- What launches access: blocks, memory, addresses that the host reaches -------------------------------

template <unsigned N> unsigned pack_blocks(const void *params) {
  auto *p = (const Pack<N> *)params;
  return p->segments == 0 || p->segments > N ? 0 : p->segment[p->segments - 1].end;
}

template <unsigned N> std::vector<fake::Access> pack_accesses(const void *params) {
  auto *p = (const Pack<N> *)params;
  std::vector<fake::Access> all;
  for (unsigned i = 0; i < p->segments && i < N; i++) {
    auto &s = p->segment[i];
    uint64_t src = (uint64_t)s.src, dst = (uint64_t)p->dst + s.at;
    uint64_t rows = s.flat == 0 ? 1 : p->rows, pad = s.flat == 0 ? 0 : s.flat - 1;
    all.push_back({src, rows * s.count - pad, false});
    for (uint64_t r = 0; r < rows; r++) all.push_back({dst + r * p->stride, s.count, true});
  }
  return all;
}

unsigned char *reached(const unsigned char *at) { return (unsigned char *)fake::reach((uint64_t)at); }

template <unsigned N> void pack_translate(void *params) {
  auto *p = (Pack<N> *)params;
  p->dst = reached(p->dst);
  for (unsigned i = 0; i < p->segments; i++) p->segment[i].src = reached(p->segment[i].src);
}

unsigned reduce_blocks(const void *params) {
  auto *p = (const Reduce *)params;
  return p->segments == 0 || p->segments > 101 || p->rows == 0 ? 0 : p->segment[p->segments - 1].end;
}

template <unsigned IN> std::vector<fake::Access> reduce_accesses(const void *params) {
  auto *p = (const Reduce *)params;
  const unsigned sizes[] = {0, 4, 8, 2, 2, 4, 8, 1, 1};
  std::vector<fake::Access> all;
  for (unsigned i = 0; i < p->segments && i < 101; i++) {
    auto &s = p->segment[i];
    unsigned out = sizes[s.output % 0x100 % 9];
    for (uint64_t r = 0; r < p->rows; r++)
      all.push_back({(uint64_t)p->src + (r * p->stride + s.at) * IN, s.count * IN, false});
    if (s.output >= 0x100) all.push_back({(uint64_t)s.dst, s.count * out, false});
    all.push_back({(uint64_t)s.dst, s.count * out, true});
  }
  return all;
}

void reduce_translate(void *params) {
  auto *p = (Reduce *)params;
  p->src = reached(p->src);
  for (unsigned i = 0; i < p->segments; i++) p->segment[i].dst = reached(p->segment[i].dst);
}

template <class P, void (*KERNEL)(const P &)> void run(const void *params, unsigned block, unsigned thread) {
  blockIdx = {block, 0, 0};
  threadIdx = {thread, 0, 0};
  KERNEL(*(const P *)params);
}

#define PACKED(NAME, N)                                                                             \
  fake::Kernel {                                                                                    \
    #NAME, sizeof(Pack<N>), pack_blocks<N>, pack_accesses<N>, run<Pack<N>, source::NAME>, pack_translate<N> \
  }
#define REDUCED(T)                                                                                  \
  fake::Kernel {                                                                                    \
    "rsb_reduce_" #T, sizeof(Reduce), reduce_blocks, reduce_accesses<sizeof(source::T)>,            \
        run<Reduce, source::rsb_reduce_##T>, reduce_translate                                       \
  }

const fake::Kernel KERNELS[] = {
    PACKED(rsb_pack, 127), PACKED(rsb_pack_few, 16),
    REDUCED(f32),                         REDUCED(f64),
    REDUCED(f16),                         REDUCED(bf16),
    REDUCED(i32),                         REDUCED(i64),
    REDUCED(u8),                          REDUCED(i8),
};

const ptx::Entry *entry_named(const char *name) {
  for (const ptx::Entry *entry = ptx::ENTRIES; entry->name != nullptr; entry++)
    if (strcmp(entry->name, name) == 0) return entry;
  return nullptr;
}

bool from_source() {
  static const char *text = getenv("RSB_FAKE_CUDA_KERNELS");
  return text != nullptr && strcmp(text, "source") == 0;
}

} // namespace

thread_local uint64_t ptx::misaligned;

bool fake::is_known_text(const std::string &text) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char c : text) hash = (hash ^ c) * 0x100000001b3ull;
  return hash == ptx::TEXT;
}

CUresult fake::run_block(const Kernel &kernel, const void *params, unsigned block) {
  const ptx::Entry *entry = from_source() ? nullptr : entry_named(kernel.name);
  for (unsigned i = 0; i < 256; i++) {
    unsigned thread = block % 2 == 0 ? i : 255 - i;
    if (entry == nullptr) kernel.source(params, block, thread);
    else entry->run((uint64_t)params, thread, block);
  }
  if (ptx::misaligned == 0) return CUDA_SUCCESS;
  breach("%s accesses %#llx, which is not aligned", kernel.name, (unsigned long long)ptx::misaligned);
  ptx::misaligned = 0;
  return CUDA_ERROR_MISALIGNED_ADDRESS;
}

const fake::Kernel *fake::kernel_named(const std::string &name) {
  for (auto &kernel : KERNELS)
    if (name == kernel.name) return &kernel;
  return nullptr;
}
