// rsb_comm_shrink: after a rank has left or was killed, the others form a smaller comm, in their old order,
// and go on with it; who calls it wrongly, or alone, is told so.
#include <gtest/gtest.h>
#include <signal.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

using Ranks = std::vector<uint32_t>;

Ranks all_of(uint32_t size) {
  Ranks ranks;
  for (uint32_t rank = 0; rank < size; ++rank) {
    ranks.push_back(rank);
  }
  return ranks;
}

/// Fails the comm on a rank that stays: `worker` waits for ranks of which some are gone.
void expect_lost(Worker &worker, rsb_comm *comm, const std::set<int32_t> &lost) {
  Error error;
  const rsb_status submitted = worker.try_submit(Op::f32(51), error);
  EXPECT_TRUE(submitted == RSB_OK || answers(RSB_ERR_PEER_LOST, submitted, error));
  EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, worker.flush(error), error));
  EXPECT_EQ(lost.count(error->peer), 1u) << error->peer;
  EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, rsb_comm_status(comm, error), error));
}

/// The survivors' comm has dense ranks in the order of `survivors`; `me` is this rank's number in it.
void expect_dense(rsb_comm *comm, uint32_t me, const Ranks &survivors) {
  const auto size = static_cast<uint32_t>(survivors.size());
  EXPECT_RSB_OK(rsb_comm_status(comm, nullptr));
  ASSERT_EQ(rsb_comm_size(comm), size);
  ASSERT_EQ(rsb_comm_rank(comm),
            static_cast<uint32_t>(std::find(survivors.begin(), survivors.end(), me) - survivors.begin()));
  Ranks all(size, 99);
  Error error;
  ASSERT_TRUE(answers(RSB_OK, rsb_comm_all_gather(comm, &me, all.data(), sizeof me, error), error));
  EXPECT_EQ(all, survivors);
}

/// Waiting, full and direct reduce-scatters, with an all-gather among them.
void work(rsb_comm *comm, uint64_t seed) {
  Worker worker(comm, static_cast<int64_t>(4 * 40 * rsb_comm_size(comm)), nullptr, seed);
  for (size_t i = 0; i < 12; ++i) {
    Op op = Op::of(5 + 7 * i, i % 3 == 0 ? RSB_DTYPE_F16 : RSB_DTYPE_F32, i % 4 == 1 ? RSB_OP_AVG : RSB_OP_SUM);
    op.data = values::Data::kRough;
    op.flat = i % 5 == 2;
    worker.submit(op);
    if (i == 6) {
      const uint64_t mine = values::hash(seed, rsb_comm_rank(comm));
      std::vector<uint64_t> all(rsb_comm_size(comm));
      EXPECT_RSB_OK(rsb_comm_all_gather(comm, &mine, all.data(), sizeof mine, nullptr));
      for (uint32_t from = 0; from < all.size(); ++from) {
        EXPECT_EQ(all[from], values::hash(seed, from));
      }
    }
  }
  worker.finish();
  EXPECT_EQ(worker.called().size(), 12u);
}

rsb_comm *shrunk(rsb_comm *comm) {
  const rsb_comm_config config = comm_config();
  rsb_comm *out = nullptr;
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_comm_shrink(comm, &config, &out, error), error));
  return out;
}

/// Nobody left anything in the run directory.
void expect_tidy() {
  const char *path = std::getenv("RSBUCKET_RUN_DIR");
  ASSERT_NE(path, nullptr);
  if (std::filesystem::exists(path)) {
    for (const auto &entry : std::filesystem::directory_iterator(path)) {
      ADD_FAILURE() << "left behind: " << entry.path();
    }
  }
}

/// Rank `me` of a comm of `size`; one after the other leaves by `leave`, the first, middle or last.
void shrink_to_one(uint32_t me, rsb_comm *comm, uint32_t at, const std::function<void(rsb_comm *)> &leave) {
  Ranks ranks = all_of(rsb_comm_size(comm));
  uint64_t seed = 1;
  work(comm, seed);
  while (ranks.size() > 1) {
    const size_t index = at * (ranks.size() - 1) / 2;
    if (ranks[index] == me) {
      leave(comm);
      return;
    }
    {
      Worker worker(comm, 0, nullptr, 99);
      expect_lost(worker, comm, {static_cast<int32_t>(index)});
    }
    rsb_comm *smaller = shrunk(comm);
    ASSERT_NE(smaller, nullptr);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, rsb_comm_status(comm, error), error)) << "the old one stays as it is";
    EXPECT_EQ(rsb_comm_size(comm), ranks.size());
    rsb_comm_free(comm);
    comm = smaller;
    ranks.erase(ranks.begin() + static_cast<std::ptrdiff_t>(index));
    expect_dense(comm, me, ranks);
    seed += 1;
    work(comm, seed);
  }
  rsb_comm_free(comm);
}

