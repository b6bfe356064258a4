// What the stand-in watches: breaches of rules, errors to order, what has not been given back.
#include <dlfcn.h>
#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace fake {
namespace {

struct Order {
  std::string name;
  uint64_t nth;
  int code;
  bool later;
  bool happened;
};

struct Watch {
  std::mutex lock;
  std::vector<std::string> breaches;
  std::vector<Order> orders;
  std::map<std::string, uint64_t> calls;
};

Watch &watch() {
  static Watch *w = new Watch;
  return *w;
}

uint64_t setting(const char *name, uint64_t otherwise) {
  const char *text = getenv(name);
  return text == nullptr || *text == 0 ? otherwise : strtoull(text, nullptr, 0);
}

} // namespace

Machine &machine() {
  static Machine *m = [] {
    auto *made = new Machine;
    made->devices = (int)setting("RSB_FAKE_CUDA_DEVICES", 2);
    made->driver_version = (int)setting("RSB_FAKE_CUDA_VERSION", 12080);
    made->memory = setting("RSB_FAKE_CUDA_MEMORY", 1u << 30);
    made->seed = setting("RSB_FAKE_CUDA_SEED", 1);
    made->delay_us = (unsigned)setting("RSB_FAKE_CUDA_DELAY_US", 100);
    made->may_wait = setting("RSB_FAKE_CUDA_MAY_WAIT", 0) != 0;
    made->live.resize((size_t)made->devices);
    for (int d = 0; d < made->devices; d++) {
      auto *context = new Context;
      context->device = d;
      context->primary = true;
      made->primaries.push_back(context);
      made->contexts.insert(context);
    }
    return made;
  }();
  return *m;
}

void keep(void *made) {
  static auto *all = new std::vector<void *>;
  static std::mutex lock;
  std::lock_guard<std::mutex> guard(lock);
  all->push_back(made);
}

void breach(const char *format, ...) {
  char text[600];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  Watch &w = watch();
  std::lock_guard<std::mutex> guard(w.lock);
  w.breaches.push_back(text);
}

void waits(const std::string &what) {
  if (!machine().may_wait) breach("%s: the host waits for the device", what.c_str());
}

int ordered_error(const char *name, const char *family, CUresult *later) {
  Watch &w = watch();
  std::lock_guard<std::mutex> guard(w.lock);
  uint64_t own = ++w.calls[name], all = ++w.calls[family];
  for (Order &order : w.orders) {
    if (order.happened) continue;
    bool hit = (order.name == name && order.nth == own) || (order.name == family && order.nth == all);
    if (!hit) continue;
    order.happened = true;
    if (!order.later) return order.code;
    *later = order.code;
  }
  return 0;
}

bool is_sticky(CUresult error) {
  return error == 214 || error == 220 || (error >= 700 && error <= 720 && error != 708);
}

} // namespace fake

using namespace fake;

extern "C" int fake_cuda_breaches(void) {
  std::lock_guard<std::mutex> guard(watch().lock);
  return (int)watch().breaches.size();
}

extern "C" const char *fake_cuda_breach(int i) {
  std::lock_guard<std::mutex> guard(watch().lock);
  auto &all = watch().breaches;
  return i >= 0 && (size_t)i < all.size() ? all[(size_t)i].c_str() : nullptr;
}

extern "C" void fake_cuda_forgive(void) {
  std::lock_guard<std::mutex> guard(watch().lock);
  watch().breaches.clear();
}

extern "C" int fake_cuda_fail(const char *spec) {
  std::vector<Order> orders;
  for (const char *at = spec == nullptr ? "" : spec; *at != 0;) {
    char name[64], kind[2];
    unsigned long long nth;
    int code, length = 0;
    if (sscanf(at, "%63[^:,]:%llu%1[=~]%d%n", name, &nth, kind, &code, &length) != 4 || length == 0) return -1;
    orders.push_back({name, nth, code, kind[0] == '~', false});
    at += length;
    if (*at == ',') at++;
    else if (*at != 0) return -1;
  }
  std::lock_guard<std::mutex> guard(watch().lock);
  watch().orders = orders;
  watch().calls.clear();
  return 0;
}

