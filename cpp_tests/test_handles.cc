// Handles that are none, in every call that takes one; and the arguments of the calls that make them.
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <map>

#include "fake_engine.h"
#include "worker.h"

using namespace harness;

namespace {

template <typename T, typename U>
T *as(U *handle) {
  return reinterpret_cast<T *>(handle);
}

class Handles : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_RSB_OK(rsb_comm_create_local(1, nullptr, &comm_, nullptr));
    ASSERT_RSB_OK(rsb_bucketer_create(nullptr, &bucketer_, nullptr));
    ASSERT_RSB_OK(rsb_comm_create_local(1, nullptr, &freed_comm_, nullptr));
    ASSERT_RSB_OK(rsb_bucketer_create(nullptr, &freed_bucketer_, nullptr));
    rsb_comm_free(freed_comm_);
    ASSERT_RSB_OK(rsb_bucketer_free(freed_bucketer_));
  }
  void TearDown() override {
    EXPECT_RSB_OK(rsb_bucketer_free(bucketer_));
    rsb_comm_free(comm_);
  }

  std::map<std::string, rsb_comm *> bad_comms() const {
    return {{"NULL", nullptr},
            {"stale", freed_comm_},
            {"a bucketer", as<rsb_comm>(bucketer_)},
            {"a freed bucketer", as<rsb_comm>(freed_bucketer_)},
            {"invented", as<rsb_comm>(reinterpret_cast<void *>(uintptr_t{0x123456789}))},
            {"all ones", as<rsb_comm>(reinterpret_cast<void *>(UINTPTR_MAX))},
            {"an address", as<rsb_comm>(const_cast<Handles *>(this))}};
  }
  std::map<std::string, rsb_bucketer *> bad_bucketers() const {
    return {{"NULL", nullptr},
            {"stale", freed_bucketer_},
            {"a comm", as<rsb_bucketer>(comm_)},
            {"a freed comm", as<rsb_bucketer>(freed_comm_)},
            {"invented", as<rsb_bucketer>(reinterpret_cast<void *>(uintptr_t{0x123456789}))},
            {"all ones", as<rsb_bucketer>(reinterpret_cast<void *>(UINTPTR_MAX))},
            {"an address", as<rsb_bucketer>(const_cast<Handles *>(this))}};
  }

  rsb_comm *comm_ = nullptr;
  rsb_comm *freed_comm_ = nullptr;
  rsb_bucketer *bucketer_ = nullptr;
  rsb_bucketer *freed_bucketer_ = nullptr;
};

void bad(const std::string &what, const std::string &name, const std::function<rsb_status(rsb_error *)> &call) {
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_BAD_HANDLE}, call(error), error, {name})) << what;
  EXPECT_EQ(call(nullptr), RSB_ERR_BAD_HANDLE) << what;
}

TEST_F(Handles, OfComms) {
  float value = 1.0F;
  const void *inputs[] = {&value};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.inputs = inputs;
  args.numel = 1;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  for (const auto &entry : bad_comms()) {
    rsb_comm *comm = entry.second;
    EXPECT_EQ(rsb_comm_rank(comm), UINT32_MAX) << entry.first;
    EXPECT_EQ(rsb_comm_size(comm), 0u) << entry.first;
    bad(entry.first, "comm", [&](rsb_error *e) { return rsb_comm_status(comm, e); });
    bad(entry.first, "comm", [&](rsb_error *e) { return rsb_comm_all_gather(comm, &value, &value, 4, e); });
    bad(entry.first, "comm", [&](rsb_error *e) {
      rsb_ticket ticket = 0;
      return rsb_bucketer_submit(bucketer_, comm, &args, &ticket, e);
    });
    bad(entry.first, "comm", [&](rsb_error *e) {
      return rsb_bucketer_reduce_scatter_async(bucketer_, comm, inputs, 1, RSB_DTYPE_F32, RSB_OP_SUM, nullptr,
                                               nullptr, e);
    });
    rsb_comm_abort(comm);
    rsb_comm_free(comm);
  }
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm_, error), error)) << "aborting bad handles did something";
  EXPECT_RSB_OK(rsb_bucketer_submit(bucketer_, comm_, &args, nullptr, nullptr));
  EXPECT_RSB_OK(rsb_bucketer_flush(bucketer_, nullptr));
}

