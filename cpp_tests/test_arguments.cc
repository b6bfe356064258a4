// Every argument of submit wrong in every way: the status, the whole of err, the argument's name in the
// message; nothing changed, and a good call afterwards is good. Rule 5 to 8.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "worker.h"

using namespace harness;

namespace {

/// The ends of a local comm of three ranks, all in this thread. Argument errors are no part of rule 1's
/// sequence, so rank 1 can make them alone; a comm of one rank serves for good calls.
class Arguments : public ::testing::Test {
 protected:
  void SetUp() override {
    const rsb_comm_config config = comm_config();
    ASSERT_RSB_OK(rsb_comm_create_local(3, &config, group_, nullptr));
    ASSERT_RSB_OK(rsb_comm_create_local(1, &config, &alone_, nullptr));
    for (size_t i = 0; i < 24; ++i) {
      memory_[i] = static_cast<float>(i) + 0.25F;
    }
    for (size_t to = 0; to < 3; ++to) {
      inputs_[to] = memory_ + to * 8;
    }
  }

  void TearDown() override {
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_comm_status(comm(), error), error)) << "an argument error is not sticky";
    const rsb_stats stats = bucketer_.stats();
    EXPECT_EQ(stats.ops_submitted, good_calls_);
    EXPECT_EQ(calls_, 0) << "a refused op was called back";
    for (rsb_comm *comm : group_) {
      rsb_comm_free(comm);
    }
    rsb_comm_free(alone_);
  }

  rsb_comm *comm() const { return group_[1]; }

  /// Arguments that are good for rank 1 of 3.
  rsb_submit_args good() {
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.inputs = inputs_;
    args.numel = 8;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.callback = [](void *user_data, const rsb_result *) { *static_cast<int *>(user_data) += 1; };
    args.user_data = &calls_;
    return args;
  }

  /// The bad arguments are refused with `status` and the name, and a good call after them works.
  void refused(const std::string &what, rsb_status status, const std::vector<std::string> &names,
               const std::function<void(rsb_submit_args &)> &spoil) {
    rsb_submit_args args = good();
    spoil(args);
    rsb_ticket ticket = 4711;
    Error error;
    EXPECT_TRUE(refuses({status}, rsb_bucketer_submit(bucketer_, comm(), &args, &ticket, error), error, names))
        << what;
    EXPECT_EQ(rsb_bucketer_submit(bucketer_, comm(), &args, nullptr, nullptr), status) << what;
    works();
  }

  void works() {
    int calls = 0;
    float data = 0.0F;
    const float value = static_cast<float>(good_calls_) + 0.5F;
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = &value;
    args.output = &data;
    args.numel = 1;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.callback = [](void *user_data, const rsb_result *) { *static_cast<int *>(user_data) += 1; };
    args.user_data = &calls;
    rsb_ticket ticket = 0;
    Error error;
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer_, alone_, &args, &ticket, error), error));
    EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer_, error), error));
    EXPECT_EQ(calls, 1);
    EXPECT_EQ(data, value);
    EXPECT_NE(ticket, 0u);
    good_calls_ += 1;
  }

  rsb_comm *group_[3] = {};
  rsb_comm *alone_ = nullptr;
  Bucketer bucketer_{0};
  float memory_[32] = {};
  const void *inputs_[3] = {};
  int calls_ = 0;
  uint64_t good_calls_ = 0;
};

TEST_F(Arguments, Pointers) {
  Error error;
  rsb_ticket ticket = 0;
  EXPECT_TRUE(refuses({RSB_ERR_INVALID_ARGUMENT},
                      rsb_bucketer_submit(bucketer_, comm(), nullptr, &ticket, error), error, {"args"}));
  works();
  refused("neither input", RSB_ERR_INVALID_ARGUMENT, {"inputs", "flat_input"},
          [](rsb_submit_args &a) { a.inputs = nullptr; });
  refused("both inputs", RSB_ERR_INVALID_ARGUMENT, {"flat_input"},
          [this](rsb_submit_args &a) { a.flat_input = memory_; });
  for (size_t i = 0; i < 3; ++i) {
    const void *saved = inputs_[i];
    inputs_[i] = nullptr;
    refused("inputs[i] is NULL", RSB_ERR_INVALID_ARGUMENT, {"inputs"}, [](rsb_submit_args &) {});
    inputs_[i] = saved;
  }
}

