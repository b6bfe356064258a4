// NCCL comms and their ends: exact means, EXACT's bits, the fallback, the allocator hook, refusals before
// anything is enqueued, and failures, at every call and in the device's own time.
#include <gtest/gtest.h>

#include <cstdlib>
#include <map>
#include <mutex>

#include "device_worker.h"

using namespace harness;

namespace {

constexpr int kGlobal = CU_CAPTURE_GLOBAL, kThreadLocal = CU_CAPTURE_THREAD_LOCAL;

size_t calls_of(const char *name) { return fake_cuda_calls(name); }

TEST(Nccl, FeaturesSayWhatIsUsable) {
  EXPECT_EQ(rsb_features() & (RSB_FEATURE_CUDA | RSB_FEATURE_NCCL), RSB_FEATURE_CUDA | RSB_FEATURE_NCCL);
}

TEST(Nccl, AveragesOf16BitTypesAreExactInTheLastStep) {
  run_device(3, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 14);
    for (const rsb_dtype dtype : {RSB_DTYPE_BF16, RSB_DTYPE_F16, RSB_DTYPE_F32, RSB_DTYPE_F64}) {
      for (const double scale : {0.0, 0.3, 7.0}) {
        Op o = Op::of(150, dtype, RSB_OP_AVG);
        o.scale = scale;
        worker.submit(o);
        o.output_dtype = RSB_DTYPE_F32;
        worker.submit(o);
      }
    }
    worker.finish();
  });
}

TEST(Nccl, ExactHasTheBitsOfALocalComm) {
  DeviceOptions options;
  options.flags = RSB_COMM_EXACT;
  options.result_stream = true;
  run_device(3, options, [](DeviceRank &rank) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{1000}, int64_t{1} << 15}) {
      DeviceWorker worker(rank, bucket_bytes);
      for (const rsb_dtype dtype : values::kAllDtypes) {
        for (const rsb_op op : values::kAllOps) {
          if (values::takes(dtype, op)) {
            Op o = Op::of(67, dtype, op);
            o.data = values::Data::kRough;
            o.flags = op == RSB_OP_MAX ? RSB_SUBMIT_BORROW : 0;
            o.scale = values::is_float(dtype) && op != RSB_OP_PROD ? 0.7 : 0.0;
            worker.submit(o);  // checked against the oracle that local comms are checked against
          }
        }
      }
      worker.finish();
    }
  });
}

TEST(Nccl, TheFallbackReducesForEveryRank) {
  ASSERT_EQ(setenv("ENABLE_NCCL_BASE_COLLECTIVES", "0", 1), 0);
  fake_cuda_fail("");
  run_device(3, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    for (size_t i = 0; i < 8; ++i) {
      worker.submit(Op::f32(40 + 200 * (i % 3)));
    }
    worker.finish();
  });
  EXPECT_EQ(unsetenv("ENABLE_NCCL_BASE_COLLECTIVES"), 0);
  EXPECT_EQ(calls_of("ncclReduceScatter"), 0u);
  EXPECT_GT(calls_of("ncclReduce"), 0u);
}

TEST(Nccl, LargeAndPackedOpsShareAGroupAndBorrowedOnesAreNotCopied) {
  fake_cuda_fail("");
  run_device(1, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 4096);
    for (int i = 0; i < 3; ++i) {
      Op large = Op::f32(2000 + static_cast<size_t>(i));
      large.flat = true;
      large.flags = RSB_SUBMIT_BORROW;
      worker.submit(large);
    }
    for (int i = 0; i < 20; ++i) {
      Op small = Op::f32(40);
      small.flags = RSB_SUBMIT_BORROW;
      worker.submit(small);
    }
    EXPECT_EQ(calls_of("cuLaunchKernel"), 0u) << "nothing is packed before the launch";
    worker.flush();
    EXPECT_EQ(calls_of("cuLaunchKernel"), 1u) << "one kernel packs the bucket";
    EXPECT_EQ(calls_of("ncclGroupEnd"), 1u) << "and one group moves all";
    EXPECT_EQ(worker.stats().copied_bytes, 20u * 40 * 4) << "what is packed, not what is sent as it lies";
    Op large = Op::f32(3000);
    worker.submit(large);
    EXPECT_EQ(worker.stats().copied_bytes, (20u * 40 + 3000) * 4);
    worker.finish();
  });
}

