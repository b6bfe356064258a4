// Rule 1 broken in every way, on threads and on processes: every rank gets RSB_ERR_DESYNC, and keeps
// it. A rank that never comes is a timeout; and what ranks may do differently does no harm.
#include <gtest/gtest.h>

#include "worker.h"

using namespace harness;

namespace {

/// What a rank does up to its last flush. `odd`: this rank is the one that does it differently.
using Script = std::function<void(Worker &worker, rsb_comm *comm, bool odd)>;

struct Case {
  const char *name;
  Script script;
  int64_t odd_bucket_bytes = 0;
};

/// A submit that may find the comm failed already: a peer may have seen the mismatch first.
void submit(Worker &worker, const Op &op) {
  Error error;
  const rsb_status status = worker.try_submit(op, error);
  EXPECT_TRUE(answers(status == RSB_OK ? RSB_OK : RSB_ERR_DESYNC, status, error));
}

/// A call that reports OK, or the mismatch if it is known by then.
void ok_or_desync(const std::function<rsb_status(rsb_error *)> &call) {
  Error error;
  const rsb_status status = call(error);
  EXPECT_TRUE(answers(status == RSB_OK ? RSB_OK : RSB_ERR_DESYNC, status, error));
}

Op tagged(size_t numel, uint64_t tag, rsb_dtype dtype = RSB_DTYPE_F32, rsb_op op = RSB_OP_SUM) {
  Op o = Op::of(numel, dtype, op);
  o.tag = tag;
  return o;
}

const std::vector<Case> &cases() {
  static const std::vector<Case> all = {
      {"Numel",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1));
         submit(w, tagged(odd ? 6 : 5, 2));
       }},
      {"NumelZero", [](Worker &w, rsb_comm *, bool odd) { submit(w, tagged(odd ? 0 : 1, 1)); }},
      {"Dtype",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1, odd ? RSB_DTYPE_I32 : RSB_DTYPE_F32));
       }},
      {"OpKind",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1, RSB_DTYPE_F32, odd ? RSB_OP_MAX : RSB_OP_SUM));
       }},
      {"Scale",
       [](Worker &w, rsb_comm *, bool odd) {
         Op op = tagged(5, 1);
         op.scale = odd ? 0.25 : 0.5;
         submit(w, op);
       }},
      {"Tag", [](Worker &w, rsb_comm *, bool odd) { submit(w, tagged(5, odd ? 8 : 7)); }},
      {"Order",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, odd ? 2 : 1));
         submit(w, tagged(5, odd ? 1 : 2));
       }},
      {"OrderOfDtypes",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1, odd ? RSB_DTYPE_F64 : RSB_DTYPE_F32));
         submit(w, tagged(5, 2, odd ? RSB_DTYPE_F32 : RSB_DTYPE_F64));
       }},
      {"ExtraOp",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1));
         if (odd) {
           submit(w, tagged(5, 2));
         }
       }},
      {"ExtraOpAfterAGoodFlush",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(9, 1));
         w.flush();
         submit(w, tagged(5, 2));
         if (odd) {
           submit(w, tagged(5, 3));
         }
       }},
      {"LaunchOrNone",
       [](Worker &w, rsb_comm *, bool odd) {
         submit(w, tagged(5, 1));
         if (odd) {
           ok_or_desync([&](rsb_error *e) { return rsb_bucketer_launch(w, e); });
         }
         submit(w, tagged(5, 2));
       }},
      {"AllGatherOrNone",
       [](Worker &w, rsb_comm *comm, bool odd) {
         submit(w, tagged(5, 1));
         if (odd) {
           Error error;
           EXPECT_TRUE(answers(RSB_ERR_DESYNC, rsb_comm_all_gather(comm, nullptr, nullptr, 0, error), error));
         }
       }},
      {"DirectOrBucketed",
       [](Worker &w, rsb_comm *, bool) { submit(w, tagged(5, 1)); }, 2},
      {"BucketBytes",
       [](Worker &w, rsb_comm *, bool) {
         submit(w, tagged(5, 1));
         submit(w, tagged(5, 2));
       },
       4096},
  };
  return all;
}

class Mismatch : public ::testing::TestWithParam<std::tuple<Kind, size_t, uint32_t>> {};

INSTANTIATE_TEST_SUITE_P(Every, Mismatch,
                         ::testing::Combine(::testing::Values(Kind::kLocal, Kind::kShm),
                                            ::testing::Range(size_t{0}, cases().size()),
                                            ::testing::Values(2u, 3u)),
                         [](const ::testing::TestParamInfo<std::tuple<Kind, size_t, uint32_t>> &info) {
                           return kind_name(std::get<0>(info.param)) + "_" +
                                  cases()[std::get<1>(info.param)].name + "_" +
                                  std::to_string(std::get<2>(info.param));
                         });

/// The comm has failed with `status`, and every call says so.
void expect_sticky(rsb_status status, Worker &worker, rsb_comm *comm) {
  Error error;
  EXPECT_TRUE(answers(status, rsb_comm_status(comm, error), error));
  const std::string first = error.message();
  unsigned char byte = 0;
  unsigned char all[8] = {};
  EXPECT_TRUE(answers(status, rsb_comm_all_gather(comm, &byte, all, 1, error), error));
  EXPECT_TRUE(answers(status, worker.try_submit(Op::f32(3), error), error));
  EXPECT_TRUE(answers(status, worker.flush(error), error)) << "the refused submit counts";
  EXPECT_TRUE(answers(status, rsb_comm_status(comm, error), error));
  EXPECT_EQ(error.message(), first) << "the first cause stays";
}

