// Local and shm comms: rank and size, all_gather, status and abort, and what happens to a comm across
// free.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>

#include <cerrno>
#include <cstring>

#include "harness.h"
#include "values.h"
#include "worker.h"

using namespace harness;

namespace {

class Groups : public ::testing::TestWithParam<std::tuple<Kind, uint32_t>> {
 protected:
  Kind kind() const { return std::get<0>(GetParam()); }
  uint32_t size() const { return std::get<1>(GetParam()); }
};

std::string group_name(const ::testing::TestParamInfo<std::tuple<Kind, uint32_t>> &info) {
  return kind_name(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(Comm, Groups,
                         ::testing::Combine(::testing::Values(Kind::kLocal, Kind::kShm),
                                            ::testing::Values(1u, 2u, 3u, 5u)),
                         group_name);

values::Bytes gathered(uint32_t rank, size_t bytes, uint64_t round) {
  values::Bytes data(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    data[i] = static_cast<unsigned char>(values::hash(rank, i, round));
  }
  return data;
}

TEST_P(Groups, RankSizeAndStatus) {
  const uint32_t expected = size();
  run_group(kind(), size(), [&](uint32_t rank, rsb_comm *comm) {
    EXPECT_EQ(rsb_comm_rank(comm), rank);
    EXPECT_EQ(rsb_comm_size(comm), expected);
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm, error), error));
    EXPECT_RSB_OK(rsb_comm_status(comm, nullptr));
  });
}

TEST_P(Groups, AllGatherGivesRankOrder) {
  const uint32_t ranks = size();
  run_group(kind(), ranks, [&](uint32_t rank, rsb_comm *comm) {
    uint64_t round = 0;
    for (const size_t bytes : {size_t{1}, size_t{7}, size_t{64}, size_t{1000}, size_t{4097}, size_t{1} << 20}) {
      round += 1;
      const values::Bytes input = gathered(rank, bytes, round);
      values::Bytes output(ranks * bytes + 1, 0x5A);
      Error error;
      ASSERT_TRUE(answers(
          RSB_OK, rsb_comm_all_gather(comm, input.data(), output.data(), bytes, error), error));
      for (uint32_t from = 0; from < ranks; ++from) {
        const values::Bytes expected = gathered(from, bytes, round);
        EXPECT_EQ(std::memcmp(output.data() + from * bytes, expected.data(), bytes), 0)
            << bytes << " bytes of rank " << from;
      }
      EXPECT_EQ(output.back(), 0x5A);
    }
  });
}

TEST_P(Groups, AllGatherInPlace) {
  const uint32_t ranks = size();
  run_group(kind(), ranks, [&](uint32_t rank, rsb_comm *comm) {
    const size_t bytes = 3001;
    values::Bytes output(ranks * bytes);
    const values::Bytes mine = gathered(rank, bytes, 9);
    std::memcpy(output.data() + rank * bytes, mine.data(), bytes);
    EXPECT_RSB_OK(
        rsb_comm_all_gather(comm, output.data() + rank * bytes, output.data(), bytes, nullptr));
    for (uint32_t from = 0; from < ranks; ++from) {
      const values::Bytes expected = gathered(from, bytes, 9);
      EXPECT_EQ(std::memcmp(output.data() + from * bytes, expected.data(), bytes), 0) << from;
    }
  });
}

TEST_P(Groups, AllGatherOfNothingIsABarrier) {
  const uint32_t ranks = size();
  Gate gate;
  run_group(kind(), ranks, [&](uint32_t, rsb_comm *comm) {
    for (uint32_t round = 1; round <= 20; ++round) {
      gate.open();
      EXPECT_RSB_OK(rsb_comm_all_gather(comm, nullptr, nullptr, 0, nullptr));
      EXPECT_GE(gate.count(), round * ranks) << "left before all had come";
    }
  });
}

