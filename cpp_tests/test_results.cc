// Where results live: the caller's memory, the library's, retained shards, and the allocator hook.
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "worker.h"

using namespace harness;

namespace {

TEST(Results, OutputFormsAreRight) {
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{700}, int64_t{0}}) {
    for (const uint32_t size : {1u, 2u, 3u}) {
      run_ranks(size, [&](uint32_t, rsb_comm *comm) {
        Worker worker(comm, bucket_bytes);
        for (size_t numel : {1u, 5u, 16u, 63u, 200u}) {
          for (const bool rough : {false, true}) {
            Op op = Op::f32(numel);
            op.data = rough ? values::Data::kRough : values::Data::kExact;
            worker.submit(op);
            op.output = true;
            worker.submit(op);
            op.scale = 0.3;
            worker.submit(op);
            op.flags = RSB_SUBMIT_ACCUMULATE;
            worker.submit(op);
            op.op = RSB_OP_AVG;
            worker.submit(op);
            op.flags |= RSB_SUBMIT_BORROW;
            worker.submit(op);
            op.flags = RSB_SUBMIT_BORROW;
            op.output = false;
            worker.submit(op);
          }
        }
        worker.finish();
      });
    }
  }
}

TEST(Results, InPlace) {
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
    run_ranks(3, [&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, bucket_bytes);
      for (size_t numel : {1u, 7u, 1000u, 100000u}) {
        for (const bool flat : {false, true}) {
          Op op = Op::f32(flat ? numel * 3 : numel);
          op.flat = flat;
          op.in_place = true;
          op.data = values::Data::kRough;
          worker.submit(op);
        }
      }
      worker.finish();
    });
  }
}

TEST(Results, EveryFloatToEveryFloat) {
  const rsb_dtype floats[] = {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_F16, RSB_DTYPE_BF16};
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{1000}}) {
    run_ranks(3, [&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, bucket_bytes);
      for (const rsb_dtype from : floats) {
        for (const rsb_dtype to : floats) {
          for (const rsb_op op : values::kAllOps) {
            for (const bool accumulate : {false, true}) {
              Op o = Op::of(37, from, op);
              o.output_dtype = to;
              o.output = accumulate;
              o.flags = accumulate ? RSB_SUBMIT_ACCUMULATE : 0;
              o.scale = 1.0 / 3.0;
              o.data = values::Data::kRough;
              worker.submit(o);
            }
          }
        }
      }
      worker.finish();
    });
  }
}

TEST(Results, IntegersAccumulateAndWrap) {
  run_ranks(3, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (const rsb_dtype dtype : {RSB_DTYPE_I32, RSB_DTYPE_I64, RSB_DTYPE_U8, RSB_DTYPE_I8}) {
      for (const rsb_op op : {RSB_OP_SUM, RSB_OP_PROD, RSB_OP_MIN, RSB_OP_MAX}) {
        Op o = Op::of(77, dtype, op);
        o.data = values::Data::kRough;
        worker.submit(o);
        o.output = true;
        o.flags = RSB_SUBMIT_ACCUMULATE;
        worker.submit(o);
      }
    }
    worker.finish();
  });
}

TEST(Results, FlatIsCutAndPadded) {
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{900}, int64_t{0}}) {
    for (const uint32_t size : {1u, 2u, 3u, 5u}) {
      run_ranks(size, [&](uint32_t, rsb_comm *comm) {
        Worker worker(comm, bucket_bytes);
        for (size_t numel = 0; numel < 40; ++numel) {
          for (const rsb_dtype dtype : {RSB_DTYPE_F32, RSB_DTYPE_BF16, RSB_DTYPE_U8}) {
            Op op = Op::of(numel, dtype);
            op.flat = true;
            op.output = numel % 3 == 0;
            worker.submit(op);
          }
        }
        worker.finish();
      });
    }
  }
}

