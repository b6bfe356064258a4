// One rank's user of a bucketer: submits ops with known data, spoils the inputs afterwards, and checks
// in every callback what must hold in all tests (fields, values, thread, exactly once).
#ifndef RSBUCKET_CPP_TESTS_WORKER_H
#define RSBUCKET_CPP_TESTS_WORKER_H

#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "harness.h"
#include "values.h"

namespace harness {

struct Op {
  size_t numel = 0;
  rsb_dtype dtype = RSB_DTYPE_F32;
  rsb_op op = RSB_OP_SUM;
  rsb_dtype output_dtype = 0;
  double scale = 0.0;
  uint32_t flags = 0;
  bool flat = false;
  bool output = false;    // give memory for the result
  bool in_place = false;  // the result goes over this rank's own piece
  bool callback = true;
  uint64_t tag = 0;   // 0: the next number
  size_t offset = 0;  // bytes by which inputs are off their natural alignment
  values::Data data = values::Data::kExact;
  std::function<void(const rsb_result &)> then = {};  // at the end of the callback

  static Op f32(size_t numel) { return of(numel, RSB_DTYPE_F32); }
  static Op of(size_t numel, rsb_dtype dtype, rsb_op op = RSB_OP_SUM) {
    Op o;
    o.numel = numel;
    o.dtype = dtype;
    o.op = op;
    return o;
  }
};

class Worker {
 public:
  /// `seed` tells the data of workers on one comm apart. Ranks give the same.
  Worker(rsb_comm *comm, int64_t bucket_bytes, const rsb_allocator *allocator = nullptr, uint64_t seed = 1);
  ~Worker();
  Worker(const Worker &) = delete;
  Worker &operator=(const Worker &) = delete;

  operator rsb_bucketer *() const { return bucketer_; }
  Bucketer &bucketer() { return bucketer_; }

  /// Submits to `comm` (0: the worker's own) and gives the place of the op in this worker: 0, 1, 2 ...
  size_t submit(const Op &op, rsb_comm *comm = nullptr);
  /// The same where a refusal may come; an op that was refused has a place, too.
  rsb_status try_submit(const Op &op, Error &error, rsb_comm *comm = nullptr);
  void launch();
  void flush();
  rsb_status flush(Error &error) { return rsb_bucketer_flush(bucketer_, error); }
  rsb_status wait(size_t place, uint64_t timeout_ns, Error &error) const;
  rsb_status wait(size_t place) const;  // as long as the comm allows
  /// Flushes, and checks that every op accepted so far has been called once with RSB_OK.
  void finish();
  rsb_status free() { return bucketer_.free(); }

  /// Places in the order of their callbacks.
  const std::vector<size_t> &called() const { return called_; }
  size_t submitted() const { return records_.size(); }
  size_t calls(size_t place) const { return records_[place].calls; }
  rsb_status status(size_t place) const { return records_[place].status; }
  rsb_ticket ticket(size_t place) const { return records_[place].ticket; }
  const values::Bytes &result(size_t place) const { return records_[place].result; }
  const values::Bytes &expected(size_t place) const { return records_[place].expected; }

 private:
  struct Record {
    Worker *worker = nullptr;
    size_t place = 0;
    Op op;
    rsb_comm *comm = nullptr;
    rsb_ticket ticket = 0;
    rsb_ticket ticket_in_result = 0;
    bool accepted = false;
    bool returned = false;  // false: an exception left the submit, and whether it was accepted is open
    size_t calls = 0;
    rsb_status status = RSB_PENDING;
    size_t shard = 0;  // elements of the result
    values::Bytes inputs;
    values::Bytes output;
    values::Bytes expected;
    values::Bytes result;
    std::vector<const void *> pointers;
    unsigned char *target = nullptr;
  };

  static void on_result(void *user_data, const rsb_result *result);
  void check(Record &record, const rsb_result &result);
  void prepare(Record &record);
  void spoil(Record &record);

  rsb_comm *comm_;
  uint64_t seed_;
  std::thread::id owner_;
  bool in_callback_ = false;
  std::deque<Record> records_;
  std::vector<size_t> called_;
  Bucketer bucketer_;
};

}  // namespace harness

#endif  // RSBUCKET_CPP_TESTS_WORKER_H
