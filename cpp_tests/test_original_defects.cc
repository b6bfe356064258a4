// The 29 defects that were found in the Python original (fairscale's and ColossalAI's
// ReduceScatterBucketer), in their order: each that can be expressed here is shown to be absent, and of
// each other one it is said why it cannot be.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

using Places = std::vector<size_t>;

// 1. An append from a callback landed behind the reduced region, got zeros, and was erased.
TEST(OriginalDefects, Defect01_ReentrantAppendIsNotLost) {
  run_ranks(3, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    size_t inner = 0;
    Op op = Op::f32(4);
    op.then = [&](const rsb_result &) { inner = worker.submit(Op::f32(4)); };
    worker.submit(op);
    worker.flush();
    worker.finish();
    EXPECT_EQ(worker.calls(inner), 1u);
    EXPECT_EQ(worker.result(inner), worker.expected(inner));
  });
}

// 2. flush() in a callback reduced and called back again, without bound.
TEST(OriginalDefects, Defect02_ReentrantFlushIsRefused) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    Op op = Op::f32(4);
    op.then = [&](const rsb_result &) {
      Error error;
      EXPECT_TRUE(answers(RSB_ERR_REENTRANT, rsb_bucketer_flush(worker, error), error));
    };
    worker.submit(op);
    worker.submit(op);
    worker.finish();
    EXPECT_EQ(worker.bucketer().stats().collectives_launched, 1u);
  });
}

// 3. After an exception in a callback, the next flush reduced again and called successful ones again.
TEST(OriginalDefects, Defect03_ThrowingCallbackLeavesTheBucketerUsable) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    Op bad = Op::f32(4);
    bad.then = [](const rsb_result &) { throw std::runtime_error("mine"); };
    worker.submit(Op::f32(3));
    worker.submit(bad);
    worker.submit(Op::f32(5));
    EXPECT_THROW(rsb_bucketer_flush(worker, nullptr), std::runtime_error);
    EXPECT_EQ(worker.called(), (Places{0, 1}));
    worker.finish();
    EXPECT_EQ(worker.called(), (Places{0, 1, 2}));
    EXPECT_EQ(worker.bucketer().stats().collectives_launched, 1u) << "nothing was reduced again";
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
  });
}

// 4. An op of zero elements made flush and free fail an assertion.
TEST(OriginalDefects, Defect04_ZeroElementOpIsCalledBack) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(0));
    worker.finish();
    EXPECT_EQ(worker.calls(0), 1u);
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
  });
}

// 5. The direct path cut a total of [4, 3, 5] elements into equal parts and gave ranks each other's.
// Pieces of unequal length cannot be written down here: one numel holds for all. What is left of it is
// a length that the ranks do not divide, and that is cut where rsb_shard_numel says.
TEST(OriginalDefects, Defect05_UnequalPiecesAreNotMispartitioned) {
  for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
    run_ranks(3, [&](uint32_t rank, rsb_comm *comm) {
      Worker worker(comm, bucket_bytes);
      Op op = Op::f32(10);  // 4, 4 and 2
      op.flat = true;
      op.then = [&](const rsb_result &result) {
        EXPECT_EQ(result.offset, rank * 4u);
        EXPECT_EQ(result.valid_numel, rank == 2 ? 2u : 4u);
        EXPECT_EQ(result.numel, 4u);
      };
      worker.submit(op);
      worker.finish();
    });
  }
}

// 6. A bucket took mixed dtypes and cast them to its first one: 70000 became inf in f16.
TEST(OriginalDefects, Defect06_DtypesDoNotMixInABucket) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::of(2, RSB_DTYPE_F16));
    Bucketer &bucketer = worker.bucketer();
    const float big[] = {70000.0F, -70000.0F};
    float output[1] = {0.0F};
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = big;
    args.output = output;
    args.numel = 2;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    rsb_ticket ticket = 0;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, &ticket, nullptr));
    worker.finish();
    EXPECT_EQ(output[0], rsb_comm_rank(comm) == 0 ? 140000.0F : -140000.0F);
  });
}

// 7. Results of transposed inputs were permuted: cannot be expressed, inputs have no strides here.

// 8. 0-dimensional tensors failed with bucketing off. A scalar is one element.
TEST(OriginalDefects, Defect08_OneElementWithBucketingOff) {
  run_ranks(3, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, -1);
    worker.submit(Op::f32(1));
    EXPECT_EQ(worker.calls(0), 1u);
    Op flat = Op::f32(1);
    flat.flat = true;
    worker.submit(flat);
    worker.finish();
  });
}

