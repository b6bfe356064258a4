// Ranks on the stand-ins of the driver and NCCL, and a worker on device memory: its inputs are written
// and spoilt by the producer's stream, its results read by the result stream, never by waiting for them.
#ifndef RSBUCKET_CPP_TESTS_DEVICE_WORKER_H
#define RSBUCKET_CPP_TESTS_DEVICE_WORKER_H

#include <deque>
#include <functional>
#include <set>
#include <vector>

#include "gpu.h"
#include "worker.h"

namespace harness {

struct DeviceOptions {
  uint64_t flags = 0;           // of the comm
  bool result_stream = false;   // give one
  bool custom = false;          // a device engine over NCCL in place of NCCL itself
  uint64_t custom_flags = RSB_TRANSPORT_DEVICE | RSB_TRANSPORT_REDUCE_SCATTER | RSB_TRANSPORT_ALL_GATHER;
  size_t max_count = 0;
  uint64_t timeout_ns = kTimeoutNs;
  bool control = false;  // a local comm of the same ranks
};

/// One rank, on its own thread: a device with its context current, a communicator, streams.
struct DeviceRank {
  uint32_t rank;
  uint32_t size;
  gpu::Device &device;
  ncclComm_t nccl;
  CUstream producer;
  CUstream result;  // NULL: the library's
  rsb_comm *comm;
};

using DeviceFn = std::function<void(DeviceRank &)>;

/// `fn` on every rank. At the end no rule of the driver may have been broken, and nothing be left.
void run_device(uint32_t size, const DeviceOptions &options, const DeviceFn &fn);

/// Runs `fn` in the order of a stream.
void in_stream(CUstream stream, std::function<void()> fn);

class DeviceWorker {
 public:
  explicit DeviceWorker(DeviceRank &rank, int64_t bucket_bytes, const rsb_allocator *allocator = nullptr);
  ~DeviceWorker();
  operator rsb_bucketer *() const { return bucketer_; }

  /// From here on ops go to this comm, which lives as long as the worker.
  void use(DeviceRank &rank) { rank_ = &rank; }
  /// Submits an op whose input `stream` (NULL: the comm's) writes before and, unless it is borrowed, spoils
  /// afterwards. Its place, 0, 1, 2 ...
  size_t submit(const Op &op, CUstream stream = nullptr);
  rsb_status try_submit(const Op &op, Error &error, CUstream stream = nullptr);
  void launch();
  void flush();
  /// Flushes, waits for the device as a test may, and checks every op accepted so far.
  void finish();
  /// The same without the flush.
  void check_all();

  rsb_stats stats() { return bucketer_.stats(); }
  rsb_status free() { return bucketer_.free(); }
  size_t calls(size_t place) const { return records_[place].calls; }
  rsb_status status(size_t place) const { return records_[place].status; }
  const std::vector<size_t> &called() const { return called_; }
  const values::Bytes &expected(size_t place) const { return records_[place].expected; }
  CUdeviceptr output(size_t place) const { return records_[place].output; }
  const values::Bytes &result(size_t place) const { return records_[place].result; }

 private:
  struct Record {
    DeviceWorker *worker = nullptr;
    DeviceRank *rank = nullptr;
    size_t place = 0;
    Op op;
    bool accepted = false;
    size_t calls = 0;
    rsb_status status = RSB_PENDING;
    size_t shard = 0;
    std::vector<CUdeviceptr> inputs;
    std::vector<values::Bytes> data;
    CUdeviceptr output = 0;
    std::vector<const void *> pointers;
    values::Bytes expected;
    values::Bytes result;
  };
  static void on_result(void *user_data, const rsb_result *result);
  void note(Record &record, const rsb_result &result);
  void prepare(Record &record, CUstream stream);

  void wait();

  DeviceRank *rank_;
  std::set<CUstream> streams_;
  std::deque<Record> records_;
  std::vector<size_t> called_;
  Bucketer bucketer_;
};

}  // namespace harness

#endif  // RSBUCKET_CPP_TESTS_DEVICE_WORKER_H