TEST(Results, InputsAtAnyAlignment) {
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
    run_ranks(2, [&](uint32_t, rsb_comm *comm) {
      Worker worker(comm, bucket_bytes);
      for (const rsb_dtype dtype : values::kAllDtypes) {
        for (size_t offset = 0; offset < 16; ++offset) {
          Op op = Op::of(13 + offset, dtype);
          op.offset = offset;
          op.flat = offset % 2 == 1;
          worker.submit(op);
        }
      }
      worker.finish();
    });
  }
}

TEST(Results, NoCallbackIsFine) {
  run_ranks(2, [](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(0);
    const double first[] = {1.0 + rank, 2.0};
    const double second[] = {10.0, 20.0 * (rank + 1)};
    const void *inputs[] = {first, second};
    double output[] = {-1.0, -1.0};
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs;
    args.output = output;
    args.numel = 2;
    args.dtype = RSB_DTYPE_F64;
    args.op = RSB_OP_SUM;
    rsb_ticket ticket = 0;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_launch(bucketer, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_wait(bucketer, ticket, UINT64_MAX, nullptr));
    EXPECT_EQ(output[0], rank == 0 ? 3.0 : 20.0);
    EXPECT_EQ(output[1], rank == 0 ? 4.0 : 60.0);
    args.output = nullptr;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
  });
}

TEST(Results, RetainedShardOutlivesEverything) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    rsb_shard *kept = nullptr;
    void *data = nullptr;
    values::Bytes expected;
    {
      Worker worker(comm, 0);
      Op op = Op::f32(300);
      op.then = [&](const rsb_result &result) {
        kept = rsb_shard_retain(result.shard);
        data = result.data;
      };
      const size_t place = worker.submit(op);
      worker.submit(Op::f32(5));
      worker.finish();
      expected = worker.expected(place);
      ASSERT_NE(kept, nullptr);
      for (size_t i = 0; i < 20; ++i) {
        worker.submit(Op::f32(300 + i));
        worker.finish();
      }
      EXPECT_EQ(std::memcmp(data, expected.data(), expected.size()), 0) << "later rounds wrote over it";
      EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
      EXPECT_GT(worker.bucketer().stats().buffer_bytes, 0u) << "the retained shard counts";
    }
    EXPECT_EQ(std::memcmp(data, expected.data(), expected.size()), 0);
    static_cast<float *>(data)[0] = 1.5F;  // the memory is the holder's
    rsb_shard *again = rsb_shard_retain(kept);
    EXPECT_NE(again, nullptr);
    rsb_shard_release(kept);
    EXPECT_EQ(static_cast<float *>(data)[0], 1.5F) << "one reference is left";
    rsb_shard_release(again);
    rsb_shard_release(nullptr);
  });
}

/// An allocator that can be told to fail, and knows what is out.
class Heap {
 public:
  rsb_allocator hook() { return {sizeof(rsb_allocator), this, &Heap::alloc, &Heap::give_back, &Heap::release}; }
  ~Heap() {
    EXPECT_TRUE(blocks_.empty()) << blocks_.size() << " blocks are still out";
    EXPECT_TRUE(errors_.empty()) << errors_;
  }
  void fail(bool yes) { failing_ = yes; }
  int allocations() const { return allocations_; }
  int releases() const { return releases_; }
  size_t live_bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    size_t sum = 0;
    for (const auto &block : blocks_) {
      sum += block.second;
    }
    return sum;
  }
  bool owns(const void *data, size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto *at = static_cast<const char *>(data);
    for (const auto &block : blocks_) {
      const auto *begin = static_cast<const char *>(block.first);
      if (at >= begin && at + bytes <= begin + block.second) {
        return true;
      }
    }
    return false;
  }

 private:
  static void *alloc(void *ctx, size_t bytes, size_t align, int32_t device, void *) {
    auto &self = *static_cast<Heap *>(ctx);
    const std::lock_guard<std::mutex> lock(self.mutex_);
    self.allocations_ += 1;
    if (device != -1 || align == 0 || (align & (align - 1)) != 0) {
      self.errors_ += "alloc with odd arguments; ";
    }
    if (self.releases_ != 0) {
      self.errors_ += "alloc after release; ";
    }
    if (self.failing_) {
      return nullptr;
    }
    const size_t step = align < sizeof(void *) ? sizeof(void *) : align;
    void *block = std::aligned_alloc(step, (bytes / step + 1) * step);
    std::memset(block, 0xDB, bytes);
    self.blocks_[block] = bytes;
    return block;
  }
  static void give_back(void *ctx, void *block, size_t bytes, int32_t device, void *) {
    auto &self = *static_cast<Heap *>(ctx);
    const std::lock_guard<std::mutex> lock(self.mutex_);
    const auto found = self.blocks_.find(block);
    if (found == self.blocks_.end() || found->second != bytes || device != -1) {
      self.errors_ += "free of what was not allocated so; ";
      return;
    }
    if (self.releases_ != 0) {
      self.errors_ += "free after release; ";
    }
    std::memset(block, 0xDD, bytes);
    self.blocks_.erase(found);
    std::free(block);
  }
  static void release(void *ctx) { static_cast<Heap *>(ctx)->releases_ += 1; }

  std::mutex mutex_;
  std::map<void *, size_t> blocks_;
  std::string errors_;
  std::atomic<bool> failing_{false};
  std::atomic<int> allocations_{0};
  std::atomic<int> releases_{0};
};

