// What a hostile reader of the header tried first: callbacks that throw on one rank only, allocators that
// fail or call back in, and an engine that writes late. Ranks stay in step, and nothing is lost or done twice.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

struct Thrown {};

/// Whether the call let a callback's exception through.
bool throws(const std::function<void()> &call) {
  try {
    call();
  } catch (const Thrown &) {
    return true;
  }
  return false;
}

constexpr uint64_t kReduce = RSB_TRANSPORT_REDUCE_SCATTER;
constexpr uint64_t kAllToAll = RSB_TRANSPORT_ALL_TO_ALL;
constexpr uint64_t kGather = RSB_TRANSPORT_ALL_GATHER;

/// The comms that must keep step; the custom ones check each other, so that a difference shows.
enum class On { kLocal, kShm, kReduceScatter, kAllToAll };

std::string name_of(On on) {
  return on == On::kLocal ? "Local" : on == On::kShm ? "Shm" : on == On::kReduceScatter ? "ReduceScatter" : "AllToAll";
}

void run_on(On on, uint32_t size, const RankFn &fn) {
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
void expect_in_step(uint32_t rank, rsb_comm *comm) {
  std::vector<uint32_t> all(rsb_comm_size(comm), 99);
  Error error;
  ASSERT_TRUE(answers(RSB_OK, rsb_comm_all_gather(comm, &rank, all.data(), sizeof rank, error), error));
  for (uint32_t from = 0; from < all.size(); ++from) {
    EXPECT_EQ(all[from], from);
  }
}

void expect_all_called(const Worker &worker) {
  for (size_t place = 0; place < worker.submitted(); ++place) {
    EXPECT_EQ(worker.calls(place), 1u) << "op " << place;
    EXPECT_EQ(worker.status(place), RSB_OK) << "op " << place;
    EXPECT_NE(worker.ticket(place), 0u) << "op " << place;
  }
}

class OneRankThrows : public ::testing::TestWithParam<std::tuple<On, uint32_t>> {
 protected:
  uint32_t size() const { return std::get<1>(GetParam()); }
  /// `fn` on every rank, once with each rank as the one that throws.
  void each(const std::function<void(bool throwing, uint32_t rank, rsb_comm *comm)> &fn) const {
    for (uint32_t thrower = 0; thrower < size(); ++thrower) {
      run_on(std::get<0>(GetParam()), size(), [&](uint32_t rank, rsb_comm *comm) {
        SCOPED_TRACE("rank " + std::to_string(thrower) + " throws");
        fn(rank == thrower, rank, comm);
      });
    }
  }
  int64_t bucket_of(size_t floats) const { return static_cast<int64_t>(floats * 4 * size()); }
};

INSTANTIATE_TEST_SUITE_P(
    Exceptions, OneRankThrows,
    ::testing::Combine(::testing::Values(On::kLocal, On::kShm, On::kReduceScatter, On::kAllToAll),
                       ::testing::Values(1u, 2u, 3u)),
    [](const ::testing::TestParamInfo<std::tuple<On, uint32_t>> &info) {
      return name_of(std::get<0>(info.param)) + std::to_string(std::get<1>(info.param));
    });

Op throwing_if(bool throwing, Op op) {
  if (throwing) {
    op.then = [](const rsb_result &) { throw Thrown{}; };
  }
  return op;
}

constexpr size_t kBuckets = 5;
constexpr size_t kOps = 10;

/// Two ops in each of five buckets; the callback of op `at` throws.
void fill_buckets(Worker &worker, bool throwing, size_t at) {
  const rsb_dtype dtypes[kBuckets] = {RSB_DTYPE_F32, RSB_DTYPE_I64, RSB_DTYPE_F16, RSB_DTYPE_F64, RSB_DTYPE_I8};
  for (size_t i = 0; i < kOps; ++i) {
    worker.submit(throwing_if(throwing && i == at, Op::of(3 + i, dtypes[i % kBuckets])));
  }
}

const std::vector<size_t> kLaunchOrder = {0, 5, 1, 6, 2, 7, 3, 8, 4, 9};

TEST_P(OneRankThrows, AFlushHasLaunchedAllBuckets) {
  for (size_t at = 0; at < kOps; ++at) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, 0);
      fill_buckets(worker, throwing, at);
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(worker.bucketer().stats().collectives_launched, kBuckets);
      expect_in_step(rank, comm);
      worker.flush();
      EXPECT_EQ(worker.called(), kLaunchOrder);
      worker.submit(Op::f32(21));
      worker.finish();
      expect_all_called(worker);
    });
  }
}