TEST_P(Groups, AllGatherLeavesOpenBucketsOpen) {
  const uint32_t ranks = size();
  run_group(kind(), ranks, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(10));
    std::vector<uint32_t> all(ranks);
    EXPECT_RSB_OK(rsb_comm_all_gather(comm, &rank, all.data(), sizeof rank, nullptr));
    for (uint32_t from = 0; from < ranks; ++from) {
      EXPECT_EQ(all[from], from);
    }
    EXPECT_EQ(worker.calls(op), 0u);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_NOT_LAUNCHED, worker.wait(op, UINT64_MAX, error), error));
    worker.launch();
    EXPECT_RSB_OK(rsb_comm_all_gather(comm, &rank, all.data(), sizeof rank, nullptr));
    EXPECT_EQ(worker.calls(op), 0u) << "all_gather ran a callback";
    worker.finish();
  });
}

TEST_P(Groups, AbortEndsTheGroupOnEveryRank) {
  const uint32_t ranks = size();
  Gate submitted;
  Gate aborted;
  run_group(kind(), ranks, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(100));
    submitted.open();
    if (rank + 1 == ranks) {
      ASSERT_TRUE(submitted.wait(ranks));
      rsb_comm_abort(comm);
      aborted.open();
    } else if (rank != 0) {
      ASSERT_TRUE(aborted.wait());
    }
    // Rank 0 of several is inside the flush, or will be; the last rank never flushes before its abort.
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error));
    EXPECT_EQ(worker.calls(op), 1u);
    EXPECT_EQ(worker.status(op), RSB_ERR_ABORTED);
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, rsb_comm_status(comm, error), error));
    values::Bytes bytes(ranks);
    EXPECT_TRUE(answers(RSB_ERR_ABORTED,
                        rsb_comm_all_gather(comm, &rank, bytes.data(), 1, error), error));
    const size_t refused = worker.submitted();
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.try_submit(Op::f32(1), error), error));
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error)) << "a refused submit is a failure";
    EXPECT_EQ(worker.calls(refused), 0u);
    EXPECT_EQ(rsb_comm_rank(comm), rank);
    EXPECT_EQ(rsb_comm_size(comm), ranks);
    rsb_comm_abort(comm);
  });
}

TEST_P(Groups, TwoGroupsOfTheSameRanksAreApart) {
  // The second comm is made by the ranks themselves for shm; locally all ends come from one call.
  const uint32_t ranks = size();
  std::vector<rsb_comm *> second(ranks, nullptr);
  const rsb_comm_config config = comm_config();
  const std::string name = unique_name();
  if (kind() == Kind::kLocal) {
    ASSERT_RSB_OK(rsb_comm_create_local(ranks, &config, second.data(), nullptr));
  }
  const bool shm = kind() == Kind::kShm;
  run_group(kind(), ranks, [&](uint32_t rank, rsb_comm *comm) {
    if (shm) {
      ASSERT_RSB_OK(rsb_comm_create_shm(name.c_str(), rank, ranks, &config, &second[rank], nullptr));
    }
    Worker worker(comm, 1 << 16);
    for (size_t i = 0; i < 10; ++i) {
      worker.submit(Op::f32(10 + i), i % 2 == 0 ? comm : second[rank]);
    }
    worker.finish();
    // Aborting one leaves the other alone.
    EXPECT_RSB_OK(rsb_comm_all_gather(comm, nullptr, nullptr, 0, nullptr));
    rsb_comm_abort(second[rank]);
    worker.submit(Op::f32(5));
    worker.finish();
    rsb_comm_free(second[rank]);
  });
}

TEST(Comm, ManyGroupsComeAndGo) {
  for (uint32_t round = 0; round < 50; ++round) {
    run_ranks(2, [&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, 0, nullptr, round);
      worker.submit(Op::f32(round));
      worker.finish();
    });
  }
}

TEST(Comm, HandleIsDeadAfterFreeButItsOpsLive) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    const size_t op = worker.submit(Op::f32(33));
    rsb_comm_free(comm);
    EXPECT_EQ(rsb_comm_rank(comm), UINT32_MAX);
    EXPECT_EQ(rsb_comm_size(comm), 0u);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_BAD_HANDLE, rsb_comm_status(comm, error), error));
    worker.flush();
    EXPECT_EQ(worker.status(op), RSB_OK);
    rsb_comm_free(comm);
  });
}