class Shrink : public ::testing::TestWithParam<std::tuple<Kind, uint32_t, uint32_t>> {
 protected:
  Kind kind() const { return std::get<0>(GetParam()); }
  uint32_t size() const { return std::get<1>(GetParam()); }
  uint32_t at() const { return std::get<2>(GetParam()); }
};

std::string shrink_name(const ::testing::TestParamInfo<std::tuple<Kind, uint32_t, uint32_t>> &info) {
  const char *const places[] = {"First", "Middle", "Last"};
  return kind_name(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param)) +
         places[std::get<2>(info.param)];
}

INSTANTIATE_TEST_SUITE_P(Shrink, Shrink,
                         ::testing::Combine(::testing::Values(Kind::kLocal, Kind::kShm),
                                            ::testing::Values(2u, 3u, 4u, 7u), ::testing::Values(0u, 1u, 2u)),
                         shrink_name);

class ShrinkKilled : public Shrink {};
INSTANTIATE_TEST_SUITE_P(Shrink, ShrinkKilled,
                         ::testing::Combine(::testing::Values(Kind::kShm), ::testing::Values(2u, 3u, 4u, 7u),
                                            ::testing::Values(0u, 1u, 2u)),
                         shrink_name);

TEST_P(Shrink, OneAfterTheOtherLeaves) {
  run_group(kind(), size(), [&](uint32_t rank, rsb_comm *comm) {
    shrink_to_one(rank, comm, at(), [](rsb_comm *left) { rsb_comm_free(left); });
  });
  expect_tidy();
}

TEST_P(ShrinkKilled, OneAfterTheOther) {
  Ranks ranks = all_of(size());
  std::set<uint32_t> killed;
  while (ranks.size() > 1) {
    const auto victim = ranks.begin() + static_cast<std::ptrdiff_t>(at() * (ranks.size() - 1) / 2);
    killed.insert(*victim);
    ranks.erase(victim);
  }
  run_shm(
      size(), [&](uint32_t rank, rsb_comm *comm) {
        shrink_to_one(rank, comm, at(), [](rsb_comm *) { raise(SIGKILL); });
      },
      nullptr, killed);
  expect_tidy();
}

TEST(ShrinkShm, TwoAreKilledAtOnce) {
  const std::set<uint32_t> pairs[] = {{0, 1}, {0, 4}, {1, 3}, {3, 4}};
  for (const std::set<uint32_t> &killed : pairs) {
    run_shm(
        5,
        [&](uint32_t rank, rsb_comm *comm) {
          work(comm, 1);
          if (killed.count(rank) != 0) {
            raise(SIGKILL);
          }
          Worker worker(comm, 0, nullptr, 99);
          expect_lost(worker, comm, {killed.begin(), killed.end()});
          rsb_comm *smaller = shrunk(comm);
          Ranks ranks;
          for (const uint32_t old : all_of(5)) {
            if (killed.count(old) == 0) {
              ranks.push_back(old);
            }
          }
          expect_dense(smaller, rank, ranks);
          work(smaller, 2);
          rsb_comm_free(smaller);
        },
        nullptr, killed);
    expect_tidy();
  }
}

TEST(ShrinkShm, ARankDiesWhileTheOthersShrink) {
  for (const uint32_t second : {0u, 2u, 3u}) {
    Gate lost;
    run_shm(
        4,
        [&](uint32_t rank, rsb_comm *comm) {
          if (rank == 1) {
            raise(SIGKILL);
          }
          Worker worker(comm, 0, nullptr, 99);
          expect_lost(worker, comm, {1, static_cast<int32_t>(second)});
          lost.open();
          if (rank == second) {
            ASSERT_TRUE(lost.wait(3));
            raise(SIGKILL);
          }
          rsb_comm *smaller = shrunk(comm);
          Ranks ranks = {0, 2, 3};
          ranks.erase(std::find(ranks.begin(), ranks.end(), second));
          expect_dense(smaller, rank, ranks);
          work(smaller, 2);
          rsb_comm_free(smaller);
        },
        nullptr, {1, second});
    expect_tidy();
  }
}

