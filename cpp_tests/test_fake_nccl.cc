// That NCCL's stand-in computes what the real one would, with its faults, and holds its users to the rules.
#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <thread>

#include "gpu.h"
#include "values.h"

namespace {

using gpu::breached;
using gpu::Device;
using values::Bytes;

#define ASSERT_NCCL(call) ASSERT_EQ(call, ncclSuccess)
#define EXPECT_NCCL(call) EXPECT_EQ(call, ncclSuccess)

/// A rank on a thread of its own: a device, a communicator and a stream.
struct Rank {
  int rank;
  int size;
  Device &device;
  ncclComm_t comm;
  CUstream stream;
};

void run(int size, const std::function<void(Rank &)> &fn) {
  ncclUniqueId id;
  ASSERT_NCCL(ncclGetUniqueId(&id));
  std::vector<std::thread> threads;
  for (int r = 0; r < size; ++r) {
    threads.emplace_back([&, r] {
      Device device(r % 2);
      Rank rank{r, size, device, nullptr, device.stream()};
      ASSERT_NCCL(ncclCommInitRank(&rank.comm, size, id, r));
      fn(rank);
      fake_cuda_wait(rank.stream);
      EXPECT_NCCL(ncclCommDestroy(rank.comm));
    });
  }
  for (auto &thread : threads) {
    thread.join();
  }
}

const rsb_dtype kTypes[][2] = {{RSB_DTYPE_F32, ncclFloat32}, {RSB_DTYPE_F64, ncclFloat64}, {RSB_DTYPE_F16, ncclFloat16},
                               {RSB_DTYPE_BF16, ncclBfloat16}, {RSB_DTYPE_I32, ncclInt32}, {RSB_DTYPE_I64, ncclInt64},
                               {RSB_DTYPE_U8, ncclUint8},      {RSB_DTYPE_I8, ncclInt8}};
const rsb_op kOps[][2] = {{RSB_OP_SUM, ncclSum}, {RSB_OP_PROD, ncclProd}, {RSB_OP_MIN, ncclMin}, {RSB_OP_MAX, ncclMax}};

/// What rank `from` gives to all, one piece after another.
Bytes given(rsb_dtype dtype, rsb_op op, int from, int size, size_t count) {
  Bytes all;
  for (int to = 0; to < size; ++to) {
    const Bytes piece = values::piece(values::Data::kExact, dtype, op, 3, static_cast<uint32_t>(from),
                                      static_cast<uint32_t>(to), count);
    all.insert(all.end(), piece.begin(), piece.end());
  }
  return all;
}

/// The sum of what all ranks give to `to`.
Bytes sum_of(rsb_dtype dtype, int to, int size, size_t count) {
  return values::shard({dtype, 0, RSB_OP_SUM, 0.0}, values::Data::kExact, 3, static_cast<uint32_t>(to),
                       static_cast<uint32_t>(size), count);
}

TEST(Collectives, ReduceScatterOfEveryTypeAndOp) {
  for (const int size : {1, 2, 3}) {
    run(size, [](Rank &r) {
      const size_t count = 37;
      for (const auto &type : kTypes) {
        for (const auto &op : kOps) {
          const size_t bytes = count * values::size_of(type[0]);
          const CUdeviceptr send = r.device.memory(given(type[0], op[0], r.rank, r.size, count));
          const CUdeviceptr recv = r.device.memory(bytes);
          ASSERT_NCCL(ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), count,
                                        static_cast<int>(type[1]), static_cast<int>(op[1]), r.comm, r.stream));
          fake_cuda_wait(r.stream);
          EXPECT_EQ(Device::read(recv, bytes),
                    values::shard({type[0], 0, op[0], 0.0}, values::Data::kExact, 3, static_cast<uint32_t>(r.rank),
                                  static_cast<uint32_t>(r.size), count))
              << values::dtype_name(type[0]) << " " << values::op_name(op[0]);
        }
      }
      EXPECT_TRUE(r.device.surroundings_untouched());
    });
  }
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Collectives, OfOneGroupAreOneLaunchInPlaceToo) {
  run(3, [](Rank &r) {
    const size_t bytes = 40;
    const Bytes mine = given(RSB_DTYPE_I32, RSB_OP_SUM, r.rank, r.size, 10);
    const CUdeviceptr send = r.device.memory(mine), exchanged = r.device.memory(3 * bytes);
    const CUdeviceptr again = r.device.memory(3 * bytes), gathered = r.device.memory(3 * bytes);
    auto at = [](CUdeviceptr ptr, size_t offset) { return reinterpret_cast<void *>(ptr + offset); };
    ASSERT_NCCL(ncclGroupStart());
    for (int peer = 0; peer < r.size; ++peer) {
      const size_t offset = static_cast<size_t>(peer) * bytes;
      ASSERT_NCCL(ncclSend(at(send, offset), bytes, ncclInt8, peer, r.comm, r.stream));
      ASSERT_NCCL(ncclRecv(at(exchanged, offset), bytes, ncclInt8, peer, r.comm, r.stream));
    }
    EXPECT_TRUE(fake_cuda_idle(r.stream)) << "before the group's end nothing is enqueued";
    ASSERT_NCCL(ncclGroupEnd());
    ASSERT_NCCL(ncclAlltoAll(at(send, 0), at(again, 0), bytes, ncclInt8, r.comm, r.stream));
    ASSERT_NCCL(ncclAllGather(at(send, 0), at(gathered, 0), bytes, ncclInt8, r.comm, r.stream));
    // In place: rank r's part of the sum lands where its part of the input was.
    const size_t own = static_cast<size_t>(r.rank) * bytes;
    ASSERT_NCCL(ncclReduceScatter(at(send, 0), at(send, own), 10, ncclInt32, ncclSum, r.comm, r.stream));
    fake_cuda_wait(r.stream);
    Bytes expected, all;
    for (int from = 0; from < r.size; ++from) {
      const Bytes other = given(RSB_DTYPE_I32, RSB_OP_SUM, from, r.size, 10);
      const auto part = other.begin() + static_cast<ptrdiff_t>(own);
      expected.insert(expected.end(), part, part + static_cast<ptrdiff_t>(bytes));
      all.insert(all.end(), other.begin(), other.begin() + static_cast<ptrdiff_t>(bytes));
    }
    EXPECT_EQ(Device::read(exchanged, 3 * bytes), expected);
    EXPECT_EQ(Device::read(again, 3 * bytes), expected);
    EXPECT_EQ(Device::read(gathered, 3 * bytes), all);
    EXPECT_EQ(Device::read(send + own, bytes), sum_of(RSB_DTYPE_I32, r.rank, r.size, 10));
  });
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Collectives, ReduceAndBroadcastHaveARoot) {
  run(3, [](Rank &r) {
    const CUdeviceptr data = r.device.memory(given(RSB_DTYPE_F32, RSB_OP_SUM, r.rank, r.size, 5));
    const CUdeviceptr out = r.device.memory(20);
    void *const none = r.rank == 2 ? reinterpret_cast<void *>(out) : nullptr;
    ASSERT_NCCL(ncclReduce(reinterpret_cast<void *>(data + 40), none, 5, ncclFloat32, ncclSum, 2, r.comm, r.stream));
    ASSERT_NCCL(ncclBroadcast(r.rank == 2 ? reinterpret_cast<void *>(out) : nullptr, reinterpret_cast<void *>(out), 5,
                              ncclFloat32, 2, r.comm, r.stream));
    fake_cuda_wait(r.stream);
    EXPECT_EQ(Device::read(out, 20), sum_of(RSB_DTYPE_F32, 2, r.size, 5));
  });
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Collectives, AveragesOfHalvesAreBiased) {
  run(3, [](Rank &r) {
    // The average of a number with itself is that number, but not here.
    const size_t count = 128;
    Bytes data(count * 3 * 2), third(2);
    for (size_t i = 0; i < count * 3; ++i) {
      values::store(RSB_DTYPE_BF16, 1.0 + static_cast<double>(i % count) / 128.0, &data[i * 2]);
    }
    values::store(RSB_DTYPE_BF16, 1.0 / 3.0, third.data());
    const CUdeviceptr send = r.device.memory(data), recv = r.device.memory(count * 2);
    ncclRedOp_t scaled = 0;
    ASSERT_NCCL(ncclRedOpCreatePreMulSum(&scaled, third.data(), ncclBfloat16, ncclScalarHostImmediate, r.comm));
    for (const ncclRedOp_t op : {static_cast<ncclRedOp_t>(ncclAvg), scaled}) {
      ASSERT_NCCL(ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), count, ncclBfloat16,
                                    op, r.comm, r.stream));
      fake_cuda_wait(r.stream);
      const Bytes got = Device::read(recv, count * 2);
      EXPECT_NE(got, Bytes(data.begin(), data.begin() + count * 2)) << "op " << op;
      for (size_t i = 0; i < count; ++i) {
        EXPECT_NEAR(values::load(RSB_DTYPE_BF16, &got[i * 2]), values::load(RSB_DTYPE_BF16, &data[i * 2]), 0.02);
      }
    }
    ASSERT_NCCL(ncclRedOpDestroy(scaled, r.comm));
  });
}

