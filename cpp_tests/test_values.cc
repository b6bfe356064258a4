// Every dtype and op on 1 to 8 ranks, with tails, nothing, exactly full buckets and one element over,
// for bucket sizes from one element to off, against an independent oracle.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "worker.h"

using namespace harness;

namespace {

class Values : public ::testing::TestWithParam<std::tuple<uint32_t, size_t>> {
 protected:
  uint32_t size() const { return std::get<0>(GetParam()); }
  /// Bytes for that many elements of F32 of each part; 0: bucketing off; SIZE_MAX: the default.
  int64_t bucket_bytes() const {
    const size_t elements = std::get<1>(GetParam());
    if (elements == SIZE_MAX) {
      return 0;
    }
    return elements == 0 ? -1 : static_cast<int64_t>(elements * 4 * size());
  }
};

INSTANTIATE_TEST_SUITE_P(AllSizes, Values,
                         ::testing::Combine(::testing::Values(1u, 2u, 3u, 4u, 7u, 8u),
                                            ::testing::Values(size_t{0}, size_t{1}, size_t{16}, size_t{100},
                                                              SIZE_MAX)),
                         [](const ::testing::TestParamInfo<std::tuple<uint32_t, size_t>> &info) {
                           const size_t elements = std::get<1>(info.param);
                           return "ranks" + std::to_string(std::get<0>(info.param)) + "_" +
                                  (elements == 0          ? std::string("off")
                                   : elements == SIZE_MAX ? std::string("default")
                                                          : "bucket" + std::to_string(elements));
                         });

/// Sizes around vectors and buckets (16 F32 are 8 F64 or 64 U8), one op after another.
const size_t kNumels[] = {1, 0, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 101, 0, 1};

void submit_all(Worker &worker, values::Data data, uint32_t size) {
  for (const rsb_dtype dtype : values::kAllDtypes) {
    for (const rsb_op op : values::kAllOps) {
      if (values::takes(dtype, op)) {
        for (const size_t numel : kNumels) {
          Op o = Op::of(numel, dtype, op);
          o.data = data;
          worker.submit(o);
        }
        Op flat = Op::of(13 * size - size / 2, dtype, op);
        flat.flat = true;
        flat.data = data;
        worker.submit(flat);
      }
    }
  }
}

TEST_P(Values, ExactData) {
  const int64_t bytes = bucket_bytes();
  run_ranks(size(), [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, bytes);
    submit_all(worker, values::Data::kExact, size());
    worker.finish();
  });
}

TEST_P(Values, RankOrderAndOneRounding) {
  const int64_t bytes = bucket_bytes();
  run_ranks(size(), [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, bytes);
    submit_all(worker, values::Data::kRough, size());
    worker.finish();
  });
}

TEST_P(Values, DtypesAndOpsInterleaved) {
  const int64_t bytes = bucket_bytes();
  run_ranks(size(), [&](uint32_t, rsb_comm *comm) {
    Worker worker(comm, bytes);
    for (uint64_t i = 0; i < 200; ++i) {
      const rsb_dtype dtype = values::kAllDtypes[values::hash(i, 1) % 8];
      rsb_op op = values::kAllOps[values::hash(i, 2) % 5];
      op = values::takes(dtype, op) ? op : RSB_OP_SUM;
      Op o = Op::of(values::hash(i, 3) % 70, dtype, op);
      o.data = values::Data::kRough;
      o.output = i % 4 == 0;
      o.flat = i % 5 == 0;
      o.flags = i % 3 == 0 ? RSB_SUBMIT_BORROW : 0;
      worker.submit(o);
    }
    worker.finish();
  });
}

TEST_P(Values, AverageOfEqualValuesIsThatValue) {
  const uint32_t ranks = size();
  const int64_t bytes = bucket_bytes();
  run_ranks(ranks, [&](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(bytes);
    for (const rsb_dtype dtype : {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_F16, RSB_DTYPE_BF16}) {
      const size_t width = values::size_of(dtype);
      const size_t numel = 257;
      values::Bytes input(numel * ranks * width);
      for (size_t i = 0; i < numel * ranks; ++i) {
        // 7 bits: the sum of 8 is exact in f32, and so is the quotient.
        const double x = (static_cast<double>(values::hash(i, dtype) % 127) - 63.0) / 8.0;
        values::store(dtype, x, input.data() + i * width);
      }
      values::Bytes output(numel * width);
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.flat_input = input.data();
      args.output = output.data();
      args.numel = numel * ranks;
      args.dtype = dtype;
      args.op = RSB_OP_AVG;
      rsb_ticket ticket = 0;
      ASSERT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
      ASSERT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
      const unsigned char *mine = input.data() + rank * numel * width;
      EXPECT_EQ(std::memcmp(output.data(), mine, output.size()), 0) << values::dtype_name(dtype);
    }
  });
}

