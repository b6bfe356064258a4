// The five cases that the Python original is tested with (fairscale, tests/utils/
// test_reduce_scatter_bucketer.py), with the same numbers, on 1 to 4 ranks.
#include <gtest/gtest.h>

#include "harness.h"

using namespace harness;

namespace {

/// A stand-in for the mock callback: how often, and the last result.
struct Callback {
  int call_count = 0;
  std::vector<float> result;

  static void call(void *user_data, const rsb_result *r) {
    auto &self = *static_cast<Callback *>(user_data);
    self.call_count += 1;
    EXPECT_EQ(r->status, RSB_OK);
    const auto *data = static_cast<const float *>(r->data);
    self.result.assign(data, data + r->numel);
  }
};

using Tensors = std::vector<std::vector<float>>;

void reduce_scatter_async(rsb_bucketer *bucketer, rsb_comm *comm, const Tensors &tensors, Callback &callback) {
  std::vector<const void *> inputs;
  for (const std::vector<float> &tensor : tensors) {
    inputs.push_back(tensor.data());
  }
  Error error;
  EXPECT_TRUE(answers(RSB_OK,
                      rsb_bucketer_reduce_scatter_async(bucketer, comm, inputs.data(), tensors[0].size(),
                                                        RSB_DTYPE_F32, RSB_OP_SUM, &Callback::call, &callback,
                                                        error),
                      error));
}

constexpr double kCapMb = 0.25;
constexpr int64_t kCapBytes = 262144;

void reduce_scatter_case(double bucket_cap_mb, size_t shard_size) {
  for (uint32_t world_size = 1; world_size <= 4; ++world_size) {
    run_ranks(world_size, [&](uint32_t rank, rsb_comm *comm) {
      // The original turns bucketing off with 0; here 0 is the default size, and below 0 is off.
      Bucketer bucketer(bucket_cap_mb > 0 ? static_cast<int64_t>(bucket_cap_mb * 1024 * 1024) : -1);
      Tensors tensors(world_size, std::vector<float>(shard_size, 1.0F));
      tensors[rank].assign(shard_size, 0.0F);
      const double input_bytes = static_cast<double>(shard_size * world_size * 4);
      const double bucket_bytes = bucket_cap_mb * 1024 * 1024;

      Callback callback;
      reduce_scatter_async(bucketer, comm, tensors, callback);
      if (bucket_cap_mb > 0 && input_bytes < bucket_bytes) {
        EXPECT_EQ(callback.call_count, 0);
        EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
      }
      EXPECT_EQ(callback.call_count, 1);
      EXPECT_EQ(callback.result, std::vector<float>(shard_size, static_cast<float>(world_size - 1)));
    });
  }
}

TEST(Fairscale, ReduceScatterCap0Shard1) { reduce_scatter_case(0.0, 1); }
TEST(Fairscale, ReduceScatterCap0Shard262144) { reduce_scatter_case(0.0, 262144); }
TEST(Fairscale, ReduceScatterCapQuarterShard1) { reduce_scatter_case(kCapMb, 1); }
TEST(Fairscale, ReduceScatterCapQuarterShard262144) { reduce_scatter_case(kCapMb, 262144); }

TEST(Fairscale, OutOfOrderReduction) {
  for (uint32_t world_size = 1; world_size <= 4; ++world_size) {
    run_ranks(world_size, [&](uint32_t, rsb_comm *comm) {
      Bucketer bucketer(kCapBytes);
      const Tensors small(world_size, std::vector<float>(1, 1.0F));
      const Tensors big(world_size, std::vector<float>(262144, 1.0F));
      const Tensors more_small(world_size, std::vector<float>(2, 1.0F));
      Callback callback1;
      Callback callback2;
      Callback callback3;
      const auto counts = [&] {
        return std::vector<int>{callback1.call_count, callback2.call_count, callback3.call_count};
      };
      reduce_scatter_async(bucketer, comm, small, callback1);
      EXPECT_EQ(counts(), (std::vector<int>{0, 0, 0}));
      reduce_scatter_async(bucketer, comm, big, callback2);
      EXPECT_EQ(counts(), (std::vector<int>{0, 1, 0}));
      reduce_scatter_async(bucketer, comm, more_small, callback3);
      EXPECT_EQ(counts(), (std::vector<int>{0, 1, 0}));
      EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
      EXPECT_EQ(counts(), (std::vector<int>{1, 1, 1}));
      // The original looks at no value here.
      const auto sum = static_cast<float>(world_size);
      EXPECT_EQ(callback1.result, std::vector<float>(1, sum));
      EXPECT_EQ(callback2.result, std::vector<float>(262144, sum));
      EXPECT_EQ(callback3.result, std::vector<float>(2, sum));
    });
  }
}

}  // namespace
