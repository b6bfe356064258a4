// Rule 9 to the element: what waits, what launches, what is direct; and in which order callbacks run.
#include <gtest/gtest.h>

#include "worker.h"

using namespace harness;

namespace {

using Places = std::vector<size_t>;

/// Bytes of a bucket that takes `numel` F32 elements of each rank's part.
int64_t capacity(size_t numel, uint32_t size) { return static_cast<int64_t>(numel * 4 * size); }

/// Whether the op is still in an open bucket. Waits for it if it is not.
bool is_open(const Worker &worker, size_t place) {
  const rsb_status status = worker.wait(place);
  EXPECT_TRUE(status == RSB_OK || status == RSB_ERR_NOT_LAUNCHED) << rsb_status_name(status);
  return status == RSB_ERR_NOT_LAUNCHED;
}

class Buckets : public ::testing::TestWithParam<uint32_t> {
 protected:
  uint32_t size() const { return GetParam(); }
};
INSTANTIATE_TEST_SUITE_P(Bucketer, Buckets, ::testing::Values(1u, 2u, 3u),
                         [](const ::testing::TestParamInfo<uint32_t> &info) {
                           return "ranks" + std::to_string(info.param);
                         });

TEST_P(Buckets, OpsWaitUntilFlushAndComeInSubmitOrder) {
  run_ranks(size(), [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (const size_t numel : {5u, 1u, 100u, 3u}) {
      worker.submit(Op::f32(numel));
    }
    EXPECT_TRUE(worker.called().empty());
    EXPECT_TRUE(is_open(worker, 0) && is_open(worker, 3));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3}));
  });
}

TEST_P(Buckets, ExactlyFullLaunchesAtOnce) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::f32(3));
    worker.submit(Op::f32(4));
    EXPECT_TRUE(is_open(worker, 1)) << "7 of 8";
    worker.submit(Op::f32(1));
    EXPECT_TRUE(worker.called().empty()) << "launched is not called back";
    EXPECT_FALSE(is_open(worker, 2)) << "8 of 8";
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
    worker.finish();
  });
}

TEST_P(Buckets, OneOverLaunchesTheOpenBucketFirst) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::f32(5));
    worker.submit(Op::f32(4));
    EXPECT_TRUE(is_open(worker, 1));
    EXPECT_FALSE(is_open(worker, 0));
    EXPECT_EQ(worker.called(), (Places{0}));
    worker.submit(Op::f32(3));
    EXPECT_TRUE(is_open(worker, 2)) << "7 of 8";
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
  });
}

TEST_P(Buckets, WholeBucketOpIsBucketed) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::f32(1));
    worker.submit(Op::f32(8));
    EXPECT_TRUE(worker.called().empty()) << "not direct: both buckets are launched and in flight";
    EXPECT_FALSE(is_open(worker, 1));
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    worker.finish();
  });
}

TEST_P(Buckets, LargerThanABucketIsDirect) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::f32(1));
    worker.submit(Op::f32(9));
    EXPECT_EQ(worker.called(), (Places{1})) << "before the earlier op that waits";
    EXPECT_TRUE(is_open(worker, 0));
    worker.submit(Op::f32(100000));
    EXPECT_EQ(worker.called(), (Places{1, 2}));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{1, 2, 0}));
  });
}

TEST_P(Buckets, CapacityIsRoundedDown) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(9, ranks) - 1);
    worker.submit(Op::f32(8));
    EXPECT_FALSE(is_open(worker, 0)) << "8 fill it";
    worker.submit(Op::f32(9));
    EXPECT_EQ(worker.called(), (Places{0, 1})) << "9 are direct";
    Worker tiny(comm, capacity(1, ranks) - 1, nullptr, 2);
    tiny.submit(Op::f32(1));
    EXPECT_EQ(tiny.calls(0), 1u) << "not one element fits";
    Worker one(comm, capacity(1, ranks), nullptr, 3);
    one.submit(Op::f32(1));
    EXPECT_EQ(one.calls(0), 0u) << "one element fits";
    one.finish();
    worker.finish();
  });
}