/// What `size` ranks give for one F32, F64, F16 or BF16 element each; the same for every destination.
double reduce_one(uint32_t size, rsb_dtype dtype, rsb_op op, const std::vector<double> &of_rank) {
  double result = 0.0;
  run_ranks(size, [&](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(0);
    unsigned char input[8] = {};
    unsigned char output[8] = {};
    values::store(dtype, of_rank[rank], input);
    const std::vector<const void *> inputs(size, input);
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs.data();
    args.output = output;
    args.numel = 1;
    args.dtype = dtype;
    args.op = op;
    rsb_ticket ticket = 0;
    ASSERT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
    ASSERT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    if (rank == 0) {
      result = values::load(dtype, output);
    }
  });
  return result;
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInf = std::numeric_limits<double>::infinity();
const rsb_dtype kFloats[] = {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_F16, RSB_DTYPE_BF16};

TEST(Special, NanInAnyRankGivesNan) {
  for (const rsb_dtype dtype : kFloats) {
    for (const rsb_op op : values::kAllOps) {
      for (size_t at = 0; at < 3; ++at) {
        std::vector<double> of_rank = {1.0, 2.0, -1.0};
        of_rank[at] = kNan;
        EXPECT_TRUE(std::isnan(reduce_one(3, dtype, op, of_rank)))
            << values::dtype_name(dtype) << " " << values::op_name(op) << " rank " << at;
      }
    }
  }
}

TEST(Special, Infinities) {
  for (const rsb_dtype dtype : kFloats) {
    EXPECT_EQ(reduce_one(2, dtype, RSB_OP_SUM, {kInf, 1.0}), kInf);
    EXPECT_TRUE(std::isnan(reduce_one(2, dtype, RSB_OP_SUM, {kInf, -kInf})));
    EXPECT_EQ(reduce_one(2, dtype, RSB_OP_MIN, {kInf, -kInf}), -kInf);
    EXPECT_EQ(reduce_one(2, dtype, RSB_OP_MAX, {5.0, kInf}), kInf);
    EXPECT_EQ(reduce_one(2, dtype, RSB_OP_AVG, {-kInf, 1.0}), -kInf);
  }
}

TEST(Special, HalfPrecisionSumsAreAccumulatedInF32) {
  // 2048 + 1 is 2048 in f16, and 256 + 1 is 256 in bf16, step by step.
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_F16, RSB_OP_SUM, {2048.0, 1.0, 1.0}), 2050.0);
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_BF16, RSB_OP_SUM, {256.0, 1.0, 1.0}), 258.0);
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_F16, RSB_OP_SUM, {60000.0, 60000.0, -60000.0}), 60000.0);
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_F16, RSB_OP_SUM, {60000.0, 60000.0}), kInf);
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_F16, RSB_OP_AVG, {60000.0, 60000.0}), 60000.0);
}

TEST(Special, SmallNumbersAndSigns) {
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_F16, RSB_OP_SUM, {0x1p-24, 0x1p-24}), 0x1p-23);
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_F32, RSB_OP_SUM, {0x1p-149, 0x1p-149}), 0x1p-148);
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_BF16, RSB_OP_MAX, {0x1p-133, -1.0}), 0x1p-133);
  EXPECT_EQ(reduce_one(2, RSB_DTYPE_F64, RSB_OP_SUM, {0x1p-1074, 0x1p-1074}), 0x1p-1073);
  for (const rsb_dtype dtype : kFloats) {
    EXPECT_TRUE(std::signbit(reduce_one(3, dtype, RSB_OP_SUM, {-0.0, -0.0, -0.0})));
    EXPECT_FALSE(std::signbit(reduce_one(3, dtype, RSB_OP_SUM, {-0.0, -0.0, 0.0})));
  }
}

TEST(Special, RankOrderShowsInCancellation) {
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_F32, RSB_OP_SUM, {1e8, 1.0, -1e8}), 0.0);
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_F32, RSB_OP_SUM, {1e8, -1e8, 1.0}), 1.0);
  EXPECT_EQ(reduce_one(3, RSB_DTYPE_F64, RSB_OP_SUM, {1e16, 1.0, -1e16}), 0.0);
}

}  // namespace
