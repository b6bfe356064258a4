// An engine for rsb_comm_create_custom whose ranks are threads: it can be slow, end requests in any
// order, fail on command, and it notes every breach of the rules that the header gives to its caller.
#ifndef RSBUCKET_CPP_TESTS_FAKE_ENGINE_H
#define RSBUCKET_CPP_TESTS_FAKE_ENGINE_H

#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "harness.h"
#include "values.h"

namespace harness {

class FakeEngine {
 public:
  enum class Order { kAtOnce, kDelayed, kNewestFirst };

  struct Options {
    uint64_t flags = RSB_TRANSPORT_REDUCE_SCATTER | RSB_TRANSPORT_ALL_GATHER;
    Order order = Order::kAtOnce;
    uint64_t reduce_dtypes = 0;
    size_t max_count = 0;
    uint64_t fail_start_at = UINT64_MAX;  // the request of that number, on every rank
    uint64_t fail_test_at = UINT64_MAX;
    int32_t code = 77;  // what failing calls return
    bool with_abort = true;
    bool with_describe = true;
  };

  /// What one request asked for, as the first rank gave it.
  struct Request {
    uint32_t kind;
    rsb_dtype dtype;
    rsb_op op;
    size_t count;
    const void *send;  // of rank 0
  };

  FakeEngine(uint32_t size, const Options &options);

  rsb_transport transport(uint32_t rank);

  /// How the ranks' calls broke the rules; empty: not at all.
  std::vector<std::string> breaches() const;
  std::vector<Request> requests() const;
  uint32_t releases(uint32_t rank) const;
  uint32_t aborts(uint32_t rank) const;
  /// From now on every start and test of every rank fails.
  void fail_from_now();

 private:
  struct Part {
    const unsigned char *send = nullptr;
    unsigned char *recv = nullptr;
    bool there = false;
  };
  struct Slot {
    Request what{};
    std::vector<Part> parts;
    uint32_t arrived = 0;
    bool done = false;
    bool dead = false;  // a rank's memory may be gone
  };
  struct Endpoint;
  class Call;
  struct Open {
    Endpoint *endpoint;
    uint64_t number;
    uint64_t tests;
  };
  struct Endpoint {
    FakeEngine *engine = nullptr;
    uint32_t rank = 0;
    uint64_t started = 0;
    std::atomic<bool> inside{false};
    bool aborted = false;
    uint32_t aborts = 0;
    uint32_t releases = 0;
    std::map<void *, std::unique_ptr<Open>> open;
  };

  static int32_t start(void *ctx, const rsb_coll *coll, void **request);
  static int32_t test(void *ctx, void *request, int32_t *done);
  static void abort(void *ctx);
  static void release(void *ctx);
  static void describe(void *ctx, int32_t code, char *text, size_t size);

  int32_t do_start(Endpoint &endpoint, const rsb_coll &coll, void **request);
  int32_t do_test(Endpoint &endpoint, void *request, int32_t *done);
  void check(const Endpoint &endpoint, const rsb_coll &coll);
  bool ready(const Endpoint &endpoint, Open &open);
  void execute(Slot &slot) const;
  void breach(const Endpoint &endpoint, const std::string &text);

  const uint32_t size_;
  const Options options_;
  mutable std::mutex mutex_;
  std::vector<Endpoint> endpoints_;
  std::deque<Slot> slots_;
  std::vector<std::string> breaches_;
  bool failing_ = false;
};

/// Custom comms over one engine, a thread each. At the end the engine's rules must have been kept, and
/// every rank released exactly once.
using EngineFn = std::function<void(uint32_t rank, rsb_comm *comm)>;
void run_custom(FakeEngine &engine, uint32_t size, uint64_t comm_flags, const EngineFn &fn,
                uint64_t timeout_ns = kTimeoutNs);

}  // namespace harness

#endif  // RSBUCKET_CPP_TESTS_FAKE_ENGINE_H
