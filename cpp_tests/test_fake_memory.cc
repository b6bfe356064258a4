// That the driver's stand-in holds its users to the rules of memory, contexts and modules, as
// test_fake_cuda.cc does for order.
#include <gtest/gtest.h>

#include <thread>

#include "gpu.h"

namespace {

using gpu::breached;
using gpu::Device;
using Bytes = std::vector<unsigned char>;

/// The parameters of rsb_pack_few with its first segment, as the kernel lays them out.
struct PackFew {
  uint64_t dst, stride;
  uint32_t rows, segments;
  uint64_t src, at, count;
  uint32_t end, flat;
  char rest[480];
};

// ---- Memory ---------------------------------------------------------------------------------------

class Memory : public gpu::TwoStreams {};

TEST_F(Memory, FaultsUnderTheHost) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        volatile unsigned char *at = reinterpret_cast<unsigned char *>(a);
        *at = 1;
      },
      [](int status) { return status != 0; }, "");
}

TEST_F(Memory, IsPoisonedBeforeAndAfterItsLife) {
  CUdeviceptr ptr = 0;
  ASSERT_CUDA(cuMemAlloc_v2(&ptr, 100));
  EXPECT_EQ(Device::read(ptr, 100), Bytes(100, 0xCB));
  Device::write(ptr, Bytes(100, 5));
  ASSERT_CUDA(cuMemFree_v2(ptr));
  EXPECT_EQ(Device::read(ptr, 100), Bytes(100, 0xDB));
  EXPECT_EQ(cuMemFree_v2(ptr), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(breached("freed before"));
}

TEST_F(Memory, InAStreamsOrderIsForThoseBehindIt) {
  CUdeviceptr ptr = 0;
  const CUevent event = device.event();
  ASSERT_CUDA(cuMemAllocAsync(&ptr, 64, from));
  ASSERT_CUDA(cuMemcpyAsync(ptr, a, 64, from));
  ASSERT_CUDA(cuEventRecord(event, from));
  ASSERT_CUDA(cuStreamWaitEvent(to, event, 0));
  ASSERT_CUDA(cuMemcpyAsync(b, ptr, 64, to));
  ASSERT_CUDA(cuMemFreeAsync(ptr, to));
  fake_cuda_wait(to);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 1));
  EXPECT_EQ(Device::read(ptr, 64), Bytes(64, 0xDB));
  EXPECT_EQ(fake_cuda_breaches(), 0);

  ASSERT_CUDA(cuMemAllocAsync(&ptr, 64, from));
  ASSERT_CUDA(cuMemcpyAsync(b, ptr, 64, to));
  EXPECT_TRUE(breached("what cuMemAllocAsync (stream"));
  ASSERT_CUDA(cuMemFreeAsync(ptr, from));
  EXPECT_TRUE(breached("unordered: cuMemFreeAsync"));
  fake_cuda_wait_all();
}

TEST_F(Memory, OutsideOfWhatIsGivenOutEndsTheContext) {
  const CUdeviceptr wild[] = {a + 64 + 500, a + 4096 * 1000, reinterpret_cast<CUdeviceptr>(&device)};
  const char *const words[] = {"past the end", "no memory that is given out", "no device memory"};
  for (int i = 0; i < 3; ++i) {
    ASSERT_CUDA(cuMemsetD8Async(wild[i], 0, 64, from)) << "enqueued all the same";
    fake_cuda_wait(from);
    EXPECT_TRUE(breached(words[i]));
    EXPECT_EQ(cuMemsetD8Async(a, 0, 64, to), CUDA_ERROR_ILLEGAL_ADDRESS) << "sticky";
    EXPECT_EQ(cuStreamQuery(from), CUDA_ERROR_ILLEGAL_ADDRESS);
    fake_cuda_heal();
  }
}

