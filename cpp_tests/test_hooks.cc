// Memory that is not the library's: allocators that fail or call back in, and an engine that writes late.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>

#include "on.h"

using namespace harness;

namespace {

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