TEST(ShrinkShm, ARankThatDiesBeforeItMeetsTheOthersIsNotWaitedFor) {
  std::string elsewhere = ::testing::TempDir() + "rsbXXXXXX";
  ASSERT_NE(mkdtemp(elsewhere.data()), nullptr);
  const std::string here = std::getenv("RSBUCKET_RUN_DIR");
  for (const uint32_t second : {0u, 2u, 3u}) {
    run_shm(
        4,
        [&](uint32_t rank, rsb_comm *comm) {
          if (rank == 1) {
            raise(SIGKILL);
          }
          {
            Worker worker(comm, 0, nullptr, 99);
            expect_lost(worker, comm, {1});
          }
          if (rank == second) {
            // It comes to shrink, looks for the others in a wrong place, and dies once they meet.
            ASSERT_EQ(setenv("RSBUCKET_RUN_DIR", elsewhere.c_str(), 1), 0);
            std::thread([&] {
              while (std::filesystem::is_empty(second == 0 ? elsewhere : here)) {
                std::this_thread::yield();
              }
              raise(SIGKILL);
            }).detach();
            shrunk(comm);
            FAIL() << "met somebody";
          }
          // Too short for a second attempt, were it only made when the first has taken its time.
          const rsb_comm_config config = comm_config(4000000000);
          rsb_comm *smaller = nullptr;
          Error error;
          ASSERT_TRUE(answers(RSB_OK, rsb_comm_shrink(comm, &config, &smaller, error), error));
          Ranks ranks = {0, 2, 3};
          ranks.erase(std::find(ranks.begin(), ranks.end(), second));
          expect_dense(smaller, rank, ranks);
          work(smaller, 2);
          rsb_comm_free(smaller);
        },
        nullptr, {1, second});
    expect_tidy();
  }
  std::filesystem::remove_all(elsewhere);
}

/// A comm of three whose last rank is gone; `fn` on the two that stay.
void two_of_three(Kind kind, const RankFn &fn) {
  run_group(kind, 3, [&](uint32_t rank, rsb_comm *comm) {
    if (rank == 2) {
      rsb_comm_free(comm);
      return;
    }
    {
      Worker worker(comm, 0, nullptr, 99);
      expect_lost(worker, comm, {2});
    }
    fn(rank, comm);
  });
}

class ShrinkAlone : public ::testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Shrink, ShrinkAlone, ::testing::Values(Kind::kLocal, Kind::kShm),
                         [](const ::testing::TestParamInfo<Kind> &info) { return kind_name(info.param); });

TEST_P(ShrinkAlone, ASurvivorThatDoesNotComeIsATimeout) {
  for (const uint32_t alone : {0u, 1u}) {
    Gate timed_out;
    two_of_three(GetParam(), [&](uint32_t rank, rsb_comm *comm) {
      if (rank == alone) {
        const rsb_comm_config config = comm_config(100000000);
        for (int attempt = 0; attempt < 2; ++attempt) {
          rsb_comm *out = comm;
          Error error;
          EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, rsb_comm_shrink(comm, &config, &out, error), error));
          EXPECT_EQ(error->peer, static_cast<int32_t>(1 - alone));
          EXPECT_NE(error.message().find("rank " + std::to_string(1 - alone)), std::string::npos)
              << error.message();
          EXPECT_EQ(out, comm) << "out_comm was written";
          EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, rsb_comm_status(comm, error), error)) << "the first cause stays";
        }
        timed_out.open();
      }
      ASSERT_TRUE(timed_out.wait());
      rsb_comm *smaller = shrunk(comm);
      expect_dense(smaller, rank, {0, 1});
      work(smaller, 3);
      rsb_comm_free(smaller);
    });
  }
  expect_tidy();
}

TEST_P(ShrinkAlone, ASurvivorThatLeavesInsteadIsLost) {
  two_of_three(GetParam(), [](uint32_t rank, rsb_comm *comm) {
    if (rank == 0) {
      rsb_comm_free(comm);
      return;
    }
    rsb_comm *smaller = shrunk(comm);
    expect_dense(smaller, 1, {1});
    work(smaller, 3);
    rsb_comm_free(smaller);
  });
  expect_tidy();
}

TEST_P(ShrinkAlone, DifferentSettingsAreAMismatch) {
  Gate refused;
  two_of_three(GetParam(), [&](uint32_t rank, rsb_comm *comm) {
    rsb_comm_config config = comm_config();
    config.staging_bytes = (size_t{1} << 20) << rank;
    rsb_comm *out = nullptr;
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_CONFIG_MISMATCH, rsb_comm_shrink(comm, &config, &out, error), error));
    ASSERT_EQ(out, nullptr);
    refused.open();
    ASSERT_TRUE(refused.wait(2));
    rsb_comm *smaller = shrunk(comm);  // it may be tried again
    expect_dense(smaller, rank, {0, 1});
    work(smaller, 3);
    rsb_comm_free(smaller);
  });
  expect_tidy();
}