TEST_P(OneRankThrows, ALaunchHasLaunchedAllBuckets) {
  // With more than two buckets a launch completes the oldest: 0 and 5, then 1 and 6, then 2 and 7.
  for (const size_t at : {0u, 5u, 1u, 6u, 2u, 7u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, 0);
      fill_buckets(worker, throwing, at);
      EXPECT_EQ(throws([&] { worker.launch(); }), throwing);
      EXPECT_EQ(worker.bucketer().stats().collectives_launched, kBuckets);
      expect_in_step(rank, comm);
      worker.submit(Op::f32(21));
      worker.finish();
      expect_all_called(worker);
      EXPECT_EQ(worker.called().size(), kOps + 1);
      EXPECT_TRUE(std::equal(kLaunchOrder.begin(), kLaunchOrder.end(), worker.called().begin()));
    });
  }
}

TEST_P(OneRankThrows, EveryCallback) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < kOps; ++i) {
      worker.submit(throwing_if(throwing, Op::of(1 + i, i % 2 == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_I32)));
    }
    for (size_t i = 0; throwing && i < kOps; ++i) {
      EXPECT_TRUE(throws([&] { worker.flush(); })) << i;
      EXPECT_EQ(worker.called().size(), i + 1);
    }
    worker.finish();
    expect_in_step(rank, comm);
    expect_all_called(worker);
  });
}

TEST_P(OneRankThrows, ALaunchThatFirstRunsWhatIsOwed) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (size_t i = 0; i < 3; ++i) {
      worker.submit(throwing_if(throwing, Op::f32(5 + i)));
    }
    EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
    EXPECT_EQ(throws([&] { worker.submit(Op::f32(6)); }), throwing);
    EXPECT_EQ(throws([&] { worker.launch(); }), throwing);
    EXPECT_EQ(worker.bucketer().stats().collectives_launched, 2u);
    expect_in_step(rank, comm);
    worker.finish();
    expect_all_called(worker);
  });
}

struct Submit {
  const char *name;
  std::vector<size_t> before;  // of a capacity of 4; the callback of the first throws
  size_t numel;
};

const Submit kSubmits[] = {
    {"fills its bucket", {4, 4}, 4},
    {"does not fit", {4, 4, 3}, 2},
    {"does not fit, then fills", {4, 4, 1}, 4},
    {"direct", {4}, 9},
    {"direct after two", {4, 4}, 9},
    {"direct beside an open bucket", {4, 2}, 9},
};

TEST_P(OneRankThrows, ASubmitTakesItsOpAllTheSame) {
  for (const Submit &submit : kSubmits) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      SCOPED_TRACE(submit.name);
      Worker worker(comm, bucket_of(4));
      for (size_t i = 0; i < submit.before.size(); ++i) {
        worker.submit(throwing_if(throwing && i == 0, Op::f32(submit.before[i])));
      }
      const size_t op = submit.before.size();
      EXPECT_TRUE(worker.called().empty());
      EXPECT_EQ(throws([&] { worker.submit(Op::f32(submit.numel)); }), throwing);
      EXPECT_EQ(worker.calls(0), 1u);
      EXPECT_NE(worker.ticket(op), 0u);
      if (throwing) {
        EXPECT_EQ(worker.calls(op), 0u);
      }
      EXPECT_EQ(worker.bucketer().stats().ops_submitted, op + 1);
      expect_in_step(rank, comm);
      worker.flush();
      EXPECT_RSB_OK(worker.wait(op));
      worker.submit(Op::f32(3));
      worker.submit(Op::f32(8));
      worker.finish();
      expect_all_called(worker);
    });
  }
}

