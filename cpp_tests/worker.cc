// The worker's data, its expectations, and the checks in its callback.
#include "worker.h"

#include <algorithm>
#include <cstring>

namespace harness {
namespace {

/// In a flat input there is no receiver yet; its data must differ from that of pieces.
constexpr uint32_t kFlat = 0xFFFFFFFFu;

/// A flag that is set in a scope, also when an exception leaves it.
class Inside {
 public:
  explicit Inside(bool &flag) : flag_(flag) { flag_ = true; }
  ~Inside() { flag_ = false; }
  Inside(const Inside &) = delete;
  Inside &operator=(const Inside &) = delete;

 private:
  bool &flag_;
};

}  // namespace

Worker::Worker(rsb_comm *comm, int64_t bucket_bytes, const rsb_allocator *allocator, uint64_t seed)
    : comm_(comm), seed_(seed), owner_(std::this_thread::get_id()), bucketer_(bucket_bytes, allocator) {}

Worker::~Worker() {
  bucketer_.free();
  for (const Record &record : records_) {
    const size_t owed = record.accepted && record.op.callback ? 1 : 0;
    EXPECT_LE(record.calls, 1u) << "callbacks of op " << record.place;
    if (record.returned) {
      EXPECT_EQ(record.calls, owed) << "callbacks of op " << record.place;
    }
    if (record.calls != 0 && record.ticket != 0) {
      EXPECT_EQ(record.ticket_in_result, record.ticket) << "op " << record.place;
    }
  }
}

void Worker::prepare(Record &record) {
  const Op &op = record.op;
  const uint32_t rank = rsb_comm_rank(record.comm);
  const uint32_t size = rsb_comm_size(record.comm);
  const size_t in = values::size_of(op.dtype);
  const rsb_dtype target = op.output_dtype != 0 ? op.output_dtype : op.dtype;
  const size_t out = values::size_of(target);
  const uint64_t seed = values::hash(seed_, record.place);
  record.shard = op.flat ? rsb_shard_numel(op.numel, size) : op.numel;

  const size_t elements = op.flat ? op.numel : op.numel * size;
  record.inputs.assign(elements * in + op.offset + 16, 0);
  const auto address = reinterpret_cast<uintptr_t>(record.inputs.data());
  unsigned char *base = record.inputs.data() + (16 - address % 16) % 16 + op.offset;
  for (size_t i = 0; i < elements; ++i) {
    const auto to = op.flat ? kFlat : static_cast<uint32_t>(i / op.numel);
    values::fill(op.data, op.dtype, op.op, {seed, rank, to, op.flat ? i : i % op.numel}, base + i * in);
  }
  if (op.flat) {
    record.pointers = {base};
  } else {
    for (uint32_t to = 0; to < size; ++to) {
      record.pointers.push_back(base + to * op.numel * in);
    }
  }

  if (op.in_place) {
    record.target = base + rank * record.shard * in;
  } else if (op.output) {
    record.output.assign(record.shard * out + 1, 0);
    record.target = record.output.data();
    for (size_t i = 0; i < record.shard; ++i) {
      values::fill(op.data, target, op.op, {seed, kFlat, rank, i}, record.target + i * out);
    }
  }

  const values::Reduction reduction{op.dtype, op.output_dtype, op.op, op.scale};
  record.expected.assign(record.shard * out, 0);
  values::Bytes elements_of_ranks(size * in);
  std::vector<const unsigned char *> inputs(size);
  for (size_t i = 0; i < record.shard; ++i) {
    const size_t position = op.flat ? rank * record.shard + i : i;
    for (uint32_t from = 0; from < size; ++from) {
      unsigned char *at = elements_of_ranks.data() + from * in;
      inputs[from] = at;
      if (op.flat && position >= op.numel) {
        std::memset(at, 0, in);
      } else {
        values::fill(op.data, op.dtype, op.op, {seed, from, op.flat ? kFlat : rank, position}, at);
      }
    }
    const bool accumulate = (op.flags & RSB_SUBMIT_ACCUMULATE) != 0;
    values::reduce(reduction, inputs, accumulate ? record.target + i * out : nullptr,
                   record.expected.data() + i * out);
  }
}

void Worker::spoil(Record &record) {
  if (!record.op.in_place) {
    std::fill(record.inputs.begin(), record.inputs.end(), static_cast<unsigned char>(0xEE));
  }
}

size_t Worker::submit(const Op &op, rsb_comm *comm) {
  Error error;
  const size_t place = records_.size();
  EXPECT_TRUE(answers(RSB_OK, try_submit(op, error, comm), error)) << "submit of op " << place;
  return place;
}

rsb_status Worker::try_submit(const Op &op, Error &error, rsb_comm *comm) {
  records_.emplace_back();
  Record &record = records_.back();
  record.worker = this;
  record.place = records_.size() - 1;
  record.op = op;
  record.comm = comm != nullptr ? comm : comm_;
  prepare(record);

  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  if (op.flat) {
    args.flat_input = record.pointers[0];
  } else {
    args.inputs = record.pointers.data();
  }
  args.output = record.target;
  args.numel = op.numel;
  args.dtype = op.dtype;
  args.output_dtype = op.output_dtype;
  args.op = op.op;
  args.flags = op.flags;
  args.scale = op.scale;
  args.tag = op.tag != 0 ? op.tag : record.place + 1;
  args.callback = op.callback ? &Worker::on_result : nullptr;
  args.user_data = &record;
  const rsb_status status = rsb_bucketer_submit(bucketer_, record.comm, &args, &record.ticket, error);
  record.returned = true;
  record.accepted = status == RSB_OK;
  // The inputs may be lent, the array of pointers to them is not.
  std::fill(record.pointers.begin(), record.pointers.end(), nullptr);
  if ((op.flags & RSB_SUBMIT_BORROW) == 0) {
    spoil(record);
  }
  if (status == RSB_OK) {
    EXPECT_NE(record.ticket, 0u);
  }
  return status;
}

void Worker::launch() {
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_launch(bucketer_, error), error));
}

