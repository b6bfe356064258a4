// Order without waiting: producers' streams, several into one bucket, results in the order of their
// stream, memory that is used again, and calls that never wait for the device.
#include <gtest/gtest.h>

#include <condition_variable>
#include <mutex>
#include <thread>

#include "device_worker.h"

using namespace harness;

namespace {

struct Way {
  const char *name;
  DeviceOptions options;
  uint32_t flags;  // of the ops
};

void PrintTo(const Way &way, std::ostream *out) { *out << way.name; }

DeviceOptions with(uint64_t flags, bool result_stream, bool custom = false,
                   uint64_t custom_flags = DeviceOptions().custom_flags, size_t max_count = 0) {
  DeviceOptions o;
  o.flags = flags;
  o.result_stream = result_stream;
  o.custom = custom;
  o.custom_flags = custom_flags;
  o.max_count = max_count;
  return o;
}

constexpr uint64_t kExchange = RSB_TRANSPORT_DEVICE | RSB_TRANSPORT_ALL_TO_ALL | RSB_TRANSPORT_ALL_GATHER;

class Ways : public ::testing::TestWithParam<Way> {};
INSTANTIATE_TEST_SUITE_P(
    Cuda, Ways,
    ::testing::Values(Way{"Nccl", with(0, false), 0}, Way{"NcclBorrow", with(0, true), RSB_SUBMIT_BORROW},
                      Way{"NcclResults", with(0, true), 0}, Way{"Exact", with(RSB_COMM_EXACT, false), 0},
                      Way{"ExactBorrow", with(RSB_COMM_EXACT, true), RSB_SUBMIT_BORROW},
                      Way{"Custom", with(0, true, true), 0},
                      Way{"CustomExchange", with(0, false, true, kExchange), RSB_SUBMIT_BORROW},
                      Way{"CustomSmall", with(0, false, true, DeviceOptions().custom_flags, 7), 0},
                      Way{"ExchangeSmall", with(0, true, true, kExchange, 5), 0}),
    [](const ::testing::TestParamInfo<Way> &info) { return std::string(info.param.name); });

/// Some ops, of another kind the next time.
void submit_mixed(DeviceWorker &worker, const std::vector<CUstream> &streams, uint32_t flags, rsb_dtype dtype,
                  rsb_op op, size_t numel, size_t &turn) {
  for (size_t end = turn + 3, i = turn; i < end; ++i, ++turn) {
    Op o = Op::of(1 + (i * 13) % numel, dtype, op);
    o.flags = i % 4 == 3 ? 0 : flags;
    o.flat = i % 3 == 1;
    o.output = i % 5 == 2;
    o.offset = i % 2 * values::size_of(dtype);
    if (values::is_float(dtype)) {
      o.scale = i % 3 == 0 ? 0.5 : 0.0;
      o.output_dtype = i % 9 == 5 ? RSB_DTYPE_F32 : i % 9 == 6 ? RSB_DTYPE_BF16 : 0;
    }
    if (o.output && i % 2 == 0) {
      o.flags |= RSB_SUBMIT_ACCUMULATE;
    }
    worker.submit(o, streams[i % streams.size()]);
  }
}

TEST_P(Ways, EveryDtypeAndOpIsRightFromSeveralProducers) {
  const std::pair<uint32_t, int64_t> cases[] = {{1, 1 << 12}, {2, -1}, {2, 1 << 16}, {3, 400}};
  for (const auto &[size, bucket_bytes] : cases) {
    run_device(size, GetParam().options, [&, bytes = bucket_bytes](DeviceRank &rank) {
      const std::vector<CUstream> streams = {nullptr, rank.device.stream(), rank.device.stream()};
      size_t turn = 0;
      for (const rsb_dtype dtype : values::kAllDtypes) {
        DeviceWorker worker(rank, bytes);
        for (const rsb_op op : values::kAllOps) {
          if (values::takes(dtype, op)) {
            submit_mixed(worker, streams, GetParam().flags, dtype, op, 40, turn);
          }
        }
        worker.finish();
      }
    });
  }
}

TEST_P(Ways, RoundsOfTheSameSizeReuseMemory) {
  run_device(2, GetParam().options, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    const std::vector<CUstream> streams = {nullptr, rank.device.stream()};
    uint64_t after = 0;
    for (int round = 0; round < 7; ++round) {
      for (size_t i = 0; i < 6; ++i) {
        Op o = Op::f32(100 + i * 37 + (round == 4 ? i : 0));
        o.flags = GetParam().flags;
        worker.submit(o, streams[i % 2]);
      }
      round % 2 == 0 ? worker.launch() : worker.flush();
      if (round == 5) {
        after = worker.stats().buffer_bytes;
      }
    }
    worker.finish();
    EXPECT_LE(worker.stats().buffer_bytes, after + (after >> 1)) << "memory grows from round to round";
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_release_buffers(worker, error), error));
    EXPECT_EQ(worker.stats().buffer_bytes, 0u);
    worker.submit(Op::f32(50));
    worker.finish();
  });
}

