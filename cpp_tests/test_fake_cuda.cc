// That the driver's stand-in holds its users to the rules, each of which must be seen to fire: otherwise the
// tests of device code would prove nothing.
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "gpu.h"

namespace {

using gpu::breached;
using gpu::Device;
using Bytes = std::vector<unsigned char>;

// ---- Order between streams ------------------------------------------------------------------------

class Order : public ::testing::Test {
 protected:
  Order() : from(device.stream()), to(device.stream()), a(device.memory(Bytes(64, 1))), b(device.memory(Bytes(64, 2))) {}
  ~Order() override { fake_cuda_delay_us(100); }
  void produce() { ASSERT_CUDA(cuMemsetD8Async(a, 7, 64, from)); }
  void consume() { ASSERT_CUDA(cuMemcpyAsync(b, a, 64, to)); }
  Device device;
  CUstream from, to;
  CUdeviceptr a, b;
};

TEST_F(Order, AnEventPutsOneStreamBehindAnother) {
  const CUevent event = device.event();
  fake_cuda_hold(from);
  produce();
  ASSERT_CUDA(cuEventRecord(event, from));
  ASSERT_CUDA(cuStreamWaitEvent(to, event, 0));
  consume();
  EXPECT_EQ(cuEventQuery(event), CUDA_ERROR_NOT_READY);
  EXPECT_EQ(cuStreamQuery(to), CUDA_ERROR_NOT_READY);
  EXPECT_FALSE(fake_cuda_idle(to));
  fake_cuda_let_go(from);
  fake_cuda_wait(to);
  EXPECT_CUDA(cuEventQuery(event));
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 7));
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST_F(Order, AMissingWaitIsFoundAndSpoilsTheData) {
  fake_cuda_hold(from);
  produce();
  consume();
  fake_cuda_wait(to);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 1)) << "what was there before";
  fake_cuda_let_go(from);
  fake_cuda_wait(from);
  EXPECT_TRUE(breached("unordered: cuMemcpyAsync"));
}

TEST_F(Order, AMissingWaitIsFoundThoughTheDataIsRight) {
  produce();
  while (!fake_cuda_idle(from)) {
    std::this_thread::yield();
  }
  consume();
  fake_cuda_wait(to);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 7));
  EXPECT_TRUE(breached("unordered: cuMemcpyAsync"));
}

TEST_F(Order, AWaitForTheWrongMomentIsFound) {
  const CUevent event = device.event();
  ASSERT_CUDA(cuEventRecord(event, from));
  produce();
  ASSERT_CUDA(cuStreamWaitEvent(to, event, 0));
  consume();
  fake_cuda_wait_all();
  EXPECT_TRUE(breached("unordered: cuMemcpyAsync"));
}

TEST_F(Order, WritingWhatAnotherStreamStillReadsIsFound) {
  ASSERT_CUDA(cuMemcpyAsync(b, a, 64, from));
  ASSERT_CUDA(cuMemsetD8Async(a + 60, 3, 4, to));
  fake_cuda_wait_all();
  EXPECT_TRUE(breached("unordered: cuMemsetD8Async"));
}

TEST_F(Order, TwoReadersNeedNoOrder) {
  const CUdeviceptr c = device.memory(64);
  ASSERT_CUDA(cuMemcpyAsync(b, a, 64, from));
  ASSERT_CUDA(cuMemcpyAsync(c, a, 64, to));
  fake_cuda_wait_all();
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST_F(Order, WaitsReachThroughThirdStreams) {
  const CUevent first = device.event(), second = device.event();
  const CUstream middle = device.stream();
  produce();
  ASSERT_CUDA(cuEventRecord(first, from));
  ASSERT_CUDA(cuStreamWaitEvent(middle, first, 0));
  ASSERT_CUDA(cuEventRecord(second, middle));
  ASSERT_CUDA(cuStreamWaitEvent(to, second, 0));
  consume();
  fake_cuda_wait(to);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 7));
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST_F(Order, WhatTheHostHasSeenDoneIsOrdered) {
  const CUevent event = device.event();
  produce();
  ASSERT_CUDA(cuEventRecord(event, from));
  while (cuEventQuery(event) != CUDA_SUCCESS) {
    std::this_thread::yield();
  }
  consume();
  fake_cuda_wait(to);
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST_F(Order, TheLegacyStreamWaitsForBlockingStreamsOnly) {
  const CUstream blocking = device.stream(CU_STREAM_DEFAULT);
  fake_cuda_hold(blocking);
  ASSERT_CUDA(cuMemsetD8Async(a, 9, 64, blocking));
  ASSERT_CUDA(cuMemcpyAsync(b, a, 64, nullptr));
  EXPECT_FALSE(fake_cuda_idle(CU_STREAM_LEGACY)) << "NULL is the legacy stream";
  fake_cuda_let_go(blocking);
  fake_cuda_wait(nullptr);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 9));
  // And blocking streams for it, this thread's default stream, too.
  ASSERT_CUDA(cuMemsetD8Async(a, 4, 64, nullptr));
  ASSERT_CUDA(cuMemcpyAsync(b, a, 64, CU_STREAM_PER_THREAD));
  fake_cuda_wait(CU_STREAM_PER_THREAD);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 4));
  EXPECT_EQ(fake_cuda_breaches(), 0);
  // Others not.
  ASSERT_CUDA(cuMemsetD8Async(b, 5, 64, nullptr));
  consume();
  fake_cuda_wait_all();
  EXPECT_TRUE(breached("unordered: cuMemcpyAsync"));
}

