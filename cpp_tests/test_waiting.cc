// Who waits for whom: a waiting op's submit never does, wait and poll tell what is done, several
// bucketers and comms work side by side; and what stats, release_buffers and free say about it.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstring>

#include "worker.h"

using namespace harness;

namespace {

using Places = std::vector<size_t>;

TEST(Waiting, SubmitOfAWaitingOpNeedsNoPeer) {
  Gate submitted;
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    if (rank == 1) {
      ASSERT_TRUE(submitted.wait()) << "rank 0 waits for rank 1 in its submits";
    }
    Worker worker(comm, 0);
    for (size_t i = 0; i < 50; ++i) {
      worker.submit(Op::f32(i));
    }
    submitted.open();
    worker.finish();
  });
}

TEST(Waiting, ARankThatIsFarAheadIsNotLate) {
  // It may give its peers a moment rather than take more staging; but nobody has to come yet.
  constexpr uint32_t kRanks = 4;
  constexpr size_t kRow = 64 << 10;
  rsb_comm *comms[kRanks];
  rsb_comm_config config = comm_config(50'000);
  Error error;
  ASSERT_RSB_OK(rsb_comm_create_local(kRanks, &config, comms, error));
  {
    Worker worker(comms[0], 0);
    for (size_t i = 1; i <= 16; ++i) {
      ASSERT_EQ(worker.try_submit(Op::f32(kRow), error), RSB_OK) << error.message();
      rsb_stats stats;
      ASSERT_EQ(rsb_bucketer_stats(worker, &stats, sizeof stats), RSB_OK);
      EXPECT_GE(stats.staging_bytes_peak, i * kRow * sizeof(float) * kRanks);
    }
    EXPECT_EQ(worker.free(), RSB_OK);
    EXPECT_EQ(worker.status(15), RSB_ERR_CANCELLED);
  }
  for (rsb_comm *comm : comms) {
    rsb_comm_free(comm);
  }
}

TEST(Waiting, PendingUntilThePeerHasCome) {
  Gate asked;
  Gate released;
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    if (rank == 1) {
      // launch may wait for peers, so rank 0 may need this one before it can ask.
      asked.wait(1, 5.0);
      released.open();
    }
    const size_t op = worker.submit(Op::f32(20));
    worker.launch();
    if (rank == 0) {
      for (const uint64_t own_time : {UINT64_C(0), UINT64_C(1000000)}) {
        Error error;
        const rsb_status status = worker.wait(op, own_time, error);
        if (released.count() == 0) {
          EXPECT_TRUE(answers(RSB_PENDING, status, error));
          EXPECT_EQ(worker.calls(op), 0u);
          Error of_comm;
          EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm, of_comm), of_comm));
        }
      }
      asked.open();
    }
    EXPECT_EQ(worker.wait(op), RSB_OK);
    EXPECT_EQ(worker.calls(op), 1u);
    worker.finish();
  });
}

TEST(Waiting, TicketsThatAreNone) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(1));
    for (const rsb_ticket ticket : {rsb_ticket{0}, worker.ticket(0) + 1000, rsb_ticket{UINT64_MAX}}) {
      Error error;
      const rsb_status status = rsb_bucketer_wait(worker, ticket, 0, error);
      EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, status, error, {"ticket"})) << ticket;
    }
    worker.finish();
  });
}

TEST(Waiting, WaitGivesTheErrorOfAFailedOp) {
  Gate launched;
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    if (rank == 1) {
      launched.wait(1, 5.0);  // launch may wait for peers
      rsb_comm_abort(comm);
      return;
    }
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(5));
    rsb_bucketer_launch(worker, nullptr);
    launched.open();
    for (int i = 0; i < 2; ++i) {
      Error error;
      EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.wait(op, UINT64_MAX, error), error));
      EXPECT_EQ(worker.calls(op), 1u);
      EXPECT_EQ(worker.status(op), RSB_ERR_ABORTED);
    }
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error));
  });
}