TEST(Allocator, GivesTheResultsMemoryAndGetsItBack) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Heap heap;
    {
      const rsb_allocator hook = heap.hook();
      Worker worker(comm, 2 * 4 * 64, &hook);
      for (size_t i = 0; i < 30; ++i) {
        Op op = Op::f32(1 + i * 5);
        op.then = [&heap](const rsb_result &result) {
          EXPECT_TRUE(heap.owns(result.data, result.numel * sizeof(float)));
        };
        worker.submit(op);
      }
      worker.finish();
      EXPECT_GT(heap.allocations(), 0);
      EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
      EXPECT_EQ(heap.live_bytes(), 0u);
      worker.submit(Op::f32(9));
      worker.finish();
      EXPECT_EQ(heap.releases(), 0);
    }
    EXPECT_EQ(heap.live_bytes(), 0u);
    EXPECT_EQ(heap.releases(), 1);
  });
}

TEST(Allocator, FailingIsNoMemoryAndChangesNothing) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Heap heap;
    const rsb_allocator hook = heap.hook();
    Worker worker(comm, 2 * 4 * 64, &hook);
    for (size_t round = 0; round < 3; ++round) {
      EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
      heap.fail(true);
      for (const size_t numel : {size_t{10}, size_t{100}}) {  // one that waits, one that is direct
        Error error;
        const size_t before = worker.submitted();
        EXPECT_TRUE(answers(RSB_ERR_NO_MEMORY, worker.try_submit(Op::f32(numel), error), error));
        EXPECT_EQ(worker.calls(before), 0u);
      }
      Error error;
      EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm, error), error));
      worker.flush();
      heap.fail(false);
      worker.submit(Op::f32(10 + round));
      worker.finish();
    }
  });
}

TEST(Allocator, WaitsWithItsReleaseForTheLastShard) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Heap heap;
    rsb_shard *kept = nullptr;
    {
      const rsb_allocator hook = heap.hook();
      Worker worker(comm, -1, &hook);
      Op op = Op::f32(40);
      op.then = [&](const rsb_result &result) { kept = rsb_shard_retain(result.shard); };
      worker.submit(op);
      worker.finish();
    }
    EXPECT_EQ(heap.releases(), 0);
    EXPECT_GT(heap.live_bytes(), 0u);
    rsb_shard_release(kept);
    EXPECT_EQ(heap.releases(), 1);
    EXPECT_EQ(heap.live_bytes(), 0u);
  });
}

TEST(Allocator, IsNotReleasedWhenCreateFails) {
  Heap heap;
  const rsb_allocator hook = heap.hook();
  rsb_config config = RSB_CONFIG_INIT;
  config.allocator = &hook;
  config.flags = UINT64_C(1) << 40;
  rsb_bucketer *bucketer = nullptr;
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_bucketer_create(&config, &bucketer, error), error,
                      {"flags"}));
  EXPECT_EQ(heap.releases(), 0);
}

}  // namespace
