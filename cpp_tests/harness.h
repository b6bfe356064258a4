// Runs the same function on every rank of a group, as threads or as processes, and checks what every
// test needs: that errors are written in full, and that waiting is bounded.
#ifndef RSBUCKET_CPP_TESTS_HARNESS_H
#define RSBUCKET_CPP_TESTS_HARNESS_H

#include <gtest/gtest.h>
#include <rsbucket.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <set>
#include <string>
#include <vector>

namespace harness {

/// Long enough for a slow machine, short enough that a hang becomes a failure and not a killed test.
constexpr uint64_t kTimeoutNs = UINT64_C(20000000000);

rsb_comm_config comm_config(uint64_t timeout_ns = kTimeoutNs);

using RankFn = std::function<void(uint32_t rank, rsb_comm *comm)>;

/// A rank's function on its own thread with its end of a new local comm. A rank that ends early (a fatal
/// failure, an exception) aborts the comm, so that the others end, too. Comms are freed after all have
/// ended.
void run_ranks(uint32_t size, const RankFn &fn, const rsb_comm_config *config = nullptr);

/// `fn(rank)` on `size` threads; `on_failure(rank)` when a rank ended early.
void run_threads(uint32_t size, const std::function<void(uint32_t rank)> &fn,
                 const std::function<void(uint32_t rank)> &on_failure);

/// `fn(rank)` in `size` forked processes. Failures of a child become failures of the test, with their
/// text. `killed` are the ranks that must die by SIGKILL.
void run_processes(uint32_t size, const std::function<void(uint32_t rank)> &fn,
                   const std::set<uint32_t> &killed = {});

/// As run_ranks, with processes and a new shm comm.
void run_shm(uint32_t size, const RankFn &fn, const rsb_comm_config *config = nullptr,
             const std::set<uint32_t> &killed = {});

/// Local or shm, for tests that must hold on both.
enum class Kind { kLocal, kShm };
std::string kind_name(Kind kind);
void run_group(Kind kind, uint32_t size, const RankFn &fn, const rsb_comm_config *config = nullptr);

/// A name for a shm group that nobody else uses.
std::string unique_name();

/// A flag that threads and forked processes can wait for. Make it before the fork.
class Gate {
 public:
  Gate();
  ~Gate();
  Gate(const Gate &) = delete;
  Gate &operator=(const Gate &) = delete;
  void open();
  /// Waits until `count` calls of open() were made; false after `seconds`.
  bool wait(uint32_t count = 1, double seconds = 15.0) const;
  uint32_t count() const;

 private:
  std::atomic<uint32_t> *count_;
};

/// An rsb_error between canaries, with every byte set before the call.
class Error {
 public:
  Error();
  operator rsb_error *() { return &frame_.error; }
  const rsb_error *operator->() const { return &frame_.error; }
  /// Not one byte was written.
  bool untouched() const;
  /// Written in full for `status`, and nothing beside it.
  ::testing::AssertionResult full(rsb_status status) const;
  std::string message() const;

 private:
  struct Frame {
    unsigned char before[64];
    rsb_error error;
    unsigned char after[64];
  } frame_;
};

/// The call returned `expected`, and left the error as it must be for it.
::testing::AssertionResult answers(rsb_status expected, rsb_status actual, const Error &error);

/// An argument error: `expected`, blaming nobody, with one of `names` in its message.
::testing::AssertionResult refuses(const std::set<rsb_status> &expected, rsb_status actual,
                                   const Error &error, const std::vector<std::string> &names);

/// Frees the bucketer at the end, unless that was done before.
class Bucketer {
 public:
  explicit Bucketer(int64_t bucket_bytes, const rsb_allocator *allocator = nullptr);
  ~Bucketer();
  Bucketer(const Bucketer &) = delete;
  Bucketer &operator=(const Bucketer &) = delete;
  operator rsb_bucketer *() const { return handle_; }
  rsb_status free();
  rsb_stats stats() const;

 private:
  rsb_bucketer *handle_ = nullptr;
};

/// What callbacks of tests throw.
struct Thrown {};

/// Whether the call let a callback's exception through.
inline bool throws(const std::function<void()> &call) {
  try {
    call();
  } catch (const Thrown &) {
    return true;
  }
  return false;
}

}  // namespace harness

#define EXPECT_RSB_OK(call) EXPECT_EQ(std::string(rsb_status_name(call)), "RSB_OK")
#define ASSERT_RSB_OK(call) ASSERT_EQ(std::string(rsb_status_name(call)), "RSB_OK")

#endif  // RSBUCKET_CPP_TESTS_HARNESS_H
