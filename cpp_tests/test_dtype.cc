// The header's element types, and the arithmetic of shards.
#include <gtest/gtest.h>
#include <rsbucket.h>

#include <map>

TEST(Dtype, Sizes) {
  const std::map<rsb_dtype, size_t> sizes = {
      {RSB_DTYPE_F32, 4}, {RSB_DTYPE_F64, 8}, {RSB_DTYPE_F16, 2}, {RSB_DTYPE_BF16, 2},
      {RSB_DTYPE_I32, 4}, {RSB_DTYPE_I64, 8}, {RSB_DTYPE_U8, 1},  {RSB_DTYPE_I8, 1},
  };
  for (const auto &entry : sizes) {
    EXPECT_EQ(rsb_dtype_size(entry.first), entry.second) << entry.first;
  }
}

TEST(Dtype, UnknownNumbersHaveNoSize) {
  for (rsb_dtype dtype = 9; dtype < 1024; ++dtype) {
    EXPECT_EQ(rsb_dtype_size(dtype), 0u) << dtype;
  }
  EXPECT_EQ(rsb_dtype_size(0), 0u);
  EXPECT_EQ(rsb_dtype_size(UINT32_MAX), 0u);
  EXPECT_EQ(rsb_dtype_size(UINT32_C(1) << 31 | RSB_DTYPE_F32), 0u);
}

TEST(Shard, NumelIsRoundedUp) {
  for (const uint32_t size : {1u, 2u, 3u, 4u, 7u, 8u, 64u}) {
    for (size_t numel = 0; numel < 200; ++numel) {
      EXPECT_EQ(rsb_shard_numel(numel, size), (numel + size - 1) / size) << numel << " over " << size;
    }
  }
}

TEST(Shard, NumelAtTheEdges) {
  EXPECT_EQ(rsb_shard_numel(0, 0), 0u);
  EXPECT_EQ(rsb_shard_numel(5, 0), 0u);
  EXPECT_EQ(rsb_shard_numel(1, UINT32_MAX), 1u);
  EXPECT_EQ(rsb_shard_numel(SIZE_MAX, 1), SIZE_MAX);
  EXPECT_EQ(rsb_shard_numel(SIZE_MAX, 2), SIZE_MAX / 2 + 1);
  EXPECT_EQ(rsb_shard_numel(SIZE_MAX - 1, 2), SIZE_MAX / 2);
}