// 9. It did not run on the CPU with a current PyTorch. No engine and no GPU is needed here.
TEST(OriginalDefects, Defect09_RunsOnTheCpuAlone) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::of(1000, RSB_DTYPE_BF16, RSB_OP_AVG));
    worker.finish();
  });
}

// 10. Items were matched by position alone: swapped tensors were added to each other, silently.
TEST(OriginalDefects, Defect10_SwappedTensorsAreFound) {
  run_ranks(2, [](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    for (const uint64_t tag : {rank == 0 ? 11u : 22u, rank == 0 ? 22u : 11u}) {
      Op op = Op::f32(1);
      op.tag = tag;
      Error error;
      const rsb_status status = worker.try_submit(op, error);
      EXPECT_TRUE(status == RSB_OK || status == RSB_ERR_DESYNC);
    }
    Error error;
    EXPECT_TRUE(answers(RSB_ERR_DESYNC, worker.flush(error), error));
    EXPECT_NE(error.message().find("tag"), std::string::npos) << error.message();
  });
}

// 11. Arguments were checked by assertions, which an optimised run drops, and most were not checked.
TEST(OriginalDefects, Defect11_ArgumentsAreCheckedInEveryBuild) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    Bucketer bucketer(0);
    const void *inputs[] = {nullptr};
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT},
                        rsb_bucketer_reduce_scatter_async(bucketer, comm, inputs, 3, RSB_DTYPE_F32,
                                                          RSB_OP_SUM, nullptr, nullptr, error),
                        error, {"inputs"}));
  });
}

// 12. Sums in the wire dtype, SUM only, no scale: 40000 three times is inf in f16.
TEST(OriginalDefects, Defect12_HalfPrecisionHasRoomAndScale) {
  run_ranks(3, [](uint32_t, rsb_comm *comm) {
    Bucketer bucketer(0);
    unsigned char input[2];
    values::store(RSB_DTYPE_F16, 40000.0, input);
    const void *inputs[] = {input, input, input};
    float wide = 0.0F;
    unsigned char mean[2] = {};
    unsigned char scaled[2] = {};
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs;
    args.numel = 1;
    args.dtype = RSB_DTYPE_F16;
    args.op = RSB_OP_SUM;
    args.output = &wide;
    args.output_dtype = RSB_DTYPE_F32;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
    args.output = scaled;
    args.output_dtype = 0;
    args.scale = 0.5;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
    args.output = mean;
    args.scale = 0.0;
    args.op = RSB_OP_AVG;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    EXPECT_EQ(wide, 120000.0F);
    EXPECT_EQ(values::load(RSB_DTYPE_F16, scaled), 60000.0);
    EXPECT_EQ(values::load(RSB_DTYPE_F16, mean), 40000.0);
  });
}

// 13. "async" waited for the slowest rank.
TEST(OriginalDefects, Defect13_SubmitDoesNotWaitForALatePeer) {
  Gate submitted;
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 0);
    if (rank == 1) {
      ASSERT_TRUE(submitted.wait());
    }
    worker.submit(Op::f32(1000));
    worker.submit(Op::f32(1000));
    submitted.open();
    worker.finish();
  });
}

// 14. Callbacks ran when the work was enqueued, on whatever stream and thread. Here: in the call that
// completes them, on its thread, with the data there. (The worker checks the thread and the data.)
TEST(OriginalDefects, Defect14_CallbacksRunAtCompletionInTheCallersThread) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    bool inside_flush = false;
    Op op = Op::f32(50);
    op.then = [&](const rsb_result &) { EXPECT_TRUE(inside_flush); };
    worker.submit(op);
    inside_flush = true;
    worker.flush();
    inside_flush = false;
    worker.finish();
  });
}

