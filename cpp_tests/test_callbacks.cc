// Rules 3 and 4: what a callback may do, what it may not, and that each comes exactly once, whatever
// happens in it. (The worker checks order, thread, nesting and count in every test.)
#include <gtest/gtest.h>

#include <stdexcept>

#include "worker.h"

using namespace harness;

namespace {

using Places = std::vector<size_t>;

class Callbacks : public ::testing::TestWithParam<uint32_t> {
 protected:
  void ranks(const RankFn &fn) const { run_ranks(GetParam(), fn); }
};
INSTANTIATE_TEST_SUITE_P(Callbacks, Callbacks, ::testing::Values(1u, 2u, 3u),
                         [](const ::testing::TestParamInfo<uint32_t> &info) {
                           return "ranks" + std::to_string(info.param);
                         });

TEST_P(Callbacks, MaySubmitToTheNextBucket) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    Op op = Op::f32(5);
    op.then = [&](const rsb_result &) {
      worker.submit(Op::f32(6));
      worker.submit(Op::of(7, RSB_DTYPE_I32));
    };
    worker.submit(op);
    worker.submit(Op::f32(8));
    worker.flush();
    EXPECT_EQ(worker.calls(0), 1u);
    EXPECT_EQ(worker.calls(1), 1u);
    worker.finish();
    EXPECT_EQ(worker.called().size(), 4u);
    EXPECT_EQ(worker.called()[0], 0u);
    EXPECT_EQ(worker.called()[1], 1u);
  });
}

TEST_P(Callbacks, MayFillBucketsAgainAndAgain) {
  const uint32_t size = GetParam();
  ranks([&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, static_cast<int64_t>(4 * 4 * size));
    size_t left = 40;
    Op op;
    op.then = [&](const rsb_result &) {
      for (size_t i = 0; i < 2 && left > 0; ++i) {
        left -= 1;
        Op next = op;
        next.numel = 1 + left % 5;  // 5 are direct
        worker.submit(next);
      }
    };
    op.numel = 3;
    worker.submit(op);
    for (int i = 0; i < 100 && worker.called().size() < 41; ++i) {
      worker.flush();
    }
    worker.finish();
    EXPECT_EQ(worker.called().size(), 41u);
  });
}

TEST_P(Callbacks, ADirectOpComesRightAfterTheRunningOne) {
  const uint32_t size = GetParam();
  ranks([&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, static_cast<int64_t>(4 * 16 * size));
    Op op = Op::f32(5);
    op.then = [&](const rsb_result &) {
      const size_t direct = worker.submit(Op::f32(17));
      EXPECT_EQ(worker.calls(direct), 0u) << "inside the running one";
    };
    worker.submit(op);            // 0, submits 3
    worker.submit(Op::f32(1));    // 1
    worker.submit(Op::of(2, RSB_DTYPE_F64));  // 2, another bucket
    worker.flush();
    EXPECT_EQ(worker.called(), (Places{0, 3, 1, 2}));
    worker.finish();
  });
}

TEST_P(Callbacks, ADirectOpInADirectOpsCallback) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    Op inner = Op::f32(20);
    Op outer = Op::f32(10);
    outer.then = [&](const rsb_result &) {
      worker.submit(inner);
      worker.submit(inner);
    };
    worker.submit(outer);
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
    worker.finish();
  });
}

TEST_P(Callbacks, OwnBucketerRefusesWhatWouldNest) {
  ranks([](uint32_t, rsb_comm *comm) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
      Worker worker(comm, bucket_bytes);
      size_t checks = 0;
      Op op = Op::f32(5);
      op.then = [&](const rsb_result &result) {
        size_t completed = 0;
        const rsb_status statuses[] = {
            rsb_bucketer_launch(worker, nullptr),
            rsb_bucketer_flush(worker, nullptr),
            rsb_bucketer_poll(worker, &completed, nullptr),
            rsb_bucketer_wait(worker, result.ticket, 0, nullptr),
            rsb_bucketer_release_buffers(worker, nullptr),
            rsb_bucketer_free(worker),
        };
        for (const rsb_status status : statuses) {
          EXPECT_EQ(status, RSB_ERR_REENTRANT) << "call " << checks;
          checks += 1;
        }
        Error error;
        EXPECT_TRUE(answers(RSB_ERR_REENTRANT, rsb_bucketer_flush(worker, error), error));
      };
      worker.submit(op);
      worker.submit(Op::f32(6));
      worker.finish();
      EXPECT_EQ(checks, 6u);
      worker.submit(Op::f32(7));
      worker.finish();
    }
  });
}

