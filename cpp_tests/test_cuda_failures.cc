// How device comms end: errors of NCCL and of the device, at every call and in the device's own time, ranks that
// stay away or differ. Every callback runs once, nothing hangs, and what can be given back is.
#include <gtest/gtest.h>

#include "device_worker.h"

using namespace harness;

// AddressSanitizer's, where it is there.
extern "C" void __lsan_disable() __attribute__((weak));

namespace {

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

TEST(Failures, AStickyErrorIsNoWrongArgument) {
  run_device(1, {}, [](DeviceRank &rank) {
    const CUdeviceptr in = rank.device.memory(256);
    const void *inputs[] = {reinterpret_cast<void *>(in)};
    Bucketer bucketer(1 << 12);
    fake_cuda_fail("cuPointerGetAttribute:1=700");
    Error error;
    EXPECT_EQ(rsb_bucketer_reduce_scatter_async(bucketer, rank.comm, inputs, 64, RSB_DTYPE_F32, RSB_OP_SUM, nullptr,
                                                nullptr, error),
              RSB_ERR_TRANSPORT);
    EXPECT_EQ(error->native_code, CUDA_ERROR_ILLEGAL_ADDRESS);
    fake_cuda_fail("");
    fake_cuda_heal();
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

/// A little of everything on one rank; whatever fails must end cleanly. What the comm says at the end, which
/// is what every callback was told that had not been told RSB_OK before.
rsb_error everything(DeviceRank &rank, CUdeviceptr in, CUdeviceptr out) {
  std::vector<rsb_error> called;
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
        static_cast<std::vector<rsb_error> *>(list)->push_back(*result->error);
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
  rsb_error end = {};
  (void)rsb_comm_status(rank.comm, &end);
  for (const rsb_error &each : called) {
    if (each.status != RSB_OK) {
      EXPECT_EQ(each.status, end.status);
      EXPECT_EQ(each.native_code, end.native_code);
    }
  }
  return end;
}

/// The same with memory that is the rank's own.
rsb_error everything(DeviceRank &rank, const std::string &failing) {
  const CUdeviceptr in = rank.device.memory(values::Bytes(8192, 1)), out = rank.device.memory(64);
  fake_cuda_fail(failing.c_str());
  return everything(rank, in, out);
}

/// A device that has failed stays so. Memory may then be kept for good, but nothing hangs.
TEST(Failures, AStickyErrorAtAnyKernelEndsWhatIsPending) {
  fake_cuda_allow_leaks(1);  // to the end of this process
  // At once, or when the kernel runs.
  for (const char *how : {"=700", "~700"}) {
    int n = 1;
    for (bool failed = true; failed; ++n) {
      SCOPED_TRACE("kernel " + std::to_string(n) + how);
      run_device(1, {}, [&](DeviceRank &rank) {
        if (__lsan_disable != nullptr) {
          __lsan_disable();  // on this thread, which ends with this rank
        }
        const rsb_error end = everything(rank, "cuLaunchKernel:" + std::to_string(n) + how);
        failed = fake_cuda_failed() == 1;
        EXPECT_EQ(end.status, failed ? RSB_ERR_TRANSPORT : RSB_OK);
        // NCCL may be the first to meet it.
        const bool by_nccl = how[0] == '~' && end.native_code == ncclUnhandledCudaError;
        EXPECT_TRUE(end.native_code == (failed ? CUDA_ERROR_ILLEGAL_ADDRESS : 0) || by_nccl) << end.native_code;
        rsb_comm_free(rank.comm);
        rank.comm = nullptr;
        fake_cuda_fail("");
        fake_cuda_heal();
      });
    }
    EXPECT_GT(n, 5) << "there are several kernels";
  }
}

constexpr uint64_t kParts = 8;

/// Every eighth call, from a first one on.
class AtCall : public ::testing::TestWithParam<uint64_t> {};
INSTANTIATE_TEST_SUITE_P(Failures, AtCall, ::testing::Range<uint64_t>(0, kParts));

TEST_P(AtCall, EndsCleanly) {
  // How many calls there are, then each of them fails once.
  uint64_t driver = 0, nccl = 0;
  const auto run = [&](const std::string &failing) {
    rsb_status end = RSB_OK;
    run_device(1, {}, [&](DeviceRank &rank) {
      end = everything(rank, failing).status;
      driver = fake_cuda_calls("*");
      nccl = fake_cuda_calls("nccl*");
      fake_cuda_fail("");
      fake_cuda_heal();
    });
    return end;
  };
  EXPECT_EQ(run(""), RSB_OK);
  const uint64_t calls = driver, collectives = nccl;
  ASSERT_GT(calls, 100u);
  for (uint64_t n = 1 + GetParam(); n <= calls && !HasFailure(); n += kParts) {
    SCOPED_TRACE("driver call " + std::to_string(n));
    (void)run("*:" + std::to_string(n) + "=1");
  }
  for (uint64_t n = 1 + GetParam(); n <= collectives && !HasFailure(); n += kParts) {
    SCOPED_TRACE("nccl call " + std::to_string(n));
    EXPECT_EQ(run("nccl*:" + std::to_string(n) + "=3"), RSB_ERR_TRANSPORT) << "none goes unnoticed";
  }
}

}  // namespace