TEST(Waiting, PollRunsWhatIsComplete) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 5; ++i) {
      worker.submit(Op::f32(i + 1));
    }
    size_t completed = 99;
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_poll(worker, &completed, error), error));
    EXPECT_EQ(completed, 0u);
    EXPECT_TRUE(worker.called().empty()) << "nothing is launched";
    worker.launch();
    size_t total = 0;
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(15);
    while (worker.called().size() < 5 && std::chrono::steady_clock::now() < end) {
      const size_t before = worker.called().size();
      ASSERT_RSB_OK(rsb_bucketer_poll(worker, &completed, nullptr));
      EXPECT_EQ(worker.called().size() - before, completed);
      total += completed;
      std::this_thread::yield();
    }
    EXPECT_EQ(total, 5u);
    EXPECT_EQ(worker.called(), (Places{0, 1, 2, 3, 4}));
    ASSERT_RSB_OK(rsb_bucketer_poll(worker, &completed, nullptr));
    EXPECT_EQ(completed, 0u);
    worker.finish();
  });
}

TEST(Waiting, TwoBucketersOnOneComm) {
  run_ranks(3, [](uint32_t, rsb_comm *comm) {
    Worker small(comm, 3 * 4 * 8, nullptr, 1);
    Worker large(comm, 3 * 4 * 1000, nullptr, 2);
    for (size_t i = 0; i < 60; ++i) {
      small.submit(Op::f32(1 + i % 7));
      large.submit(Op::f32(1 + i % 11));
    }
    EXPECT_FALSE(small.called().empty());
    EXPECT_TRUE(large.called().empty());
    large.finish();
    small.finish();
  });
}

TEST(Waiting, OneBucketerOnTwoComms) {
  std::vector<rsb_comm *> others(2, nullptr);
  const rsb_comm_config config = comm_config();
  ASSERT_RSB_OK(rsb_comm_create_local(2, &config, others.data(), nullptr));
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 2 * 4 * 8);
    worker.submit(Op::f32(3), others[rank]);
    worker.submit(Op::f32(3), comm);
    worker.submit(Op::f32(4), others[rank]);
    worker.submit(Op::f32(4), comm);
    EXPECT_TRUE(worker.called().empty()) << "7 of 8 on either comm";
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 2, 1, 3}));
    for (size_t i = 0; i < 30; ++i) {
      worker.submit(Op::f32(1 + i % 8), i % 3 == 0 ? others[rank] : comm);
    }
    worker.finish();
  });
  for (rsb_comm *comm : others) {
    rsb_comm_free(comm);
  }
}

TEST(Waiting, TheShorthandIsTheSameOp) {
  run_ranks(2, [](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(0);
    struct Seen {
      int calls = 0;
      rsb_result result = {};
      std::vector<float> data;
    } seen;
    const rsb_callback callback = [](void *user_data, const rsb_result *result) {
      auto &s = *static_cast<Seen *>(user_data);
      s.calls += 1;
      s.result = *result;
      const auto *data = static_cast<const float *>(result->data);
      s.data.assign(data, data + result->numel);
    };
    std::vector<float> pieces[2];
    for (uint32_t to = 0; to < 2; ++to) {
      for (size_t i = 0; i < 11; ++i) {
        pieces[to].push_back(static_cast<float>(values::hash(rank, to, i) % 100));
      }
    }
    const void *inputs[] = {pieces[0].data(), pieces[1].data()};
    EXPECT_RSB_OK(rsb_bucketer_reduce_scatter_async(bucketer, comm, inputs, 11, RSB_DTYPE_F32, RSB_OP_MAX,
                                                    callback, &seen, nullptr));
    EXPECT_EQ(seen.calls, 0);
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    ASSERT_EQ(seen.calls, 1);
    EXPECT_EQ(seen.result.status, RSB_OK);
    EXPECT_EQ(seen.result.tag, 0u);
    EXPECT_EQ(seen.result.dtype, RSB_DTYPE_F32);
    EXPECT_NE(seen.result.shard, nullptr);
    ASSERT_EQ(seen.data.size(), 11u);
    for (size_t i = 0; i < 11; ++i) {
      EXPECT_EQ(seen.data[i], static_cast<float>(std::max(values::hash(0, rank, i) % 100,
                                                          values::hash(1, rank, i) % 100)));
    }
  });
}

