// Custom engines: every mix of what an engine can do, requests that end late and in any order, and
// engines that fail. The engine notes each breach of the rules its caller promised.
#include <gtest/gtest.h>

#include <algorithm>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

constexpr uint64_t kReduce = RSB_TRANSPORT_REDUCE_SCATTER;
constexpr uint64_t kAllToAll = RSB_TRANSPORT_ALL_TO_ALL;
constexpr uint64_t kGather = RSB_TRANSPORT_ALL_GATHER;

struct Mix {
  const char *name;
  uint64_t flags;
  uint64_t comm_flags;
  FakeEngine::Order order;
};

/// GoogleTest would print the bytes, padding included.
void PrintTo(const Mix &mix, std::ostream *out) { *out << mix.name; }

class Mixes : public ::testing::TestWithParam<Mix> {
 protected:
  FakeEngine::Options options() const {
    FakeEngine::Options options;
    options.flags = GetParam().flags;
    options.order = GetParam().order;
    return options;
  }
  uint64_t comm_flags() const { return GetParam().comm_flags; }
};

using Order = FakeEngine::Order;
INSTANTIATE_TEST_SUITE_P(
    Custom, Mixes,
    ::testing::Values(
        Mix{"Reduce", kReduce, 0, Order::kAtOnce}, Mix{"AllToAll", kAllToAll, 0, Order::kAtOnce},
        Mix{"Both", kReduce | kAllToAll, 0, Order::kDelayed},
        Mix{"ReduceGather", kReduce | kGather, 0, Order::kDelayed},
        Mix{"AllToAllGather", kAllToAll | kGather, 0, Order::kNewestFirst},
        Mix{"BothGather", kReduce | kAllToAll | kGather, 0, Order::kNewestFirst},
        Mix{"AllToAllExact", kAllToAll, RSB_COMM_EXACT, Order::kDelayed},
        Mix{"BothExact", kReduce | kAllToAll, RSB_COMM_EXACT, Order::kNewestFirst},
        Mix{"BothGatherExact", kReduce | kAllToAll | kGather, RSB_COMM_EXACT, Order::kDelayed}),
    [](const ::testing::TestParamInfo<Mix> &info) { return std::string(info.param.name); });

void submit_everything(Worker &worker, values::Data data) {
  const size_t numels[] = {1, 3, 0, 16, 33};
  for (const rsb_dtype dtype : values::kAllDtypes) {
    for (const rsb_op op : values::kAllOps) {
      if (values::takes(dtype, op)) {
        for (const size_t numel : numels) {
          Op o = Op::of(numel, dtype, op);
          o.data = data;
          o.flat = numel == 33;
          o.output = numel == 3;
          o.scale = values::is_float(dtype) && numel == 16 ? 0.5 : 0.0;
          worker.submit(o);
        }
      }
    }
  }
}

TEST_P(Mixes, EveryDtypeAndOpIsRight) {
  for (const uint32_t size : {1u, 2u, 3u}) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{200}, int64_t{1} << 20}) {
      FakeEngine engine(size, options());
      run_custom(engine, size, comm_flags(), [&](uint32_t, rsb_comm *comm) {
        Worker worker(comm, bucket_bytes);
        submit_everything(worker, values::Data::kExact);
        worker.finish();
      });
    }
  }
}

TEST(Custom, ExactMeansRankOrder) {
  // By the flag, or because the engine moves bytes only.
  const std::pair<uint64_t, uint64_t> exact[] = {{kAllToAll, 0},
                                                 {kAllToAll | kGather, 0},
                                                 {kAllToAll, RSB_COMM_EXACT},
                                                 {kReduce | kAllToAll, RSB_COMM_EXACT},
                                                 {kReduce | kAllToAll | kGather, RSB_COMM_EXACT}};
  for (const auto &flags : exact) {
    FakeEngine::Options options;
    options.flags = flags.first;
    options.order = Order::kDelayed;
    FakeEngine engine(3, options);
    run_custom(engine, 3, flags.second, [&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, 500);
      submit_everything(worker, values::Data::kRough);
      worker.finish();
    });
    for (const FakeEngine::Request &request : engine.requests()) {
      EXPECT_NE(request.kind, uint32_t{RSB_COLL_REDUCE_SCATTER});
    }
  }
}