TEST_P(OneRankThrows, ASubmitThatFirstRunsWhatIsOwed) {
  for (const size_t numel : {2u, 9u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, bucket_of(4));
      worker.submit(throwing_if(throwing, Op::f32(1)));
      worker.submit(throwing_if(throwing, Op::f32(2)));
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(throws([&] { worker.submit(Op::f32(numel)); }), throwing);
      EXPECT_EQ(worker.called().size(), throwing || numel < 4 ? 2u : 3u);
      EXPECT_NE(worker.ticket(2), 0u);
      expect_in_step(rank, comm);
      worker.finish();
      expect_all_called(worker);
      EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2}));
    });
  }
}

TEST_P(OneRankThrows, ADirectOpComesAfterTheBucketsBeforeIt) {
  each([&](bool throwing, uint32_t, rsb_comm *comm) {
    Worker worker(comm, bucket_of(4));
    for (size_t i = 0; i < 3; ++i) {
      worker.submit(throwing_if(throwing && i < 2, Op::f32(1)));
    }
    EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
    EXPECT_EQ(throws([&] { worker.submit(Op::f32(9)); }), throwing);
    worker.finish();
    expect_all_called(worker);
    EXPECT_EQ(worker.called(), (std::vector<size_t>{0, 1, 2, 3}));
  });
}

TEST_P(OneRankThrows, ASubmitHasReadItsInputs) {
  for (const size_t numel : {4u, 9u}) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, bucket_of(4));
      worker.submit(throwing_if(throwing, Op::f32(4)));
      worker.submit(Op::f32(4));
      std::vector<float> input(numel * size());
      for (size_t i = 0; i < input.size(); ++i) {
        input[i] = static_cast<float>(values::hash(rank, i) % 1000);
      }
      std::vector<float> result;
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.flat_input = input.data();
      args.numel = input.size();
      args.dtype = RSB_DTYPE_F32;
      args.op = RSB_OP_SUM;
      args.user_data = &result;
      args.callback = [](void *user_data, const rsb_result *r) {
        const auto *data = static_cast<const float *>(r->data);
        auto &all = *static_cast<std::vector<float> *>(user_data);
        all.insert(all.end(), data, data + r->numel);
      };
      rsb_ticket ticket = 0;
      EXPECT_EQ(throws([&] { EXPECT_RSB_OK(rsb_bucketer_submit(worker, comm, &args, &ticket, nullptr)); }),
                throwing);
      EXPECT_NE(ticket, 0u);
      std::fill(input.begin(), input.end(), -1.0F);
      worker.finish();
      ASSERT_EQ(result.size(), numel) << "one callback";
      for (size_t i = 0; i < numel; ++i) {
        float expected = 0.0F;
        for (uint32_t from = 0; from < size(); ++from) {
          expected += static_cast<float>(values::hash(from, rank * numel + i) % 1000);
        }
        EXPECT_EQ(result[i], expected) << i;
      }
    });
  }
}

/// A call after the one that threw, which runs what that one owes; made on the ranks that share it.
struct Next {
  const char *name;
  bool shared;  // part of rule 1's sequence: every rank makes it
  std::function<void(Worker &)> call;
};

const Next kNexts[] = {
    {"flush", true, [](Worker &worker) { worker.flush(); }},
    {"launch", true, [](Worker &worker) { worker.launch(); }},
    {"a waiting submit", true, [](Worker &worker) { worker.submit(Op::f32(11)); }},
    {"a direct submit", true, [](Worker &worker) { worker.submit(Op::f32(5000)); }},
    {"poll", false,
     [](Worker &worker) {
       size_t all = 0;
       for (size_t i = 0; i < 1000000 && all < kOps - 1; ++i) {
         size_t completed = 99;
         EXPECT_RSB_OK(rsb_bucketer_poll(worker, &completed, nullptr));
         all += completed;
       }
       EXPECT_EQ(all, kOps - 1);
     }},
    {"wait for the first", false, [](Worker &worker) { EXPECT_RSB_OK(worker.wait(0)); }},
    {"wait for the last", false, [](Worker &worker) { EXPECT_RSB_OK(worker.wait(kOps - 1)); }},
    {"free", false, [](Worker &worker) { EXPECT_RSB_OK(worker.free()); }},
};