TEST(Nccl, ALentDirectOpAloneComesAfterItsMemory) {
  DeviceOptions options;
  options.flags = RSB_COMM_EXACT;
  run_device(2, options, [](DeviceRank &rank) {
    DeviceWorker worker(rank, -1);
    for (int round = 0; round < 3; ++round) {
      // Nothing of it is packed: no producer's stream has waited for the memory of the exchange.
      Op o = Op::f32(3000);
      o.flat = true;
      o.flags = RSB_SUBMIT_BORROW;
      worker.submit(o);
      worker.flush();
    }
    worker.finish();
  });
}

/// An allocator over the driver's, that notes what it is asked for.
struct Caching {
  std::mutex mutex;
  std::map<void *, std::pair<size_t, void *>> live;
  std::vector<std::string> wrong;
  size_t allocations = 0;
  int device = 0;

  rsb_allocator table() {
    rsb_allocator a = {};
    a.struct_size = sizeof a;
    a.ctx = this;
    a.alloc = [](void *ctx, size_t bytes, size_t, int32_t device, void *stream) -> void * {
      auto &self = *static_cast<Caching *>(ctx);
      CUdeviceptr at = 0;
      const std::lock_guard<std::mutex> lock(self.mutex);
      if (device != self.device || cuMemAllocAsync(&at, bytes, static_cast<CUstream>(stream)) != CUDA_SUCCESS) {
        self.wrong.push_back("alloc for device " + std::to_string(device));
        return nullptr;
      }
      ++self.allocations;
      self.live[reinterpret_cast<void *>(at)] = {bytes, stream};
      return reinterpret_cast<void *>(at);
    };
    a.free = [](void *ctx, void *ptr, size_t bytes, int32_t device, void *stream) {
      auto &self = *static_cast<Caching *>(ctx);
      const std::lock_guard<std::mutex> lock(self.mutex);
      if (self.live[ptr] != std::make_pair(bytes, stream) || device != self.device) {
        self.wrong.push_back("free with other bytes, stream or device than alloc");
      }
      self.live.erase(ptr);
      if (cuMemFreeAsync(reinterpret_cast<CUdeviceptr>(ptr), static_cast<CUstream>(stream)) != CUDA_SUCCESS) {
        self.wrong.push_back("free in no context");
      }
    };
    return a;
  }
};

TEST(Nccl, TheAllocatorHookServesDeviceMemory) {
  DeviceOptions options;
  options.result_stream = true;
  run_device(2, options, [](DeviceRank &rank) {
    Caching caching;
    caching.device = static_cast<int>(rank.rank % 2);
    const rsb_allocator table = caching.table();
    {
      DeviceWorker worker(rank, 2000, &table);
      for (size_t i = 0; i < 12; ++i) {
        Op o = Op::f32(i % 4 == 3 ? 600 : 90);
        o.output_dtype = i % 4 == 1 ? RSB_DTYPE_BF16 : 0;
        worker.submit(o);
      }
      worker.finish();
      EXPECT_GT(caching.allocations, 2u);
      EXPECT_FALSE(caching.live.empty());
      EXPECT_GT(worker.stats().buffer_bytes, 0u);
    }
    EXPECT_TRUE(caching.live.empty());
    EXPECT_EQ(caching.wrong, std::vector<std::string>());
  });
}

TEST(Refusals, WrapChecksWhatItIsGiven) {
  run_device(2, {}, [](DeviceRank &rank) {
    rsb_comm *comm = nullptr;
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_wrap_nccl(nullptr, nullptr, &comm, error), error, {"nccl_comm"}));
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_wrap_nccl(rank.nccl, nullptr, nullptr, error), error, {"out_comm"}));
    gpu::Device other(1 - static_cast<int>(rank.rank));
    rsb_comm_config config = comm_config();
    config.stream = other.stream();
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_wrap_nccl(rank.nccl, &config, &comm, error), error, {"stream"}));
    config.stream = nullptr;
    config.result_stream = other.stream();
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_wrap_nccl(rank.nccl, &config, &comm, error), error, {"result_stream"}));
    // Another context is current: the comm works in its own device's, and this one stays.
    CUcontext before = nullptr, after = nullptr;
    EXPECT_CUDA(cuCtxGetCurrent(&before));
    Error fine;
    ASSERT_TRUE(answers(RSB_OK, rsb_comm_wrap_nccl(rank.nccl, nullptr, &comm, fine), fine));
    EXPECT_CUDA(cuCtxGetCurrent(&after));
    EXPECT_EQ(before, after);
    rsb_comm_free(comm);
  });
}

