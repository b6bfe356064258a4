// A device of the driver's stand-in, as tests of device code use it: a context that is current on the
// thread, streams, memory, and the library's kernels.
#ifndef RSBUCKET_CPP_TESTS_GPU_H
#define RSBUCKET_CPP_TESTS_GPU_H

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "fake_cuda.h"

namespace gpu {

#define ASSERT_CUDA(call) ASSERT_EQ(call, CUDA_SUCCESS)
#define EXPECT_CUDA(call) EXPECT_EQ(call, CUDA_SUCCESS)

/// Whether exactly one rule was broken since the last time, in words that contain `what`; forgives it.
::testing::AssertionResult breached(const std::string &what);

/// A device with its primary context current. All that it made goes with it.
class Device {
 public:
  explicit Device(int ordinal = 0);
  ~Device();
  Device(const Device &) = delete;
  Device &operator=(const Device &) = delete;

  CUcontext context() const { return context_; }
  CUstream stream(unsigned flags = CU_STREAM_NON_BLOCKING);
  CUevent event();
  /// Memory with room before and behind that nobody may write; `misaligned` bytes from an alignment of 256.
  CUdeviceptr memory(size_t bytes, size_t misaligned = 0);
  /// The same with these bytes in it.
  CUdeviceptr memory(const std::vector<unsigned char> &bytes, size_t misaligned = 0);
  /// What is in memory now, without waiting for anything.
  static std::vector<unsigned char> read(CUdeviceptr ptr, size_t bytes);
  static void write(CUdeviceptr ptr, const std::vector<unsigned char> &bytes);
  /// The bytes around all memory are as they were.
  bool surroundings_untouched() const;
  /// Gives all memory back.
  void free_memory();

  /// Launches a kernel of src/cuda/kernels.ptx.
  CUresult launch(const std::string &kernel, unsigned blocks, const void *params, CUstream stream);
  CUfunction function(const std::string &kernel);

 private:
  struct Memory {
    CUdeviceptr base;
    size_t before, bytes, behind;
  };
  int ordinal_;
  CUcontext context_ = nullptr;
  CUmodule module_ = nullptr;
  std::vector<CUstream> streams_;
  std::vector<CUevent> events_;
  std::vector<Memory> memory_;
};

/// A stream that writes `a` and another one that reads it into `b`, in the order that a test gives them.
class TwoStreams : public ::testing::Test {
 protected:
  TwoStreams();
  void produce();
  void consume();
  Device device;
  CUstream from, to;
  CUdeviceptr a, b;
};

}  // namespace gpu

#endif  // RSBUCKET_CPP_TESTS_GPU_H
