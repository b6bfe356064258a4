// The header's status and log sections: every number has its name, and a logger is used and released.
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <set>
#include <string>

#include "harness.h"

namespace {

const std::map<rsb_status, std::string> kNames = {
    {0, "RSB_OK"},
    {1, "RSB_PENDING"},
    {-1, "RSB_ERR_INVALID_ARGUMENT"},
    {-2, "RSB_ERR_BAD_HANDLE"},
    {-3, "RSB_ERR_UNSUPPORTED"},
    {-4, "RSB_ERR_NO_MEMORY"},
    {-5, "RSB_ERR_BUSY"},
    {-6, "RSB_ERR_NOT_LAUNCHED"},
    {-7, "RSB_ERR_REENTRANT"},
    {-8, "RSB_ERR_CANCELLED"},
    {-9, "RSB_ERR_PERMISSION"},
    {-10, "RSB_ERR_CONFIG_MISMATCH"},
    {-20, "RSB_ERR_TIMEOUT"},
    {-21, "RSB_ERR_PEER_LOST"},
    {-22, "RSB_ERR_DESYNC"},
    {-23, "RSB_ERR_ABORTED"},
    {-24, "RSB_ERR_TRANSPORT"},
    {-99, "RSB_ERR_PANIC"},
};

TEST(Status, EveryNumberHasItsName) {
  for (const auto &entry : kNames) {
    EXPECT_EQ(rsb_status_name(entry.first), entry.second);
    EXPECT_EQ(rsb_status_name(entry.first), rsb_status_name(entry.first)) << "not static";
  }
}

TEST(Status, OtherNumbersHaveSomeOtherName) {
  std::set<std::string> known;
  for (const auto &entry : kNames) {
    known.insert(entry.second);
  }
  for (const rsb_status status : {2, -11, -19, -25, -98, -100, 1000, INT32_MAX, INT32_MIN}) {
    const char *name = rsb_status_name(status);
    ASSERT_NE(name, nullptr) << status;
    EXPECT_EQ(known.count(name), 0u) << status << " is called " << name;
  }
}

struct Logger {
  std::atomic<int> messages{0};
  std::atomic<int> wrong{0};
  std::atomic<int> releases{0};

  static void log(void *user_data, int32_t level, const char *target, const char *message) {
    auto &self = *static_cast<Logger *>(user_data);
    self.messages += 1;
    const bool good = level >= RSB_LOG_ERROR && level <= RSB_LOG_DEBUG && target != nullptr &&
                      message != nullptr && std::strlen(message) > 0 && self.releases == 0;
    self.wrong += good ? 0 : 1;
  }
  static void release(void *user_data) { static_cast<Logger *>(user_data)->releases += 1; }
};

TEST(Log, LoggerIsReleasedOnceWhenAnotherTakesItsPlace) {
  Logger first;
  Logger second;
  EXPECT_RSB_OK(rsb_set_logger(&Logger::log, &first, &Logger::release, RSB_LOG_DEBUG));
  EXPECT_EQ(first.releases, 0);
  harness::run_ranks(2, [](uint32_t, rsb_comm *comm) {
    harness::Bucketer bucketer(0);
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    EXPECT_RSB_OK(rsb_comm_all_gather(comm, nullptr, nullptr, 0, nullptr));
  });
  EXPECT_RSB_OK(rsb_set_logger(&Logger::log, &second, &Logger::release, RSB_LOG_ERROR));
  EXPECT_EQ(first.releases, 1);
  EXPECT_RSB_OK(rsb_set_logger(nullptr, nullptr, nullptr, RSB_LOG_ERROR));
  EXPECT_EQ(first.releases, 1);
  EXPECT_EQ(second.releases, 1);
  EXPECT_EQ(first.wrong, 0);
  EXPECT_EQ(second.wrong, 0);
}

TEST(Log, SilenceIsTheDefaultAndReleaseIsOptional) {
  Logger logger;
  EXPECT_RSB_OK(rsb_set_logger(&Logger::log, &logger, nullptr, RSB_LOG_WARN));
  EXPECT_RSB_OK(rsb_set_logger(nullptr, nullptr, nullptr, RSB_LOG_WARN));
  const int before = logger.messages;
  harness::Error error;
  EXPECT_EQ(rsb_bucketer_flush(nullptr, error), RSB_ERR_BAD_HANDLE);
  EXPECT_EQ(logger.messages, before);
}

}  // namespace