TEST(Refusals, NothingIsEnqueuedForWrongMemoryOrACapture) {
  run_device(1, {}, [](DeviceRank &rank) {
    Bucketer bucketer(1 << 12);
    std::vector<float> host(64);
    const CUdeviceptr device = rank.device.memory(256);
    const auto at = reinterpret_cast<void *>(device);
    const void *inputs[] = {at};
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs;
    args.numel = 64;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    Error error;
    fake_cuda_fail("");
    inputs[0] = host.data();
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"inputs[0]"}));
    // What the driver knows, and is of this device, but lies in the host.
    void *pinned = nullptr;
    ASSERT_CUDA(cuMemHostAlloc(&pinned, 256, 0));
    inputs[0] = pinned;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"inputs[0]"}));
    EXPECT_NE(error.message().find("host memory"), std::string::npos) << error.message();
    ASSERT_CUDA(cuMemFreeHost(pinned));
    inputs[0] = at;
    args.output = host.data();
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"output"}));
    args.output = nullptr;
    gpu::Device other(1);
    args.stream = other.stream();
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"stream"}));
    const CUdeviceptr elsewhere = other.memory(256);
    inputs[0] = reinterpret_cast<void *>(elsewhere);
    args.stream = nullptr;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"inputs[0]"}));
    inputs[0] = at;
    ASSERT_CUDA(cuCtxPushCurrent_v2(rank.device.context()));
    ASSERT_CUDA(cuStreamBeginCapture_v2(rank.producer, kGlobal));
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"stream"}));
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_comm_all_gather(rank.comm, at, at, 4, error), error, {"stream"}));
    CUgraph graph = nullptr;
    ASSERT_CUDA(cuStreamEndCapture(rank.producer, &graph)) << "the capture is not spoilt";
    ASSERT_CUDA(cuGraphDestroy(graph));
    EXPECT_EQ(calls_of("cuLaunchKernel") + calls_of("cuMemAllocAsync") + calls_of("ncclGroupStart"), 0u);
    // A bucket that is open when a capture begins: its launch is refused, and works afterwards.
    Error fine;
    ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, fine), fine));
    ASSERT_CUDA(cuStreamBeginCapture_v2(rank.producer, kGlobal));
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_bucketer_flush(bucketer, error), error, {"stream"}));
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(rank.comm, fine), fine)) << "polling does not spoil it either";
    ASSERT_CUDA(cuStreamEndCapture(rank.producer, &graph));
    ASSERT_CUDA(cuGraphDestroy(graph));
    ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer, fine), fine));
    fake_cuda_wait_all();
  });
}

TEST(Refusals, ACaptureThatGoesOnElsewhereIsNotSpoilt) {
  run_device(1, {}, [](DeviceRank &rank) {
    const CUdeviceptr in = rank.device.memory(values::Bytes(8192, 3)), out = rank.device.memory(64);
    const CUstream captured = rank.device.stream();
    const void *inputs[] = {reinterpret_cast<void *>(in)};
    for (const int mode : {kGlobal, kThreadLocal}) {
      Bucketer bucketer(1 << 12);
      Error error;
      const auto submit = [&](size_t numel) {
        return rsb_bucketer_reduce_scatter_async(bucketer, rank.comm, inputs, numel, RSB_DTYPE_F32, RSB_OP_SUM, nullptr,
                                                 nullptr, error);
      };
      // Work under way is what polling asks about, which spoils a capture unless the thread is told otherwise.
      fake_cuda_hold(rank.producer);
      EXPECT_TRUE(answers(RSB_OK, submit(50), error));
      EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_launch(bucketer, error), error));
      ASSERT_CUDA(cuStreamBeginCapture_v2(captured, mode));
      EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(rank.comm, error), error));
      EXPECT_TRUE(answers(RSB_OK, submit(60), error));
      EXPECT_TRUE(answers(RSB_OK, submit(2000), error)) << "a direct one";
      EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer, error), error));
      EXPECT_TRUE(answers(RSB_OK, rsb_comm_all_gather(rank.comm, inputs[0], reinterpret_cast<void *>(out), 64, error), error));
      rsb_comm *second = nullptr;
      EXPECT_TRUE(answers(RSB_OK, rsb_comm_wrap_nccl(rank.nccl, nullptr, &second, error), error));
      rsb_comm_free(second);
      EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_release_buffers(bucketer, error), error));
      EXPECT_RSB_OK(bucketer.free());
      int own = kGlobal;
      EXPECT_CUDA(cuThreadExchangeStreamCaptureMode(&own));
      EXPECT_EQ(own, kGlobal) << "the thread's own mode is as it was";
      CUgraph graph = nullptr;
      ASSERT_CUDA(cuStreamEndCapture(captured, &graph));
      ASSERT_CUDA(cuGraphDestroy(graph));
      fake_cuda_let_go(rank.producer);
    }
    fake_cuda_wait_all();
  });
}