void Worker::flush() {
  Error error;
  EXPECT_TRUE(answers(RSB_OK, rsb_bucketer_flush(bucketer_, error), error));
}

rsb_status Worker::wait(size_t place, uint64_t timeout_ns, Error &error) const {
  return rsb_bucketer_wait(bucketer_, records_[place].ticket, timeout_ns, error);
}

rsb_status Worker::wait(size_t place) const {
  Error error;
  const rsb_status status = wait(place, UINT64_MAX, error);
  EXPECT_TRUE(answers(status, status, error));
  return status;
}

void Worker::finish() {
  flush();
  for (const Record &record : records_) {
    if (record.accepted && record.op.callback) {
      EXPECT_EQ(record.calls, 1u) << "op " << record.place;
      EXPECT_EQ(record.status, RSB_OK) << "op " << record.place;
    }
  }
}

void Worker::on_result(void *user_data, const rsb_result *result) {
  auto &record = *static_cast<Record *>(user_data);
  Worker &worker = *record.worker;
  EXPECT_FALSE(worker.in_callback_) << "a callback inside another";
  EXPECT_EQ(std::this_thread::get_id(), worker.owner_);
  const Inside inside(worker.in_callback_);
  worker.called_.push_back(record.place);
  record.calls += 1;
  record.status = result->status;
  record.ticket_in_result = result->ticket;
  worker.check(record, *result);
  worker.spoil(record);
  if (record.op.then) {
    record.op.then(*result);
  }
}

void Worker::check(Record &record, const rsb_result &result) {
  const Op &op = record.op;
  const std::string name = "op " + std::to_string(record.place) + " " + values::dtype_name(op.dtype) + " " +
                           values::op_name(op.op) + " numel " + std::to_string(op.numel);
  EXPECT_EQ(record.calls, 1u) << name;
  EXPECT_GE(result.struct_size, sizeof(rsb_result)) << name;
  EXPECT_NE(result.ticket, 0u) << name;
  EXPECT_EQ(result.tag, op.tag != 0 ? op.tag : record.place + 1) << name;
  ASSERT_NE(result.error, nullptr) << name;
  EXPECT_EQ(result.error->status, result.status) << name;
  if (result.status != RSB_OK) {
    EXPECT_LT(result.status, 0) << name;
    EXPECT_EQ(result.data, nullptr) << name;
    EXPECT_NE(result.error->message[0], '\0') << name;
    return;
  }
  const rsb_dtype dtype = op.output_dtype != 0 ? op.output_dtype : op.dtype;
  EXPECT_EQ(result.dtype, dtype) << name;
  ASSERT_EQ(result.numel, record.shard) << name;
  size_t valid = record.shard;
  if (op.flat) {
    const size_t begin = rsb_comm_rank(record.comm) * record.shard;
    valid = begin < op.numel ? std::min(record.shard, op.numel - begin) : 0;
    EXPECT_EQ(result.offset, begin) << name;
  }
  EXPECT_EQ(result.valid_numel, valid) << name;
  if (record.target != nullptr) {
    EXPECT_EQ(result.data, static_cast<void *>(record.target)) << name;
    EXPECT_EQ(result.shard, nullptr) << name;
  }
  if (record.shard == 0) {
    return;
  }
  ASSERT_NE(result.data, nullptr) << name;
  const auto *data = static_cast<const unsigned char *>(result.data);
  record.result.assign(data, data + record.expected.size());
  if (record.result != record.expected) {
    const size_t width = values::size_of(dtype);
    const auto differ = std::mismatch(record.result.begin(), record.result.end(), record.expected.begin());
    const auto at = static_cast<size_t>(differ.first - record.result.begin()) / width;
    ADD_FAILURE() << name << ": element " << at << " is " << values::load(dtype, data + at * width)
                  << ", not " << values::load(dtype, record.expected.data() + at * width);
  }
}

}  // namespace harness
