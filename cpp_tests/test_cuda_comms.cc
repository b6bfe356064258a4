// Several device comms on one GPU in one process, callbacks of device comms, and memory that is given back while
// work is under way.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>

#include "device_worker.h"

using namespace harness;

namespace {

/// One more comm of the same ranks on the same GPU, with streams of its own.
class More {
 public:
  More(const DeviceRank &of, const ncclUniqueId &id, uint64_t flags) : rank(of) {
    rank.producer = rank.device.stream();
    rank.result = rank.device.stream();
    rank.comm = nullptr;
    EXPECT_EQ(ncclCommInitRank(&rank.nccl, static_cast<int>(rank.size), id, static_cast<int>(rank.rank)), ncclSuccess);
    rsb_comm_config config = comm_config();
    config.flags = flags;
    config.stream = rank.producer;
    config.result_stream = rank.result;
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_wrap_nccl(rank.nccl, &config, &rank.comm, error), error));
  }
  ~More() { free(); }
  More(const More &) = delete;
  More &operator=(const More &) = delete;
  void free() {
    if (rank.comm != nullptr) {
      rsb_comm_free(rank.comm);
      EXPECT_EQ(ncclCommDestroy(rank.nccl), ncclSuccess);
    }
    rank.comm = nullptr;
  }
  DeviceRank rank;
};

std::vector<ncclUniqueId> ids(size_t count) {
  std::vector<ncclUniqueId> all(count);
  for (ncclUniqueId &id : all) {
    EXPECT_EQ(ncclGetUniqueId(&id), ncclSuccess);
  }
  return all;
}

constexpr size_t kComms = 3;
using Order = std::array<size_t, kComms>;

class FreedInOrder : public ::testing::TestWithParam<Order> {};
INSTANTIATE_TEST_SUITE_P(Comms, FreedInOrder,
                         ::testing::Values(Order{0, 1, 2}, Order{0, 2, 1}, Order{1, 0, 2}, Order{1, 2, 0},
                                           Order{2, 0, 1}, Order{2, 1, 0}),
                         [](const ::testing::TestParamInfo<Order> &info) {
                           std::string name;
                           for (const size_t each : info.param) {
                             name += std::to_string(each);
                           }
                           return name;
                         });

TEST_P(FreedInOrder, CommsOfOneGpuKeepApart) {
  const std::vector<ncclUniqueId> id = ids(kComms);
  // Ranks 0 and 2 share a GPU, too.
  run_device(3, {}, [&](DeviceRank &rank) {
    std::deque<More> comms;
    std::deque<DeviceWorker> workers;
    for (size_t i = 0; i < kComms; ++i) {
      comms.emplace_back(rank, id[i], i == 1 ? RSB_COMM_EXACT : 0);
      workers.emplace_back(comms[i].rank, i == 2 ? -1 : int64_t{1} << (11 + i));
    }
    DeviceWorker shared(comms[0].rank, 1 << 12);
    const CUstream common = rank.device.stream();
    const auto work = [&](size_t first) {
      for (size_t turn = 0; turn < 6; ++turn) {
        for (size_t left = first; left < kComms; ++left) {
          const size_t c = GetParam()[left];
          // Not behind work of a comm that is held.
          const CUstream other = left == first ? common : nullptr;
          Op o = Op::of(40 + turn * 61, turn % 2 == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_BF16, RSB_OP_AVG);
          o.flags = turn % 3 == 0 ? RSB_SUBMIT_BORROW : 0;
          workers[c].submit(o, turn % 3 == 1 ? other : nullptr);
          shared.use(comms[c].rank);
          shared.submit(o, turn % 3 == 2 ? other : nullptr);
          if (turn % 3 == c) {
            workers[c].launch();
          }
        }
      }
      shared.flush();
    };
    for (size_t first = 0; first < kComms; ++first) {
      const size_t gone = GetParam()[first];
      for (size_t left = first + 1; left < kComms; ++left) {
        fake_cuda_hold(comms[GetParam()[left]].rank.producer);
      }
      work(first);
      workers[gone].finish();
      EXPECT_RSB_OK(workers[gone].free());
      // The others are at work.
      comms[gone].free();
      for (size_t left = first + 1; left < kComms; ++left) {
        const CUstream held = comms[GetParam()[left]].rank.producer;
        EXPECT_FALSE(fake_cuda_idle(held));
        fake_cuda_let_go(held);
      }
    }
    shared.check_all();
  });
}