/// Waits for a comm to fail, which is found by polling.
rsb_status ends(DeviceRank &rank, Error &error) {
  rsb_status status = RSB_OK;
  for (int i = 0; i < 200000 && status == RSB_OK; ++i) {
    status = rsb_comm_status(rank.comm, error);
    std::this_thread::yield();
  }
  return status;
}

TEST(Failures, AnAsynchronousErrorEndsTheComm) {
  run_device(1, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    worker.submit(Op::f32(50));
    fake_nccl_async_error(rank.nccl, ncclRemoteError);
    Error error;
    EXPECT_EQ(rsb_bucketer_flush(worker, error), RSB_ERR_TRANSPORT);
    EXPECT_EQ(error->native_code, ncclRemoteError);
    EXPECT_EQ(worker.status(0), RSB_ERR_TRANSPORT) << "every pending callback hears of it";
    EXPECT_NE(error.message().find("owner"), std::string::npos) << error.message();
    fake_nccl_async_error(rank.nccl, ncclSuccess);
  });
}

TEST(Failures, WhatNcclRefusesEndsTheComm) {
  for (const char *call : {"ncclGroupStart", "ncclReduceScatter", "ncclGroupEnd"}) {
    SCOPED_TRACE(call);
    run_device(1, {}, [call](DeviceRank &rank) {
      DeviceWorker worker(rank, 1 << 12);
      worker.submit(Op::f32(50));
      worker.submit(Op::f32(5000));
      fake_cuda_fail((std::string(call) + ":1=3").c_str());
      Error error;
      EXPECT_EQ(rsb_bucketer_flush(worker, error), RSB_ERR_TRANSPORT);
      EXPECT_EQ(error->native_code, ncclInternalError);
      EXPECT_EQ(worker.status(0), RSB_ERR_TRANSPORT);
      EXPECT_EQ(worker.status(1), RSB_ERR_TRANSPORT);
      EXPECT_EQ(fake_cuda_failed(), 1);
      fake_cuda_fail("");
    });
  }
}

TEST(Failures, AStickyErrorOfTheDeviceIsFoundByPolling) {
  run_device(1, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    // Nothing runs before it is enqueued: only polling can find what fails.
    fake_cuda_hold(rank.producer);
    fake_cuda_fail("cuLaunchKernel:1~700");
    worker.submit(Op::f32(50));
    worker.launch();
    fake_cuda_let_go(rank.producer);
    Error error;
    EXPECT_EQ(ends(rank, error), RSB_ERR_TRANSPORT);
    EXPECT_EQ(error->native_code, 700);
    fake_cuda_fail("");
    fake_cuda_heal();
    EXPECT_EQ(worker.try_submit(Op::f32(3), error), RSB_ERR_TRANSPORT) << "the first cause stays";
  });
}

TEST(Failures, ARankThatStaysAwayIsATimeout) {
  fake_nccl_allow_mismatch(1);
  DeviceOptions options;
  options.timeout_ns = 50'000'000;
  run_device(2, options, [](DeviceRank &rank) {
    if (rank.rank == 0) {
      DeviceWorker worker(rank, 1 << 12);
      worker.submit(Op::f32(50));
      worker.flush();
      Error error;
      EXPECT_EQ(ends(rank, error), RSB_ERR_TIMEOUT);
      EXPECT_NE(error.message().find("owner"), std::string::npos) << error.message();
      EXPECT_EQ(rsb_bucketer_flush(worker, error), RSB_ERR_TIMEOUT);
    }
  });
  fake_nccl_allow_mismatch(0);
}

TEST(Failures, AbortEndsWhatIsPending) {
  run_device(1, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    worker.submit(Op::f32(50));
    worker.submit(Op::f32(5000));
    rsb_comm_abort(rank.comm);
    Error error;
    EXPECT_EQ(rsb_bucketer_flush(worker, error), RSB_ERR_ABORTED);
    EXPECT_EQ(worker.status(0), RSB_ERR_ABORTED);
    EXPECT_EQ(worker.status(1), RSB_ERR_ABORTED);
  });
}