TEST_F(Memory, IsNotUsedAfterItWasFreed) {
  CUdeviceptr ptr = 0;
  ASSERT_CUDA(cuMemAllocAsync(&ptr, 64, from));
  ASSERT_CUDA(cuMemFreeAsync(ptr, from));
  ASSERT_CUDA(cuMemsetD8Async(ptr, 0, 64, from));
  fake_cuda_wait(from);
  EXPECT_TRUE(breached("after they were freed"));
  fake_cuda_heal();
}

TEST_F(Memory, FreeingAtOnceUnderWorkWaits) {
  CUdeviceptr ptr = 0;
  ASSERT_CUDA(cuMemAlloc_v2(&ptr, 64));
  fake_cuda_hold(from);
  produce();
  ASSERT_CUDA(cuMemFree_v2(ptr));
  EXPECT_TRUE(breached("cuMemFree while work is under way"));
  EXPECT_TRUE(fake_cuda_idle(from)) << "it has waited, for the held stream, too";
}

TEST_F(Memory, HasAnEnd) {
  CUdeviceptr ptr = 0;
  EXPECT_EQ(cuMemAlloc_v2(&ptr, SIZE_MAX / 2), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(cuMemAllocAsync(&ptr, size_t{1} << 40, from), CUDA_ERROR_OUT_OF_MEMORY);
  const size_t before = fake_cuda_live_bytes();
  ASSERT_CUDA(cuMemAlloc_v2(&ptr, 1000));
  EXPECT_EQ(fake_cuda_live_bytes(), before + 1000);
  ASSERT_CUDA(cuMemFree_v2(ptr));
  EXPECT_EQ(fake_cuda_live_bytes(), before);
}

TEST_F(Memory, SaysWhatItIs) {
  int value = 0;
  unsigned type = 0;
  EXPECT_CUDA(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, a + 63));
  EXPECT_EQ(type, static_cast<unsigned>(CU_MEMORYTYPE_DEVICE));
  EXPECT_CUDA(cuPointerGetAttribute(&value, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, a));
  EXPECT_EQ(value, 0);
  EXPECT_EQ(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, reinterpret_cast<CUdeviceptr>(&value)),
            CUDA_ERROR_INVALID_VALUE);
  void *pinned = nullptr;
  ASSERT_CUDA(cuMemHostAlloc(&pinned, 10, 0));
  EXPECT_CUDA(cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, reinterpret_cast<CUdeviceptr>(pinned)));
  EXPECT_EQ(type, static_cast<unsigned>(CU_MEMORYTYPE_HOST));
  ASSERT_CUDA(cuMemFreeHost(pinned));
  // Asked for several at once, host memory that is unknown is no error.
  int attributes[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL};
  void *data[] = {&type, &value};
  EXPECT_CUDA(cuPointerGetAttributes(2, attributes, data, reinterpret_cast<CUdeviceptr>(&value)));
  EXPECT_EQ(type, 0u);
  EXPECT_EQ(value, -2);
}

TEST_F(Memory, OfAnotherDeviceIsFound) {
  Device other(1);
  const CUdeviceptr far = other.memory(64);
  ASSERT_CUDA(cuMemcpyAsync(b, far, 64, from));
  EXPECT_TRUE(breached("memory of device 1"));
  fake_cuda_wait(from);
}

// ---- The host does not wait -----------------------------------------------------------------------

TEST_F(Memory, SynchronizingIsABreach) {
  const CUevent event = device.event();
  ASSERT_CUDA(cuEventRecord(event, from));
  EXPECT_CUDA(cuStreamSynchronize(from));
  EXPECT_TRUE(breached("cuStreamSynchronize"));
  EXPECT_CUDA(cuEventSynchronize(event));
  EXPECT_TRUE(breached("cuEventSynchronize"));
  EXPECT_CUDA(cuCtxSynchronize());
  EXPECT_TRUE(breached("cuCtxSynchronize"));
  unsigned char bytes[64];
  EXPECT_CUDA(cuMemcpyDtoH_v2(bytes, a, 64));
  EXPECT_TRUE(breached("cuMemcpyDtoH"));
  EXPECT_CUDA(cuMemcpyDtoHAsync_v2(bytes, a, 64, from));
  EXPECT_TRUE(breached("not pinned"));
}

