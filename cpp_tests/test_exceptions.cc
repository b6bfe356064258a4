// Callbacks that throw on one rank only: ranks stay in step, and nothing is lost or done twice.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "on.h"

using namespace harness;

namespace {

class OneRankThrows : public ::testing::TestWithParam<std::tuple<On, uint32_t>> {
 protected:
  uint32_t size() const { return std::get<1>(GetParam()); }
  /// `fn` on every rank, once with each rank as the one that throws.
  void each(const std::function<void(bool throwing, uint32_t rank, rsb_comm *comm)> &fn) const {
    for (uint32_t thrower = 0; thrower < size(); ++thrower) {
      run_on(std::get<0>(GetParam()), size(), [&](uint32_t rank, rsb_comm *comm) {
        SCOPED_TRACE("rank " + std::to_string(thrower) + " throws");
        fn(rank == thrower, rank, comm);
      });
    }
  }
  int64_t bucket_of(size_t floats) const { return static_cast<int64_t>(floats * 4 * size()); }
};

INSTANTIATE_TEST_SUITE_P(
    Exceptions, OneRankThrows,
    ::testing::Combine(::testing::Values(On::kLocal, On::kShm, On::kReduceScatter, On::kAllToAll),
                       ::testing::Values(1u, 2u, 3u)),
    [](const ::testing::TestParamInfo<std::tuple<On, uint32_t>> &info) {
      return name_of(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
    });

Op throwing_if(bool throwing, Op op) {
  if (throwing) {
    op.then = [](const rsb_result &) { throw Thrown{}; };
  }
  return op;
}

constexpr size_t kBuckets = 5;
constexpr size_t kOps = 10;

/// Two ops in each of five buckets; the callback of op `at` throws.
void fill_buckets(Worker &worker, bool throwing, size_t at) {
  const rsb_dtype dtypes[kBuckets] = {RSB_DTYPE_F32, RSB_DTYPE_I64, RSB_DTYPE_F16, RSB_DTYPE_F64, RSB_DTYPE_I8};
  for (size_t i = 0; i < kOps; ++i) {
    worker.submit(throwing_if(throwing && i == at, Op::of(3 + i, dtypes[i % kBuckets])));
  }
}

const std::vector<size_t> kLaunchOrder = {0, 5, 1, 6, 2, 7, 3, 8, 4, 9};

TEST_P(OneRankThrows, AFlushHasLaunchedAllBuckets) {
  for (size_t at = 0; at < kOps; ++at) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, 0);
      fill_buckets(worker, throwing, at);
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(worker.bucketer().stats().collectives_launched, kBuckets);
      expect_in_step(rank, comm);
      worker.flush();
      EXPECT_EQ(worker.called(), kLaunchOrder);
      worker.submit(Op::f32(21));
      worker.finish();
      expect_all_called(worker);
    });
  }
}

TEST_P(OneRankThrows, ALaunchHasLaunchedAllBuckets) {
  // With more than two buckets a launch completes the oldest: 0 and 5, then 1 and 6, then 2 and 7.
  for (const size_t at : {0u, 5u, 1u, 6u, 2u, 7u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, 0);
      fill_buckets(worker, throwing, at);
      EXPECT_EQ(throws([&] { worker.launch(); }), throwing);
      EXPECT_EQ(worker.bucketer().stats().collectives_launched, kBuckets);
      expect_in_step(rank, comm);
      worker.submit(Op::f32(21));
      worker.finish();
      expect_all_called(worker);
      EXPECT_EQ(worker.called().size(), kOps + 1);
      EXPECT_TRUE(std::equal(kLaunchOrder.begin(), kLaunchOrder.end(), worker.called().begin()));
    });
  }
}

TEST_P(OneRankThrows, EveryCallback) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < kOps; ++i) {
      worker.submit(throwing_if(throwing, Op::of(1 + i, i % 2 == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_I32)));
    }
    for (size_t i = 0; throwing && i < kOps; ++i) {
      EXPECT_TRUE(throws([&] { worker.flush(); })) << i;
      EXPECT_EQ(worker.called().size(), i + 1);
    }
    worker.finish();
    expect_in_step(rank, comm);
    expect_all_called(worker);
  });
}

TEST_P(OneRankThrows, ALaunchThatFirstRunsWhatIsOwed) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 3; ++i) {
      worker.submit(throwing_if(throwing, Op::f32(5 + i)));
    }
    EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
    EXPECT_EQ(throws([&] { worker.submit(Op::f32(6)); }), throwing);
    EXPECT_EQ(throws([&] { worker.launch(); }), throwing);
    EXPECT_EQ(worker.bucketer().stats().collectives_launched, 2u);
    expect_in_step(rank, comm);
    worker.finish();
    expect_all_called(worker);
  });
}