TEST_P(ShrinkAlone, NewSettingsHoldForTheNewComm) {
  two_of_three(GetParam(), [](uint32_t rank, rsb_comm *comm) {
    rsb_comm_config config = comm_config();
    config.label = "survivors";
    config.staging_bytes = size_t{1} << 16;
    rsb_comm *smaller = nullptr;
    Error error;
    ASSERT_TRUE(answers(RSB_OK, rsb_comm_shrink(comm, &config, &smaller, error), error));
    expect_dense(smaller, rank, {0, 1});
    Worker worker(smaller, 0);
    worker.submit(Op::f32(50000));  // more than the staging holds
    worker.submit(Op::f32(3));
    worker.finish();
    rsb_comm_abort(smaller);
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, rsb_comm_status(smaller, error), error));
    EXPECT_NE(error.message().find("survivors"), std::string::npos) << error.message();
    rsb_comm_free(smaller);
  });
}

TEST_P(ShrinkAlone, ABucketerGoesOnWithTheNewComm) {
  run_group(GetParam(), 3, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(30));
    worker.finish();
    if (rank == 1) {
      rsb_comm_free(comm);
      return;
    }
    expect_lost(worker, comm, {1});
    rsb_comm *smaller = shrunk(comm);
    const size_t first = worker.submit(Op::f32(40), smaller);
    const size_t second = worker.submit(Op::of(9, RSB_DTYPE_I64), smaller);
    worker.flush();
    EXPECT_RSB_OK(worker.status(first));
    EXPECT_RSB_OK(worker.status(second));
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, worker.try_submit(Op::f32(2), error, comm), error));
    EXPECT_TRUE(answers(RSB_ERR_PEER_LOST, worker.flush(error), error)) << "a refused submit is a failure";
    rsb_comm_free(smaller);
  });
}

TEST_P(ShrinkAlone, ArgumentsAreChecked) {
  two_of_three(GetParam(), [](uint32_t rank, rsb_comm *comm) {
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_shrink(comm, nullptr, nullptr, error), error,
                        {"out_comm"}));
    rsb_comm *out = nullptr;
    rsb_comm_config config = comm_config();
    config.flags = UINT64_C(1) << 40;
    Error flags;
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_comm_shrink(comm, &config, &out, flags), flags, {"flags"}));
    config = comm_config();
    config.struct_size = 3;
    Error size;
    EXPECT_TRUE(
        refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_shrink(comm, &config, &out, size), size, {"struct_size"}));
    EXPECT_EQ(out, nullptr);
    rsb_comm *smaller = shrunk(comm);  // a refused call has changed nothing
    expect_dense(smaller, rank, {0, 1});
    rsb_comm_free(smaller);
  });
}

TEST_P(ShrinkAlone, OnlyAfterALostPeer) {
  run_group(GetParam(), 2, [](uint32_t rank, rsb_comm *comm) {
    const rsb_comm_config config = comm_config();
    rsb_comm *out = nullptr;
    Error fine;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_shrink(comm, &config, &out, fine), fine, {"comm"}));
    expect_dense(comm, rank, {0, 1});
    work(comm, 5);
    rsb_comm_abort(comm);
    Error aborted;
    EXPECT_TRUE(
        refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_shrink(comm, &config, &out, aborted), aborted, {"comm"}));
    EXPECT_NE(aborted.message().find("RSB_ERR_ABORTED"), std::string::npos) << aborted.message();
    EXPECT_EQ(out, nullptr);
  });
}

TEST(ShrinkHandles, BadOnes) {
  rsb_comm *out = nullptr;
  rsb_comm *freed = nullptr;
  ASSERT_RSB_OK(rsb_comm_create_local(1, nullptr, &freed, nullptr));
  rsb_comm_free(freed);
  Bucketer bucketer(0);
  rsb_bucketer *other = bucketer;
  int number = 0;
  for (rsb_comm *bad : {static_cast<rsb_comm *>(nullptr), freed, reinterpret_cast<rsb_comm *>(other),
                        reinterpret_cast<rsb_comm *>(&number)}) {
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_BAD_HANDLE}, rsb_comm_shrink(bad, nullptr, &out, error), error, {"comm"}));
    EXPECT_EQ(rsb_comm_shrink(bad, nullptr, nullptr, nullptr), RSB_ERR_BAD_HANDLE);
  }
  EXPECT_EQ(out, nullptr);
}

TEST(ShrinkCustom, IsUnsupported) {
  FakeEngine engine(2, {});
  run_custom(engine, 2, 0, [](uint32_t, rsb_comm *comm) {
    work(comm, 1);
    for (const bool failed : {false, true}) {
      if (failed) {
        rsb_comm_abort(comm);
      }
      rsb_comm *out = nullptr;
      Error error;
      EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_comm_shrink(comm, nullptr, &out, error), error, {"comm"}));
      EXPECT_EQ(out, nullptr);
    }
  });
}

}  // namespace