TEST_P(Buckets, ElementsAreCountedInTheirDtype) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::of(4, RSB_DTYPE_F64));
    EXPECT_FALSE(is_open(worker, 0));
    worker.submit(Op::of(15, RSB_DTYPE_BF16));
    EXPECT_TRUE(is_open(worker, 1));
    worker.submit(Op::of(1, RSB_DTYPE_BF16));
    EXPECT_FALSE(is_open(worker, 2));
    worker.submit(Op::of(33, RSB_DTYPE_U8));
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3}));
    worker.submit(Op::of(5, RSB_DTYPE_F64));
    EXPECT_EQ(worker.calls(4), 1u);
    worker.finish();
  });
}

TEST_P(Buckets, FlatOpsTakeTheirShard) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    Op op = Op::f32(7 * ranks + 1);
    op.flat = true;
    worker.submit(op);
    EXPECT_FALSE(is_open(worker, 0)) << "its shard has 8 elements";
    op.numel = 8 * ranks + 1;
    worker.submit(op);
    EXPECT_EQ(worker.calls(1), 1u) << "its shard has 9";
    worker.finish();
  });
}

TEST_P(Buckets, BucketingOff) {
  run_ranks(size(), [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    for (size_t i = 0; i < 6; ++i) {
      const size_t op = worker.submit(Op::f32(i * i));
      EXPECT_EQ(worker.calls(op), 1u);
    }
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3, 4, 5}));
    worker.finish();
  });
}

TEST_P(Buckets, ZeroElementsWaitLikeAnyOther) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(2, ranks));
    worker.submit(Op::f32(0));
    EXPECT_TRUE(is_open(worker, 0));
    worker.launch();
    EXPECT_FALSE(is_open(worker, 0)) << "a bucket of nothing is launched, too";
    worker.submit(Op::f32(1));
    worker.submit(Op::f32(0));
    EXPECT_TRUE(is_open(worker, 2));
    worker.submit(Op::f32(1));
    EXPECT_FALSE(is_open(worker, 3));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3}));
  });
}

TEST_P(Buckets, ZeroElementsNeedNoPointers) {
  run_ranks(size(), [](uint32_t, rsb_comm *comm) {
    Bucketer bucketer(0);
    struct Seen {
      int calls;
      size_t numel;
      rsb_status status;
    } seen = {0, 99, RSB_PENDING};
    const rsb_callback callback = [](void *user_data, const rsb_result *result) {
      auto &s = *static_cast<Seen *>(user_data);
      s = {s.calls + 1, result->numel, result->status};
    };
    EXPECT_RSB_OK(rsb_bucketer_reduce_scatter_async(bucketer, comm, nullptr, 0, RSB_DTYPE_F32,
                                                    RSB_OP_SUM, callback, &seen, nullptr));
    EXPECT_EQ(seen.calls, 0);
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    EXPECT_EQ(seen.calls, 1);
    EXPECT_EQ(seen.numel, 0u);
    EXPECT_EQ(seen.status, RSB_OK);
  });
}

TEST_P(Buckets, AThirdBucketCompletesTheOldest) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(4, ranks));
    worker.submit(Op::f32(4));
    EXPECT_EQ(worker.called(), Places{});
    worker.submit(Op::of(2, RSB_DTYPE_F64));
    EXPECT_EQ(worker.called(), Places{});
    worker.submit(Op::f32(3));
    worker.submit(Op::f32(1));
    EXPECT_EQ(worker.called(), (Places{0})) << "dtypes share the two places";
    worker.submit(Op::of(4, RSB_DTYPE_I32));
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    worker.submit(Op::f32(1));
    worker.submit(Op::f32(4));
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3, 4})) << "one submit, two launches";
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3, 4, 5, 6}));
  });
}