TEST_P(Mixes, ManyBucketsInFlight) {
  FakeEngine engine(3, options());
  run_custom(engine, 3, comm_flags(), [&](uint32_t, rsb_comm *comm) {
    Worker first(comm, 4 * 3 * 16, nullptr, 1);
    Worker second(comm, 4 * 3 * 8, nullptr, 2);
    for (size_t i = 0; i < 120; ++i) {
      Worker &worker = i % 3 == 0 ? second : first;
      worker.submit(Op::of(1 + i % 9, i % 5 == 0 ? RSB_DTYPE_F64 : RSB_DTYPE_F32));
      if (i % 17 == 0) {
        worker.launch();
      }
      if (i % 50 == 49) {
        worker.flush();
      }
    }
    first.finish();
    second.finish();
  });
}

TEST_P(Mixes, AllGather) {
  const uint32_t size = 3;
  FakeEngine engine(size, options());
  const bool can = (GetParam().flags & kGather) != 0;
  run_custom(engine, size, comm_flags(), [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(7));
    for (uint64_t round = 0; round < 4; ++round) {
      const uint64_t mine = values::hash(rank, round);
      uint64_t all[size] = {};
      Error error;
      const rsb_status status = rsb_comm_all_gather(comm, &mine, all, sizeof mine, error);
      ASSERT_TRUE(answers(can ? RSB_OK : RSB_ERR_UNSUPPORTED, status, error));
      for (uint32_t from = 0; can && from < size; ++from) {
        EXPECT_EQ(all[from], values::hash(from, round));
      }
    }
    EXPECT_EQ(worker.calls(op), 0u);
    worker.finish();
  });
}

TEST(Custom, ReduceDtypesSendsTheRestThroughAllToAll) {
  FakeEngine::Options options;
  options.flags = kReduce | kAllToAll;
  options.reduce_dtypes = UINT64_C(1) << RSB_DTYPE_F32 | UINT64_C(1) << RSB_DTYPE_I64;
  FakeEngine engine(2, options);
  run_custom(engine, 2, 0, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 300);
    submit_everything(worker, values::Data::kExact);
    worker.finish();
  });
  size_t reduced = 0;
  for (const FakeEngine::Request &request : engine.requests()) {
    reduced += request.kind == RSB_COLL_REDUCE_SCATTER ? 1 : 0;
  }
  EXPECT_GT(reduced, 0u) << "F32 and I64 are for REDUCE_SCATTER";
}

TEST(Custom, MaxCountIsNeverExceeded) {
  for (const uint64_t flags : {kReduce, kAllToAll, kReduce | kAllToAll | kGather}) {
    FakeEngine::Options options;
    options.flags = flags;
    options.max_count = 256;
    FakeEngine engine(2, options);
    run_custom(engine, 2, 0, [](uint32_t, rsb_comm *comm) {
      Worker worker(comm, 0);
      for (size_t i = 0; i < 40; ++i) {
        worker.submit(Op::of(20 + i, i % 4 == 0 ? RSB_DTYPE_F16 : RSB_DTYPE_F32));
      }
      worker.finish();
      Worker direct(comm, -1, nullptr, 2);
      direct.submit(Op::f32(256));
      direct.submit(Op::f32(1001));
      Op flat = Op::f32(2001);
      flat.flat = true;
      flat.scale = 0.5;
      direct.submit(flat);
      direct.finish();
    });
  }
}