TEST_P(OneRankThrows, TheNextCallRunsWhatAFlushOwes) {
  for (const Next &next : kNexts) {
    each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
      SCOPED_TRACE(next.name);
      Worker worker(comm, bucket_of(1000));
      fill_buckets(worker, throwing, 0);
      EXPECT_EQ(throws([&] { worker.flush(); }), throwing);
      EXPECT_EQ(worker.called().size(), throwing ? 1u : kOps);
      Error error;
      EXPECT_TRUE(answers(throwing ? RSB_ERR_BUSY : RSB_OK, rsb_bucketer_release_buffers(worker, error), error));
      expect_in_step(rank, comm);  // from here on no call needs a peer for what is owed
      if (throwing || next.shared) {
        next.call(worker);
      }
      for (size_t i = 0; i < kOps; ++i) {
        ASSERT_LT(i, worker.called().size());
        EXPECT_EQ(worker.called()[i], kLaunchOrder[i]);
      }
      expect_in_step(rank, comm);
      if (next.shared) {
        worker.finish();
        expect_all_called(worker);
      }
    });
  }
}

TEST_P(OneRankThrows, FreeCanBeTriedAgain) {
  each([&](bool throwing, uint32_t rank, rsb_comm *comm) {
    rsb_config config = RSB_CONFIG_INIT;
    rsb_bucketer *bucketer = nullptr;
    ASSERT_RSB_OK(rsb_bucketer_create(&config, &bucketer, nullptr));
    size_t calls = 0;
    struct Call {
      bool throwing;
      size_t *calls;
    } call{throwing, &calls};
    const rsb_callback count = [](void *user_data, const rsb_result *result) {
      EXPECT_EQ(result->status, result->tag < 2 ? RSB_OK : RSB_ERR_CANCELLED) << result->tag;
      const Call &call = *static_cast<Call *>(user_data);
      *call.calls += 1;
      if (call.throwing) {
        throw Thrown{};
      }
    };
    std::vector<float> input(7 * size(), static_cast<float>(rank + 1));
    for (uint64_t tag = 0; tag < 4; ++tag) {
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      args.flat_input = input.data();
      args.numel = input.size();
      args.dtype = RSB_DTYPE_F32;
      args.op = RSB_OP_SUM;
      args.tag = tag;
      args.callback = count;
      args.user_data = &call;
      ASSERT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
      if (tag == 1) {
        ASSERT_RSB_OK(rsb_bucketer_launch(bucketer, nullptr));
      }
    }
    for (size_t i = 0; throwing && i < 4; ++i) {
      EXPECT_TRUE(throws([&] { rsb_bucketer_free(bucketer); })) << i;
      EXPECT_EQ(calls, i + 1);
    }
    EXPECT_RSB_OK(rsb_bucketer_free(bucketer));
    EXPECT_EQ(calls, 4u);
    EXPECT_EQ(rsb_bucketer_free(bucketer), RSB_ERR_BAD_HANDLE);
  });
}

TEST(Exceptions, PollWaitsForNobodyAfterAThrow) {
  // The second bucket's peer comes only after the poll: had the poll waited, it would time out.
  const rsb_comm_config config = comm_config(1000000000);
  for (const bool poll : {true, false}) {
    Gate polled;
    run_ranks(
        2,
        [&](uint32_t rank, rsb_comm *comm) {
          Worker worker(comm, 4 * 4 * 2);
          worker.submit(throwing_if(rank == 0, Op::f32(4)));
          worker.submit(Op::f32(3));
          if (rank == 0) {
            EXPECT_TRUE(throws([&] { worker.flush(); }));
            EXPECT_EQ(worker.called().size(), 1u);
            Error error;
            size_t completed = 99;
            if (poll) {
              EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_poll(worker, &completed, error), error));
              EXPECT_EQ(completed, 0u);
            } else {
              EXPECT_TRUE(answers(RSB_PENDING, worker.wait(1, 0, error), error)) << "its own time is 0";
            }
            polled.open();
          } else {
            ASSERT_TRUE(polled.wait());
          }
          worker.finish();
        },
        &config);
  }
}