// 15. Two threads that appended corrupted the offset.
TEST(OriginalDefects, Defect15_ThreadsMaySubmitToOneBucketer) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    Bucketer bucketer(4096);
    constexpr int kThreads = 4;
    constexpr int kEach = 500;
    struct Seen {
      std::atomic<int> calls{0};
      float expected = 0.0F;
    };
    std::vector<Seen> seen(kThreads * kEach);
    const rsb_callback callback = [](void *user_data, const rsb_result *result) {
      auto &s = *static_cast<Seen *>(user_data);
      s.calls += 1;
      EXPECT_EQ(*static_cast<const float *>(result->data), s.expected);
    };
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
      threads.emplace_back([&, t] {
        for (int i = 0; i < kEach; ++i) {
          Seen &s = seen[static_cast<size_t>(t * kEach + i)];
          s.expected = static_cast<float>(t * kEach + i);
          const void *inputs[] = {&s.expected};
          EXPECT_RSB_OK(rsb_bucketer_reduce_scatter_async(bucketer, comm, inputs, 1, RSB_DTYPE_F32, RSB_OP_SUM,
                                                          callback, &s, nullptr));
        }
      });
    }
    for (std::thread &thread : threads) {
      thread.join();
    }
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    for (const Seen &s : seen) {
      ASSERT_EQ(s.calls, 1);
    }
  });
}

// 16. Three copies and a memset for each byte.
TEST(OriginalDefects, Defect16_AtMostOneCopyOfTheInput) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{1} << 16}) {
      Worker worker(comm, bucket_bytes);
      for (size_t i = 0; i < 50; ++i) {
        worker.submit(Op::f32(1000 + i));
      }
      worker.finish();
      const rsb_stats stats = worker.bucketer().stats();
      EXPECT_LE(stats.copied_bytes, stats.payload_bytes);
    }
  });
}

// 17. The peak was twice what was documented. Here it is counted, and does not grow with the rounds.
TEST(OriginalDefects, Defect17_MemoryIsCountedAndDoesNotGrow) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 1 << 16);
    uint64_t peak = 0;
    for (size_t round = 0; round < 30; ++round) {
      for (size_t i = 0; i < 20; ++i) {
        worker.submit(Op::f32(500 + i));
      }
      worker.finish();
      const rsb_stats stats = worker.bucketer().stats();
      EXPECT_LE(stats.buffer_bytes, stats.buffer_bytes_peak);
      if (round == 4) {
        peak = stats.buffer_bytes_peak;
      }
    }
    EXPECT_EQ(worker.bucketer().stats().buffer_bytes_peak, peak);
  });
}

// 18. A new output shard was allocated at every flush, even before free. Here outputs may be the
// caller's, and then nothing is held for results.
TEST(OriginalDefects, Defect18_NoMemoryForResultsThatHaveTheirOwn) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 1 << 16);
    Op op = Op::f32(100000);
    op.output = true;
    worker.submit(op);
    worker.finish();
    EXPECT_LT(worker.bucketer().stats().buffer_bytes_peak, 100000u * 4u);
  });
}

// 19. A kept result of one element kept the whole bucket's output in memory.
TEST(OriginalDefects, Defect19_AKeptScalarDoesNotKeepTheBucket) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    rsb_shard *kept = nullptr;
    Op op = Op::f32(1);
    op.then = [&](const rsb_result &result) { kept = rsb_shard_retain(result.shard); };
    worker.submit(op);
    worker.submit(Op::f32(100000));
    worker.finish();
    EXPECT_RSB_OK(rsb_bucketer_release_buffers(worker, nullptr));
    EXPECT_LE(worker.bucketer().stats().buffer_bytes, 4096u);
    rsb_shard_release(kept);
  });
}

// 20. The direct path concatenated, although callers gave adjacent pieces of one tensor.
TEST(OriginalDefects, Defect20_LargeFlatInputIsNotCopied) {
  FakeEngine::Options options;
  options.flags = RSB_TRANSPORT_REDUCE_SCATTER;
  FakeEngine engine(2, options);
  run_custom(engine, 2, 0, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 4096);
    Op op = Op::f32(20000);
    op.flat = true;
    worker.submit(op);
    worker.finish();
    EXPECT_EQ(worker.bucketer().stats().copied_bytes, 0u);
  });
}

// 21. Next-fit: a large-ish item flushes a nearly empty bucket. A cost, not a behaviour, and rule 9 keeps
// the policy: it makes what is launched a plain function of the sequence.

// 22. No alignment: rows and results began at odd places. Here every result is aligned for its dtype.
TEST(OriginalDefects, Defect22_ResultsAreAligned) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    for (const int64_t bucket_bytes : {int64_t{-1}, int64_t{0}}) {
      Worker worker(comm, bucket_bytes);
      for (size_t i = 0; i < 40; ++i) {
        Op op = Op::of(1 + i % 5, values::kAllDtypes[i % 8]);
        op.then = [](const rsb_result &result) {
          EXPECT_EQ(reinterpret_cast<uintptr_t>(result.data) % rsb_dtype_size(result.dtype), 0u);
        };
        worker.submit(op);
      }
      worker.finish();
    }
  });
}