TEST(Custom, LargeFlatInputGoesToTheEngineUncopied) {
  FakeEngine::Options options;
  options.flags = kReduce;
  FakeEngine engine(2, options);
  std::atomic<const void *> given{nullptr};
  run_custom(engine, 2, 0, [&](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(-1);
    std::vector<float> input(2 * 5000);
    for (size_t i = 0; i < input.size(); ++i) {
      input[i] = static_cast<float>(values::hash(rank, i) % 64);
    }
    std::vector<float> output(5000);
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = input.data();
    args.output = output.data();
    args.numel = input.size();
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    if (rank == 0) {
      given = input.data();
    }
    rsb_ticket ticket = 0;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
    for (size_t i = 0; i < output.size(); ++i) {
      const size_t at = rank * output.size() + i;
      ASSERT_EQ(output[i], static_cast<float>(values::hash(0, at) % 64 + values::hash(1, at) % 64));
    }
  });
  const auto requests = engine.requests();
  EXPECT_TRUE(std::any_of(requests.begin(), requests.end(), [&](const FakeEngine::Request &request) {
    return request.kind == RSB_COLL_REDUCE_SCATTER && request.send == given.load();
  }));
}

/// After the engine failed with 77: every op was called back with it, and so is every later call.
void expect_failed(Worker &worker, rsb_comm *comm, bool described) {
  Error error;
  EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, rsb_comm_status(comm, error), error));
  EXPECT_EQ(error->native_code, 77);
  if (described) {
    EXPECT_NE(error.message().find("the fake engine failed with 77"), std::string::npos)
        << error.message();
  }
  EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, worker.try_submit(Op::f32(2), error), error));
  EXPECT_EQ(error->native_code, 77);
  EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, worker.flush(error), error));
  EXPECT_EQ(error->native_code, 77);
}

struct Failure {
  const char *name;
  uint64_t start_at;
  uint64_t test_at;
  bool describe;
  uint64_t flags;
};

void PrintTo(const Failure &failure, std::ostream *out) { *out << failure.name; }

class Failures : public ::testing::TestWithParam<Failure> {
 protected:
  FakeEngine::Options options() const {
    FakeEngine::Options options;
    options.flags = GetParam().flags;
    options.fail_start_at = GetParam().start_at;
    options.fail_test_at = GetParam().test_at;
    options.with_describe = GetParam().describe;
    options.with_abort = GetParam().describe;
    return options;
  }
};

INSTANTIATE_TEST_SUITE_P(
    Custom, Failures,
    ::testing::Values(Failure{"Start", 0, UINT64_MAX, true, kReduce},
                      Failure{"Test", UINT64_MAX, 0, true, kReduce},
                      Failure{"StartOfAllToAll", 0, UINT64_MAX, true, kAllToAll},
                      Failure{"TestOfAllToAll", UINT64_MAX, 0, true, kAllToAll},
                      Failure{"StartOfCrossCheck", 0, UINT64_MAX, true, kReduce | kGather},
                      Failure{"TestUndescribed", UINT64_MAX, 0, false, kAllToAll | kGather}),
    [](const ::testing::TestParamInfo<Failure> &info) { return std::string(info.param.name); });

TEST_P(Failures, WaitingOpsGetTheEnginesCode) {
  FakeEngine engine(2, options());
  run_custom(engine, 2, 0, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    int32_t native = 0;
    Op op = Op::f32(9);
    op.then = [&](const rsb_result &result) { native = result.error->native_code; };
    const size_t first = worker.submit(op);
    const size_t second = worker.submit(Op::f32(10));
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, worker.flush(error), error));
    EXPECT_EQ(error->native_code, 77);
    EXPECT_EQ(worker.called(), (std::vector<size_t>{first, second}));
    EXPECT_EQ(worker.status(first), RSB_ERR_TRANSPORT);
    EXPECT_EQ(worker.status(second), RSB_ERR_TRANSPORT);
    EXPECT_EQ(native, 77);
    expect_failed(worker, comm, GetParam().describe);
  });
}

