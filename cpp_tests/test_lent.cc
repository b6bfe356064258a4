// Inputs that are lent: read at any time until the callback, and never after it. The worker spoils them in the
// callback, and the array of pointers right after the submit.
#include <gtest/gtest.h>

#include <tuple>

#include "worker.h"

using namespace harness;

namespace {

class Lent : public ::testing::TestWithParam<std::tuple<Kind, uint32_t>> {
 protected:
  void run(const RankFn &fn, const rsb_comm_config *config = nullptr) const {
    run_group(std::get<0>(GetParam()), size(), fn, config);
  }
  uint32_t size() const { return std::get<1>(GetParam()); }
};

INSTANTIATE_TEST_SUITE_P(Kinds, Lent,
                         ::testing::Combine(::testing::Values(Kind::kLocal, Kind::kShm),
                                            ::testing::Values(1u, 2u, 3u, 4u, 7u)),
                         [](const auto &info) {
                           return kind_name(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
                         });

Op lent(Op op) {
  op.flags |= RSB_SUBMIT_BORROW;
  return op;
}

/// From single elements to more than a chunk takes, with all tails on the way.
size_t numel_of(size_t i) {
  const size_t around[] = {1, 64, 128, 256, 1000, 4096, 20000};
  return around[i % 7] + i % 5 - (i % 7 == 0 ? 0 : 2);
}

TEST_P(Lent, ManyOpsAmongThoseThatAreNot) {
  for (const int64_t bucket_bytes : {int64_t{0}, int64_t{200000}, int64_t{-1}}) {
    run([&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, bucket_bytes);
      for (size_t i = 0; i < 140; ++i) {
        Op op = Op::of(numel_of(i), values::kAllDtypes[i / 20 % 8]);
        op.flat = i % 3 == 0;
        op.output = i % 4 == 1;
        op.data = values::Data::kRough;
        op.offset = i % 11;
        if (i % 6 != 5) {
          op = lent(op);
        }
        if (i % 8 == 3 && !op.flat) {
          op.in_place = true;
          op.offset = 0;
        }
        worker.submit(op);
        if (values::hash(i, 3) % 16 == 0) {
          worker.flush();
        } else if (values::hash(i, 3) % 16 == 1) {
          worker.launch();
        }
      }
      worker.finish();
    });
  }
}

TEST_P(Lent, WhatIsCopiedIsCounted) {
  run([&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 50; ++i) {
      worker.submit(lent(Op::f32(1024)));
    }
    worker.finish();
    EXPECT_EQ(worker.bucketer().stats().copied_bytes, 50u * 4096 * (size() - 1)) << "all rows but the own";
  });
}

TEST_P(Lent, WhatAFreedBucketerWasLentIsReadBeforeItsCallbacks) {
  // Staging of 16 chunks: at most eight lanes have one open, and those after them have the oldest published.
  rsb_comm_config config = comm_config();
  config.staging_bytes = size_t{64} << 10;
  run(
      [&](uint32_t rank, rsb_comm *comm) {
        Worker worker(comm, 0);
        worker.submit(Op::f32(130));  // into memory that is new
        worker.finish();
        worker.submit(lent(Op::f32(130)));
        if (rank % 2 == 0) {
          EXPECT_RSB_OK(worker.free());
          EXPECT_EQ(worker.status(1), RSB_ERR_CANCELLED);
        }
        Worker other(comm, 0, nullptr, 2);
        for (const rsb_dtype dtype : values::kAllDtypes) {
          other.submit(Op::of(3, dtype, RSB_OP_MAX));
          other.submit(Op::of(3, dtype, RSB_OP_MIN));
        }
        if (rank % 2 != 0) {
          worker.launch();
          EXPECT_RSB_OK(worker.wait(1));
          EXPECT_EQ(worker.status(1), RSB_OK);
        }
        // The other ranks have not launched: no flush from here on.
        EXPECT_RSB_OK(other.free());
        if (rank % 2 != 0) {
          EXPECT_RSB_OK(worker.free());
        }
      },
      &config);
}

TEST_P(Lent, AFailureEndsThem) {
  Gate submitted;
  run([&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 5; ++i) {
      worker.submit(lent(Op::f32(1000)));
    }
    submitted.open();
    if (rank == size() - 1) {
      EXPECT_TRUE(submitted.wait(size()));
      rsb_comm_abort(comm);
    }
    Error error;
    while (rsb_comm_status(comm, error) == RSB_OK) {
      std::this_thread::yield();
    }
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error));
    for (size_t i = 0; i < 5; ++i) {
      EXPECT_EQ(worker.status(i), RSB_ERR_ABORTED) << i;
    }
  });
}

}  // namespace
