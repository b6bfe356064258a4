// NCCL comms: exact means, EXACT's bits, the fallback, the allocator hook, and refusals before anything is
// enqueued.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
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

TEST(Nccl, TheLeastAndTheGreatestAreNanWhereAnyRankHasOne) {
  run_device(2, {}, [](DeviceRank &rank) {
    const size_t count = 40;
    for (const rsb_dtype dtype : {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_F16, RSB_DTYPE_BF16}) {
      for (const rsb_op op : {RSB_OP_MIN, RSB_OP_MAX}) {
        const size_t width = values::size_of(dtype);
        values::Bytes data(count * width);
        for (size_t i = 0; i < count; ++i) {
          // Of rank 0 every third, of rank 1 every fifth.
          const bool lacks = i % (rank.rank == 0 ? 3 : 5) == 0;
          const double value = rank.rank == 0 ? static_cast<double>(i) : 20.0;
          values::store(dtype, value, &data[i * width]);
          if (lacks) {
            std::memset(&data[i * width], 0xFF, width);  // a NaN in every type
          }
        }
        const auto at = reinterpret_cast<void *>(rank.device.memory(data));
        const CUdeviceptr output = rank.device.memory(data.size());
        const void *inputs[] = {at, at};
        Bucketer bucketer(1 << 12);
        rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
        args.inputs = inputs;
        args.numel = count;
        args.dtype = dtype;
        args.op = op;
        args.output = reinterpret_cast<void *>(output);
        Error error;
        ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error));
        ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer, error), error));
        fake_cuda_wait(rank.producer);
        const values::Bytes result = gpu::Device::read(output, data.size());
        for (size_t i = 0; i < count; ++i) {
          const double got = values::load(dtype, &result[i * width]), other = static_cast<double>(i);
          const double want = op == RSB_OP_MIN ? std::min(other, 20.0) : std::max(other, 20.0);
          ASSERT_EQ(std::isnan(got), i % 3 == 0 || i % 5 == 0) << values::dtype_name(dtype) << ", element " << i << ": " << got;
          ASSERT_TRUE(std::isnan(got) || got == want) << i << ": " << got;
        }
      }
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

TEST(Nccl, DirectOpsLieAtAnyAlignment) {
  for (const uint64_t flags : {uint64_t{0}, uint64_t{RSB_COMM_EXACT}}) {
    DeviceOptions options;
    options.flags = flags;
    run_device(2, options, [](DeviceRank &rank) {
      DeviceWorker worker(rank, -1);
      for (const rsb_dtype dtype : {RSB_DTYPE_F32, RSB_DTYPE_BF16, RSB_DTYPE_F64, RSB_DTYPE_I8}) {
        for (const size_t offset : {0u, 1u, 2u, 4u}) {
          for (const bool output : {false, true}) {
            Op o = Op::of(1000 + offset, dtype);
            o.flat = true;
            o.offset = offset;
            o.output = output;
            o.flags = RSB_SUBMIT_BORROW;
            worker.submit(o);
          }
        }
      }
      // The result's own place.
      const auto in = reinterpret_cast<void *>(rank.device.memory(values::Bytes(4000, 0)));
      const CUdeviceptr out = rank.device.memory(4000, 1);
      const void *inputs[] = {in, in};
      Bucketer bucketer(-1);
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.inputs = inputs;
      args.numel = 1000;
      args.dtype = RSB_DTYPE_F32;
      args.op = RSB_OP_SUM;
      args.output = reinterpret_cast<void *>(out);
      Error error;
      ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error));
      ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer, error), error));
      worker.finish();
      EXPECT_EQ(gpu::Device::read(out, 4000), values::Bytes(4000, 0));
    });
  }
}

TEST(Nccl, AWaitStartsNothing) {
  run_device(2, {}, [](DeviceRank &rank) {
    const auto at = reinterpret_cast<void *>(rank.device.memory(values::Bytes(4000, 0)));
    const void *inputs[] = {at, at};
    Bucketer bucketer(-1);
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs;
    args.numel = 1000;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    rsb_ticket ticket = 0;
    Error error;
    ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer, rank.comm, &args, &ticket, error), error));
    if (rank.rank == 0) {
      // The other rank does not ask, and must be sent the same groups.
      for (const uint64_t limit : {uint64_t{0}, UINT64_MAX}) {
        EXPECT_TRUE(refuses({RSB_ERR_NOT_LAUNCHED}, rsb_bucketer_wait(bucketer, ticket, limit, error), error, {"ticket"}));
      }
    }
    Error fine;
    ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, fine), fine));
    ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer, fine), fine));
    ASSERT_TRUE(answers(RSB_OK, rsb_bucketer_wait(bucketer, ticket, 0, fine), fine));
    fake_cuda_wait(rank.producer);
  });
}

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
    // Of the same device, but in a context of its own.
    CUcontext apart = nullptr;
    CUstream stranger = nullptr;
    ASSERT_CUDA(cuCtxCreate_v2(&apart, 0, 0));
    ASSERT_CUDA(cuStreamCreateWithPriority(&stranger, CU_STREAM_NON_BLOCKING, 0));
    ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
    args.stream = stranger;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_submit(bucketer, rank.comm, &args, nullptr, error), error, {"stream"}));
    EXPECT_NE(error.message().find("device or context"), std::string::npos) << error.message();
    args.stream = nullptr;
    ASSERT_CUDA(cuCtxPushCurrent_v2(apart));
    ASSERT_CUDA(cuStreamDestroy_v2(stranger));
    ASSERT_CUDA(cuCtxDestroy_v2(apart));
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

}  // namespace