TEST_F(Order, DefaultStreamsOfThreadsAreTheirOwn) {
  ASSERT_CUDA(cuMemsetD8Async(a, 3, 64, CU_STREAM_PER_THREAD));
  std::thread([&] {
    ASSERT_CUDA(cuCtxPushCurrent_v2(device.context()));
    ASSERT_CUDA(cuMemcpyAsync(b, a, 64, CU_STREAM_PER_THREAD));
    ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
  }).join();
  fake_cuda_wait_all();
  EXPECT_TRUE(breached("unordered: cuMemcpyAsync"));
}

TEST_F(Order, HostFunctionsTakeTheirPlaceAndMayNotCallTheDriver) {
  struct Both {
    CUdeviceptr at;
    int seen;
  } both{a, 0};
  produce();
  fake_cuda_touch(from, a, 64, 0);
  ASSERT_CUDA(cuLaunchHostFunc(
      from, [](void *arg) { static_cast<Both *>(arg)->seen = *static_cast<unsigned char *>(fake_cuda_reach(static_cast<Both *>(arg)->at)); },
      &both));
  fake_cuda_wait(from);
  EXPECT_EQ(both.seen, 7);
  ASSERT_CUDA(cuMemsetD8Async(a, 0, 64, to));
  EXPECT_EQ(fake_cuda_breaches(), 0) << "the host has seen it done";
  ASSERT_CUDA(cuLaunchHostFunc(from, [](void *) { cuInit(0); }, nullptr));
  fake_cuda_wait(from);
  EXPECT_TRUE(breached("cuInit inside a host function"));
}

// ---- Memory ---------------------------------------------------------------------------------------