struct Submit {
  const char *name;
  std::vector<size_t> before;  // of a capacity of 4; the callback of the first throws
  size_t numel;
};

const Submit kSubmits[] = {
    {"fills its bucket", {4, 4}, 4},
    {"does not fit", {4, 4, 3}, 2},
    {"does not fit, then fills", {4, 4, 1}, 4},
    {"direct", {4}, 9},
    {"direct after two", {4, 4}, 9},
    {"direct beside an open bucket", {4, 2}, 9},
};

TEST_P(OneRankThrows, ASubmitTakesItsOpAllTheSame) {
  for (const Submit &submit : kSubmits) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      SCOPED_TRACE(submit.name);
      Worker worker(comm, bucket_of(4));
      for (size_t i = 0; i < submit.before.size(); ++i) {
        worker.submit(throwing_if(throwing && i == 0, Op::f32(submit.before[i])));
      }
      const size_t op = submit.before.size();
      EXPECT_TRUE(worker.called().empty());
      EXPECT_EQ(throws([&] { worker.submit(Op::f32(submit.numel)); }), throwing);
      EXPECT_EQ(worker.calls(0), 1u);
      EXPECT_NE(worker.ticket(op), 0u);
      if (throwing) {
        EXPECT_EQ(worker.calls(op), 0u);
      }
      EXPECT_EQ(worker.bucketer().stats().ops_submitted, op + 1);
      expect_in_step(rank, comm);
      worker.flush();
      EXPECT_RSB_OK(worker.wait(op));
      worker.submit(Op::f32(3));
      worker.submit(Op::f32(8));
      worker.finish();
      expect_all_called(worker);
    });
  }
}

TEST_P(OneRankThrows, ASubmitThatFirstRunsWhatIsOwed) {
  for (const size_t numel : {2u, 9u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, bucket_of(4));
      worker.submit(throwing_if(throwing, Op::f32(1)));
      worker.submit(throwing_if(throwing, Op::f32(2)));
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(throws([&] { worker.submit(Op::f32(numel)); }), throwing);
      EXPECT_EQ(worker.called().size(), throwing || numel < 4 ? 2u : 3u);
      EXPECT_NE(worker.ticket(2), 0u);
      expect_in_step(rank, comm);
      worker.finish();
      expect_all_called(worker);
      EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2}));
    });
  }
}

TEST_P(OneRankThrows, ADirectOpComesAfterTheBucketsBeforeIt) {
  each([&](bool throwing, uint32_t, rsb_comm *comm) {
    Worker worker(comm, bucket_of(4));
    for (size_t i = 0; i < 3; ++i) {
      worker.submit(throwing_if(throwing && i < 2, Op::f32(1)));
    }
    EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
    EXPECT_EQ(throws([&] { worker.submit(Op::f32(9)); }), throwing);
    worker.finish();
    expect_all_called(worker);
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2, 3}));
  });
}

TEST_P(OneRankThrows, ASubmitHasReadItsInputs) {
  for (const size_t numel : {4u, 9u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, bucket_of(4));
      worker.submit(throwing_if(throwing, Op::f32(4)));
      worker.submit(Op::f32(4));
      std::vector<float> input(numel * size());
      for (size_t i = 0; i < input.size(); ++i) {
        input[i] = static_cast<float>(values::hash(rank, i) % 1000);
      }
      std::vector<float> result;
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.flat_input = input.data();
      args.numel = input.size();
      args.dtype = RSB_DTYPE_F32;
      args.op = RSB_OP_SUM;
      args.user_data = &result;
      args.callback = [](void *user_data, const rsb_result *r) {
        const auto *data = static_cast<const float *>(r->data);
        auto &all = *static_cast<std::vector<float> *>(user_data);
        all.insert(all.end(), data, data + r->numel);
      };
      rsb_ticket ticket = 0;
      EXPECT_EQ(throws([&] { EXPECT_RSB_OK(rsb_bucketer_submit(worker, comm, &args, &ticket, nullptr)); }),
                throwing);
      EXPECT_NE(ticket, 0u);
      std::fill(input.begin(), input.end(), -1.0F);
      worker.finish();
      ASSERT_EQ(result.size(), numel) << "one callback";
      for (size_t i = 0; i < numel; ++i) {
        float expected = 0.0F;
        for (uint32_t from = 0; from < size(); ++from) {
          expected += static_cast<float>(values::hash(from, rank * numel + i) % 1000);
        }
        EXPECT_EQ(result[i], expected) << i;
      }
    });
  }
}

/// A call after the one that threw, which runs what that one owes; made on the ranks that share it.
struct Next {
  const char *name;
  bool shared;  // part of rule 1's sequence: every rank makes it
  std::function<void(Worker &)> call;
};

