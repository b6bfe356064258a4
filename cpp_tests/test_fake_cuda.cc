// That the driver's stand-in holds its users to the rules of order, errors and captures. Each must be seen to
// fire: otherwise the tests of device code would prove nothing.
#include <gtest/gtest.h>

#include <thread>

#include "gpu.h"

namespace {

using gpu::breached;
using gpu::Device;
using Bytes = std::vector<unsigned char>;

// ---- Order between streams ------------------------------------------------------------------------

class Order : public gpu::TwoStreams {};

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

TEST_F(Order, TimedEventsSayWhenTheyWerePassed) {
  CUevent before = nullptr, after = nullptr;
  ASSERT_CUDA(cuEventCreate(&before, CU_EVENT_DEFAULT));
  ASSERT_CUDA(cuEventCreate(&after, CU_EVENT_DEFAULT));
  float ms = -1;
  EXPECT_EQ(cuEventElapsedTime(&ms, before, after), CUDA_ERROR_INVALID_HANDLE) << "never recorded";
  ASSERT_CUDA(cuEventRecord(before, from));
  produce();
  fake_cuda_hold(from);
  ASSERT_CUDA(cuEventRecord(after, from));
  EXPECT_EQ(cuEventElapsedTime(&ms, before, after), CUDA_ERROR_NOT_READY);
  fake_cuda_let_go(from);
  fake_cuda_wait(from);
  EXPECT_CUDA(cuEventElapsedTime(&ms, before, after));
  EXPECT_GE(ms, 0.0F);
  const CUevent untimed = device.event();
  ASSERT_CUDA(cuEventRecord(untimed, from));
  fake_cuda_wait(from);
  EXPECT_EQ(cuEventElapsedTime(&ms, before, untimed), CUDA_ERROR_INVALID_HANDLE);
  EXPECT_CUDA(cuEventDestroy_v2(before));
  EXPECT_CUDA(cuEventDestroy_v2(after));
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
  const auto look = [](void *arg) {
    auto *seen = static_cast<Both *>(arg);
    seen->seen = *static_cast<unsigned char *>(fake_cuda_reach(seen->at));
  };
  ASSERT_CUDA(cuLaunchHostFunc(from, look, &both));
  fake_cuda_wait(from);
  EXPECT_EQ(both.seen, 7);
  ASSERT_CUDA(cuMemsetD8Async(a, 0, 64, to));
  EXPECT_EQ(fake_cuda_breaches(), 0) << "the host has seen it done";
  ASSERT_CUDA(cuLaunchHostFunc(from, [](void *) { cuInit(0); }, nullptr));
  fake_cuda_wait(from);
  EXPECT_TRUE(breached("cuInit inside a host function"));
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

class Captures : public gpu::TwoStreams {
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