// ---- Contexts -------------------------------------------------------------------------------------

TEST(Contexts, AreNeeded) {
  CUdeviceptr ptr = 0;
  CUstream stream = nullptr;
  ASSERT_CUDA(cuInit(0));
  EXPECT_EQ(cuMemAlloc_v2(&ptr, 1), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuStreamCreate(&stream, 0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuCtxPopCurrent_v2(nullptr), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_TRUE(breached("empty stack"));
}

TEST(Contexts, DoNotMix) {
  Device one(0);
  const CUstream stream = one.stream();
  const CUevent event = one.event();
  const CUfunction function = one.function("rsb_pack_few");
  Device two(1);
  const CUstream other = two.stream();
  EXPECT_EQ(cuEventRecord(event, other), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_CUDA(cuEventRecord(event, stream));
  EXPECT_CUDA(cuStreamWaitEvent(other, event, 0)) << "that is allowed";
  PackFew pack{};
  pack.segments = pack.end = 1;
  void *params[] = {&pack};
  EXPECT_EQ(cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, other, params, nullptr), CUDA_ERROR_INVALID_HANDLE);
  // Another stream's context is what counts, not the one that is current.
  CUcontext context = nullptr;
  EXPECT_CUDA(cuStreamGetCtx(stream, &context));
  EXPECT_EQ(context, one.context());
  fake_cuda_wait_all();
}

TEST(Contexts, MustBeRetainedPoppedAndReleased) {
  CUcontext context = nullptr;
  ASSERT_CUDA(cuInit(0));
  ASSERT_CUDA(cuDevicePrimaryCtxRetain(&context, 0));
  std::thread([&] { ASSERT_CUDA(cuCtxPushCurrent_v2(context)); }).join();
  EXPECT_TRUE(breached("pushed and not popped"));
  ASSERT_CUDA(cuCtxPushCurrent_v2(context));
  EXPECT_EQ(fake_cuda_stack_depth(), 1);
  EXPECT_EQ(fake_cuda_retained(), 1);
  ASSERT_CUDA(cuDevicePrimaryCtxRelease_v2(0));
  CUstream stream = nullptr;
  EXPECT_EQ(cuStreamCreate(&stream, 0), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_TRUE(breached("nobody retains"));
  EXPECT_EQ(cuDevicePrimaryCtxRelease_v2(0), CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_TRUE(breached("more often"));
  ASSERT_CUDA(cuCtxPopCurrent_v2(&context));
}

TEST(Contexts, OfOnesOwnEndWithAllThatTheyHave) {
  CUcontext own = nullptr;
  CUstream stream = nullptr;
  ASSERT_CUDA(cuInit(0));
  ASSERT_CUDA(cuCtxCreate_v2(&own, 0, 1));
  ASSERT_CUDA(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  // A sick context is sick from everywhere, and makes no other one sick.
  ASSERT_EQ(fake_cuda_fail("cuStreamQuery:1=719"), 0);
  EXPECT_EQ(cuStreamQuery(stream), CUDA_ERROR_LAUNCH_FAILED);
  {
    Device device;
    EXPECT_EQ(cuLaunchHostFunc(stream, [](void *) {}, nullptr), CUDA_ERROR_LAUNCH_FAILED);
    EXPECT_CUDA(cuLaunchHostFunc(nullptr, [](void *) {}, nullptr));
    fake_cuda_wait_all();
  }
  fake_cuda_fail(nullptr);
  fake_cuda_heal();
  ASSERT_CUDA(cuStreamDestroy_v2(stream));
  ASSERT_CUDA(cuCtxPushCurrent_v2(own));
  std::thread([&] { EXPECT_CUDA(cuCtxDestroy_v2(own)); }).join();
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_CONTEXT_IS_DESTROYED);
  EXPECT_EQ(cuCtxPushCurrent_v2(own), CUDA_ERROR_INVALID_CONTEXT);
  ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
  ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Contexts, DeadStreamsAndEventsAreFound) {
  Device device;
  CUstream stream = nullptr;
  CUevent event = nullptr;
  ASSERT_CUDA(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
  ASSERT_CUDA(cuEventCreate(&event, 0));
  const CUdeviceptr a = device.memory(8);
  ASSERT_CUDA(cuMemsetD8Async(a, 6, 8, stream));
  ASSERT_CUDA(cuEventRecord(event, stream));
  ASSERT_CUDA(cuStreamDestroy_v2(stream));
  fake_cuda_wait_all();
  EXPECT_EQ(Device::read(a, 8), Bytes(8, 6)) << "work of a stream that was destroyed is done";
  EXPECT_CUDA(cuEventQuery(event));
  EXPECT_EQ(cuEventRecord(event, stream), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_TRUE(breached("a stream that does not live"));
  ASSERT_CUDA(cuEventDestroy_v2(event));
  EXPECT_EQ(cuEventQuery(event), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_TRUE(breached("an event that does not live"));
}

// ---- Kernels --------------------------------------------------------------------------------------

TEST(Modules, AreTextThatTheOldestDriverTakes) {
  Device device;
  CUmodule module = nullptr;
  EXPECT_EQ(cuModuleLoadData(&module, "\n.version 8.8\n.target sm_70\n"), CUDA_ERROR_INVALID_PTX);
  ASSERT_CUDA(cuModuleLoadData(&module, "\n.version 6.4\n.target sm_70\n.visible .entry rsb_pack(\n"));
  CUfunction function = nullptr;
  EXPECT_CUDA(cuModuleGetFunction(&function, module, "rsb_pack"));
  EXPECT_EQ(cuModuleGetFunction(&function, module, "rsb_reduce_f32"), CUDA_ERROR_NOT_FOUND) << "not in this text";
  PackFew pack{};
  pack.segments = pack.end = 1;
  void *params[] = {&pack};
  EXPECT_EQ(cuLaunchKernel(function, 1, 1, 1, 256, 1, 1, 0, device.stream(), params, nullptr), CUDA_ERROR_INVALID_PTX);
  EXPECT_TRUE(breached("launched from another text"));
  EXPECT_CUDA(cuModuleUnload(module));
  EXPECT_EQ(cuModuleUnload(module), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_TRUE(breached("twice"));
}

TEST(Modules, LaunchesHaveTheGridOfTheirParameters) {
  Device device;
  PackFew pack{};
  pack.dst = device.memory(100);
  pack.src = device.memory(Bytes(100, 8));
  pack.segments = pack.end = 1;
  pack.count = 100;
  const CUstream stream = device.stream();
  EXPECT_CUDA(device.launch("rsb_pack_few", 1, &pack, stream));
  fake_cuda_wait(stream);
  EXPECT_EQ(Device::read(pack.dst, 100), Bytes(100, 8));
  EXPECT_EQ(device.launch("rsb_pack_few", 2, &pack, stream), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(breached("expected 1x1x1"));
  // A module goes when none of its kernels is under way: unloading would wait for them.
  CUmodule module = nullptr;
  ASSERT_CUDA(cuModuleLoadData(&module, "\n.version 6.4\n.target sm_70\n"));
  fake_cuda_hold(stream);
  EXPECT_CUDA(device.launch("rsb_pack_few", 1, &pack, stream));
  EXPECT_CUDA(cuModuleUnload(module));
  EXPECT_TRUE(breached("cuModuleUnload while rsb_pack_few is under way"));
  fake_cuda_let_go(stream);
}

}  // namespace