TEST(Comms, OneFailsAndTheOtherGoesOn) {
  const std::vector<ncclUniqueId> id = ids(2);
  run_device(2, {}, [&](DeviceRank &rank) {
    More bad(rank, id[0], 0), good(rank, id[1], 0);
    DeviceWorker both(bad.rank, 1 << 12), after(good.rank, 1 << 12);
    const size_t lost = both.submit(Op::f32(60));
    both.use(good.rank);
    const size_t kept = both.submit(Op::f32(70)), large = both.submit(Op::f32(3000));
    fake_nccl_async_error(bad.rank.nccl, ncclRemoteError);
    Error error;
    EXPECT_EQ(rsb_bucketer_flush(both, error), RSB_ERR_TRANSPORT);
    EXPECT_EQ(error->native_code, ncclRemoteError);
    EXPECT_EQ(both.status(lost), RSB_ERR_TRANSPORT);
    fake_cuda_wait(good.rank.result);
    for (const size_t place : {kept, large}) {
      EXPECT_RSB_OK(both.status(place));
      EXPECT_EQ(both.result(place), both.expected(place));
    }
    after.submit(Op::f32(33));
    after.finish();
    both.use(bad.rank);
    EXPECT_EQ(both.try_submit(Op::f32(5), error), RSB_ERR_TRANSPORT) << "the first cause stays";
  });
}

/// Submits what waits, in two buckets, and what is direct; rank 1's callbacks run `then`.
void submit_some(DeviceWorker &worker, const DeviceRank &rank, const std::function<void(const rsb_result &)> &then) {
  for (size_t i = 0; i < 5; ++i) {
    Op o = i == 4 ? Op::f32(5000) : Op::of(20 + i, i % 2 == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_I64);
    if (rank.rank == 1) {
      o.then = then;
    }
    worker.submit(o);
  }
}

TEST(Callbacks, AnExceptionPassesAndTheNextCallRunsTheRest) {
  const std::pair<const char *, std::function<void(DeviceWorker &)>> calls[] = {
      {"launch", [](DeviceWorker &w) { w.launch(); }}, {"flush", [](DeviceWorker &w) { w.flush(); }}};
  for (const auto &each : calls) {
    SCOPED_TRACE(each.first);
    run_device(2, {}, [&, call = each.second](DeviceRank &rank) {
      DeviceWorker worker(rank, 1 << 12);
      submit_some(worker, rank, [](const rsb_result &) { throw Thrown{}; });
      for (size_t i = 0; i < (rank.rank == 1 ? 5u : 1u); ++i) {
        EXPECT_EQ(throws([&] { call(worker); }), rank.rank == 1) << i;
        EXPECT_EQ(worker.called().size(), rank.rank == 1 ? i + 1 : 5);
        EXPECT_EQ(worker.stats().collectives_launched, 3u) << "what the other rank waits for is done all the same";
      }
      worker.submit(Op::f32(21));
      worker.finish();
      EXPECT_EQ(worker.called().size(), 6u);
    });
  }
}

TEST(Callbacks, AnExceptionOfASubmitThatFillsABucket) {
  run_device(2, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 800);  // 100 elements for each of two ranks
    Op o = Op::f32(60);
    if (rank.rank == 1) {
      o.then = [](const rsb_result &) { throw Thrown{}; };
    }
    worker.submit(o);
    // DeviceWorker spoils its inputs only if submit returns; so this one is borrowed.
    Op next = Op::f32(60);
    next.flags = RSB_SUBMIT_BORROW;
    EXPECT_EQ(throws([&] { worker.submit(next); }), rank.rank == 1);
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0}));
    worker.flush();
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1})) << "it was accepted";
    fake_cuda_wait_all();
    EXPECT_EQ(worker.result(1), worker.expected(1));
  });
}