TEST(Collectives, SumInARingsOrderInTheWiresType) {
  run(3, [](Rank &r) {
    // 256 and three ones in bf16: the order shows.
    Bytes data(6);
    for (size_t to = 0; to < 3; ++to) {
      values::store(RSB_DTYPE_BF16, r.rank == 0 ? 256.0 : 1.0, &data[to * 2]);
    }
    const CUdeviceptr send = r.device.memory(data), recv = r.device.memory(2);
    ASSERT_NCCL(ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), 1, ncclBfloat16,
                                  ncclSum, r.comm, r.stream));
    fake_cuda_wait(r.stream);
    // Rank 0's sum is (1 + 1) + 256; where 256 comes earlier, ones are lost.
    EXPECT_EQ(values::load(RSB_DTYPE_BF16, Device::read(recv, 2).data()), r.rank == 0 ? 258.0 : 256.0);
  });
}

TEST(Streams, OrderCollectivesAsTheyOrderKernels) {
  run(2, [](Rank &r) {
    const CUstream other = r.device.stream();
    const CUdeviceptr send = r.device.memory(16), recv = r.device.memory(8);
    ASSERT_CUDA(cuMemsetD8Async(send, 1, 16, other));
    if (r.rank == 0) {
      const CUevent event = r.device.event();
      ASSERT_CUDA(cuEventRecord(event, other));
      ASSERT_CUDA(cuStreamWaitEvent(r.stream, event, 0));
    }
    ASSERT_NCCL(ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), 8, ncclInt8, ncclSum,
                                  r.comm, r.stream));
    fake_cuda_wait(other);
  });
  EXPECT_TRUE(breached("unordered: ncclReduceScatter")) << "rank 1 has not waited";
}

