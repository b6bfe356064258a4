// The same bits whatever carries them: for every bucket size, run and transport, with data whose sums
// depend on the order of the ranks.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cstring>
#include <new>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

constexpr uint32_t kRanks = 3;
constexpr size_t kOps = 40;
constexpr uint64_t kSeed = 77;

Op op_of(size_t i) {
  Op op = Op::of(values::hash(i, 5) % 90, values::kAllDtypes[values::hash(i, 6) % 8]);
  op.op = values::takes(op.dtype, values::kAllOps[i % 5]) ? values::kAllOps[i % 5] : RSB_OP_SUM;
  op.data = values::Data::kRough;
  op.flat = i % 3 == 0;
  if (values::is_float(op.dtype)) {
    op.scale = i % 4 == 0 ? 1.0 / 3.0 : 0.0;
    op.output_dtype = i % 7 == 0 ? RSB_DTYPE_BF16 : 0;
  }
  return op;
}

/// All results of a rank, one after another.
values::Bytes results_of(rsb_comm *comm, int64_t bucket_bytes, uint64_t flushes) {
  Worker worker(comm, bucket_bytes, nullptr, kSeed);
  for (size_t i = 0; i < kOps; ++i) {
    worker.submit(op_of(i));
    if (flushes != 0 && values::hash(i, flushes) % 4 == 0) {
      worker.flush();
    }
  }
  worker.finish();
  values::Bytes all;
  for (size_t i = 0; i < kOps; ++i) {
    all.insert(all.end(), worker.result(i).begin(), worker.result(i).end());
  }
  return all;
}

/// Results of all ranks, in memory that forked processes share.
class Results {
 public:
  Results() {
    void *memory = mmap(nullptr, kRanks * kRoom, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    memory_ = static_cast<unsigned char *>(memory);
  }
  ~Results() { munmap(memory_, kRanks * kRoom); }
  Results(const Results &) = delete;
  Results &operator=(const Results &) = delete;
  void put(uint32_t rank, const values::Bytes &bytes) {
    ASSERT_LE(bytes.size() + sizeof(size_t), kRoom);
    const size_t size = bytes.size();
    std::memcpy(memory_ + rank * kRoom, &size, sizeof size);
    std::memcpy(memory_ + rank * kRoom + sizeof size, bytes.data(), size);
  }
  std::vector<values::Bytes> get() const {
    std::vector<values::Bytes> all;
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      size_t size = 0;
      std::memcpy(&size, memory_ + rank * kRoom, sizeof size);
      const unsigned char *begin = memory_ + rank * kRoom + sizeof size;
      all.emplace_back(begin, begin + size);
    }
    return all;
  }

 private:
  static constexpr size_t kRoom = size_t{1} << 16;
  unsigned char *memory_ = nullptr;
};

const std::vector<values::Bytes> &reference() {
  static const std::vector<values::Bytes> bytes = [] {
    Results results;
    run_ranks(kRanks, [&](uint32_t rank, rsb_comm *comm) { results.put(rank, results_of(comm, 0, 0)); });
    return results.get();
  }();
  return bytes;
}

TEST(Identity, ResultsAreThere) {
  ASSERT_EQ(reference().size(), kRanks);
  for (const values::Bytes &bytes : reference()) {
    EXPECT_GT(bytes.size(), 1000u);
  }
}

TEST(Identity, EveryBucketSizeAndGrouping) {
  for (const int64_t bucket_bytes : {-1, 1, 24, 48, 100, 333, 1000, 4096, 0}) {
    for (const uint64_t flushes : {0u, 1u, 2u}) {
      Results results;
      run_ranks(kRanks, [&](uint32_t rank, rsb_comm *comm) {
        results.put(rank, results_of(comm, bucket_bytes, flushes));
      });
      EXPECT_TRUE(results.get() == reference()) << bucket_bytes << " bytes, flushes " << flushes;
    }
  }
}

TEST(Identity, EveryRun) {
  for (int run = 0; run < 20; ++run) {
    Results results;
    run_ranks(kRanks, [&](uint32_t rank, rsb_comm *comm) { results.put(rank, results_of(comm, 500, 3)); });
    ASSERT_TRUE(results.get() == reference()) << "run " << run;
  }
}

TEST(Identity, SmallStaging) {
  rsb_comm_config config = comm_config();
  config.staging_bytes = size_t{64} << 10;
  Results results;
  run_ranks(
      kRanks, [&](uint32_t rank, rsb_comm *comm) { results.put(rank, results_of(comm, 0, 0)); }, &config);
  EXPECT_TRUE(results.get() == reference());
}

TEST(Identity, SharedMemory) {
  for (const int64_t bucket_bytes : {-1, 333, 0}) {
    Results results;
    run_shm(kRanks, [&](uint32_t rank, rsb_comm *comm) {
      results.put(rank, results_of(comm, bucket_bytes, 1));
    });
    EXPECT_TRUE(results.get() == reference()) << bucket_bytes;
  }
}

TEST(Identity, CustomExact) {
  for (const int64_t bucket_bytes : {-1, 333, 0}) {
    FakeEngine::Options options;
    options.flags = RSB_TRANSPORT_REDUCE_SCATTER | RSB_TRANSPORT_ALL_TO_ALL | RSB_TRANSPORT_ALL_GATHER;
    options.order = FakeEngine::Order::kNewestFirst;
    FakeEngine engine(kRanks, options);
    Results results;
    run_custom(engine, kRanks, RSB_COMM_EXACT, [&](uint32_t rank, rsb_comm *comm) {
      results.put(rank, results_of(comm, bucket_bytes, 2));
    });
    EXPECT_TRUE(results.get() == reference()) << bucket_bytes;
  }
}

TEST(Identity, LargeOpsThroughSharedMemory) {
  // Larger than a chunk of staging, and than all of it.
  for (const Kind kind : {Kind::kLocal, Kind::kShm}) {
    rsb_comm_config config = comm_config();
    config.staging_bytes = size_t{1} << 20;
    run_group(
        kind, 2,
        [](uint32_t, rsb_comm *comm) {
          for (const int64_t bucket_bytes : {-1, 0}) {
            Worker worker(comm, bucket_bytes, nullptr, 9);
            for (const size_t numel : {size_t{70000}, size_t{3}, size_t{300001}}) {
              Op op = Op::of(numel, numel == 70000 ? RSB_DTYPE_BF16 : RSB_DTYPE_F32);
              op.data = values::Data::kRough;
              worker.submit(op);
              op.flat = true;
              op.flags = RSB_SUBMIT_BORROW;
              worker.submit(op);
            }
            worker.finish();
          }
        },
        &config);
  }
}

}  // namespace