TEST_F(Handles, OfBucketers) {
  float value = 1.0F;
  const void *inputs[] = {&value};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.inputs = inputs;
  args.numel = 1;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  for (const auto &entry : bad_bucketers()) {
    rsb_bucketer *bucketer = entry.second;
    bad(entry.first, "bucketer", [&](rsb_error *e) {
      rsb_ticket ticket = 0;
      return rsb_bucketer_submit(bucketer, comm_, &args, &ticket, e);
    });
    bad(entry.first, "bucketer", [&](rsb_error *e) {
      return rsb_bucketer_reduce_scatter_async(bucketer, comm_, inputs, 1, RSB_DTYPE_F32, RSB_OP_SUM, nullptr,
                                               nullptr, e);
    });
    bad(entry.first, "bucketer", [&](rsb_error *e) { return rsb_bucketer_launch(bucketer, e); });
    bad(entry.first, "bucketer", [&](rsb_error *e) { return rsb_bucketer_flush(bucketer, e); });
    bad(entry.first, "bucketer", [&](rsb_error *e) {
      size_t completed = 0;
      return rsb_bucketer_poll(bucketer, &completed, e);
    });
    bad(entry.first, "bucketer", [&](rsb_error *e) { return rsb_bucketer_wait(bucketer, 1, 0, e); });
    bad(entry.first, "bucketer", [&](rsb_error *e) { return rsb_bucketer_release_buffers(bucketer, e); });
    rsb_stats stats = {};
    EXPECT_EQ(rsb_bucketer_stats(bucketer, &stats, sizeof stats), RSB_ERR_BAD_HANDLE) << entry.first;
    if (bucketer != nullptr) {
      EXPECT_EQ(rsb_bucketer_free(bucketer), RSB_ERR_BAD_HANDLE) << entry.first;
    }
  }
  EXPECT_RSB_OK(rsb_bucketer_free(nullptr));
  EXPECT_RSB_OK(rsb_bucketer_flush(bucketer_, nullptr));
}

TEST_F(Handles, OfShards) {
  Worker worker(comm_, 0);
  rsb_shard *kept = nullptr;
  rsb_shard *not_kept = nullptr;
  Op op = Op::f32(3);
  op.then = [&](const rsb_result &result) { kept = rsb_shard_retain(result.shard); };
  worker.submit(op);
  op.then = [&](const rsb_result &result) { not_kept = result.shard; };
  worker.submit(op);
  worker.finish();
  ASSERT_NE(kept, nullptr);
  rsb_shard_release(kept);
  for (rsb_shard *shard : {kept, not_kept, as<rsb_shard>(comm_), as<rsb_shard>(bucketer_),
                           as<rsb_shard>(this), static_cast<rsb_shard *>(nullptr)}) {
    EXPECT_EQ(rsb_shard_retain(shard), nullptr);
    rsb_shard_release(shard);
  }
  worker.submit(Op::f32(4));
  worker.finish();
}

TEST_F(Handles, ManyAreMadeAndOldOnesStayDead) {
  std::vector<rsb_bucketer *> dead;
  for (int i = 0; i < 2000; ++i) {
    rsb_bucketer *bucketer = nullptr;
    ASSERT_RSB_OK(rsb_bucketer_create(nullptr, &bucketer, nullptr));
    ASSERT_RSB_OK(rsb_bucketer_free(bucketer));
    dead.push_back(bucketer);
  }
  for (rsb_bucketer *bucketer : dead) {
    ASSERT_EQ(rsb_bucketer_flush(bucketer, nullptr), RSB_ERR_BAD_HANDLE);
  }
}

TEST(Create, Local) {
  rsb_comm *comms[2] = {};
  const auto create = [&](uint32_t size, const rsb_comm_config *config, rsb_comm **out, Error &error) {
    return rsb_comm_create_local(size, config, out, error);
  };
  {
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(0, nullptr, comms, error), error, {"size"}));
  }
  {
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(2, nullptr, nullptr, error), error, {"out_comms"}));
  }
  for (const uint64_t flag : {UINT64_C(2), UINT64_C(1) << 63}) {
    rsb_comm_config config = comm_config();
    config.flags = flag;
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, create(2, &config, comms, error), error, {"flags"}));
  }
  for (const size_t size : {size_t{0}, size_t{7}, sizeof(rsb_comm_config) - 1}) {
    rsb_comm_config config = comm_config();
    config.struct_size = size;
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(2, &config, comms, error), error,
                        {"struct_size", "config"}));
  }
  struct {
    rsb_comm_config config;
    unsigned char tail[16];
  } longer = {};
  longer.config.struct_size = sizeof longer;
  longer.tail[15] = 1;
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, create(2, &longer.config, comms, error), error,
                      {"struct_size", "config", "tail", "field"}));
  longer.tail[15] = 0;
  Error clean;
  EXPECT_TRUE(answers(RSB_OK, create(2, &longer.config, comms, clean), clean));
  for (rsb_comm *comm : comms) {
    EXPECT_EQ(rsb_comm_size(comm), 2u);
    rsb_comm_free(comm);
  }
}

TEST(Create, Shm) {
  const rsb_comm_config config = comm_config(1000000000);
  rsb_comm *comm = nullptr;
  const auto refused = [&](const char *name, uint32_t rank, uint32_t size, rsb_comm **out,
                           const std::string &argument) {
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_create_shm(name, rank, size, &config, out, error),
                        error, {argument}))
        << (name != nullptr ? name : "NULL");
  };
  const std::string long_name(65, 'x');
  refused(nullptr, 0, 1, &comm, "name");
  for (const char *name : {"", "a/b", "a b", "..//x", "\xC3\xA4", "a\n", long_name.c_str()}) {
    refused(name, 0, 1, &comm, "name");
  }
  const std::string good = unique_name();
  refused(good.c_str(), 0, 0, &comm, "size");
  refused(good.c_str(), 1, 1, &comm, "rank");
  refused(good.c_str(), UINT32_MAX, 2, &comm, "rank");
  refused(good.c_str(), 0, 1, nullptr, "out_comm");
}