TEST_F(Arguments, NumbersThatMeanNothing) {
  for (const uint32_t dtype : {0u, 9u, 255u, 0x80000001u, 0xFFFFFFFFu}) {
    refused("dtype " + std::to_string(dtype), RSB_ERR_UNSUPPORTED, {"dtype"},
            [dtype](rsb_submit_args &a) { a.dtype = dtype; });
  }
  for (const uint32_t dtype : {9u, 0xFFFFFFFFu}) {
    refused("output_dtype " + std::to_string(dtype), RSB_ERR_UNSUPPORTED, {"output_dtype"},
            [dtype](rsb_submit_args &a) { a.output_dtype = dtype; });
  }
  for (const uint32_t op : {0u, 6u, 255u, 0x80000001u, 0xFFFFFFFFu}) {
    refused("op " + std::to_string(op), RSB_ERR_UNSUPPORTED, {"op"},
            [op](rsb_submit_args &a) { a.op = op; });
  }
  for (uint32_t bit = 2; bit < 32; ++bit) {
    refused("flag " + std::to_string(bit), RSB_ERR_UNSUPPORTED, {"flags"},
            [bit](rsb_submit_args &a) { a.flags = UINT32_C(1) << bit; });
  }
}

TEST_F(Arguments, WhatIntegersCannotDo) {
  for (const rsb_dtype dtype : {RSB_DTYPE_I32, RSB_DTYPE_I64, RSB_DTYPE_U8, RSB_DTYPE_I8}) {
    const std::string name = values::dtype_name(dtype);
    refused("AVG of " + name, RSB_ERR_UNSUPPORTED, {"op", "AVG"}, [dtype](rsb_submit_args &a) {
      a.dtype = dtype;
      a.numel = 1;
      a.op = RSB_OP_AVG;
    });
    refused("scale of " + name, RSB_ERR_UNSUPPORTED, {"scale"}, [dtype](rsb_submit_args &a) {
      a.dtype = dtype;
      a.numel = 1;
      a.scale = 2.0;
    });
    refused(name + " to F32", RSB_ERR_UNSUPPORTED, {"output_dtype"}, [dtype](rsb_submit_args &a) {
      a.dtype = dtype;
      a.numel = 1;
      a.output_dtype = RSB_DTYPE_F32;
    });
    refused("F32 to " + name, RSB_ERR_UNSUPPORTED, {"output_dtype"},
            [dtype](rsb_submit_args &a) { a.output_dtype = dtype; });
  }
}

TEST_F(Arguments, ScaleIsANumber) {
  refused("NaN", RSB_ERR_INVALID_ARGUMENT, {"scale"},
          [](rsb_submit_args &a) { a.scale = std::numeric_limits<double>::quiet_NaN(); });
}

TEST_F(Arguments, SizesThatOverflow) {
  for (const size_t numel : {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 4 + 1, SIZE_MAX / 12 + 1}) {
    refused("pieces of " + std::to_string(numel), RSB_ERR_INVALID_ARGUMENT, {"numel"},
            [numel](rsb_submit_args &a) { a.numel = numel; });
  }
  for (const size_t numel : {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 4 + 1}) {
    refused("flat of " + std::to_string(numel), RSB_ERR_INVALID_ARGUMENT, {"numel"},
            [this, numel](rsb_submit_args &a) {
              a.inputs = nullptr;
              a.flat_input = memory_;
              a.numel = numel;
            });
  }
}

TEST_F(Arguments, AccumulateNeedsOutput) {
  refused("ACCUMULATE", RSB_ERR_INVALID_ARGUMENT, {"output"},
          [](rsb_submit_args &a) { a.flags = RSB_SUBMIT_ACCUMULATE; });
}

TEST_F(Arguments, OutputOverlapsInputs) {
  const auto overlap = [&](const std::string &what, float *output) {
    refused(what, RSB_ERR_INVALID_ARGUMENT, {"output"},
            [output](rsb_submit_args &a) { a.output = output; });
  };
  overlap("another rank's piece", memory_);
  overlap("the last piece", memory_ + 16);
  overlap("one element into its own piece", memory_ + 9);
  overlap("one element before its own piece", memory_ + 7);
  overlap("the last element", memory_ + 23);
  const auto flat = [&](const std::string &what, size_t at) {
    refused("flat: " + what, RSB_ERR_INVALID_ARGUMENT, {"output"}, [this, at](rsb_submit_args &a) {
      a.inputs = nullptr;
      a.flat_input = memory_;
      a.numel = 24;
      a.output = memory_ + at;
    });
  };
  flat("its beginning", 0);
  flat("beside its own piece", 9);
  flat("the last piece", 16);
  refused("in place with another dtype", RSB_ERR_INVALID_ARGUMENT, {"output"}, [this](rsb_submit_args &a) {
    a.output = memory_ + 8;
    a.output_dtype = RSB_DTYPE_BF16;
  });
}