TEST(Rules, CallsOfRanksAreCompared) {
  run(2, [](Rank &r) {
    const CUdeviceptr send = r.device.memory(16), recv = r.device.memory(16);
    const size_t count = r.rank == 0 ? 2 : 1;
    const ncclResult_t result = ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), count,
                                                  ncclInt32, ncclSum, r.comm, r.stream);
    EXPECT_TRUE(result == ncclSuccess || result == ncclInvalidUsage);
    fake_cuda_wait(r.stream);
  });
  EXPECT_TRUE(breached("ranks differ in launch 0"));
}

TEST(Rules, WhoNeverComesIsNamed) {
  run(2, [](Rank &r) {
    if (r.rank == 0) {
      const CUdeviceptr send = r.device.memory(16), recv = r.device.memory(8);
      ASSERT_NCCL(ncclReduceScatter(reinterpret_cast<void *>(send), reinterpret_cast<void *>(recv), 8, ncclInt8,
                                    ncclSum, r.comm, r.stream));
      fake_cuda_wait(r.stream);
      ncclResult_t error = ncclSuccess;
      EXPECT_NCCL(ncclCommGetAsyncError(r.comm, &error));
      EXPECT_EQ(error, ncclRemoteError);
      EXPECT_EQ(Device::read(recv, 8), Bytes(8, 0xCB)) << "nothing came";
    }
  });
  EXPECT_TRUE(breached("ranks that never came: 1"));
}