// 23. The size is that of all ranks' parts together, so messages shrink with the number of ranks. Kept:
// bucket_bytes has the original's meaning, and the caller who knows the group can scale it.

// 24. An item as large as the bucket paid all copies for no gain: a cost, not a behaviour. It is launched
// at once (Buckets.WholeBucketOpIsBucketed) with the one copy of defect 16.

// 25. A cache on a method kept bucketer, buffers and groups alive after del.
TEST(OriginalDefects, Defect25_FreeLetsEverythingGo) {
  FakeEngine engine(1, {});
  const rsb_transport transport = engine.transport(0);
  rsb_comm *comm = nullptr;
  ASSERT_RSB_OK(rsb_comm_create_custom(&transport, 0, 1, nullptr, &comm, nullptr));
  rsb_bucketer *handle = nullptr;
  {
    Worker worker(comm, 0);
    handle = worker;
    worker.submit(Op::f32(10));
    worker.finish();
  }
  rsb_comm_free(comm);
  EXPECT_EQ(engine.releases(0), 1u);
  EXPECT_EQ(rsb_bucketer_flush(handle, nullptr), RSB_ERR_BAD_HANDLE);
}

// 26. Buckets were keyed by the hash of the group object. Here a group is its handle: two groups of the
// same ranks are two, and one handle is one.
TEST(OriginalDefects, Defect26_GroupsAreToldApartByIdentity) {
  std::vector<rsb_comm *> second(2, nullptr);
  ASSERT_RSB_OK(rsb_comm_create_local(2, nullptr, second.data(), nullptr));
  run_ranks(2, [&](uint32_t rank, rsb_comm *comm) {
    Worker worker(comm, 2 * 4 * 4);
    worker.submit(Op::f32(2), comm);
    worker.submit(Op::f32(2), second[rank]);
    EXPECT_EQ(worker.wait(0), RSB_ERR_NOT_LAUNCHED) << "2 of 4 on either";
    EXPECT_EQ(worker.wait(1), RSB_ERR_NOT_LAUNCHED);
    worker.submit(Op::f32(2), comm);
    EXPECT_EQ(worker.wait(2), RSB_OK) << "4 of 4 on the first";
    EXPECT_EQ(worker.wait(1), RSB_ERR_NOT_LAUNCHED);
    worker.finish();
  });
  for (rsb_comm *comm : second) {
    rsb_comm_free(comm);
  }
}

// 27. No group: TypeError or AttributeError, and an error text that named a method that does not exist.
TEST(OriginalDefects, Defect27_NoGroupIsADescribedError) {
  Bucketer bucketer(0);
  const float one = 1.0F;
  const void *inputs[] = {&one};
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_BAD_HANDLE},
                      rsb_bucketer_reduce_scatter_async(bucketer, nullptr, inputs, 1, RSB_DTYPE_F32, RSB_OP_SUM,
                                                        nullptr, nullptr, error),
                      error, {"comm"}));
}

// 28. Without a callback the result could not be reached.
TEST(OriginalDefects, Defect28_OutputNeedsNoCallback) {
  run_ranks(2, [](uint32_t rank, rsb_comm *comm) {
    Bucketer bucketer(0);
    const float input[] = {1.0F + static_cast<float>(rank), 5.0F};
    float output = 0.0F;
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = input;
    args.output = &output;
    args.numel = 2;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    EXPECT_RSB_OK(rsb_bucketer_submit(bucketer, comm, &args, nullptr, nullptr));
    EXPECT_RSB_OK(rsb_bucketer_flush(bucketer, nullptr));
    EXPECT_EQ(output, rank == 0 ? 3.0F : 10.0F);
  });
}

// 29. Queued items were dropped silently with the bucketer; no counters, no timeout.
TEST(OriginalDefects, Defect29_FreeCallsBackWhatWasQueued) {
  run_ranks(2, [](uint32_t, rsb_comm *comm) {
    Worker worker(comm, 0);
    worker.submit(Op::f32(3));
    worker.submit(Op::of(3, RSB_DTYPE_I8));
    EXPECT_EQ(worker.bucketer().stats().ops_submitted, 2u);
    worker.free();
    EXPECT_EQ(worker.status(0), RSB_ERR_CANCELLED);
    EXPECT_EQ(worker.status(1), RSB_ERR_CANCELLED);
  });
}

}  // namespace