extern "C" uint64_t fake_cuda_calls(const char *name) {
  std::lock_guard<std::mutex> guard(watch().lock);
  auto found = watch().calls.find(name);
  return found == watch().calls.end() ? 0 : found->second;
}

extern "C" int fake_cuda_failed(void) {
  std::lock_guard<std::mutex> guard(watch().lock);
  for (const Order &order : watch().orders)
    if (!order.happened) return 0;
  return 1;
}

extern "C" void fake_cuda_heal(void) {
  Lock lock(machine().lock);
  for (Context *context : machine().contexts) context->sticky = CUDA_SUCCESS;
}

extern "C" void fake_cuda_seed(uint64_t seed) {
  Lock lock(machine().lock);
  machine().seed = seed;
}

extern "C" void fake_cuda_delay_us(unsigned longest) {
  Lock lock(machine().lock);
  machine().delay_us = longest;
}

extern "C" int fake_cuda_live_streams(void) {
  Lock lock(machine().lock);
  int live = 0;
  for (Stream *stream : machine().streams) live += !stream->destroyed && !stream->internal;
  return live;
}

extern "C" int fake_cuda_live_events(void) {
  Lock lock(machine().lock);
  int live = 0;
  for (Event *event : machine().events) live += !event->destroyed;
  return live;
}

extern "C" int fake_cuda_live_modules(void) {
  Lock lock(machine().lock);
  return machine().modules;
}

extern "C" int fake_cuda_retained(void) {
  Lock lock(machine().lock);
  int count = 0;
  for (Context *context : machine().primaries) count += context->retained;
  return count;
}

extern "C" size_t fake_cuda_live_bytes(void) {
  Lock lock(machine().lock);
  size_t bytes = 0;
  for (uint64_t live : machine().live) bytes += live;
  return bytes;
}

static bool leaks_allowed = false;

extern "C" void fake_cuda_allow_leaks(int on) {
  Lock lock(machine().lock);
  leaks_allowed = on != 0;
}

extern "C" int fake_cuda_check_leaks(void) {
  {
    Lock lock(machine().lock);
    drain_all(lock);
    if (leaks_allowed) return fake_cuda_breaches();
  }
  struct {
    const char *what;
    long count;
  } left[] = {{"streams", fake_cuda_live_streams()},
              {"events", fake_cuda_live_events()},
              {"modules", fake_cuda_live_modules()},
              {"retained contexts", fake_cuda_retained()},
              {"bytes of device memory", (long)fake_cuda_live_bytes()},
              {"graphs", machine().graphs + machine().execs},
              {"communicators", machine().comms}};
  for (auto &each : left)
    if (each.count != 0) breach("left behind: %ld %s", each.count, each.what);
  Lock lock(machine().lock);
  for (auto &each : machine().allocations)
    if (each.second.host) breach("left behind: pinned memory of %lu bytes", (unsigned long)each.second.bytes);
  for (Context *context : machine().contexts)
    if (!context->primary && !context->destroyed) breach("left behind: a context of device %d", context->device);
  lock.unlock();
  return fake_cuda_breaches();
}

namespace {

// Speaks at the end of the process. Work that hangs must not keep it from ending.
struct AtEnd {
  AtEnd() { fake_cuda_fail(getenv("RSB_FAKE_CUDA_FAIL")); }
  ~AtEnd() {
    bool used = machine().initialized;
    if (used && fake_cuda_breaches() == 0) fake_cuda_check_leaks();
    int count = fake_cuda_breaches();
    if (count == 0) return;
    fprintf(stderr, "libcuda stand-in: %d rules broken\n", count);
    for (int i = 0; i < count && i < 50; i++) fprintf(stderr, "  %s\n", fake_cuda_breach(i));
    fflush(nullptr);
    _exit(86);
  }
} at_end;

} // namespace