TEST_P(Buckets, LaunchTakesOpenBucketsInTheOrderOfTheirFirstSubmit) {
  run_ranks(size(), [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::of(3, RSB_DTYPE_F64));                  // 0: bucket a
    worker.submit(Op::of(3, RSB_DTYPE_F32));                  // 1: bucket b
    worker.submit(Op::of(3, RSB_DTYPE_F64));                  // 2: bucket a
    worker.submit(Op::of(3, RSB_DTYPE_F32, RSB_OP_MAX));      // 3: bucket c
    worker.submit(Op::of(3, RSB_DTYPE_F32));                  // 4: bucket b
    worker.launch();
    EXPECT_EQ(worker.called(), (Places{0, 2})) << "the third launch completes the oldest";
    worker.launch();
    EXPECT_EQ(worker.called(), (Places{0, 2})) << "nothing was open";
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 2, 1, 4, 3}));
  });
}

TEST_P(Buckets, DirectRunsWhatWasLaunchedBeforeIt) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(8, ranks));
    worker.submit(Op::f32(2));
    worker.launch();
    worker.submit(Op::of(1, RSB_DTYPE_I32));
    worker.submit(Op::f32(50));
    EXPECT_EQ(worker.called(), (Places{0, 2}));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 2, 1}));
  });
}

TEST_P(Buckets, EmptyFlushAndLaunchAreNoPartOfTheSequence) {
  run_ranks(size(), [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t round = 0; round < 4; ++round) {
      for (size_t i = 0; i < rank * 3; ++i) {
        worker.flush();
        worker.launch();
      }
      worker.submit(Op::f32(round + 1));
      worker.finish();
    }
  });
}

TEST_P(Buckets, WaitRunsThoseUpToItsOp) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(4, ranks));
    worker.submit(Op::f32(1));
    worker.submit(Op::f32(2));
    worker.submit(Op::f32(1));  // full
    worker.submit(Op::f32(4));  // full
    worker.submit(Op::f32(1));
    EXPECT_EQ(worker.wait(1), RSB_OK);
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    EXPECT_EQ(worker.wait(0), RSB_OK) << "done already";
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    EXPECT_EQ(worker.wait(3), RSB_OK);
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3}));
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_NOT_LAUNCHED, worker.wait(4, 0, error), error));
    worker.finish();
    EXPECT_EQ(worker.wait(4), RSB_OK);
  });
}

TEST_P(Buckets, OneBucketerManyRounds) {
  const uint32_t ranks = size();
  run_ranks(ranks, [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, capacity(32, ranks));
    for (uint64_t i = 0; i < 300; ++i) {
      Op op = Op::of(values::hash(i) % 40, i % 3 == 0 ? RSB_DTYPE_F16 : RSB_DTYPE_F32);
      op.flat = i % 7 == 0;
      worker.submit(op);
      if (values::hash(i, 1) % 20 == 0) {
        worker.flush();
      } else if (values::hash(i, 1) % 20 == 1) {
        worker.launch();
      }
    }
    worker.finish();
  });
}

TEST_P(Buckets, SmallStagingOnlySlowsThingsDown) {
  const uint32_t ranks = size();
  rsb_comm_config config = comm_config();
  config.staging_bytes = size_t{64} << 10;
  run_ranks(
      ranks,
      [&](uint32_t, rsb_comm *comm) {
        Worker worker(comm, 0);
        Worker other(comm, capacity(5000, ranks), nullptr, 2);
        for (size_t i = 0; i < 60; ++i) {
          (i % 2 == 0 ? worker : other).submit(Op::of(1500 + i, values::kAllDtypes[i % 8]));
        }
        EXPECT_TRUE(worker.called().empty()) << "staging does not decide when callbacks run";
        worker.finish();
        other.finish();
      },
      &config);
}

}  // namespace