TEST_P(Callbacks, MayAsk) {
  const uint32_t size = GetParam();
  ranks([&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    size_t asked = 0;
    Op op = Op::f32(5);
    op.then = [&](const rsb_result &result) {
      asked += 1;
      EXPECT_EQ(rsb_comm_rank(comm), rank);
      EXPECT_EQ(rsb_comm_size(comm), size);
      EXPECT_EQ(rsb_comm_status(comm, nullptr), RSB_OK);
      rsb_stats stats = {};
      EXPECT_EQ(rsb_bucketer_stats(worker, &stats, sizeof stats), RSB_OK);
      EXPECT_EQ(stats.ops_submitted, 2u);
      rsb_shard_release(rsb_shard_retain(result.shard));
    };
    worker.submit(op);
    worker.submit(Op::f32(6));
    worker.finish();
    EXPECT_EQ(asked, 1u);
  });
}

TEST_P(Callbacks, MayUseAnotherBucketerAndAllGather) {
  const uint32_t size = GetParam();
  ranks([&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0, nullptr, 1);
    Worker other(comm, 0, nullptr, 2);
    std::vector<uint32_t> all(size, 99);
    Op op = Op::f32(5);
    op.then = [&](const rsb_result &) {
      other.submit(Op::f32(9));
      other.flush();
      EXPECT_EQ(other.called().size(), 1u);
      EXPECT_RSB_OK(rsb_comm_all_gather(comm, &rank, all.data(), sizeof rank, nullptr));
    };
    worker.submit(op);
    worker.submit(Op::f32(6));
    worker.finish();
    for (uint32_t from = 0; from < size; ++from) {
      EXPECT_EQ(all[from], from);
    }
    other.finish();
  });
}

TEST_P(Callbacks, ATrainingStepInCallbacks) {
  // The sharded step: reduce, update in the callback, gather; several rounds.
  const uint32_t size = GetParam();
  ranks([&](uint32_t rank, rsb_comm *comm) {
    std::vector<float> weights(size * 8, 0.0F);
    for (int round = 0; round < 5; ++round) {
      Worker worker(comm, 0, nullptr, static_cast<uint64_t>(round));
      Op op = Op::f32(8);
      op.then = [&](const rsb_result &result) {
        const auto *gradient = static_cast<const float *>(result.data);
        float *mine = weights.data() + rank * 8;
        for (size_t i = 0; i < 8; ++i) {
          mine[i] += gradient[i];
        }
        EXPECT_RSB_OK(rsb_comm_all_gather(comm, mine, weights.data(), 8 * sizeof(float), nullptr));
      };
      worker.submit(op);
      worker.finish();
    }
    float sum = 0.0F;
    for (const float w : weights) {
      sum += w;
    }
    std::vector<float> sums(size);
    EXPECT_RSB_OK(rsb_comm_all_gather(comm, &sum, sums.data(), sizeof sum, nullptr));
    for (const float s : sums) {
      EXPECT_EQ(s, sums[0]) << "ranks hold different weights";
    }
  });
}

Op throwing(size_t numel) {
  Op op = Op::f32(numel);
  op.then = [](const rsb_result &result) { throw std::runtime_error("tag " + std::to_string(result.tag)); };
  return op;
}

std::string caught(const std::function<void()> &call) {
  try {
    call();
  } catch (const std::runtime_error &e) {
    return e.what();
  }
  return "nothing";
}

TEST_P(Callbacks, AnExceptionReachesTheCallerOfFlush) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(1));
    worker.submit(throwing(2));
    worker.submit(Op::of(3, RSB_DTYPE_F64));
    worker.submit(Op::f32(4));
    EXPECT_EQ(caught([&] { rsb_bucketer_flush(worker, nullptr); }), "tag 2");
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 3, 2}));
    worker.submit(Op::f32(5));
    worker.finish();
  });
}

