// Device memory: one range of addresses that faults when the host touches it, mapped a second time where
// the stand-in's work reaches it. Memory begins and ends poisoned, is given out again as late as possible,
// and remembers who used it, so that unordered uses are found.
#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace fake {
namespace {

const uint64_t SPACE = 16ull << 30;
const uint64_t PAGE = 4096;
const unsigned FRESH = 0xCB, FREED = 0xDB;

struct Space {
  uint64_t device; // faults
  char *host;      // the same bytes
  uint64_t top = 0;
};

Space &space() {
  static Space *made = [] {
    auto *s = new Space;
    int fd = memfd_create("fake-cuda", MFD_CLOEXEC);
    void *device = MAP_FAILED, *host = MAP_FAILED;
    if (fd >= 0 && ftruncate(fd, (off_t)SPACE) == 0) {
      device = mmap(nullptr, SPACE, PROT_NONE, MAP_SHARED | MAP_NORESERVE, fd, 0);
      host = mmap(nullptr, SPACE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    }
    if (device == MAP_FAILED || host == MAP_FAILED) abort();
    close(fd);
    s->device = (uint64_t)device;
    s->host = (char *)host;
    return s;
  }();
  return *made;
}

// Whether what `past` names comes before everything that `clock` knows.
bool before(const Past &past, const Clock &clock) {
  auto seen = clock.find(past.stream);
  return seen != clock.end() && seen->second >= past.tick;
}

bool overlap(const Past &past, const Access &access) {
  return past.at < access.at + access.bytes && access.at < past.at + past.bytes;
}

} // namespace

bool is_device_address(uint64_t at) { return at >= space().device && at < space().device + SPACE; }

void *reach(uint64_t at) { return is_device_address(at) ? space().host + (at - space().device) : (void *)at; }

void poison(const Allocation &allocation) {
  if (!allocation.host) memset(reach(allocation.start), (int)FREED, allocation.bytes);
}

uint64_t allocate(int device, uint64_t bytes, bool ordered) {
  Machine &m = machine();
  if (bytes > m.memory || m.live[(size_t)device] + bytes > m.memory) return 0;
  Space &s = space();
  // A page between two, which belongs to nobody, and never at a page's beginning, but at what drivers promise.
  uint64_t span = (bytes + 2 * PAGE - 1) / PAGE * PAGE + PAGE, at = 0;
  if (s.top + span <= SPACE) {
    at = s.device + s.top;
    s.top += span;
  } else {
    // All has been given out once: what was freed longest ago and fits.
    for (auto i = m.allocations.begin(); i != m.allocations.end(); ++i) {
      if (i->second.host || !i->second.freed || i->second.span < span) continue;
      at = i->second.start - 256;
      span = i->second.span;
      m.allocations.erase(i);
      break;
    }
    if (at == 0) return 0;
  }
  Allocation a;
  a.start = at + 256;
  a.bytes = bytes;
  a.span = span;
  a.device = device;
  a.ordered = ordered;
  m.allocations[a.start] = a;
  m.live[(size_t)device] += bytes;
  memset(reach(a.start), (int)FRESH, bytes);
  return a.start;
}

Allocation *allocate_host(void *at, uint64_t bytes, int device) {
  Allocation a;
  a.start = (uint64_t)at;
  a.bytes = bytes;
  a.device = device;
  a.host = true;
  return &(machine().allocations[a.start] = a);
}

Allocation *find(uint64_t at) {
  auto &all = machine().allocations;
  auto next = all.upper_bound(at);
  if (next == all.begin()) return nullptr;
  Allocation &a = std::prev(next)->second;
  return at < a.start + a.bytes ? &a : nullptr;
}

bool check_accesses(const std::vector<Access> &accesses, const std::string &name, Context *context, const Clock &clock,
                    uint32_t stream, uint64_t tick) {
  bool allowed = true;
  for (const Access &access : accesses) {
    if (access.bytes == 0) continue;
    const char *how = access.write ? "writes" : "reads";
    Allocation *a = find(access.at);
    if (a == nullptr || access.at + access.bytes > a->start + a->bytes) {
      breach("%s %s %" PRIu64 " bytes at %#" PRIx64 ", which is %s", name.c_str(), how, access.bytes, access.at,
             a != nullptr                     ? "past the end of its memory"
             : is_device_address(access.at) ? "no memory that is given out"
                                              : "no device memory");
      allowed = false;
      continue;
    }
    if (a->freed) {
      breach("%s %s %" PRIu64 " bytes at %#" PRIx64 " after they were freed", name.c_str(), how, access.bytes,
             access.at);
      allowed = false;
      continue;
    }
    if (a->device != context->device && !a->host)
      breach("%s on device %d %s memory of device %d", name.c_str(), context->device, how, a->device);
    auto &history = a->history;
    for (auto past = history.begin(); past != history.end();) {
      bool ordered = before(*past, clock);
      if (!ordered && (past->write || access.write) && overlap(*past, access)) {
        breach("unordered: %s (stream %u) %s what %s (stream %u) %s, %" PRIu64 " bytes at %#" PRIx64 " of [%#" PRIx64
               ", +%" PRIu64 ")",
               name.c_str(), stream, how, past->name.c_str(), past->stream, past->write ? "writes" : "reads",
               access.bytes, access.at, a->start, a->bytes);
      }
      // Whoever must come after what this covers must come after this, too, and that is enough.
      bool covered = ordered && (access.write || !past->write) && past->at >= access.at &&
                     past->at + past->bytes <= access.at + access.bytes;
      past = covered ? history.erase(past) : std::next(past);
    }
    history.push_back({access.at, access.bytes, tick, stream, access.write, name});
    if (history.size() > 4096) history.pop_front();
  }
  return allowed;
}

} // namespace fake

extern "C" void *fake_cuda_reach(CUdeviceptr ptr) {
  fake::Lock lock(fake::machine().lock);
  return fake::is_device_address(ptr) ? fake::reach(ptr) : nullptr;
}