class Memory : public Order {};

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
  const CUfunction function = one.function("rsb_pack_raw_few");
  Device two(1);
  const CUstream other = two.stream();
  EXPECT_EQ(cuEventRecord(event, other), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_CUDA(cuEventRecord(event, stream));
  EXPECT_CUDA(cuStreamWaitEvent(other, event, 0)) << "that is allowed";
  struct {
    uint64_t dst, stride;
    uint32_t rows, segments;
    uint64_t src, at, count;
    uint32_t end, flat;
    char rest[480];
  } pack{};
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
  ASSERT_CUDA(cuModuleLoadData(&module, "\n.version 6.4\n.target sm_70\n.visible .entry rsb_pack_raw(\n"));
  CUfunction function = nullptr;
  EXPECT_CUDA(cuModuleGetFunction(&function, module, "rsb_pack_raw"));
  EXPECT_EQ(cuModuleGetFunction(&function, module, "rsb_reduce_f32"), CUDA_ERROR_NOT_FOUND) << "not in this text";
  EXPECT_CUDA(cuModuleUnload(module));
  EXPECT_EQ(cuModuleUnload(module), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_TRUE(breached("twice"));
}

TEST(Modules, LaunchesHaveTheGridOfTheirParameters) {
  Device device;
  struct {
    uint64_t dst, stride;
    uint32_t rows, segments;
    uint64_t src, at, count;
    uint32_t end, flat;
    char rest[480];
  } pack{};
  pack.dst = device.memory(100);
  pack.src = device.memory(Bytes(100, 8));
  pack.segments = pack.end = 1;
  pack.count = 100;
  const CUstream stream = device.stream();
  EXPECT_CUDA(device.launch("rsb_pack_raw_few", 1, &pack, stream));
  fake_cuda_wait(stream);
  EXPECT_EQ(Device::read(pack.dst, 100), Bytes(100, 8));
  EXPECT_EQ(device.launch("rsb_pack_raw_few", 2, &pack, stream), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(breached("expected 1x1x1"));
}

// ---- Errors ---------------------------------------------------------------------------------------

TEST_F(Order, ErrorsComeWhereTheyAreOrdered) {
  EXPECT_EQ(fake_cuda_fail("cuMemsetD8Async"), -1);
  ASSERT_EQ(fake_cuda_fail("cuMemsetD8Async:2=1,*:4=2"), 0);
  produce();
  EXPECT_EQ(cuMemsetD8Async(a, 7, 64, from), CUDA_ERROR_INVALID_VALUE);
  EXPECT_FALSE(fake_cuda_failed());
  produce();
  EXPECT_EQ(fake_cuda_calls("cuMemsetD8Async"), 3u);
  EXPECT_EQ(cuStreamQuery(nullptr), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_TRUE(fake_cuda_failed());
  EXPECT_EQ(fake_cuda_calls("*"), 4u);
  fake_cuda_fail(nullptr);
  fake_cuda_wait(from);
}

TEST_F(Order, ErrorsOfWorkComeLaterAndStay) {
  ASSERT_EQ(fake_cuda_fail("cuMemsetD8Async:1~719"), 0);
  bool called = false;
  fake_cuda_hold(from);
  produce();
  ASSERT_CUDA(cuLaunchHostFunc(from, [](void *arg) { *static_cast<bool *>(arg) = true; }, &called));
  fake_cuda_let_go(from);
  fake_cuda_wait(from);
  EXPECT_FALSE(called) << "not on an error";
  EXPECT_EQ(cuMemcpyAsync(b, a, 64, to), CUDA_ERROR_LAUNCH_FAILED);
  EXPECT_EQ(Device::read(a, 64), Bytes(64, 1));
  fake_cuda_fail(nullptr);
  fake_cuda_heal();
}

TEST_F(Order, StickyErrorsStay) {
  ASSERT_EQ(fake_cuda_fail("cuEventCreate:1=700"), 0);
  CUevent event = nullptr;
  EXPECT_EQ(cuEventCreate(&event, 0), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(cuEventCreate(&event, 0), CUDA_ERROR_ILLEGAL_ADDRESS);
  fake_cuda_fail(nullptr);
  fake_cuda_heal();
}

// ---- Captures -------------------------------------------------------------------------------------

class Captures : public Order {
 protected:
  ~Captures() override { fake_cuda_wait_all(); }
  void begin(int mode = CU_CAPTURE_THREAD_LOCAL) { ASSERT_CUDA(cuStreamBeginCapture_v2(from, mode)); }
  CUgraph graph = nullptr;
};

TEST_F(Captures, RecordAndRepeat) {
  const CUevent fork = device.event(), back = device.event();
  begin();
  int status = 0;
  EXPECT_CUDA(cuStreamIsCapturing(from, &status));
  EXPECT_EQ(status, CU_CAPTURE_STATUS_ACTIVE);
  EXPECT_CUDA(cuStreamIsCapturing(to, &status));
  EXPECT_EQ(status, CU_CAPTURE_STATUS_NONE);
  produce();
  ASSERT_CUDA(cuEventRecord(fork, from));
  ASSERT_CUDA(cuStreamWaitEvent(to, fork, 0));
  consume();
  ASSERT_CUDA(cuEventRecord(back, to));
  ASSERT_CUDA(cuStreamWaitEvent(from, back, 0));
  ASSERT_CUDA(cuStreamEndCapture(from, &graph));
  fake_cuda_wait_all();
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 2)) << "nothing has run yet";
  CUgraphExec exec = nullptr;
  ASSERT_CUDA(cuGraphInstantiateWithFlags(&exec, graph, 0));
  ASSERT_CUDA(cuGraphLaunch(exec, to));
  fake_cuda_wait(to);
  EXPECT_EQ(Device::read(b, 64), Bytes(64, 7));
  EXPECT_EQ(cuEventQuery(fork), CUDA_ERROR_CAPTURED_EVENT);
  ASSERT_CUDA(cuGraphExecDestroy(exec));
  ASSERT_CUDA(cuGraphDestroy(graph));
}

TEST_F(Captures, MustBeJoined) {
  const CUevent fork = device.event();
  begin();
  ASSERT_CUDA(cuEventRecord(fork, from));
  ASSERT_CUDA(cuStreamWaitEvent(to, fork, 0));
  consume();
  EXPECT_EQ(cuStreamEndCapture(from, &graph), CUDA_ERROR_STREAM_CAPTURE_UNJOINED);
}

TEST_F(Captures, AreSpoiltByWaitsForWorkOutside) {
  const CUevent outside = device.event();
  ASSERT_CUDA(cuEventRecord(outside, to));
  begin();
  EXPECT_EQ(cuStreamWaitEvent(from, outside, 0), CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  EXPECT_EQ(cuMemsetD8Async(a, 0, 64, from), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EXPECT_EQ(cuStreamEndCapture(from, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

TEST_F(Captures, AreSpoiltByQueries) {
  const CUevent event = device.event();
  begin();
  ASSERT_CUDA(cuEventRecord(event, from));
  int relaxed = CU_CAPTURE_RELAXED;
  ASSERT_CUDA(cuThreadExchangeStreamCaptureMode(&relaxed));
  EXPECT_EQ(relaxed, CU_CAPTURE_GLOBAL);
  EXPECT_EQ(cuEventQuery(event), CUDA_ERROR_CAPTURED_EVENT);
  ASSERT_CUDA(cuThreadExchangeStreamCaptureMode(&relaxed));
  EXPECT_EQ(cuStreamEndCapture(from, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

TEST_F(Captures, InGlobalModeForbidUnsafeCallsOfAllThreads) {
  const CUevent event = device.event();
  CUdeviceptr ptr = 0;
  begin(CU_CAPTURE_GLOBAL);
  std::thread([&] {
    ASSERT_CUDA(cuCtxPushCurrent_v2(device.context()));
    EXPECT_EQ(cuEventQuery(event), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
    ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
  }).join();
  EXPECT_EQ(cuStreamEndCapture(from, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  begin();
  std::thread([&] {
    ASSERT_CUDA(cuCtxPushCurrent_v2(device.context()));
    EXPECT_CUDA(cuEventQuery(event));
    ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
  }).join();
  EXPECT_EQ(cuMemAlloc_v2(&ptr, 1), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  EXPECT_EQ(cuStreamEndCapture(from, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
}

TEST_F(Captures, ForbidTheLegacyStream) {
  const CUstream blocking = device.stream(CU_STREAM_DEFAULT);
  ASSERT_CUDA(cuStreamBeginCapture_v2(blocking, CU_CAPTURE_THREAD_LOCAL));
  int status = 0;
  EXPECT_EQ(cuStreamIsCapturing(nullptr, &status), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  EXPECT_EQ(cuMemsetD8Async(a, 0, 64, nullptr), CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  EXPECT_EQ(cuStreamEndCapture(blocking, &graph), CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
  EXPECT_EQ(cuStreamBeginCapture_v2(nullptr, 0), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
}

// ---- What is left behind --------------------------------------------------------------------------

TEST(Leaks, AreFound) {
  {
    Device device;
    CUstream stream = nullptr;
    CUevent event = nullptr;
    CUdeviceptr ptr = 0;
    ASSERT_CUDA(cuStreamCreate(&stream, 0));
    ASSERT_CUDA(cuEventCreate(&event, 0));
    ASSERT_CUDA(cuMemAlloc_v2(&ptr, 100));
    EXPECT_EQ(fake_cuda_check_leaks(), 4) << "a stream, an event, memory, a context";
    fake_cuda_forgive();
    ASSERT_CUDA(cuStreamDestroy_v2(stream));
    ASSERT_CUDA(cuEventDestroy_v2(event));
    ASSERT_CUDA(cuMemFree_v2(ptr));
  }
  EXPECT_EQ(fake_cuda_check_leaks(), 0);
}

TEST(Leaks, EndTheProcessWithAStatusOfTheirOwn) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        CUcontext context;
        cuInit(0);
        cuDevicePrimaryCtxRetain(&context, 0);
        exit(0);
      },
      ::testing::ExitedWithCode(86), "left behind: 1 retained contexts");
}

}  // namespace
