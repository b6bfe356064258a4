// The kinds of comm that a test runs on, and that ranks on them kept step.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "fake_engine.h"
#include "worker.h"

namespace harness {

constexpr uint64_t kReduce = RSB_TRANSPORT_REDUCE_SCATTER;
constexpr uint64_t kAllToAll = RSB_TRANSPORT_ALL_TO_ALL;
constexpr uint64_t kGather = RSB_TRANSPORT_ALL_GATHER;

/// The comms that must keep step; the custom ones check each other, so that a difference shows.
enum class On { kLocal, kShm, kReduceScatter, kAllToAll };

inline std::string name_of(On on) {
  return on == On::kLocal ? "Local" : on == On::kShm ? "Shm" : on == On::kReduceScatter ? "ReduceScatter" : "AllToAll";
}

inline void run_on(On on, uint32_t size, const RankFn &fn) {
  if (on == On::kLocal || on == On::kShm) {
    run_group(on == On::kLocal ? Kind::kLocal : Kind::kShm, size, fn);
    return;
  }
  FakeEngine::Options options;
  options.flags = (on == On::kAllToAll ? kAllToAll : kReduce) | kGather;
  options.order = FakeEngine::Order::kDelayed;
  FakeEngine engine(size, options);
  run_custom(engine, size, 0, fn);
}

/// All ranks are at the same place of rule 1's sequence; if not, some get RSB_ERR_DESYNC here.
inline void expect_in_step(uint32_t rank, rsb_comm *comm) {
  std::vector<uint32_t> all(rsb_comm_size(comm), 99);
  Error error;
  ASSERT_TRUE(answers(RSB_OK, rsb_comm_all_gather(comm, &rank, all.data(), sizeof rank, error), error));
  for (uint32_t from = 0; from < all.size(); ++from) {
    EXPECT_EQ(all[from], from);
  }
}

inline void expect_all_called(const Worker &worker) {
  for (size_t place = 0; place < worker.submitted(); ++place) {
    EXPECT_EQ(worker.calls(place), 1u) << "op " << place;
    EXPECT_EQ(worker.status(place), RSB_OK) << "op " << place;
    EXPECT_NE(worker.ticket(place), 0u) << "op " << place;
  }
}

}  // namespace harness