TEST_F(Arguments, StructSize) {
  const std::vector<std::string> names = {"struct_size", "args"};
  for (const size_t size : {size_t{0}, size_t{1}, sizeof(size_t), sizeof(rsb_submit_args) - 1}) {
    refused("struct_size " + std::to_string(size), RSB_ERR_INVALID_ARGUMENT, names,
            [size](rsb_submit_args &a) { a.struct_size = size; });
  }
}

TEST_F(Arguments, ATailOfZerosIsFineAndOthersAreNot) {
  struct {
    rsb_submit_args args;
    unsigned char tail[64];
  } longer = {};
  int calls = 0;
  float value = 2.5F;
  float output = 0.0F;
  longer.args = good();
  longer.args.struct_size = sizeof longer;
  longer.args.inputs = nullptr;
  longer.args.flat_input = &value;
  longer.args.output = &output;
  longer.args.numel = 1;
  longer.args.user_data = &calls;
  rsb_ticket ticket = 0;
  Error clean;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_submit(bucketer_, alone_, &longer.args, &ticket, clean), clean));
  EXPECT_RSB_OK(rsb_bucketer_flush(bucketer_, nullptr));
  good_calls_ += 1;
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(output, 2.5F);
  for (const size_t at : {size_t{0}, size_t{17}, sizeof longer.tail - 1}) {
    longer.tail[at] = 1;
    Error error;
    EXPECT_TRUE(refuses({RSB_ERR_UNSUPPORTED},
                        rsb_bucketer_submit(bucketer_, alone_, &longer.args, &ticket, error), error,
                        {"struct_size", "args", "tail", "field"}))
        << "tail byte " << at;
    longer.tail[at] = 0;
  }
  EXPECT_EQ(calls, 1);
  works();
}

TEST_F(Arguments, TheShorthandChecksTheSame) {
  const auto submit = [this](const void *const *inputs, size_t numel, rsb_dtype dtype, rsb_op op,
                             rsb_error *error) {
    return rsb_bucketer_reduce_scatter_async(bucketer_, comm(), inputs, numel, dtype, op, nullptr, nullptr,
                                             error);
  };
  struct Case {
    rsb_status status;
    const char *name;
    const void *const *inputs;
    size_t numel;
    rsb_dtype dtype;
    rsb_op op;
  };
  const void *with_null[] = {memory_, nullptr, memory_};
  const Case cases[] = {
      {RSB_ERR_INVALID_ARGUMENT, "inputs", nullptr, 8, RSB_DTYPE_F32, RSB_OP_SUM},
      {RSB_ERR_INVALID_ARGUMENT, "inputs", with_null, 8, RSB_DTYPE_F32, RSB_OP_SUM},
      {RSB_ERR_INVALID_ARGUMENT, "numel", inputs_, SIZE_MAX, RSB_DTYPE_F32, RSB_OP_SUM},
      {RSB_ERR_UNSUPPORTED, "dtype", inputs_, 8, 77, RSB_OP_SUM},
      {RSB_ERR_UNSUPPORTED, "op", inputs_, 8, RSB_DTYPE_F32, 77},
      {RSB_ERR_UNSUPPORTED, "op", inputs_, 1, RSB_DTYPE_I64, RSB_OP_AVG},
  };
  for (const Case &c : cases) {
    Error error;
    EXPECT_TRUE(refuses({c.status}, submit(c.inputs, c.numel, c.dtype, c.op, error), error, {c.name}));
    works();
  }
}

TEST_F(Arguments, ErrIsLeftAloneOnSuccess) {
  Error error;
  EXPECT_RSB_OK(rsb_comm_status(comm(), error));
  EXPECT_RSB_OK(rsb_comm_all_gather(alone_, memory_, memory_ + 1, 4, error));
  EXPECT_RSB_OK(rsb_bucketer_launch(bucketer_, error));
  EXPECT_RSB_OK(rsb_bucketer_flush(bucketer_, error));
  size_t completed = 0;
  EXPECT_RSB_OK(rsb_bucketer_poll(bucketer_, &completed, error));
  EXPECT_RSB_OK(rsb_bucketer_poll(bucketer_, nullptr, error));
  EXPECT_RSB_OK(rsb_bucketer_release_buffers(bucketer_, error));
  rsb_bucketer *other = nullptr;
  EXPECT_RSB_OK(rsb_bucketer_create(nullptr, &other, error));
  EXPECT_RSB_OK(rsb_bucketer_free(other));
  EXPECT_TRUE(error.untouched());
  works();
}

}  // namespace