TEST(Create, Custom) {
  FakeEngine engine(2, {});
  rsb_comm *comm = nullptr;
  const auto refused = [&](rsb_status status, const std::vector<std::string> &names,
                           const std::function<void(rsb_transport &)> &spoil) {
    rsb_transport transport = engine.transport(0);
    spoil(transport);
    Error error;
    EXPECT_TRUE(refuses({status}, rsb_comm_create_custom(&transport, 0, 2, nullptr, &comm, error), error, names));
  };
  refused(RSB_ERR_INVALID_ARGUMENT, {"start"}, [](rsb_transport &t) { t.start = nullptr; });
  refused(RSB_ERR_INVALID_ARGUMENT, {"test"}, [](rsb_transport &t) { t.test = nullptr; });
  refused(RSB_ERR_INVALID_ARGUMENT, {"release"}, [](rsb_transport &t) { t.release = nullptr; });
  refused(RSB_ERR_INVALID_ARGUMENT, {"flags"}, [](rsb_transport &t) { t.flags = RSB_TRANSPORT_ALL_GATHER; });
  refused(RSB_ERR_UNSUPPORTED, {"flags"}, [](rsb_transport &t) { t.flags |= UINT64_C(1) << 40; });
  refused(RSB_ERR_INVALID_ARGUMENT, {"struct_size", "transport"}, [](rsb_transport &t) { t.struct_size = 8; });
  rsb_transport transport = engine.transport(0);
  const auto create = [&](const rsb_transport *t, uint32_t rank, uint32_t size, rsb_comm **out, Error &error) {
    return rsb_comm_create_custom(t, rank, size, nullptr, out, error);
  };
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(nullptr, 0, 2, &comm, error), error, {"transport"}));
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(&transport, 0, 0, &comm, error), error, {"size"}));
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(&transport, 2, 2, &comm, error), error, {"rank"}));
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, create(&transport, 0, 2, nullptr, error), error, {"out_comm"}));
  if ((rsb_features() & RSB_FEATURE_CUDA) == 0) {
    refused(RSB_ERR_UNSUPPORTED, {"DEVICE", "flags"}, [](rsb_transport &t) { t.flags |= RSB_TRANSPORT_DEVICE; });
  }
  rsb_comm_config exact = comm_config();
  exact.flags = RSB_COMM_EXACT;
  transport.flags = RSB_TRANSPORT_REDUCE_SCATTER;
  EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_comm_create_custom(&transport, 0, 2, &exact, &comm, error), error,
                      {"EXACT", "flags"}));
  EXPECT_EQ(engine.releases(0), 0u) << "create failed: release is not called";
  EXPECT_TRUE(engine.breaches().empty());
}

TEST(Create, Bucketer) {
  rsb_bucketer *bucketer = nullptr;
  Error error;
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_create(nullptr, nullptr, error), error, {"out"}));
  rsb_config config = RSB_CONFIG_INIT;
  config.flags = 1;
  EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED}, rsb_bucketer_create(&config, &bucketer, error), error, {"flags"}));
  config.flags = 0;
  config.struct_size = sizeof config - 8;
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_create(&config, &bucketer, error), error,
                      {"struct_size", "config"}));
  config.struct_size = sizeof config;
  rsb_allocator allocator = {};
  allocator.struct_size = sizeof allocator;
  config.allocator = &allocator;
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_bucketer_create(&config, &bucketer, error), error,
                      {"alloc"}));
}

TEST(Create, AllGatherArguments) {
  run_ranks(1, [](uint32_t, rsb_comm *comm) {
    char bytes[16] = {};
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_all_gather(comm, nullptr, bytes, 8, error), error,
                        {"input"}));
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_all_gather(comm, bytes, nullptr, 8, error), error,
                        {"output"}));
    EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT}, rsb_comm_all_gather(comm, bytes, bytes + 1, 8, error), error,
                        {"input", "output"}));
    Error clean;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_all_gather(comm, bytes, bytes, 8, clean), clean));
  });
}

TEST(Create, WhatThisBuildDoesNotHave) {
  rsb_comm *comm = nullptr;
  Error error;
  const rsb_status nccl = rsb_comm_wrap_nccl(nullptr, nullptr, &comm, error);
  EXPECT_EQ(nccl, RSB_ERR_INVALID_ARGUMENT);
  EXPECT_TRUE(error.full(nccl));
  run_ranks(2, [](uint32_t, rsb_comm *healthy) {
    rsb_comm *smaller = nullptr;
    Error refused;
    const rsb_status shrink = rsb_comm_shrink(healthy, nullptr, &smaller, refused);
    EXPECT_TRUE(shrink == RSB_ERR_INVALID_ARGUMENT || shrink == RSB_ERR_UNSUPPORTED) << "no peer is lost";
    EXPECT_TRUE(refused.full(shrink));
  });
}

}  // namespace