TEST(Comm, LabelAndFlagsOfConfig) {
  rsb_comm_config config = comm_config();
  std::string label = "gradients";
  config.label = label.c_str();
  config.flags = RSB_COMM_EXACT;
  config.staging_bytes = size_t{1} << 20;
  run_ranks(
      2,
      [](uint32_t, rsb_comm *comm) {
        Worker worker(comm, 0);
        for (size_t i = 0; i < 5; ++i) {
          worker.submit(Op::f32(200000 + i));  // more than the staging holds
        }
        worker.finish();
      },
      &config);
}

TEST(Shm, NobodyComesIsATimeout) {
  const rsb_comm_config config = comm_config(200000000);
  rsb_comm *comm = nullptr;
  Error error;
  EXPECT_TRUE(answers(RSB_ERR_TIMEOUT,
                      rsb_comm_create_shm(unique_name().c_str(), 0, 2, &config, &comm, error), error));
}

TEST(Shm, DifferentStagingIsAConfigMismatch) {
  const std::string name = unique_name();
  run_processes(2, [&](uint32_t rank) {
    rsb_comm_config config = comm_config();
    config.staging_bytes = (size_t{1} << 20) << rank;
    rsb_comm *comm = nullptr;
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_CONFIG_MISMATCH,
                        rsb_comm_create_shm(name.c_str(), rank, 2, &config, &comm, error), error));
  });
}

TEST(Shm, ALimitOfFileSizesIsNoMemoryAndNoSignal) {
  run_processes(1, [&](uint32_t) {
    const rlimit limit = {size_t{1} << 20, size_t{1} << 20};
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
    rsb_comm_config config = comm_config();
    rsb_comm *comm = nullptr;
    Error error;
    const std::string name = unique_name();
    ASSERT_TRUE(answers(RSB_ERR_NO_MEMORY, rsb_comm_create_shm(name.c_str(), 0, 1, &config, &comm, error), error));
    EXPECT_EQ(error->native_code, EFBIG);
    EXPECT_NE(error.message().find("1048576"), std::string::npos) << error.message();
    config.staging_bytes = size_t{1} << 16;
    ASSERT_RSB_OK(rsb_comm_create_shm(name.c_str(), 0, 1, &config, &comm, nullptr));
    rsb_comm_free(comm);
  });
}

TEST(Shm, OneNameServesOneGroupAfterAnother) {
  const std::string name = unique_name();
  run_processes(2, [&](uint32_t rank) {
    const rsb_comm_config config = comm_config();
    for (uint64_t round = 0; round < 5; ++round) {
      rsb_comm *comm = nullptr;
      ASSERT_RSB_OK(rsb_comm_create_shm(name.c_str(), rank, 2, &config, &comm, nullptr));
      {
        Worker worker(comm, 0, nullptr, round);
        worker.submit(Op::f32(17));
        worker.finish();
      }
      // Both are done with the name before either takes it again.
      EXPECT_RSB_OK(rsb_comm_all_gather(comm, nullptr, nullptr, 0, nullptr));
      rsb_comm_free(comm);
    }
  });
}

TEST(Shm, AKilledRankIsLostToTheOthers) {
  // Were it not noticed, the timeout would end the wait with another status.
  const rsb_comm_config config = comm_config(20000000000);
  run_shm(
      3,
      [](uint32_t rank, rsb_comm *comm) {
        Worker worker(comm, 0);
        worker.submit(Op::f32(50));
        worker.finish();
        // Another survivor may have noticed already: then this submit is refused.
        Error error;
        const rsb_status submitted = worker.try_submit(Op::f32(51), error);
        if (rank == 1) {
          raise(SIGKILL);
        }
        EXPECT_TRUE(submitted == RSB_OK || answers(RSB_ERR_PEER_LOST, submitted, error));
        EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, worker.flush(error), error));
        EXPECT_EQ(error->peer, 1);
        EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, rsb_comm_status(comm, error), error));
      },
      &config, {1});
}

TEST(Local, ARankThatLeavesIsLostToTheOthers) {
  run_ranks(3, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(50));
    worker.finish();
    if (rank == 2) {
      rsb_comm_free(comm);
      return;
    }
    Error error;
    const rsb_status submitted = worker.try_submit(Op::f32(51), error);
    EXPECT_TRUE(submitted == RSB_OK || answers(RSB_ERR_PEER_LOST, submitted, error));
    EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, worker.flush(error), error));
    EXPECT_EQ(error->peer, 2);
  });
}

}  // namespace