TEST_P(Mismatch, IsDesyncOnEveryRank) {
  const Case &c = cases()[std::get<1>(GetParam())];
  const uint32_t size = std::get<2>(GetParam());
  run_group(std::get<0>(GetParam()), size, [&](uint32_t rank, rsb_comm *comm) {
    const bool odd = rank + 1 == size;
    Worker worker(comm, odd ? c.odd_bucket_bytes : 0);
    c.script(worker, comm, odd);
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_DESYNC, worker.flush(error), error));
    for (size_t place = 0; place < worker.submitted(); ++place) {
      if (worker.calls(place) != 0 && worker.status(place) != RSB_ERR_DESYNC) {
        EXPECT_EQ(worker.status(place), RSB_OK);
        EXPECT_EQ(worker.expected(place).size(), 9u * 4u) << "only the op of the good flush may be OK";
      }
    }
    expect_sticky(RSB_ERR_DESYNC, worker, comm);
  });
}

class Late : public ::testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Every, Late, ::testing::Values(Kind::kLocal, Kind::kShm),
                         [](const ::testing::TestParamInfo<Kind> &info) { return kind_name(info.param); });

/// A shm group needs some of its timeout to join.
uint64_t short_timeout(Kind kind) { return kind == Kind::kLocal ? 200000000 : 2000000000; }

TEST_P(Late, ARankThatNeverComesIsATimeout) {
  const rsb_comm_config config = comm_config(short_timeout(GetParam()));
  Gate joined;
  Gate failed;
  run_group(
      GetParam(), 3,
      [&](uint32_t rank, rsb_comm *comm) {
        Worker worker(comm, 0);
        joined.open();
        ASSERT_TRUE(joined.wait(3));
        if (rank == 2) {
          ASSERT_TRUE(failed.wait(2));
        }
        Error error;
        const rsb_status submitted = worker.try_submit(Op::f32(6), error);
        EXPECT_TRUE(answers(submitted == RSB_OK ? RSB_OK : RSB_ERR_TIMEOUT, submitted, error));
        EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, worker.flush(error), error));
        failed.open();
        expect_sticky(RSB_ERR_TIMEOUT, worker, comm);
        ASSERT_TRUE(failed.wait(3)) << "nobody leaves before all have seen it";
      },
      &config);
}

TEST_P(Late, AllGatherTimesOutToo) {
  const rsb_comm_config config = comm_config(short_timeout(GetParam()));
  Gate joined;
  Gate failed;
  run_group(
      GetParam(), 2,
      [&](uint32_t rank, rsb_comm *comm) {
        joined.open();
        ASSERT_TRUE(joined.wait(2));
        if (rank == 1) {
          ASSERT_TRUE(failed.wait(1));
        }
        Error error;
        EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, rsb_comm_all_gather(comm, nullptr, nullptr, 0, error), error));
        failed.open();
        ASSERT_TRUE(failed.wait(2));
      },
      &config);
}

TEST_P(Late, AbortBeforeTheFlushReachesAll) {
  Gate aborted;
  run_group(GetParam(), 3, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(6));
    aborted.open();
    ASSERT_TRUE(aborted.wait(3));
    if (rank == 1) {
      rsb_comm_abort(comm);
    }
    Error error;
    // Ranks 0 and 2 wait for rank 1, which will not come.
    EXPECT_TRUE(answers(RSB_ERR_ABORTED, worker.flush(error), error));
    EXPECT_EQ(worker.status(0), RSB_ERR_ABORTED);
    expect_sticky(RSB_ERR_ABORTED, worker, comm);
    aborted.open();
    ASSERT_TRUE(aborted.wait(6));
  });
}

class Same : public ::testing::TestWithParam<Kind> {};
INSTANTIATE_TEST_SUITE_P(Every, Same, ::testing::Values(Kind::kLocal, Kind::kShm),
                         [](const ::testing::TestParamInfo<Kind> &info) { return kind_name(info.param); });

TEST_P(Same, WhatIsNotComparedMayDiffer) {
  run_group(GetParam(), 2, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 500);
    for (size_t i = 0; i < 40; ++i) {
      Op op = Op::f32(1 + i);
      op.callback = (i + rank) % 3 != 0;
      op.flags = (i + rank) % 2 == 0 ? RSB_SUBMIT_BORROW : 0;
      op.output = (i / 2 + rank) % 2 == 0;
      op.offset = rank * 4;
      worker.submit(op);
    }
    worker.finish();
  });
}

TEST_P(Same, LongSequencesGiveNoFalseAlarm) {
  run_group(GetParam(), 2, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 256);
    for (uint64_t i = 0; i < 2000; ++i) {
      worker.submit(tagged(values::hash(i) % 12, values::hash(i, 1), i % 2 == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_I64));
      if (values::hash(i, 2) % 50 == 0) {
        worker.flush();
        if (rank == 0) {
          worker.flush();  // nothing is open
        }
      }
      if (values::hash(i, 3) % 200 == 0) {
        EXPECT_RSB_OK(rsb_comm_all_gather(comm, nullptr, nullptr, 0, nullptr));
      }
    }
    worker.finish();
  });
}

}  // namespace