TEST_P(Ways, NoCallWaitsForTheDevice) {
  run_device(2, GetParam().options, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    const CUstream held = rank.device.stream();
    fake_cuda_hold(held);
    for (size_t i = 0; i < 20; ++i) {
      Op o = Op::f32(i % 10 == 9 ? 2000 : 150);
      o.flags = GetParam().flags;
      worker.submit(o, held);
    }
    worker.flush();
    EXPECT_EQ(worker.called().size(), 20u) << "enqueued is complete";
    EXPECT_FALSE(fake_cuda_idle(held));
    fake_cuda_let_go(held);
    worker.check_all();
  });
}

TEST(Order, TheProducerDoesNotWaitForTheReduceScatter) {
  DeviceOptions options;
  options.result_stream = true;
  run_device(2, options, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    // A rank that is late holds the collective; the producers of two buckets go on.
    const CUstream late = rank.device.stream();
    fake_cuda_hold(late);
    worker.submit(Op::f32(20), rank.rank == 1 ? late : nullptr);
    worker.launch();
    worker.submit(Op::f32(30));
    worker.launch();
    worker.submit(Op::f32(40));
    fake_cuda_wait(rank.producer);
    EXPECT_TRUE(fake_cuda_idle(rank.producer));
    fake_cuda_let_go(late);
    worker.finish();
  });
}

TEST(Order, AThreadsDefaultStreamIsThatThreads) {
  // One name, a stream in each thread: a bucket waits for all of them.
  const auto per_thread = reinterpret_cast<CUstream>(uintptr_t{2});
  for (const uint32_t flags : {0u, uint32_t{RSB_SUBMIT_BORROW}}) {
    run_device(2, {}, [&](DeviceRank &rank) {
      DeviceWorker worker(rank, 1 << 14);
      Op o = Op::f32(300);
      o.flags = flags;
      std::mutex lock;
      std::condition_variable changed;
      int turn = 0;
      std::vector<std::thread> threads;
      for (int t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
          ASSERT_CUDA(cuCtxPushCurrent_v2(rank.device.context()));
          std::unique_lock<std::mutex> held(lock);
          changed.wait(held, [&] { return turn == t; });
          worker.submit(o, per_thread);
          ++turn;
          changed.notify_all();
          // Its stream lives until all have submitted.
          changed.wait(held, [&] { return turn == 3; });
          ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
        });
      }
      for (std::thread &thread : threads) {
        thread.join();
      }
      // And of threads that come after each other, which may lie in the same memory.
      for (int t = 0; t < 3; ++t) {
        std::thread([&] {
          ASSERT_CUDA(cuCtxPushCurrent_v2(rank.device.context()));
          worker.submit(o, per_thread);
          ASSERT_CUDA(cuCtxPopCurrent_v2(nullptr));
        }).join();
      }
      worker.finish();
    });
  }
}