TEST(Waiting, ReleaseBuffersIsBusyWhileOpsArePending) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_release_buffers(worker, error), error)) << "never used";
    worker.submit(Op::f32(9));
    EXPECT_TRUE(answers(RSB_ERR_BUSY, rsb_bucketer_release_buffers(worker, error), error));
    worker.launch();
    EXPECT_TRUE(answers(RSB_ERR_BUSY, rsb_bucketer_release_buffers(worker, error), error));
    worker.finish();
    Error clean;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_release_buffers(worker, clean), clean));
    EXPECT_EQ(worker.bucketer().stats().buffer_bytes, 0u);
    worker.submit(Op::f32(10));
    worker.submit(Op::f32(3000));
    worker.finish();
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr)) << "twice";
  });
}

TEST(Waiting, ReleaseBuffersOnOneRankAlone) {
  run_ranks(2, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t round = 0; round < 5; ++round) {
      worker.submit(Op::f32(100 + round));
      worker.finish();
      if (rank == 1) {
        EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
      }
    }
  });
}

TEST(Waiting, FreeCancelsWhatIsOpenAndCompletesWhatIsLaunched) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(6));
    worker.submit(Op::f32(7));
    worker.launch();
    worker.submit(Op::f32(8));
    worker.submit(Op::of(9, RSB_DTYPE_F64));
    worker.free();
    EXPECT_EQ(worker.called().size(), 4u);
    EXPECT_EQ(worker.status(0), RSB_OK);
    EXPECT_EQ(worker.status(1), RSB_OK);
    EXPECT_EQ(worker.status(2), RSB_ERR_CANCELLED);
    EXPECT_EQ(worker.status(3), RSB_ERR_CANCELLED);
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm, error), error)) << "CANCELLED is not sticky";
  });
}

TEST(Waiting, StatsCountOps) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 2 * 4 * 8);
    worker.submit(Op::f32(8));   // full
    worker.submit(Op::f32(2));   // waits
    worker.submit(Op::f32(20));  // direct
    rsb_stats stats = worker.bucketer().stats();
    EXPECT_EQ(stats.ops_submitted, 3u);
    EXPECT_EQ(stats.ops_bucketed, 2u);
    EXPECT_EQ(stats.ops_direct, 1u);
    EXPECT_EQ(stats.flushes_full, 1u);
    EXPECT_EQ(stats.flushes_explicit, 0u);
    EXPECT_EQ(stats.collectives_launched, 2u);
    EXPECT_EQ(stats.ops_completed, 2u) << "the direct op, and the bucket launched before it";
    EXPECT_EQ(stats.ops_failed, 0u);
    Op flat = Op::f32(5);
    flat.flat = true;
    worker.submit(flat);
    worker.finish();
    stats = worker.bucketer().stats();
    EXPECT_EQ(stats.ops_submitted, 4u);
    EXPECT_EQ(stats.ops_completed, 4u);
    EXPECT_EQ(stats.flushes_explicit, 1u);
    EXPECT_EQ(stats.collectives_launched, 3u);
    EXPECT_EQ(stats.payload_bytes, (8 + 2 + 20) * 2 * 4 + 5 * 4u);
    EXPECT_EQ(stats.padding_bytes, 4u) << "5 elements over 2 ranks";
    EXPECT_GE(stats.buffer_bytes_peak, stats.buffer_bytes);
  });
}

TEST(Waiting, StatsRespectTheCallersSize) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(3));
    worker.finish();
    unsigned char bytes[sizeof(rsb_stats) + 64];
    std::memset(bytes, 0xA5, sizeof bytes);
    rsb_stats out;
    EXPECT_RSB_OK(rsb_bucketer_stats(worker, reinterpret_cast<rsb_stats *>(bytes), 16));
    for (size_t i = 16; i < sizeof bytes; ++i) {
      ASSERT_EQ(bytes[i], 0xA5) << "byte " << i << " is beyond the caller's struct";
    }
    std::memset(&out, 0xA5, sizeof out);
    EXPECT_RSB_OK(rsb_bucketer_stats(worker, &out, sizeof out));
    EXPECT_EQ(std::memcmp(bytes, &out, 16), 0);
    EXPECT_EQ(out.ops_submitted, 1u);
    EXPECT_EQ(out.ops_completed, 1u);
  });
}

}  // namespace