/// Memory that is never really freed, so that a write to what was given back shows.
class Watched {
 public:
  Watched() { hook_ = {sizeof(rsb_allocator), this, &Watched::alloc, &Watched::free, nullptr}; }
  const rsb_allocator *hook() const { return &hook_; }
  /// The allocation after `count` more fails; UINT64_MAX: none.
  void fail_after(uint64_t count) {
    const std::lock_guard<std::mutex> lock(mutex_);
    until_failure_ = count;
  }
  size_t failures() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failures_;
  }
  size_t live() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<size_t>(std::count_if(pieces_.begin(), pieces_.end(),
                                             [](const Piece &piece) { return !piece.freed; }));
  }
  /// Nobody wrote to what was given back.
  bool freed_is_untouched() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::all_of(pieces_.begin(), pieces_.end(), [](const Piece &piece) {
      const unsigned char *at = piece.at.get();
      return !piece.freed || std::all_of(at, at + piece.bytes, [](unsigned char b) { return b == 0xDD; });
    });
  }
  std::function<void()> inside_alloc;
  std::function<void()> inside_free;

 private:
  struct Free {
    void operator()(unsigned char *at) const { std::free(at); }
  };
  struct Piece {
    std::unique_ptr<unsigned char, Free> at;
    size_t bytes;
    bool freed;
  };

  static void *alloc(void *ctx, size_t bytes, size_t align, int32_t, void *) {
    auto &self = *static_cast<Watched *>(ctx);
    if (self.inside_alloc) {
      self.inside_alloc();
    }
    const std::lock_guard<std::mutex> lock(self.mutex_);
    if (self.until_failure_ != UINT64_MAX && self.until_failure_-- == 0) {
      self.until_failure_ = UINT64_MAX;
      self.failures_ += 1;
      return nullptr;
    }
    void *at = nullptr;
    if (posix_memalign(&at, align, bytes) != 0) {
      return nullptr;
    }
    self.pieces_.push_back({std::unique_ptr<unsigned char, Free>(static_cast<unsigned char *>(at)), bytes, false});
    return at;
  }
  static void free(void *ctx, void *at, size_t bytes, int32_t, void *) {
    auto &self = *static_cast<Watched *>(ctx);
    if (self.inside_free) {
      self.inside_free();
    }
    const std::lock_guard<std::mutex> lock(self.mutex_);
    for (Piece &piece : self.pieces_) {
      if (piece.at.get() == at) {
        EXPECT_EQ(piece.bytes, bytes);
        EXPECT_FALSE(piece.freed) << "freed twice";
        piece.freed = true;
        std::memset(at, 0xDD, bytes);
        return;
      }
    }
    ADD_FAILURE() << "freed what alloc did not give";
  }

  mutable std::mutex mutex_;
  std::vector<Piece> pieces_;
  uint64_t until_failure_ = UINT64_MAX;
  size_t failures_ = 0;
  rsb_allocator hook_;
};

