// Ranks and workers on device memory: see device_worker.h.
#include "device_worker.h"

#include <cstring>
#include <deque>
#include <mutex>
#include <thread>

namespace harness {
namespace {

/// A device engine that hands its collectives to NCCL.
struct OverNccl {
  ncclComm_t comm;
  int released = 0;
};

int nccl_type(rsb_dtype dtype) {
  const int codes[] = {-1, ncclFloat32, ncclFloat64, ncclFloat16, ncclBfloat16, ncclInt32, ncclInt64, ncclUint8, ncclInt8};
  return codes[dtype];
}

int nccl_op(rsb_op op) {
  return op == RSB_OP_SUM ? ncclSum : op == RSB_OP_PROD ? ncclProd : op == RSB_OP_MIN ? ncclMin : ncclMax;
}

int32_t start(void *ctx, const rsb_coll *c, void **) {
  auto *engine = static_cast<OverNccl *>(ctx);
  auto stream = static_cast<CUstream>(c->stream);
  const int type = nccl_type(c->dtype);
  switch (c->kind) {
    case RSB_COLL_REDUCE_SCATTER:
      return ncclReduceScatter(c->send, c->recv, c->count, type, nccl_op(c->op), engine->comm, stream);
    case RSB_COLL_ALL_TO_ALL:
      return ncclAlltoAll(c->send, c->recv, c->count, type, engine->comm, stream);
    default:
      return ncclAllGather(c->send, c->recv, c->count, type, engine->comm, stream);
  }
}

int32_t test(void *, void *, int32_t *done) {
  *done = 1;
  return 0;
}

// What streams hold. A device that has failed never runs it: so it is not the stream's to free.
std::mutex in_streams_mutex;
std::deque<std::function<void()>> in_streams;

void release(void *ctx) { ++static_cast<OverNccl *>(ctx)->released; }

}  // namespace

void run_device(uint32_t size, const DeviceOptions &options, const DeviceFn &fn) {
  ncclUniqueId id;
  ASSERT_EQ(ncclGetUniqueId(&id), ncclSuccess);
  std::vector<rsb_comm *> control(size, nullptr);
  if (options.control) {
    Error error;
    ASSERT_RSB_OK(rsb_comm_create_local(size, nullptr, control.data(), error));
  }
  std::atomic<uint32_t> over{0};
  run_threads(
      size,
      [&](uint32_t r) {
        gpu::Device device(static_cast<int>(r % 2));
        DeviceRank rank{r, size, device, nullptr, device.stream(), nullptr, nullptr};
        if (options.result_stream) {
          rank.result = device.stream();
        }
        ASSERT_EQ(ncclCommInitRank(&rank.nccl, static_cast<int>(size), id, static_cast<int>(r)), ncclSuccess);
        rsb_comm_config config = comm_config(options.timeout_ns);
        config.flags = options.flags;
        config.stream = rank.producer;
        config.result_stream = rank.result;
        config.control = control[r];
        OverNccl engine{rank.nccl};
        Error error;
        if (options.custom) {
          rsb_transport table = {};
          table.struct_size = sizeof table;
          table.flags = options.custom_flags;
          table.ctx = &engine;
          table.start = start;
          table.test = test;
          table.release = release;
          table.max_count = options.max_count;
          ASSERT_TRUE(answers(RSB_OK, rsb_comm_create_custom(&table, r, size, &config, &rank.comm, error), error));
        } else {
          ASSERT_TRUE(answers(RSB_OK, rsb_comm_wrap_nccl(rank.nccl, &config, &rank.comm, error), error));
        }
        const int depth = fake_cuda_stack_depth();
        fn(rank);
        EXPECT_EQ(fake_cuda_stack_depth(), depth) << "the caller's context is as it was";
        // Kernels that have not run would keep their module.
        fake_cuda_wait_all();
        rsb_comm_free(rank.comm);
        rsb_comm_free(control[r]);
        EXPECT_EQ(engine.released, options.custom ? 1 : 0);
        fake_cuda_wait_all();
        EXPECT_EQ(ncclCommDestroy(rank.nccl), ncclSuccess);
        // Ranks share devices, which freeing plain memory would wait for.
        ++over;
        while (over < size) {
          std::this_thread::yield();
        }
        fake_cuda_wait_all();
      },
      [&](uint32_t r) {
        over = size;
        rsb_comm_abort(control[r]);
      });
  in_streams.clear();
  std::string all;
  for (int i = 0; i < fake_cuda_breaches(); ++i) {
    all += std::string("\n  ") + fake_cuda_breach(i);
  }
  EXPECT_EQ(fake_cuda_check_leaks(), 0) << all;
  fake_cuda_forgive();
}

void in_stream(CUstream stream, std::function<void()> fn) {
  std::function<void()> *held;
  {
    std::lock_guard<std::mutex> lock(in_streams_mutex);
    held = &in_streams.emplace_back(std::move(fn));
  }
  EXPECT_CUDA(cuLaunchHostFunc(stream, [](void *data) { (*static_cast<std::function<void()> *>(data))(); }, held));
}

DeviceWorker::DeviceWorker(DeviceRank &rank, int64_t bucket_bytes, const rsb_allocator *allocator)
    : rank_(&rank), bucketer_(bucket_bytes, allocator) {}

DeviceWorker::~DeviceWorker() { wait(); }

/// Not for other ranks' streams, which may wait for what this one does next.
void DeviceWorker::wait() {
  for (const CUstream stream : streams_) {
    fake_cuda_wait(stream);
  }
}

void DeviceWorker::prepare(Record &record, CUstream stream) {
  const Op &op = record.op;
  const uint32_t size = rank_->size;
  record.shard = op.flat ? rsb_shard_numel(op.numel, size) : op.numel;
  const size_t element = values::size_of(op.dtype);
  const rsb_dtype out = op.output_dtype == 0 ? op.dtype : op.output_dtype;
  size_t left = op.numel;
  for (uint32_t to = 0; to < size; ++to) {
    values::Bytes piece = values::piece(op.data, op.dtype, op.op, record.place + 1, rank_->rank, to, record.shard);
    if (op.flat) {
      // What is past the end counts as zeros.
      const size_t real = std::min(left, record.shard);
      left -= real;
      piece.resize(real * element);
    }
    record.data.push_back(piece);
  }
  if (op.flat) {
    values::Bytes all;
    for (const values::Bytes &piece : record.data) {
      all.insert(all.end(), piece.begin(), piece.end());
    }
    record.data.assign(1, all);
  }
  for (const values::Bytes &piece : record.data) {
    const CUdeviceptr at = rank_->device.memory(piece.size(), op.offset);
    record.inputs.push_back(at);
    record.pointers.push_back(reinterpret_cast<const void *>(at));
    fake_cuda_touch(stream, at, piece.size(), 1);
    in_stream(stream, [at, &piece] {
      if (!piece.empty()) {
        std::memcpy(fake_cuda_reach(at), piece.data(), piece.size());
      }
    });
  }
  // The oracle, over what all ranks give; a flat tail is zeros on every rank.
  values::Bytes old;
  if (op.output) {
    const size_t bytes = record.shard * values::size_of(out);
    old.resize(bytes);
    for (size_t i = 0; i < record.shard; ++i) {
      values::store(out, static_cast<double>(i % 5), &old[i * values::size_of(out)]);
    }
    record.output = rank_->device.memory(bytes);
    fake_cuda_touch(stream, record.output, bytes, 1);
    in_stream(stream, [at = record.output, old] {
      if (!old.empty()) {
        std::memcpy(fake_cuda_reach(at), old.data(), old.size());
      }
    });
  }
  const values::Reduction reduction{op.dtype, op.output_dtype, op.op, op.scale};
  const bool accumulate = (op.flags & RSB_SUBMIT_ACCUMULATE) != 0;
  std::vector<values::Bytes> rows;
  for (uint32_t from = 0; from < size; ++from) {
    values::Bytes row = values::piece(op.data, op.dtype, op.op, record.place + 1, from, rank_->rank, record.shard);
    if (op.flat) {
      const size_t first = record.shard * rank_->rank;
      const size_t real = op.numel > first ? std::min(op.numel - first, record.shard) : 0;
      std::fill(row.begin() + static_cast<std::ptrdiff_t>(real * element), row.end(), static_cast<unsigned char>(0));
    }
    rows.push_back(row);
  }
  record.expected.resize(record.shard * values::size_of(out));
  for (size_t i = 0; i < record.shard; ++i) {
    std::vector<const unsigned char *> inputs;
    for (const values::Bytes &row : rows) {
      inputs.push_back(&row[i * element]);
    }
    const size_t at = i * values::size_of(out);
    values::reduce(reduction, inputs, accumulate ? &old[at] : nullptr, &record.expected[at]);
  }
}

rsb_status DeviceWorker::try_submit(const Op &op, Error &error, CUstream stream) {
  Record &record = records_.emplace_back();
  record.worker = this;
  record.rank = rank_;
  record.place = records_.size() - 1;
  record.op = op;
  const CUstream producer = stream == nullptr ? rank_->producer : stream;
  streams_.insert(producer);
  prepare(record, producer);
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  if (op.flat) {
    args.flat_input = record.pointers[0];
  } else {
    args.inputs = record.pointers.data();
  }
  args.output = reinterpret_cast<void *>(record.output);
  args.numel = op.numel;
  args.dtype = op.dtype;
  args.output_dtype = op.output_dtype;
  args.op = op.op;
  args.flags = op.flags;
  args.scale = op.scale;
  args.tag = record.place + 1;
  args.stream = stream;
  args.callback = on_result;
  args.user_data = &record;
  rsb_ticket ticket = 0;
  const rsb_status status = rsb_bucketer_submit(bucketer_, rank_->comm, &args, &ticket, error);
  record.accepted = status == RSB_OK;
  if ((op.flags & RSB_SUBMIT_BORROW) == 0) {
    for (size_t i = 0; i < record.inputs.size(); ++i) {
      const size_t bytes = record.data[i].size();
      fake_cuda_touch(producer, record.inputs[i], bytes, 1);
      in_stream(producer, [at = record.inputs[i], bytes] {
        if (bytes > 0) {
          std::memset(fake_cuda_reach(at), 0x5A, bytes);
        }
      });
    }
  }
  return status;
}

size_t DeviceWorker::submit(const Op &op, CUstream stream) {
  Error error;
  EXPECT_TRUE(answers(RSB_OK, try_submit(op, error, stream), error));
  return records_.size() - 1;
}

void DeviceWorker::on_result(void *user_data, const rsb_result *result) {
  auto &record = *static_cast<Record *>(user_data);
  ++record.calls;
  record.status = result->status;
  record.worker->called_.push_back(record.place);
  EXPECT_EQ(result->tag, record.place + 1);
  EXPECT_EQ(result->error->status, result->status);
  record.worker->note(record, *result);
  if (record.op.then) {
    record.op.then(*result);
  }
}

void DeviceWorker::note(Record &record, const rsb_result &result) {
  if (result.status != RSB_OK) {
    EXPECT_EQ(result.data, nullptr);
    EXPECT_EQ(result.shard, nullptr);
    return;
  }
  EXPECT_EQ(result.numel, record.shard);
  EXPECT_EQ(result.shard == nullptr, record.output != 0);
  EXPECT_NE(result.stream, nullptr);
  if (record.rank->result != nullptr) {
    EXPECT_EQ(result.stream, record.rank->result);
  }
  if (record.output != 0) {
    EXPECT_EQ(reinterpret_cast<CUdeviceptr>(result.data), record.output);
  }
  const size_t bytes = record.expected.size();
  if (bytes == 0) {
    return;
  }
  // The result is read when the result stream comes to it; then its memory may go, in that order.
  const auto stream = static_cast<CUstream>(result.stream);
  streams_.insert(stream);
  const auto at = reinterpret_cast<CUdeviceptr>(result.data);
  fake_cuda_touch(stream, at, bytes, 0);
  in_stream(stream, [&record, at, bytes] {
    const auto *from = static_cast<const unsigned char *>(fake_cuda_reach(at));
    record.result.assign(from, from + bytes);
  });
}

void DeviceWorker::launch() {
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_launch(bucketer_, error), error));
}

void DeviceWorker::flush() {
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer_, error), error));
}

void DeviceWorker::finish() {
  flush();
  check_all();
}

void DeviceWorker::check_all() {
  wait();
  for (const Record &record : records_) {
    if (!record.accepted) {
      EXPECT_EQ(record.calls, 0u) << "op " << record.place;
      continue;
    }
    EXPECT_EQ(record.calls, 1u) << "op " << record.place;
    EXPECT_EQ(std::string(rsb_status_name(record.status)), "RSB_OK") << "op " << record.place;
    EXPECT_TRUE(record.result == record.expected)
        << "op " << record.place << " " << values::dtype_name(record.op.dtype) << " " << values::op_name(record.op.op);
  }
}

}  // namespace harness