TEST_P(Callbacks, EveryOpThrows) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 5; ++i) {
      worker.submit(throwing(i));
    }
    for (size_t i = 0; i < 5; ++i) {
      EXPECT_EQ(caught([&] { rsb_bucketer_flush(worker, nullptr); }), "tag " + std::to_string(i + 1));
      EXPECT_EQ(worker.called().size(), i + 1);
    }
    worker.finish();
  });
}

TEST_P(Callbacks, AnExceptionReachesTheCallerOfWait) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(1));
    worker.submit(throwing(2));
    worker.submit(Op::f32(3));
    worker.launch();
    EXPECT_EQ(caught([&] { worker.wait(2); }), "tag 2");
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    EXPECT_EQ(worker.wait(1), RSB_OK) << "it counts as called";
    EXPECT_EQ(worker.wait(2), RSB_OK);
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
    worker.finish();
  });
}

TEST_P(Callbacks, AnExceptionReachesTheCallerOfADirectSubmit) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    worker.submit(Op::f32(1));
    EXPECT_EQ(caught([&] { worker.submit(throwing(30)); }), "tag 2");
    EXPECT_EQ(worker.calls(1), 1u);
    worker.submit(Op::f32(4));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
  });
}

TEST_P(Callbacks, AnExceptionReachesTheSubmitThatCompletesTheOldest) {
  const uint32_t size = GetParam();
  ranks([&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, static_cast<int64_t>(4 * 4 * size));
    worker.submit(throwing(1));   // 0, first bucket
    worker.submit(Op::f32(3));    // 1, fills it
    worker.submit(Op::f32(4));    // 2, second bucket
    EXPECT_EQ(caught([&] { worker.submit(Op::f32(4)); }), "tag 1");  // 3, third bucket
    EXPECT_EQ(worker.called(), (Places{0}));
    worker.flush();
    EXPECT_EQ(worker.calls(1), 1u);
    EXPECT_EQ(worker.calls(2), 1u);
    worker.submit(Op::f32(2));
    worker.finish();
  });
}

TEST_P(Callbacks, AnExceptionOfAnOpSubmittedInACallback) {
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    Op outer = Op::f32(3);
    outer.then = [&](const rsb_result &) { worker.submit(throwing(4)); };
    EXPECT_EQ(caught([&] { worker.submit(outer); }), "tag 2");
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    worker.finish();
  });
}

TEST_P(Callbacks, SubmitsFromOtherThreadsWhileACallbackRuns) {
  // Their place in rule 1's order is fixed here by the callback, which lets the other thread in.
  ranks([](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    Bucketer &bucketer = worker.bucketer();
    const uint32_t size = rsb_comm_size(comm);
    std::vector<float> input(size, 1.0F);
    std::atomic<int> late{0};
    const rsb_callback count = [](void *user_data, const rsb_result *result) {
      EXPECT_EQ(result->status, RSB_OK);
      EXPECT_EQ(*static_cast<const float *>(result->data) >= 1.0F, true);
      *static_cast<std::atomic<int> *>(user_data) += 1;
    };
    Op op = Op::f32(5);
    op.then = [&](const rsb_result &) {
      std::thread other([&] {
        rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
        args.flat_input = input.data();
        args.numel = size;
        args.dtype = RSB_DTYPE_F32;
        args.op = RSB_OP_SUM;
        args.callback = count;
        args.user_data = &late;
        rsb_ticket ticket = 0;
        EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
      });
      other.join();
      EXPECT_EQ(late, 0);
    };
    worker.submit(op);
    worker.submit(Op::f32(6));
    worker.flush();
    worker.finish();
    EXPECT_EQ(late, 1);
  });
}

TEST(CallbackErrors, ThrowingOnErrorsToo) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(throwing(3));
    worker.submit(throwing(4));
    rsb_comm_abort(comm);
    EXPECT_EQ(caught([&] { rsb_bucketer_flush(worker, nullptr); }), "tag 1");
    EXPECT_EQ(caught([&] { rsb_bucketer_flush(worker, nullptr); }), "tag 2");
    EXPECT_EQ(worker.status(0), RSB_ERR_ABORTED);
    EXPECT_EQ(worker.status(1), RSB_ERR_ABORTED);
    EXPECT_EQ(worker.called(), (Places{0, 1}));
  });
}

}  // namespace
