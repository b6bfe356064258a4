// Streams, events and captures: who waits for whom. Each stream has a thread, which dawdles.
#include <time.h>
#include <unistd.h>

#include <chrono>
#include <thread>

#include "machine.h"

namespace fake {
namespace {

// Well-mixed bits of a stream and a tick: the delays of a seed are always the same.
uint64_t mix(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t h = a * 0x9e3779b97f4a7c15ull + b * 0xbf58476d1ce4e5b9ull + c;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9ull;
  h = (h ^ h >> 27) * 0x94d049bb133111ebull;
  return h ^ h >> 31;
}

void work(Stream *s) {
  Machine &m = machine();
  Lock lock(m.lock);
  for (;;) {
    m.changed.wait(lock, [&] { return (!s->queue.empty() && !s->held) || (s->queue.empty() && s->destroyed); });
    if (s->queue.empty()) break;
    Work &w = s->queue.front();
    uint64_t bits = mix(m.seed, s->id, w.tick);
    // Half of all work starts at once, some of it late.
    unsigned delay = m.delay_us == 0 || bits % 2 == 0 ? 0 : (unsigned)(bits / 2 % (m.delay_us + 1));
    if (delay > 0) {
      lock.unlock();
      usleep(delay);
      lock.lock();
    }
    if (w.after != nullptr) {
      m.changed.wait(lock, [&] { return w.after->done >= w.after_tick; });
    } else if (w.run && (s->context->sticky == CUDA_SUCCESS || w.always)) {
      lock.unlock();
      CUresult result = w.run();
      lock.lock();
      if (result != CUDA_SUCCESS && s->context->sticky == CUDA_SUCCESS) s->context->sticky = result;
    }
    s->done = w.tick;
    s->queue.pop_front();
    m.changed.notify_all();
  }
}

bool blocking(const Stream *s) { return (s->flags & CU_STREAM_NON_BLOCKING) == 0; }

void push(Stream *s, Work w) {
  w.tick = ++s->ticks;
  s->clock[s->id] = w.tick;
  s->queue.push_back(std::move(w));
  machine().changed.notify_all();
}

void push_wait(Stream *s, Stream *after, uint64_t tick, const Clock &clock) {
  join(s->clock, clock);
  if (after == s || tick == 0) return;
  Work w;
  w.name = "wait";
  w.after = after;
  w.after_tick = tick;
  push(s, std::move(w));
}

// The legacy default stream waits for all blocking streams of its context, and they for it.
CUresult legacy_order(Stream *s) {
  Context *context = s->context;
  if (s == context->legacy) {
    for (Stream *other : machine().streams) {
      if (other == s || other->context != context || !blocking(other)) continue;
      if (other->capture != nullptr) {
        other->capture->invalid = true;
        return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
      }
      if (other->ticks > 0) push_wait(s, other, other->ticks, other->clock);
    }
  } else if (blocking(s) && context->legacy != nullptr && context->legacy->ticks > 0) {
    push_wait(s, context->legacy, context->legacy->ticks, context->legacy->clock);
  }
  return CUDA_SUCCESS;
}

} // namespace

void join(Clock &into, const Clock &other) {
  for (auto &each : other) {
    uint64_t &tick = into[each.first];
    if (tick < each.second) tick = each.second;
  }
}

Stream *create_stream(Context *context, unsigned flags, int priority, bool internal) {
  Machine &m = machine();
  auto *s = new Stream;
  s->id = m.next_stream++;
  s->context = context;
  s->flags = flags;
  s->priority = priority;
  s->internal = internal;
  m.streams.insert(s);
  std::thread(work, s).detach();
  return s;
}

Stream *stream_of(CUstream handle, CUresult *error) {
  Machine &m = machine();
  Thread &t = self();
  Context *current = t.current();
  *error = CUDA_SUCCESS;
  if (handle == nullptr || handle == CU_STREAM_LEGACY) {
    if (current->legacy == nullptr) current->legacy = create_stream(current, 0, 0, true);
    return current->legacy;
  }
  if (handle == CU_STREAM_PER_THREAD) {
    Stream *&own = t.streams[current];
    if (own == nullptr) own = create_stream(current, 0, 0, true);
    return own;
  }
  auto *s = (Stream *)handle;
  if (m.streams.count(s) == 0 || s->destroyed) {
    breach("a stream that does not live: %p", (void *)handle);
    *error = CUDA_ERROR_INVALID_HANDLE;
    return nullptr;
  }
  return s;
}

CUresult enqueue(Lock &lock, Stream *s, Work w) {
  (void)lock;
  CUresult later = self().later;
  self().later = CUDA_SUCCESS;
  if (s->context->destroyed) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (s->context->sticky != CUDA_SUCCESS) return s->context->sticky;
  if (s->capture != nullptr) {
    if (s->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    s->capture->clocks[s][s->id]++;
    s->capture->works.push_back(std::move(w));
    return CUDA_SUCCESS;
  }
  CUresult implicit = legacy_order(s);
  if (implicit != CUDA_SUCCESS) return implicit;
  join(s->clock, machine().host);
  s->clock[s->id] = s->ticks + 1;
  if (!check_accesses(w.accesses, w.name, s->context, s->clock, s->id, s->ticks + 1))
    later = CUDA_ERROR_ILLEGAL_ADDRESS;
  if (later != CUDA_SUCCESS) w.run = [later] { return later; };
  push(s, std::move(w));
  return CUDA_SUCCESS;
}

CUresult record_event(Lock &lock, Event *event, Stream *s) {
  if (event->context != s->context) return CUDA_ERROR_INVALID_HANDLE;
  if (s->capture != nullptr) {
    if (s->capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    event->capture = s->capture;
    event->clock = s->capture->clocks[s];
    return CUDA_SUCCESS;
  }
  Work w;
  w.name = "event";
  if (event->timed) {
    w.run = [event]() -> CUresult {
      auto now = std::chrono::steady_clock::now().time_since_epoch();
      event->passed = std::chrono::duration<double, std::milli>(now).count();
      return CUDA_SUCCESS;
    };
  }
  CUresult result = enqueue(lock, s, std::move(w));
  if (result != CUDA_SUCCESS) return result;
  event->capture = nullptr;
  event->stream = s;
  event->tick = s->ticks;
  event->clock = s->clock;
  return CUDA_SUCCESS;
}

CUresult wait_event(Lock &lock, Stream *s, Event *event) {
  if (event->capture != nullptr) {
    Capture *capture = event->capture;
    if (machine().captures.count(capture) == 0) return CUDA_ERROR_CAPTURED_EVENT;
    if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
    if (s->capture != nullptr && s->capture != capture) {
      capture->invalid = s->capture->invalid = true;
      return CUDA_ERROR_STREAM_CAPTURE_MERGE;
    }
    if (s->internal && s == s->context->legacy) {
      capture->invalid = true;
      return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
    }
    s->capture = capture;
    capture->streams.insert(s);
    join(capture->clocks[s], event->clock);
    return CUDA_SUCCESS;
  }
  if (event->stream == nullptr) return CUDA_SUCCESS;
  if (s->capture != nullptr) {
    s->capture->invalid = true;
    return CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
  }
  if (s->context->sticky != CUDA_SUCCESS) return s->context->sticky;
  CUresult implicit = legacy_order(s);
  if (implicit != CUDA_SUCCESS) return implicit;
  (void)lock;
  push_wait(s, event->stream, event->tick, event->clock);
  return CUDA_SUCCESS;
}

void drain(Lock &lock, Stream *s) {
  uint64_t tick = s->ticks;
  Clock clock = s->clock;
  machine().changed.wait(lock, [&] { return s->done >= tick; });
  join(machine().host, clock);
}

void drain_all(Lock &lock) {
  std::vector<Stream *> all(machine().streams.begin(), machine().streams.end());
  for (Stream *s : all) {
    s->held = false;
    machine().changed.notify_all();
    drain(lock, s);
  }
}

} // namespace fake

using namespace fake;

// Tests name default streams in the context that is current.
static Stream *named(CUstream handle) {
  if (self().current() == nullptr) return nullptr;
  CUresult error;
  return stream_of(handle, &error);
}

extern "C" void fake_cuda_hold(CUstream handle) {
  Lock lock(machine().lock);
  if (Stream *s = named(handle)) s->held = true;
}

extern "C" void fake_cuda_let_go(CUstream handle) {
  Lock lock(machine().lock);
  if (Stream *s = named(handle)) s->held = false;
  machine().changed.notify_all();
}

extern "C" void fake_cuda_wait(CUstream handle) {
  Lock lock(machine().lock);
  if (Stream *s = named(handle)) drain(lock, s);
}

extern "C" void fake_cuda_wait_all(void) {
  Lock lock(machine().lock);
  drain_all(lock);
}

extern "C" int fake_cuda_idle(CUstream handle) {
  Lock lock(machine().lock);
  Stream *s = named(handle);
  return s != nullptr && s->done == s->ticks;
}

extern "C" void fake_cuda_touch(CUstream handle, CUdeviceptr ptr, size_t bytes, int write) {
  Lock lock(machine().lock);
  if (Stream *s = named(handle)) s->touched.push_back({ptr, bytes, write != 0});
}
