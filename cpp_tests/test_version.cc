// The header's version section: the header that these tests saw and the library that is loaded agree.
#include <gtest/gtest.h>
#include <rsbucket.h>

#include <string>

TEST(Version, LibraryAndHeaderAgree) {
  EXPECT_EQ(rsb_version(), uint32_t{RSB_VERSION_MAJOR} << 16 | uint32_t{RSB_VERSION_MINOR} << 8 |
                               uint32_t{RSB_VERSION_PATCH});
  EXPECT_EQ(rsb_abi_version(), RSB_ABI_VERSION);
}

TEST(Version, StringIsTheNumbersAndStatic) {
  const char *text = rsb_version_string();
  ASSERT_NE(text, nullptr);
  EXPECT_EQ(std::string(text), std::to_string(RSB_VERSION_MAJOR) + "." + std::to_string(RSB_VERSION_MINOR) +
                                   "." + std::to_string(RSB_VERSION_PATCH));
  EXPECT_EQ(rsb_version_string(), text);
}

TEST(Version, FeaturesAreKnownBits) {
  const uint64_t features = rsb_features();
  EXPECT_EQ(features & ~(RSB_FEATURE_SHM | RSB_FEATURE_CUDA | RSB_FEATURE_NCCL), 0u);
#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
  EXPECT_NE(features & RSB_FEATURE_SHM, 0u);
#else
  EXPECT_EQ(features & RSB_FEATURE_SHM, 0u);
#endif
  EXPECT_EQ(rsb_features(), features);
}

TEST(Version, LayoutOfFrozenStructs) {
  EXPECT_EQ(sizeof(rsb_error), 256u);
  EXPECT_EQ(offsetof(rsb_error, message), 16u);
  EXPECT_EQ(offsetof(rsb_submit_args, struct_size), 0u);
  EXPECT_EQ(offsetof(rsb_config, struct_size), 0u);
  EXPECT_EQ(offsetof(rsb_comm_config, struct_size), 0u);
  EXPECT_EQ(offsetof(rsb_transport, struct_size), 0u);
  EXPECT_EQ(offsetof(rsb_allocator, struct_size), 0u);
  EXPECT_EQ(offsetof(rsb_result, struct_size), 0u);
}
