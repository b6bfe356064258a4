// A machine with a driver and without NCCL: what is missing is named, with where it was looked for. (Without a
// driver, too: test_handles.)
#include <gtest/gtest.h>

#include <cstdlib>

#include "fake_cuda.h"
#include "harness.h"

using namespace harness;

namespace {

void refused(const std::vector<std::string> &names) {
  rsb_comm *comm = nullptr;
  Error error;
  int any = 0;
  EXPECT_EQ(rsb_comm_wrap_nccl(&any, nullptr, &comm, error), RSB_ERR_UNSUPPORTED);
  EXPECT_TRUE(error.full(RSB_ERR_UNSUPPORTED));
  EXPECT_EQ(comm, nullptr);
  for (const std::string &name : names) {
    EXPECT_NE(error.message().find(name), std::string::npos) << error.message();
  }
}

TEST(Absent, NcclIsNamedWithWhereItWasLookedFor) {
  ASSERT_EQ(cuInit(0), CUDA_SUCCESS);
  EXPECT_EQ(rsb_features() & (RSB_FEATURE_CUDA | RSB_FEATURE_NCCL), RSB_FEATURE_CUDA);
  ASSERT_EQ(unsetenv("RSBUCKET_NCCL_LIB"), 0);
  refused({"libnccl.so.2", "RSBUCKET_NCCL_LIB is not set"});
  ASSERT_EQ(setenv("RSBUCKET_NCCL_LIB", "/nowhere/libnccl.so.2", 1), 0);
  refused({"RSBUCKET_NCCL_LIB=/nowhere/libnccl.so.2"});
}

TEST(Absent, WhatIsNoNcclIsRefused) {
  // Some library that is there for sure.
  ASSERT_EQ(setenv("RSBUCKET_NCCL_LIB", "libm.so.6", 1), 0);
  refused({"libm.so.6", "ncclGetVersion"});
}

TEST(Absent, AnOldOneIsRefusedByItsVersion) {
  ASSERT_EQ(setenv("RSBUCKET_NCCL_LIB", RSB_FAKE_NCCL, 1), 0);
  ASSERT_EQ(setenv("RSB_FAKE_NCCL_VERSION", "2804", 1), 0);
  refused({"2.8.4", "2.10", "RSBUCKET_NCCL_LIB"});
}

}  // namespace
