// The insides of the driver's stand-in: what a machine with GPUs consists of, and the rules that it
// watches. Work runs on a thread for each stream, after random delays. Beside that, every access to
// device memory is checked when it is enqueued: two of the same bytes, one of them a write, that no
// event, stream or legacy order puts one after the other, are a breach, whatever the delays were.
#ifndef RSB_FAKES_MACHINE_H
#define RSB_FAKES_MACHINE_H

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "fake_cuda.h"

namespace fake {

// What must have happened before: the last piece of work of each stream.
using Clock = std::map<uint32_t, uint64_t>;
void join(Clock &into, const Clock &other);

struct Context {
  int device = 0;
  bool primary = false;
  bool destroyed = false;
  int retained = 0;
  CUresult sticky = CUDA_SUCCESS;
  struct Stream *legacy = nullptr;
};

// One access to memory, as it is written in parameters.
struct Access {
  uint64_t at;
  uint64_t bytes;
  bool write;
};

// A piece of work. `run` gets the context's health first.
struct Work {
  std::string name;
  std::vector<Access> accesses;
  std::function<CUresult()> run;
  // Waits for this work of that stream; then there is nothing to run.
  struct Stream *after = nullptr;
  uint64_t after_tick = 0;
  uint64_t tick = 0;
  // Runs even in a context with an error: it must hand back what it has.
  bool always = false;
};

struct Capture {
  uint64_t id = 0;
  int mode = 0;
  uint64_t thread = 0;
  struct Stream *origin = nullptr;
  bool invalid = false;
  std::set<struct Stream *> streams;
  std::map<struct Stream *, Clock> clocks;
  std::vector<Work> works;
};

struct Stream {
  uint32_t id = 0;
  Context *context = nullptr;
  unsigned flags = 0;
  int priority = 0;
  bool destroyed = false;
  bool internal = false; // legacy and per-thread streams
  bool held = false;
  uint64_t ticks = 0, done = 0;
  Clock clock;
  std::deque<Work> queue;
  std::vector<Access> touched; // fake_cuda_touch
  Capture *capture = nullptr;
};

struct Event {
  Context *context = nullptr;
  Stream *stream = nullptr; // of the last record
  uint64_t tick = 0;
  Clock clock;
  Capture *capture = nullptr;
  bool destroyed = false;
  bool timed = false;
  double passed = 0; // milliseconds, of the last record that was passed
};

struct Past {
  uint64_t at, bytes, tick;
  uint32_t stream;
  bool write;
  std::string name;
};

struct Allocation {
  uint64_t start = 0, bytes = 0, span = 0;
  int device = 0;
  bool host = false, ordered = false, freed = false;
  std::deque<Past> history;
};

struct Machine {
  std::mutex lock;
  std::condition_variable changed;
  int devices;
  int driver_version;
  uint64_t memory;
  uint64_t seed;
  unsigned delay_us;
  bool may_wait;
  bool initialized = false;
  std::vector<Context *> primaries;
  std::set<Context *> contexts;
  std::set<Stream *> streams;
  std::set<Event *> events;
  std::set<Capture *> captures;
  int modules = 0, graphs = 0, execs = 0, comms = 0;
  uint32_t next_stream = 1;
  uint64_t next_capture = 1;
  Clock host; // what the host has seen done
  std::map<uint64_t, Allocation> allocations;
  std::vector<uint64_t> live; // bytes by device
};
Machine &machine();
// What handles name lives to the end, so that stale ones are recognized. Any thread.
void keep(void *made);
template <class T> T *kept(T *made) { return keep(made), made; }
using Lock = std::unique_lock<std::mutex>;

// ---- Breaches and ordered errors (watch.cc) ----

void breach(const char *format, ...) __attribute__((format(printf, 1, 2)));
// The host waits for the device, in `what`: a breach unless it may.
void waits(const std::string &what);
// Counts a call of `name`; an ordered error for it, or 0; *later: it is to come when the work runs.
int ordered_error(const char *name, const char *family, CUresult *later);
bool is_sticky(CUresult error);

// ---- Threads ----

// What a thread knows: its contexts, whether it runs a host function, how it treats captures.
struct Thread {
  uint64_t id;
  struct Entry {
    Context *context;
    bool pushed;
  };
  std::vector<Entry> stack;
  std::map<Context *, Stream *> streams;
  bool in_host_function = false;
  int capture_mode = CU_CAPTURE_GLOBAL;
  CUresult later = CUDA_SUCCESS;
  Thread();
  ~Thread();
  Context *current() const { return stack.empty() ? nullptr : stack.back().context; }
};
Thread &self();

enum Need { NOTHING, INITIALIZED, CURRENT };
// Every driver function begins so: counting, ordered errors, and what it needs. Unsafe ones may not be called
// while a stream captures.
CUresult begin(const char *name, Need need, bool unsafe = false);

// ---- Memory (memory.cc); the machine is locked ----

uint64_t allocate(int device, uint64_t bytes, bool ordered);
Allocation *allocate_host(void *at, uint64_t bytes, int device);
Allocation *find(uint64_t at);
// Poisons what was freed.
void poison(const Allocation &allocation);
void *reach(uint64_t at);
bool is_device_address(uint64_t at);
// Checks what `work`, of the stream with this clock, accesses; false: not all of it may be.
bool check_accesses(const std::vector<Access> &accesses, const std::string &name, Context *context, const Clock &clock,
                    uint32_t stream, uint64_t tick);

// ---- Streams (stream.cc) ----

// The stream of a handle, in the current context where it says nothing itself; null with *error set.
Stream *stream_of(CUstream handle, CUresult *error);
Stream *create_stream(Context *context, unsigned flags, int priority, bool internal);
CUresult enqueue(Lock &lock, Stream *stream, Work work);
CUresult wait_event(Lock &lock, Stream *stream, Event *event);
CUresult record_event(Lock &lock, Event *event, Stream *stream);
// Until all that has been enqueued is done.
void drain(Lock &lock, Stream *stream);
void drain_all(Lock &lock);

// ---- Kernels (kernels.cc) ----

struct Kernel {
  const char *name;
  size_t bytes; // of its parameter
  unsigned (*blocks)(const void *params);
  std::vector<Access> (*accesses)(const void *params);
  void (*source)(const void *params, unsigned block, unsigned thread); // with addresses that the host reaches
  void (*translate)(void *params);
};
const Kernel *kernel_named(const std::string &name);
// Whether it is the PTX that the kernels here were made from.
bool is_known_text(const std::string &text);
CUresult run_block(const Kernel &kernel, const void *params, unsigned block);

} // namespace fake

#endif
