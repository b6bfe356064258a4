// A device of the driver's stand-in: see gpu.h.
#include "gpu.h"

#include <cstring>
#include <fstream>
#include <iterator>

namespace gpu {
namespace {

constexpr size_t kMargin = 512;
constexpr unsigned char kCanary = 0xA7;

}  // namespace

::testing::AssertionResult breached(const std::string &what) {
  const int count = fake_cuda_breaches();
  std::string all;
  for (int i = 0; i < count; ++i) {
    all += std::string("\n  ") + fake_cuda_breach(i);
  }
  fake_cuda_forgive();
  if (count == 1 && all.find(what) != std::string::npos) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "expected one breach with '" << what << "'; " << count << ":" << all;
}

Device::Device(int ordinal) : ordinal_(ordinal) {
  EXPECT_CUDA(cuInit(0));
  EXPECT_CUDA(cuDevicePrimaryCtxRetain(&context_, ordinal));
  EXPECT_CUDA(cuCtxPushCurrent_v2(context_));
}

Device::~Device() {
  free_memory();
  for (const CUevent event : events_) {
    EXPECT_CUDA(cuEventDestroy_v2(event));
  }
  for (const CUstream stream : streams_) {
    EXPECT_CUDA(cuStreamDestroy_v2(stream));
  }
  if (module_ != nullptr) {
    EXPECT_CUDA(cuModuleUnload(module_));
  }
  EXPECT_CUDA(cuCtxPopCurrent_v2(nullptr));
  EXPECT_CUDA(cuDevicePrimaryCtxRelease_v2(ordinal_));
}

CUstream Device::stream(unsigned flags) {
  CUstream stream = nullptr;
  EXPECT_CUDA(cuStreamCreate(&stream, flags));
  streams_.push_back(stream);
  return stream;
}

CUevent Device::event() {
  CUevent event = nullptr;
  EXPECT_CUDA(cuEventCreate(&event, CU_EVENT_DISABLE_TIMING));
  events_.push_back(event);
  return event;
}

CUdeviceptr Device::memory(size_t bytes, size_t misaligned) {
  Memory memory{0, kMargin + misaligned, bytes, kMargin};
  EXPECT_CUDA(cuMemAlloc_v2(&memory.base, memory.before + bytes + memory.behind));
  auto *at = static_cast<unsigned char *>(fake_cuda_reach(memory.base));
  std::memset(at, kCanary, memory.before);
  std::memset(at + memory.before + bytes, kCanary, memory.behind);
  memory_.push_back(memory);
  return memory.base + memory.before;
}

CUdeviceptr Device::memory(const std::vector<unsigned char> &bytes, size_t misaligned) {
  const CUdeviceptr ptr = memory(bytes.size(), misaligned);
  write(ptr, bytes);
  return ptr;
}

std::vector<unsigned char> Device::read(CUdeviceptr ptr, size_t bytes) {
  const auto *at = static_cast<const unsigned char *>(fake_cuda_reach(ptr));
  return {at, at + bytes};
}

void Device::write(CUdeviceptr ptr, const std::vector<unsigned char> &bytes) {
  if (!bytes.empty()) {
    std::memcpy(fake_cuda_reach(ptr), bytes.data(), bytes.size());
  }
}

bool Device::surroundings_untouched() const {
  for (const Memory &memory : memory_) {
    const auto all = read(memory.base, memory.before + memory.bytes + memory.behind);
    for (size_t i = 0; i < all.size(); ++i) {
      const bool inside = i >= memory.before && i < memory.before + memory.bytes;
      if (!inside && all[i] != kCanary) {
        return false;
      }
    }
  }
  return true;
}

void Device::free_memory() {
  fake_cuda_wait_all();
  for (const Memory &memory : memory_) {
    EXPECT_CUDA(cuMemFree_v2(memory.base));
  }
  memory_.clear();
}

CUfunction Device::function(const std::string &kernel) {
  if (module_ == nullptr) {
    std::ifstream file(RSB_PTX);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    EXPECT_CUDA(cuModuleLoadData(&module_, text.c_str()));
  }
  CUfunction function = nullptr;
  EXPECT_CUDA(cuModuleGetFunction(&function, module_, kernel.c_str()));
  return function;
}

CUresult Device::launch(const std::string &kernel, unsigned blocks, const void *params, CUstream stream) {
  void *list[] = {const_cast<void *>(params)};
  return cuLaunchKernel(function(kernel), blocks, 1, 1, 256, 1, 1, 0, stream, list, nullptr);
}

TwoStreams::TwoStreams()
    : from(device.stream()),
      to(device.stream()),
      a(device.memory(std::vector<unsigned char>(64, 1))),
      b(device.memory(std::vector<unsigned char>(64, 2))) {}

void TwoStreams::produce() { ASSERT_CUDA(cuMemsetD8Async(a, 7, 64, from)); }

void TwoStreams::consume() { ASSERT_CUDA(cuMemcpyAsync(b, a, 64, to)); }

}  // namespace gpu