TEST_P(Failures, DirectOpIsCalledBackIfAndOnlyIfAccepted) {
  FakeEngine engine(2, options());
  run_custom(engine, 2, 0, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    Error error;
    const rsb_status status = worker.try_submit(Op::f32(100), error);
    EXPECT_TRUE(answers(status == RSB_OK ? RSB_OK : RSB_ERR_TRANSPORT, status, error));
    EXPECT_EQ(worker.calls(0), status == RSB_OK ? 1u : 0u);
    EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, worker.flush(error), error));
    expect_failed(worker, comm, GetParam().describe);
  });
}

TEST(Custom, FailureInTheMiddleKeepsWhatWasDone) {
  FakeEngine::Options options;
  options.flags = kReduce;
  options.fail_start_at = 3;
  FakeEngine engine(2, options);
  run_custom(engine, 2, 0, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    size_t good = 0;
    Error error;
    while (worker.submitted() < 10 && worker.try_submit(Op::f32(4), error) == RSB_OK &&
           worker.status(worker.submitted() - 1) == RSB_OK) {
      good += 1;
    }
    EXPECT_GE(good, 1u);
    EXPECT_LE(good, 3u);
    EXPECT_TRUE(answers(RSB_ERR_TRANSPORT, worker.flush(error), error));
    expect_failed(worker, comm, true);
  });
}

TEST(Custom, AbortIsPassedOnAndEndsWaits) {
  FakeEngine::Options options;
  options.flags = kReduce;
  FakeEngine engine(2, options);
  Gate submitted;
  run_custom(engine, 2, 0, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(9));
    submitted.open();
    ASSERT_TRUE(submitted.wait(2));
    rsb_comm_abort(comm);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error));
    EXPECT_EQ(worker.status(op), RSB_ERR_ABORTED);
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, rsb_comm_status(comm, error), error));
    EXPECT_GE(engine.aborts(rank), 1u);
  });
}

TEST(Custom, APeerThatNeverComesIsATimeout) {
  FakeEngine engine(2, {});
  Gate done;
  run_custom(
      engine, 2, 0,
      [&](uint32_t rank, rsb_comm *comm) {
        if (rank == 1) {
          ASSERT_TRUE(done.wait());
          return;
        }
        Worker worker(comm, 0);
        const size_t op = worker.submit(Op::f32(9));
        Error error;
        EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, worker.flush(error), error));
        EXPECT_EQ(worker.status(op), RSB_ERR_TIMEOUT);
        EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, rsb_comm_status(comm, error), error));
        done.open();
      },
      200000000);
}

TEST(Custom, CrossCheckOverAllGatherFindsDifferences) {
  FakeEngine::Options options;
  options.flags = kReduce | kGather;
  FakeEngine engine(3, options);
  run_custom(engine, 3, 0, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    Op op = Op::f32(8);
    op.tag = rank == 2 ? 71 : 70;
    worker.submit(op);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_DESYNC, worker.flush(error), error));
    EXPECT_EQ(worker.status(0), RSB_ERR_DESYNC);
    EXPECT_TRUE(answers(RSB_ERR_DESYNC, rsb_comm_status(comm, error), error));
  });
}

TEST(Custom, ReleaseComesWhenTheCommIsGone) {
  FakeEngine engine(1, {});
  const rsb_transport transport = engine.transport(0);
  rsb_comm *comm = nullptr;
  ASSERT_RSB_OK(rsb_comm_create_custom(&transport, 0, 1, nullptr, &comm, nullptr));
  {
    Worker worker(comm, 0);
    worker.submit(Op::f32(12));
    worker.finish();
    worker.submit(Op::f32(13));
    rsb_comm_free(comm);
    EXPECT_EQ(engine.releases(0), 0u) << "an op that waits keeps the comm alive";
    worker.finish();
    EXPECT_EQ(engine.releases(0), 1u) << "an idle bucketer does not";
  }
  EXPECT_EQ(engine.releases(0), 1u);
  EXPECT_TRUE(engine.breaches().empty());
}

}  // namespace