/// One rank times out with its request open; then the other comes, and the engine writes both results.
void late_write(uint64_t flags, int64_t bucket_bytes, bool release_buffers) {
  constexpr size_t kNumel = 300;
  FakeEngine::Options options;
  options.flags = flags;
  FakeEngine engine(2, options);
  Watched memory;
  Gate reused;
  Gate written;
  run_custom(
      engine, 2, 0,
      [&](uint32_t rank, rsb_comm *comm) {
        if (rank == 1) {
          ASSERT_TRUE(reused.wait());
          // Its own result depends on inputs that rank 0 has back: only that the engine was done counts.
          Bucketer late(bucket_bytes);
          const std::vector<float> input(2 * kNumel, 5.0F);
          const void *pieces[] = {input.data(), input.data() + kNumel};
          const rsb_status submitted = rsb_bucketer_reduce_scatter_async(
              late, comm, pieces, kNumel, RSB_DTYPE_F32, RSB_OP_SUM, nullptr, nullptr, nullptr);
          const rsb_status flushed = rsb_bucketer_flush(late, nullptr);
          // With a cross-check it has to go on alone after that, and times out, too.
          EXPECT_EQ(flushed, (flags & kGather) == 0 ? RSB_OK : RSB_ERR_TIMEOUT);
          EXPECT_TRUE(submitted == RSB_OK || submitted == flushed);
          written.open();
          return;
        }
        Worker worker(comm, bucket_bytes, memory.hook());
        Error error;
        const rsb_status status = worker.try_submit(Op::f32(kNumel), error);
        EXPECT_TRUE(status == RSB_OK || answers(RSB_ERR_TIMEOUT, status, error));
        EXPECT_TRUE(answers(RSB_ERR_TIMEOUT, worker.flush(error), error));
        EXPECT_EQ(worker.calls(0), status == RSB_OK ? 1u : 0u);
        if (release_buffers) {
          EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
        }
        // The same bucketer goes on with another comm, and its results are kept.
        rsb_comm *other = nullptr;
        ASSERT_RSB_OK(rsb_comm_create_local(1, nullptr, &other, nullptr));
        struct Kept {
          rsb_shard *shard;
          const unsigned char *data;
          values::Bytes bytes;
        };
        std::vector<Kept> kept;
        for (size_t i = 0; i < 8; ++i) {
          Op op = Op::f32(kNumel * (1 + i % 2));
          op.then = [&](const rsb_result &result) {
            const auto *data = static_cast<const unsigned char *>(result.data);
            kept.push_back({rsb_shard_retain(result.shard), data, {data, data + 4 * result.numel}});
          };
          worker.submit(op, other);
        }
        worker.flush();
        EXPECT_EQ(kept.size(), 8u);
        reused.open();
        ASSERT_TRUE(written.wait());
        for (const Kept &one : kept) {
          EXPECT_EQ(std::memcmp(one.data, one.bytes.data(), one.bytes.size()), 0)
              << "the engine wrote into the result of another comm";
          rsb_shard_release(one.shard);
        }
        rsb_comm_free(other);
        EXPECT_TRUE(memory.freed_is_untouched()) << "the engine wrote into memory that was given back";
      },
      100000000);
  EXPECT_TRUE(memory.freed_is_untouched());
  EXPECT_EQ(memory.live(), 0u) << "release ends what the engine may use";
}

TEST(LateEngine, WritesIntoNothingThatIsUsedAgain) {
  for (const uint64_t flags : {kReduce, kAllToAll, kReduce | kGather}) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
      for (const bool release_buffers : {false, true}) {
        SCOPED_TRACE("flags " + std::to_string(flags) + ", bucket_bytes " + std::to_string(bucket_bytes));
        late_write(flags, bucket_bytes, release_buffers);
      }
    }
  }
}

/// What a hook of an allocator gets from the bucketer that is calling it.
std::vector<rsb_status> call_all(rsb_bucketer *bucketer, rsb_comm *comm, rsb_ticket ticket) {
  const float input[4] = {1, 2, 3, 4};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.flat_input = input;
  args.numel = 4;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  args.callback = [](void *, const rsb_result *) { ADD_FAILURE() << "a refused op was called back"; };
  return {rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr),
          rsb_bucketer_flush(bucketer, nullptr),
          rsb_bucketer_poll(bucketer, nullptr, nullptr),
          rsb_bucketer_launch(bucketer, nullptr),
          rsb_bucketer_wait(bucketer, ticket, 0, nullptr),
          rsb_bucketer_release_buffers(bucketer, nullptr),
          rsb_bucketer_free(bucketer)};
}

class Allocators : public ::testing::TestWithParam<On> {};
INSTANTIATE_TEST_SUITE_P(Exceptions, Allocators, ::testing::Values(On::kLocal, On::kReduceScatter, On::kAllToAll),
                         [](const ::testing::TestParamInfo<On> &info) { return name_of(info.param); });