const Next kNexts[] = {
    {"flush", true, [](Worker &worker) { worker.flush(); }},
    {"launch", true, [](Worker &worker) { worker.launch(); }},
    {"a waiting submit", true, [](Worker &worker) { worker.submit(Op::f32(11)); }},
    {"a direct submit", true, [](Worker &worker) { worker.submit(Op::f32(5000)); }},
    {"poll", false,
     [](Worker &worker) {
       size_t all = 0;
       for (size_t i = 0; i < 1000000 && all < kOps - 1; ++i) {
         size_t completed = 99;
         EXPECT_RSB_OK(rsb_bucketer_poll(worker, &completed, nullptr));
         all += completed;
       }
       EXPECT_EQ(all, kOps - 1);
     }},
    {"wait for the first", false, [](Worker &worker) { EXPECT_RSB_OK(worker.wait(0)); }},
    {"wait for the last", false, [](Worker &worker) { EXPECT_RSB_OK(worker.wait(kOps - 1)); }},
    {"free", false, [](Worker &worker) { EXPECT_RSB_OK(worker.free()); }},
};

TEST_P(OneRankThrows, TheNextCallRunsWhatAFlushOwes) {
  for (const Next &next : kNexts) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      SCOPED_TRACE(next.name);
      Worker worker(comm, bucket_of(1000));
      fill_buckets(worker, throwing, 0);
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(worker.called().size(), throwing ? 1u : kOps);
      Error error;
      EXPECT_TRUE(answers(throwing ? RSB_ERR_BUSY : RSB_OK, rsb_bucketer_release_buffers(worker, error), error));
      expect_in_step(rank, comm);  // from here on no call needs a peer for what is owed
      if (throwing || next.shared) {
        next.call(worker);
      }
      for (size_t i = 0; i < kOps; ++i) {
        ASSERT_LT(i, worker.called().size());
        EXPECT_EQ(worker.called()[i], kLaunchOrder[i]);
      }
      expect_in_step(rank, comm);
      if (next.shared) {
        worker.finish();
        expect_all_called(worker);
      }
    });
  }
}

TEST_P(OneRankThrows, FreeCanBeTriedAgain) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    rsb_config config = RSB_CONFIG_INIT;
    rsb_bucketer *bucketer = nullptr;
    ASSERT_RSB_OK(rsb_bucketer_create(&config, &bucketer, nullptr));
    size_t calls = 0;
    struct Call {
      bool throwing;
      size_t *calls;
    } call{throwing, &calls};
    const rsb_callback count = [](void *user_data, const rsb_result *result) {
      EXPECT_EQ(result->status, result->tag < 2 ? RSB_OK : RSB_ERR_CANCELLED) << result->tag;
      const Call &call = *static_cast<Call *>(user_data);
      *call.calls += 1;
      if (call.throwing) {
        throw Thrown{};
      }
    };
    std::vector<float> input(7 * size(), static_cast<float>(rank + 1));
    for (uint64_t tag = 0; tag < 4; ++tag) {
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.flat_input = input.data();
      args.numel = input.size();
      args.dtype = RSB_DTYPE_F32;
      args.op = RSB_OP_SUM;
      args.tag = tag;
      args.callback = count;
      args.user_data = &call;
      ASSERT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
      if (tag == 1) {
        ASSERT_RSB_OK(rsb_bucketer_launch(bucketer, nullptr));
      }
    }
    for (size_t i = 0; throwing && i < 4; ++i) {
      EXPECT_TRUE(throws([&] { rsb_bucketer_free(bucketer); })) << i;
      EXPECT_EQ(calls, i + 1);
    }
    EXPECT_RSB_OK(rsb_bucketer_free(bucketer));
    EXPECT_EQ(calls, 4u);
    EXPECT_EQ(rsb_bucketer_free(bucketer), RSB_ERR_BAD_HANDLE);
  });
}

TEST(Exceptions, PollWaitsForNobodyAfterAThrow) {
  // The second bucket's peer comes only after the poll: had the poll waited, it would time out.
  const rsb_comm_config config = comm_config(1000000000);
  for (const bool poll : {true, false}) {
    Gate polled;
    run_ranks(
        2,
        [&](uint32_t rank, rsb_comm *comm) {
          Worker worker(comm, 4 * 4 * 2);
          worker.submit(throwing_if(rank == 0, Op::f32(4)));
          worker.submit(Op::f32(3));
          if (rank == 0) {
            EXPECT_TRUE(throws([&] { worker.flush(); }));
            EXPECT_EQ(worker.called().size(), 1u);
            Error error;
            size_t completed = 99;
            if (poll) {
              EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_poll(worker, &completed, error), error));
              EXPECT_EQ(completed, 0u);
            } else {
              EXPECT_TRUE(answers(RSB_PENDING, worker.wait(1, 0, error), error)) << "its own time is 0";
            }
            polled.open();
          } else {
            ASSERT_TRUE(polled.wait());
          }
          worker.finish();
        },
        &config);
  }
}

}  // namespace