TEST(Failures, RanksThatDifferAreFoundOverControl) {
  fake_nccl_allow_mismatch(1);
  DeviceOptions options;
  options.control = true;
  run_device(2, options, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    worker.submit(Op::f32(50));
    worker.flush();
    Op o = Op::f32(60);
    o.scale = rank.rank == 1 ? 0.5 : 0.25;
    worker.submit(o);
    Error error;
    (void)rsb_bucketer_flush(worker, error);
    EXPECT_EQ(ends(rank, error), RSB_ERR_DESYNC);
    EXPECT_NE(error.message().find("scale"), std::string::npos) << error.message();
    EXPECT_NE(error.message().find("rank 1"), std::string::npos) << error.message();
  });
  fake_nccl_allow_mismatch(0);
}

TEST(Failures, RanksThatAgreeAreLeftAlone) {
  DeviceOptions options;
  options.control = true;
  run_device(3, options, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 11);
    for (size_t i = 0; i < 60; ++i) {
      worker.submit(Op::f32(1 + i * 7 % 300));
    }
    worker.finish();
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(rank.comm, error), error));
  });
}

/// A little of everything on one rank; whatever fails must end cleanly. What the comm says at the end.
rsb_status everything(DeviceRank &rank, CUdeviceptr in, CUdeviceptr out) {
  std::vector<rsb_status> called;
  {
    Bucketer bucketer(1 << 11);
    const void *inputs[] = {reinterpret_cast<void *>(in)};
    size_t accepted = 0;
    for (size_t i = 0; i < 8; ++i) {
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.inputs = inputs;
      args.numel = i % 4 == 3 ? 1000 : 200;
      args.dtype = RSB_DTYPE_F32;
      args.op = i % 2 == 0 ? RSB_OP_SUM : RSB_OP_AVG;
      args.output_dtype = i == 5 ? RSB_DTYPE_BF16 : 0;
      args.scale = i % 3 == 0 ? 0.5 : 0;
      args.flags = i % 3 == 1 ? RSB_SUBMIT_BORROW : 0;
      args.callback = [](void *list, const rsb_result *result) {
        static_cast<std::vector<rsb_status> *>(list)->push_back(result->status);
      };
      args.user_data = &called;
      Error error;
      const rsb_status status = rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error);
      EXPECT_TRUE(answers(status, status, error));
      accepted += status == RSB_OK ? 1 : 0;
    }
    Error error;
    const rsb_status flushed = rsb_bucketer_flush(bucketer, error);
    EXPECT_TRUE(answers(flushed, flushed, error));
    EXPECT_EQ(called.size(), accepted) << "once each";
    Error gathering;
    const rsb_status gathered = rsb_comm_all_gather(rank.comm, inputs[0], reinterpret_cast<void *>(out), 64, gathering);
    EXPECT_TRUE(answers(gathered, gathered, gathering));
    (void)bucketer.free();
    fake_cuda_wait_all();
  }
  return rsb_comm_status(rank.comm, nullptr);
}

constexpr uint64_t kParts = 8;

/// Every eighth call, from a first one on.
class AtCall : public ::testing::TestWithParam<uint64_t> {};
INSTANTIATE_TEST_SUITE_P(Failures, AtCall, ::testing::Range<uint64_t>(0, kParts));

TEST_P(AtCall, EndsCleanly) {
  // How many calls there are, then each of them fails once.
  uint64_t driver = 0, nccl = 0;
  rsb_status end = RSB_OK;
  const auto run = [&](const std::string &spec) {
    run_device(1, {}, [&](DeviceRank &rank) {
      const CUdeviceptr in = rank.device.memory(values::Bytes(8192, 1)), out = rank.device.memory(64);
      fake_cuda_fail(spec.c_str());
      end = everything(rank, in, out);
      driver = calls_of("*");
      nccl = calls_of("nccl*");
      fake_cuda_fail("");
      fake_cuda_heal();
    });
  };
  run("");
  const uint64_t calls = driver, collectives = nccl;
  ASSERT_GT(calls, 100u);
  for (uint64_t n = 1 + GetParam(); n <= calls && !HasFailure(); n += kParts) {
    SCOPED_TRACE("driver call " + std::to_string(n));
    run("*:" + std::to_string(n) + "=1");
  }
  for (uint64_t n = 1 + GetParam(); n <= collectives && !HasFailure(); n += kParts) {
    SCOPED_TRACE("nccl call " + std::to_string(n));
    run("nccl*:" + std::to_string(n) + "=3");
    EXPECT_EQ(end, RSB_ERR_TRANSPORT) << "none goes unnoticed";
  }
}

}  // namespace