TEST_P(Allocators, AHookThatCallsItsBucketerIsRefused) {
  alarm(60);  // a call that hangs ends the test
  std::deque<Watched> memories(2);
  run_on(GetParam(), 2, [&](uint32_t rank, rsb_comm *comm) {
    Watched &memory = memories[rank];
    Worker worker(comm, 4 * 2 * 100, memory.hook());
    size_t hooked = 0;
    bool inside = false;
    memory.inside_alloc = memory.inside_free = [&] {
      if (!inside) {
        inside = true;
        for (const rsb_status status : call_all(worker, comm, 1)) {
          EXPECT_EQ(std::string(rsb_status_name(status)), "RSB_ERR_REENTRANT");
        }
        Error error;
        EXPECT_TRUE(answers(RSB_ERR_REENTRANT, rsb_bucketer_flush(worker, error), error));
        hooked += 1;
        inside = false;
      }
    };
    for (size_t i = 0; i < 12; ++i) {
      worker.submit(Op::f32(20 + 17 * i));  // waiting, launching and direct
    }
    worker.launch();
    expect_in_step(rank, comm);  // carries on the buckets, and may end them
    worker.finish();
    EXPECT_GE(hooked, 1u);
    const size_t before = hooked;
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
    EXPECT_GT(hooked, before) << "release_buffers gives memory back";
    worker.submit(Op::f32(30));
    worker.finish();
    expect_all_called(worker);
    memory.inside_alloc = memory.inside_free = nullptr;
  });
  alarm(0);
}

TEST_P(Allocators, AFailureInASubmitThatDoesNotFitChangesNothing) {
  // Rank 0's n-th allocation fails. The other rank's submit is refused, too, so that places agree.
  size_t failures = 0;
  for (const bool output : {false, true}) {
    for (uint64_t at = 0; at < 6; ++at) {
      Watched memory;
      std::vector<rsb_comm *> control(2, nullptr);
      ASSERT_RSB_OK(rsb_comm_create_local(2, nullptr, control.data(), nullptr));
      run_on(GetParam(), 2, [&](uint32_t rank, rsb_comm *comm) {
        Worker worker(comm, 4 * 2 * 100, rank == 0 ? memory.hook() : nullptr);
        const auto op = [&](size_t numel, uint64_t tag) {
          Op o = Op::f32(numel);
          o.tag = tag;
          o.output = output;
          return o;
        };
        worker.submit(op(60, 1));
        const rsb_stats before = worker.bucketer().stats();
        bool refused = false;
        Error error;
        if (rank == 0) {
          memory.fail_after(at);
          const rsb_status status = worker.try_submit(op(90, 2), error);
          refused = status != RSB_OK;
          EXPECT_TRUE(answers(refused ? RSB_ERR_NO_MEMORY : RSB_OK, status, error));
          EXPECT_EQ(memory.failures(), refused ? 1u : 0u);
          memory.fail_after(UINT64_MAX);
        }
        unsigned char mine = refused ? 1 : 0;
        unsigned char all[2] = {};
        ASSERT_RSB_OK(rsb_comm_all_gather(control[rank], &mine, all, 1, nullptr));
        if (rank == 1 && all[0] == 1) {
          Op unknown = op(90, 2);
          unknown.flags |= 1u << 31;
          EXPECT_TRUE(answers(RSB_ERR_UNSUPPORTED, worker.try_submit(unknown, error), error));
        }
        if (all[0] == 1) {
          const rsb_stats after = worker.bucketer().stats();
          EXPECT_EQ(after.collectives_launched, before.collectives_launched);
          EXPECT_EQ(after.ops_submitted, before.ops_submitted);
          EXPECT_EQ(after.flushes_full, before.flushes_full);
          EXPECT_EQ(worker.ticket(1), 0u);
          EXPECT_RSB_OK(rsb_comm_status(comm, nullptr));
        }
        if (rank == 1 || all[0] == 1) {
          worker.submit(op(90, 2));
        }
        EXPECT_EQ(worker.bucketer().stats().collectives_launched, before.collectives_launched + 1);
        worker.submit(op(95, 3));
        worker.submit(op(5, 4));
        worker.submit(op(200, 5));
        worker.finish();
        expect_in_step(rank, comm);
        EXPECT_EQ(worker.called().size(), 5u);
        EXPECT_EQ(worker.bucketer().stats().ops_submitted, 5u);
      });
      failures += memory.failures();
      for (rsb_comm *comm : control) {
        rsb_comm_free(comm);
      }
      EXPECT_EQ(memory.live(), 0u);
    }
  }
  EXPECT_GE(failures, 1u) << "no allocation failed: nothing was tested";
}

}  // namespace