TEST(Rules, AnAbortEndsWhatHangs) {
  ncclUniqueId id;
  ASSERT_NCCL(ncclGetUniqueId(&id));
  Device device;
  ncclComm_t comms[2];
  ASSERT_NCCL(ncclGroupStart());
  ASSERT_NCCL(ncclCommInitRank(&comms[0], 2, id, 0));
  ASSERT_NCCL(ncclCommInitRank(&comms[1], 2, id, 1));
  ASSERT_NCCL(ncclGroupEnd());
  const CUstream stream = device.stream();
  const CUdeviceptr data = device.memory(8);
  ASSERT_NCCL(ncclAllReduce(reinterpret_cast<void *>(data), reinterpret_cast<void *>(data), 8, ncclInt8, ncclSum,
                            comms[0], stream));
  EXPECT_NCCL(ncclCommAbort(comms[0]));
  fake_cuda_wait(stream);
  EXPECT_NCCL(ncclCommAbort(comms[1]));
  int count = 0;
  EXPECT_EQ(ncclCommCount(comms[0], &count), ncclInvalidArgument) << "it does not live any more";
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Rules, GroupsMustBalance) {
  EXPECT_EQ(ncclGroupEnd(), ncclInvalidUsage);
  EXPECT_TRUE(breached("ncclGroupEnd without"));
  std::thread([] { EXPECT_NCCL(ncclGroupStart()); }).join();
  EXPECT_TRUE(breached("inside of ncclGroupStart"));
}

TEST(Rules, HostMemoryIsNotTaken) {
  run(1, [](Rank &r) {
    int number = 3;
    const CUdeviceptr recv = r.device.memory(4);
    ASSERT_NCCL(ncclAllReduce(&number, reinterpret_cast<void *>(recv), 1, ncclInt32, ncclSum, r.comm, r.stream));
    fake_cuda_wait(r.stream);
    EXPECT_EQ(cuStreamQuery(r.stream), CUDA_ERROR_ILLEGAL_ADDRESS);
    EXPECT_TRUE(breached("no device memory"));
    fake_cuda_heal();
  });
}

TEST(Rules, BadArgumentsAreRefusedAlsoInGroups) {
  run(1, [](Rank &r) {
    const CUdeviceptr data = r.device.memory(4);
    void *const at = reinterpret_cast<void *>(data);
    EXPECT_EQ(ncclAllReduce(at, at, 1, 99, ncclSum, r.comm, r.stream), ncclInvalidArgument);
    EXPECT_EQ(ncclAllReduce(at, at, 1, ncclInt32, 17, r.comm, r.stream), ncclInvalidArgument);
    EXPECT_EQ(ncclReduce(at, at, 1, ncclInt32, ncclSum, 1, r.comm, r.stream), ncclInvalidArgument);
    EXPECT_EQ(ncclAllReduce(nullptr, at, 1, ncclInt32, ncclSum, r.comm, r.stream), ncclInvalidArgument);
    EXPECT_EQ(ncclAllReduce(at, at, 1, ncclInt32, ncclSum, nullptr, r.stream), ncclInvalidArgument);
    EXPECT_STRNE(ncclGetLastError(r.comm), "");
    ASSERT_NCCL(ncclGroupStart());
    EXPECT_NCCL(ncclAllReduce(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream));
    EXPECT_EQ(ncclAllReduce(at, at, 1, 99, ncclSum, r.comm, r.stream), ncclInvalidArgument);
    EXPECT_EQ(ncclGroupEnd(), ncclInvalidArgument);
    EXPECT_TRUE(fake_cuda_idle(r.stream)) << "nothing of the group was enqueued";
  });
}