TEST(Order, FlushJoinsResultsIntoTheProducersStream) {
  run_device(2, {}, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    Op o = Op::f32(300);
    o.output = true;
    const size_t place = worker.submit(o);
    worker.flush();
    const size_t bytes = worker.expected(place).size();
    values::Bytes got;
    fake_cuda_touch(rank.producer, worker.output(place), bytes, 0);
    in_stream(rank.producer, [&] { got = gpu::Device::read(worker.output(place), bytes); });
    fake_cuda_wait(rank.producer);
    EXPECT_EQ(got, worker.expected(place)) << "what follows on the comm's stream comes after all results";
    worker.check_all();
  });
}

TEST(Order, APartFullBucketIsPackedOnceAndSentWhole) {
  run_device(2, {}, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 16);
    for (int round = 0; round < 3; ++round) {
      for (size_t i = 0; i < 5; ++i) {
        worker.submit(Op::f32(64 + i));
      }
      worker.flush();
    }
    const rsb_stats stats = worker.stats();
    EXPECT_EQ(stats.copied_bytes, stats.payload_bytes) << "every byte is copied once";
    EXPECT_EQ(stats.collectives_launched, 3u);
    worker.finish();
  });
}

TEST(Order, CallbacksRunInTheCallThatLaunches) {
  run_device(2, {}, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 800);  // 100 elements for each of two ranks
    worker.submit(Op::f32(60));
    EXPECT_EQ(worker.called().size(), 0u);
    worker.submit(Op::f32(60));  // pushes the first out
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0}));
    worker.submit(Op::f32(40));  // fills the second
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2}));
    worker.submit(Op::f32(500));  // direct: waits for the next launch
    worker.submit(Op::f32(10));
    EXPECT_EQ(worker.called().size(), 3u);
    worker.launch();
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2, 3, 4}));
    worker.submit(Op::f32(700));
    worker.launch();  // finds only that
    EXPECT_EQ(worker.called().size(), 6u);
    worker.submit(Op::f32(300));
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_free(worker), error)) << "free hands back what waits";
    worker.check_all();
  });
}

TEST(Order, CancelledOpsGiveTheirMemoryBack) {
  run_device(2, {}, [&](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    const size_t place = worker.submit(Op::f32(60), rank.device.stream());
    EXPECT_RSB_OK(worker.free());
    EXPECT_EQ(worker.status(place), RSB_ERR_CANCELLED);
  });
}

TEST(Order, AllGatherInTheOrderOfTheCommsStream) {
  for (const bool custom : {false, true}) {
    DeviceOptions options;
    options.custom = custom;
    options.max_count = custom ? 7 : 0;
    run_device(3, options, [&](DeviceRank &rank) {
      const size_t bytes = 25;
      const CUdeviceptr in = rank.device.memory(bytes), out = rank.device.memory(3 * bytes);
      const auto mine = static_cast<unsigned char>(rank.rank + 1);
      fake_cuda_touch(rank.producer, in, bytes, 1);
      in_stream(rank.producer, [=] {
        for (size_t i = 0; i < bytes; ++i) {
          static_cast<unsigned char *>(fake_cuda_reach(in))[i] = static_cast<unsigned char>(mine * 40 + i);
        }
      });
      Error error;
      EXPECT_TRUE(answers(RSB_OK,
                          rsb_comm_all_gather(rank.comm, reinterpret_cast<void *>(in), reinterpret_cast<void *>(out),
                                              bytes, error),
                          error));
      values::Bytes got;
      fake_cuda_touch(rank.producer, out, 3 * bytes, 0);
      in_stream(rank.producer, [&got, out, bytes] {
        const auto *from = static_cast<unsigned char *>(fake_cuda_reach(out));
        got.assign(from, from + 3 * bytes);
      });
      EXPECT_TRUE(answers(RSB_OK, rsb_comm_all_gather(rank.comm, nullptr, nullptr, 0, error), error)) << "a barrier";
      fake_cuda_wait_all();
      ASSERT_EQ(got.size(), 3 * bytes);
      for (size_t i = 0; i < got.size(); ++i) {
        EXPECT_EQ(got[i], static_cast<unsigned char>((i / bytes + 1) * 40 + i % bytes)) << i;
      }
    });
  }
}

}  // namespace