TEST(Callbacks, MaySubmitAgainAndGather) {
  run_device(2, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12);
    const CUdeviceptr in = rank.device.memory(values::Bytes(16, 1)), out = rank.device.memory(32);
    std::vector<std::vector<size_t>> inside;
    size_t depth = 0;
    Op o = Op::f32(50);
    o.then = [&](const rsb_result &) {
      if (++depth > 3) {
        return;
      }
      worker.submit(o);  // the next bucket's
      const size_t direct = worker.submit(Op::f32(4000));
      EXPECT_EQ(worker.calls(direct), 0u) << "never one inside another";
      Error error;
      EXPECT_TRUE(answers(RSB_OK,
                          rsb_comm_all_gather(rank.comm, reinterpret_cast<void *>(in), reinterpret_cast<void *>(out),
                                              16, error),
                          error));
    };
    worker.submit(o);
    for (size_t round = 0; round < 3; ++round) {
      worker.flush();
      EXPECT_EQ(worker.called().size(), 2 * round + 2) << "the direct one's right after, the next bucket's not";
    }
    worker.finish();
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 2, 1, 4, 3, 6, 5}));
  });
}

TEST(Callbacks, MayNotEndTheirBucketerButAnother) {
  run_device(2, {}, [](DeviceRank &rank) {
    DeviceWorker worker(rank, 1 << 12), other(rank, 1 << 12);
    const size_t waiting = other.submit(Op::f32(30)), direct = other.submit(Op::f32(4000));
    Op o = Op::f32(50);
    o.then = [&](const rsb_result &) {
      Error error;
      EXPECT_EQ(rsb_bucketer_free(worker), RSB_ERR_REENTRANT);
      EXPECT_EQ(rsb_bucketer_flush(worker, error), RSB_ERR_REENTRANT);
      EXPECT_EQ(rsb_bucketer_release_buffers(worker, error), RSB_ERR_REENTRANT);
      EXPECT_RSB_OK(other.free());
    };
    worker.submit(o);
    worker.submit(Op::f32(60));
    worker.finish();
    EXPECT_EQ(other.status(waiting), RSB_ERR_CANCELLED);
    EXPECT_RSB_OK(other.status(direct)) << "it shared the group of the worker's launch";
    EXPECT_EQ(other.result(direct), other.expected(direct));
  });
}

TEST(Callbacks, AShardOutlivesItsBucketerAndComm) {
  for (const bool result_stream : {false, true}) {
    DeviceOptions options;
    options.result_stream = result_stream;
    run_device(2, options, [](DeviceRank &rank) {
      struct Kept {
        rsb_shard *shard;
        CUdeviceptr data;
      };
      std::vector<Kept> kept;
      std::vector<values::Bytes> expected;
      {
        DeviceWorker worker(rank, 1 << 12);
        for (const size_t numel : {60u, 70u, 4000u}) {
          Op o = Op::f32(numel);
          o.then = [&](const rsb_result &result) {
            kept.push_back({rsb_shard_retain(result.shard), reinterpret_cast<CUdeviceptr>(result.data)});
          };
          expected.push_back(worker.expected(worker.submit(o)));
        }
        worker.finish();
        std::rotate(expected.begin(), expected.begin() + 2, expected.end());  // the direct one came first
      }
      fake_cuda_wait_all();
      rsb_comm_free(rank.comm);
      rank.comm = nullptr;
      fake_cuda_wait_all();
      ASSERT_EQ(kept.size(), 3u);
      for (size_t i = 0; i < kept.size(); ++i) {
        EXPECT_EQ(gpu::Device::read(kept[i].data, expected[i].size()), expected[i]) << i;
        rsb_shard_release(kept[i].shard);
      }
    });
  }
}

TEST(Memory, IsReleasedBehindWorkThatIsUnderWay) {
  for (const uint64_t flags : {uint64_t{0}, uint64_t{RSB_COMM_EXACT}}) {
    DeviceOptions options;
    options.flags = flags;
    run_device(2, options, [](DeviceRank &rank) {
      DeviceWorker worker(rank, 1 << 12);
      const CUstream held = rank.device.stream();
      fake_cuda_hold(held);
      for (int round = 0; round < 3; ++round) {
        worker.submit(Op::f32(60), held);
        worker.submit(Op::f32(4000), held);
        Error error;
        EXPECT_TRUE(answers(RSB_ERR_BUSY, rsb_bucketer_release_buffers(worker, error), error)) << "ops are pending";
        EXPECT_GT(worker.stats().buffer_bytes, 0u);
        worker.flush();
        EXPECT_FALSE(fake_cuda_idle(held));
        Error fine;
        EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_release_buffers(worker, fine), fine));
        EXPECT_EQ(worker.stats().buffer_bytes, 0u);
      }
      fake_cuda_let_go(held);
      worker.check_all();
    });
  }
}

}  // namespace