TEST(Errors, ComeWhereTheyAreOrdered) {
  run(1, [](Rank &r) {
    const CUdeviceptr data = r.device.memory(4);
    void *const at = reinterpret_cast<void *>(data);
    ASSERT_EQ(fake_cuda_fail("ncclAllReduce:2=3,nccl*:5=2,ncclReduceScatter:1~719"), 0);
    EXPECT_NCCL(ncclAllReduce(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream));
    EXPECT_EQ(ncclAllReduce(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream), ncclInternalError);
    EXPECT_NCCL(ncclGroupStart());
    EXPECT_NCCL(ncclReduceScatter(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream));
    EXPECT_EQ(ncclGroupEnd(), ncclSystemError) << "the group is over, and nothing was enqueued";
    ASSERT_EQ(fake_cuda_fail("ncclReduceScatter:1~719"), 0);
    EXPECT_NCCL(ncclReduceScatter(at, at, 1, ncclInt32, ncclSum, r.comm, r.stream));
    fake_cuda_wait(r.stream);
    EXPECT_EQ(cuStreamQuery(r.stream), CUDA_ERROR_LAUNCH_FAILED);
    fake_cuda_fail(nullptr);
    fake_cuda_heal();
    ncclResult_t error = ncclSuccess;
    fake_nccl_async_error(r.comm, ncclSystemError);
    EXPECT_NCCL(ncclCommGetAsyncError(r.comm, &error));
    EXPECT_EQ(error, ncclSystemError);
  });
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

TEST(Versions, AnOldOneLacksTypesAndOps) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        setenv("RSB_FAKE_NCCL_VERSION", "20804", 1);
        bool right = false;
        run(1, [&](Rank &r) {
          void *const at = reinterpret_cast<void *>(r.device.memory(8));
          int version = 0;
          right = ncclGetVersion(&version) == ncclSuccess && version == 20804 &&
                  ncclAllReduce(at, at, 1, ncclBfloat16, ncclSum, r.comm, r.stream) == ncclInvalidArgument &&
                  ncclAllReduce(at, at, 1, ncclFloat32, ncclAvg, r.comm, r.stream) == ncclInvalidArgument &&
                  ncclAllReduce(at, at, 1, ncclFloat32, ncclSum, r.comm, r.stream) == ncclSuccess;
        });
        exit(right ? 0 : 1);
      },
      ::testing::ExitedWithCode(0), "");
}

TEST(Versions, ABasicOneLacksTheCollectivesOfOneCall) {
  void *const basic = dlopen(RSB_NCCL_BASIC, RTLD_NOW | RTLD_LOCAL);
  ASSERT_NE(basic, nullptr) << dlerror();
  EXPECT_EQ(dlsym(basic, "ncclReduceScatter"), nullptr);
  EXPECT_EQ(dlsym(basic, "ncclAllGather"), nullptr);
  EXPECT_NE(dlsym(basic, "ncclReduce"), nullptr);
  EXPECT_EQ(dlclose(basic), 0);
}

TEST(Graphs, RepeatCollectives) {
  run(2, [](Rank &r) {
    const CUdeviceptr data = r.device.memory(Bytes{1, 0, 0, 0});
    CUgraph graph = nullptr;
    CUgraphExec exec = nullptr;
    ASSERT_CUDA(cuStreamBeginCapture_v2(r.stream, CU_CAPTURE_THREAD_LOCAL));
    ASSERT_NCCL(ncclAllReduce(reinterpret_cast<void *>(data), reinterpret_cast<void *>(data), 1, ncclInt32, ncclSum,
                              r.comm, r.stream));
    ASSERT_CUDA(cuStreamEndCapture(r.stream, &graph));
    ASSERT_CUDA(cuGraphInstantiateWithFlags(&exec, graph, 0));
    for (int i = 0; i < 3; ++i) {
      ASSERT_CUDA(cuGraphLaunch(exec, r.stream));
    }
    fake_cuda_wait(r.stream);
    EXPECT_EQ(Device::read(data, 4), (Bytes{8, 0, 0, 0}));
    ASSERT_CUDA(cuGraphExecDestroy(exec));
    ASSERT_CUDA(cuGraphDestroy(graph));
  });
  EXPECT_EQ(fake_cuda_breaches(), 0);
}

}  // namespace
