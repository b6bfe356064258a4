// The stand-in's driver functions about streams, events, copies, kernels and captures.
#include <cstring>

#include "machine.h"

using namespace fake;

#define BEGIN(...)                                               \
  do {                                                           \
    CUresult begun = begin(__func__, __VA_ARGS__);               \
    if (begun != CUDA_SUCCESS) return begun;                     \
  } while (0)
#define GIVEN(condition) \
  if (!(condition)) return CUDA_ERROR_INVALID_VALUE
// `s` becomes the stream of `handle`.
#define STREAM(handle)                    \
  Lock lock(machine().lock);              \
  CUresult error;                         \
  Stream *s = stream_of(handle, &error);  \
  if (s == nullptr) return error

namespace {

Event *event_of(CUevent handle) {
  auto *event = (Event *)handle;
  if (machine().events.count(event) != 0 && !event->destroyed) return event;
  breach("an event that does not live: %p", (void *)handle);
  return nullptr;
}

// Whether the host may use this stream while it captures: never, and the capture is spoilt.
bool spoils(Stream *s) {
  if (s->capture == nullptr) return false;
  s->capture->invalid = true;
  return true;
}

} // namespace

extern "C" {

CUresult cuStreamCreateWithPriority(CUstream *stream, unsigned flags, int priority) {
  BEGIN(CURRENT);
  GIVEN(stream && flags <= CU_STREAM_NON_BLOCKING);
  Lock lock(machine().lock);
  *stream = (CUstream)create_stream(self().current(), flags, priority, false);
  return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  BEGIN(CURRENT);
  GIVEN(stream && flags <= CU_STREAM_NON_BLOCKING);
  Lock lock(machine().lock);
  *stream = (CUstream)create_stream(self().current(), flags, 0, false);
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy_v2(CUstream handle) {
  BEGIN(CURRENT);
  STREAM(handle);
  GIVEN(!s->internal);
  // What is enqueued is still done.
  s->destroyed = true;
  machine().changed.notify_all();
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCtx(CUstream handle, CUcontext *context) {
  BEGIN(INITIALIZED);
  GIVEN(context);
  bool default_stream = handle == nullptr || handle == CU_STREAM_LEGACY || handle == CU_STREAM_PER_THREAD;
  if (default_stream && self().current() == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  STREAM(handle);
  *context = (CUcontext)s->context;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetFlags(CUstream handle, unsigned *flags) {
  BEGIN(CURRENT);
  GIVEN(flags);
  STREAM(handle);
  *flags = s->flags;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetPriority(CUstream handle, int *priority) {
  BEGIN(CURRENT);
  GIVEN(priority);
  STREAM(handle);
  *priority = s->priority;
  return CUDA_SUCCESS;
}

CUresult cuStreamQuery(CUstream handle) {
  BEGIN(CURRENT, true);
  STREAM(handle);
  if (spoils(s)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  if (s->context->sticky != CUDA_SUCCESS) return s->context->sticky;
  if (s->done != s->ticks) return CUDA_ERROR_NOT_READY;
  join(machine().host, s->clock);
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream handle) {
  BEGIN(CURRENT, true);
  breach("cuStreamSynchronize: the host waits for the device");
  STREAM(handle);
  if (spoils(s)) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  drain(lock, s);
  return s->context->sticky;
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned flags) {
  BEGIN(CURRENT);
  GIVEN(flags <= 1);
  STREAM(handle);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return wait_event(lock, s, e);
}

CUresult cuLaunchHostFunc(CUstream handle, CUhostFn function, void *arg) {
  BEGIN(CURRENT);
  GIVEN(function);
  STREAM(handle);
  Work work;
  work.name = "host function";
  work.accesses.swap(s->touched);
  work.run = [=]() -> CUresult {
    self().in_host_function = true;
    function(arg);
    self().in_host_function = false;
    return CUDA_SUCCESS;
  };
  return enqueue(lock, s, std::move(work));
}

// ---- Events -----------------------------------------------------------------------------------------------

CUresult cuEventCreate(CUevent *event, unsigned) {
  BEGIN(CURRENT);
  GIVEN(event);
  Lock lock(machine().lock);
  auto *made = new Event;
  made->context = self().current();
  machine().events.insert(made);
  *event = (CUevent)made;
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy_v2(CUevent event) {
  BEGIN(CURRENT);
  Lock lock(machine().lock);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  e->destroyed = true;
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream handle) {
  BEGIN(CURRENT);
  STREAM(handle);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return record_event(lock, e, s);
}

CUresult cuEventRecordWithFlags(CUevent event, CUstream handle, unsigned) { return cuEventRecord(event, handle); }

CUresult cuEventQuery(CUevent event) {
  BEGIN(CURRENT, true);
  Lock lock(machine().lock);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (e->capture != nullptr) {
    if (machine().captures.count(e->capture) != 0) e->capture->invalid = true;
    return CUDA_ERROR_CAPTURED_EVENT;
  }
  if (e->context->sticky != CUDA_SUCCESS) return e->context->sticky;
  if (e->stream == nullptr) return CUDA_SUCCESS;
  if (e->stream->done < e->tick) return CUDA_ERROR_NOT_READY;
  join(machine().host, e->clock);
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  BEGIN(CURRENT, true);
  breach("cuEventSynchronize: the host waits for the device");
  Lock lock(machine().lock);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (e->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
  if (e->stream == nullptr) return CUDA_SUCCESS;
  machine().changed.wait(lock, [&] { return e->stream->done >= e->tick; });
  join(machine().host, e->clock);
  return e->context->sticky;
}

// ---- Copies -----------------------------------------------------------------------------------------------

// Copies `rows` pieces. Of host memory that is not pinned, the driver keeps nothing: it copies what is there now,
// and waits for what it brings back.
static CUresult copy(CUstream handle, const char *name, uint64_t dst, uint64_t src, size_t bytes, size_t rows,
                     size_t dst_pitch, size_t src_pitch) {
  STREAM(handle);
  if (bytes == 0 || rows == 0) return CUDA_SUCCESS;
  Work work;
  work.name = name;
  auto pageable = [](uint64_t at) { return !is_device_address(at) && find(at) == nullptr; };
  std::shared_ptr<std::vector<char>> staged;
  if (pageable(src)) {
    staged = std::make_shared<std::vector<char>>(bytes * rows);
    for (size_t r = 0; r < rows; r++) memcpy(staged->data() + r * bytes, (const char *)src + r * src_pitch, bytes);
  }
  bool waits = pageable(dst);
  if (waits) breach("%s to memory that is not pinned: the host waits for the device", name);
  for (size_t r = 0; r < rows; r++) {
    if (!staged) work.accesses.push_back({src + r * src_pitch, bytes, false});
    if (!waits) work.accesses.push_back({dst + r * dst_pitch, bytes, true});
  }
  work.run = [=]() -> CUresult {
    for (size_t r = 0; r < rows; r++) {
      const void *from = staged ? staged->data() + r * bytes : reach(src + r * src_pitch);
      memmove(reach(dst + r * dst_pitch), from, bytes);
    }
    return CUDA_SUCCESS;
  };
  CUresult result = enqueue(lock, s, std::move(work));
  if (result == CUDA_SUCCESS && waits) drain(lock, s);
  return result;
}

CUresult cuMemcpyAsync(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  BEGIN(CURRENT);
  return copy(stream, "cuMemcpyAsync", dst, src, bytes, 1, 0, 0);
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  BEGIN(CURRENT);
  return copy(stream, "cuMemcpyDtoDAsync", dst, src, bytes, 1, 0, 0);
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr dst, const void *src, size_t bytes, CUstream stream) {
  BEGIN(CURRENT);
  return copy(stream, "cuMemcpyHtoDAsync", dst, (uint64_t)src, bytes, 1, 0, 0);
}

CUresult cuMemcpyDtoHAsync_v2(void *dst, CUdeviceptr src, size_t bytes, CUstream stream) {
  BEGIN(CURRENT);
  return copy(stream, "cuMemcpyDtoHAsync", (uint64_t)dst, src, bytes, 1, 0, 0);
}

static CUresult copy_now(const char *name, uint64_t dst, uint64_t src, size_t bytes) {
  breach("%s: the host waits for the device", name);
  Lock lock(machine().lock);
  drain_all(lock);
  memmove(reach(dst), reach(src), bytes);
  return self().current()->sticky;
}

CUresult cuMemcpyHtoD_v2(CUdeviceptr dst, const void *src, size_t bytes) {
  BEGIN(CURRENT, true);
  return copy_now("cuMemcpyHtoD", dst, (uint64_t)src, bytes);
}

CUresult cuMemcpyDtoH_v2(void *dst, CUdeviceptr src, size_t bytes) {
  BEGIN(CURRENT, true);
  return copy_now("cuMemcpyDtoH", (uint64_t)dst, src, bytes);
}

CUresult cuMemcpy2DAsync_v2(const CUDA_MEMCPY2D_v2 *c, CUstream stream) {
  BEGIN(CURRENT);
  GIVEN(c && c->srcMemoryType == CU_MEMORYTYPE_DEVICE && c->dstMemoryType == CU_MEMORYTYPE_DEVICE);
  GIVEN(c->srcPitch >= c->srcXInBytes + c->WidthInBytes && c->dstPitch >= c->dstXInBytes + c->WidthInBytes);
  return copy(stream, "cuMemcpy2DAsync", c->dstDevice + c->dstY * c->dstPitch + c->dstXInBytes,
              c->srcDevice + c->srcY * c->srcPitch + c->srcXInBytes, c->WidthInBytes, c->Height, c->dstPitch, c->srcPitch);
}

CUresult cuMemsetD8Async(CUdeviceptr dst, unsigned char value, size_t bytes, CUstream stream) {
  BEGIN(CURRENT);
  STREAM(stream);
  Work work;
  work.name = "cuMemsetD8Async";
  work.accesses = {{dst, bytes, true}};
  work.run = [=]() -> CUresult { return memset(reach(dst), value, bytes), CUDA_SUCCESS; };
  return enqueue(lock, s, std::move(work));
}

// ---- Kernels ----------------------------------------------------------------------------------------------

struct Module {
  Context *context;
  std::string text;
  bool unloaded = false;
};

struct Function {
  Module *module;
  const Kernel *kernel;
};

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  BEGIN(CURRENT, true);
  GIVEN(module && image);
  auto *made = new Module{self().current(), (const char *)image};
  if (made->text.find("\n.version 6.4\n") == std::string::npos || made->text.find("\n.target sm_70\n") == std::string::npos) {
    delete made;
    return CUDA_ERROR_INVALID_PTX;
  }
  Lock lock(machine().lock);
  machine().modules++;
  *module = (CUmodule)made;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned, int *, void **) {
  return cuModuleLoadData(module, image);
}

CUresult cuModuleUnload(CUmodule module) {
  BEGIN(CURRENT, true);
  GIVEN(module);
  auto *m = (Module *)module;
  Lock lock(machine().lock);
  if (m->unloaded || m->context != self().current()) {
    breach("cuModuleUnload %s", m->unloaded ? "twice" : "in another context");
    return CUDA_ERROR_INVALID_HANDLE;
  }
  m->unloaded = true;
  machine().modules--;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  BEGIN(CURRENT);
  GIVEN(function && module && name);
  auto *m = (Module *)module;
  // It must be in the text, and in the same source made for the host.
  const Kernel *kernel = kernel_named(name);
  if (kernel == nullptr || m->text.find(std::string(".entry ") + name + "(") == std::string::npos) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction) new Function{m, kernel};
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared_bytes, CUstream handle, void **params,
                        void **extra) {
  BEGIN(CURRENT);
  GIVEN(function && params && params[0] && extra == nullptr && grid_x > 0 && grid_x < 1u << 31);
  auto *f = (Function *)function;
  const Kernel *kernel = f->kernel;
  STREAM(handle);
  if (f->module->unloaded) {
    breach("%s is launched after its module was unloaded", kernel->name);
    return CUDA_ERROR_INVALID_HANDLE;
  }
  if (f->module->context != s->context) return CUDA_ERROR_INVALID_HANDLE;
  if (grid_y != 1 || grid_z != 1 || block_x != 256 || block_y != 1 || block_z != 1 || shared_bytes != 0 ||
      kernel->blocks(params[0]) != grid_x) {
    breach("%s is launched with a grid of %ux%ux%u blocks of %ux%ux%u; expected %ux1x1 of 256x1x1", kernel->name, grid_x,
           grid_y, grid_z, block_x, block_y, block_z, kernel->blocks(params[0]));
    return CUDA_ERROR_INVALID_VALUE;
  }
  // Parameters are copied now.
  auto copied = std::make_shared<std::vector<uint64_t>>((kernel->bytes + 7) / 8);
  memcpy(copied->data(), params[0], kernel->bytes);
  Work work;
  work.name = kernel->name;
  work.accesses = kernel->accesses(params[0]);
  work.run = [=]() -> CUresult {
    kernel->translate(copied->data());
    // Blocks come in any order.
    for (unsigned i = 0; i < grid_x; i++) kernel->run(copied->data(), grid_x % 2 == 0 ? grid_x - 1 - i : i);
    return CUDA_SUCCESS;
  };
  return enqueue(lock, s, std::move(work));
}

// ---- Captures ---------------------------------------------------------------------------------------------

struct Graph {
  std::shared_ptr<std::vector<Work>> works;
};

CUresult cuStreamBeginCapture_v2(CUstream handle, int mode) {
  BEGIN(CURRENT);
  GIVEN(mode >= 0 && mode <= CU_CAPTURE_RELAXED);
  STREAM(handle);
  if (s->capture != nullptr || s == s->context->legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  auto *capture = new Capture;
  capture->id = machine().next_capture++;
  capture->mode = mode;
  capture->thread = self().id;
  capture->origin = s;
  capture->streams.insert(s);
  machine().captures.insert(capture);
  s->capture = capture;
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *graph) {
  BEGIN(CURRENT);
  GIVEN(graph);
  *graph = nullptr;
  STREAM(handle);
  Capture *capture = s->capture;
  if (capture == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (capture->origin != s) return CUDA_ERROR_STREAM_CAPTURE_UNMATCHED;
  if (capture->mode != CU_CAPTURE_RELAXED && capture->thread != self().id) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
  bool joined = true;
  for (Stream *each : capture->streams) {
    Clock &origin = capture->clocks[s];
    auto own = capture->clocks[each].find(each->id);
    if (own != capture->clocks[each].end() && origin[each->id] < own->second) joined = false;
    each->capture = nullptr;
  }
  // Its events stay captured; so it is never deleted.
  machine().captures.erase(capture);
  if (capture->invalid) return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  if (!joined) return CUDA_ERROR_STREAM_CAPTURE_UNJOINED;
  *graph = (CUgraph) new Graph{std::make_shared<std::vector<Work>>(std::move(capture->works))};
  machine().graphs++;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream handle, int *status) {
  BEGIN(CURRENT);
  GIVEN(status);
  STREAM(handle);
  // Of the legacy stream nothing can be said while a blocking stream of the context captures.
  if (s == s->context->legacy)
    for (Capture *capture : machine().captures)
      for (Stream *each : capture->streams)
        if (each->context == s->context && (each->flags & CU_STREAM_NON_BLOCKING) == 0) return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
  *status = s->capture == nullptr ? CU_CAPTURE_STATUS_NONE
            : s->capture->invalid ? CU_CAPTURE_STATUS_INVALIDATED
                                  : CU_CAPTURE_STATUS_ACTIVE;
  return CUDA_SUCCESS;
}

CUresult cuStreamGetCaptureInfo_v2(CUstream handle, int *status, uint64_t *id, CUgraph *graph, const void **deps,
                                   size_t *count) {
  CUresult result = cuStreamIsCapturing(handle, status);
  if (result != CUDA_SUCCESS) return result;
  STREAM(handle);
  if (id != nullptr) *id = s->capture == nullptr ? 0 : s->capture->id;
  if (graph != nullptr) *graph = nullptr;
  if (deps != nullptr) *deps = nullptr;
  if (count != nullptr) *count = 0;
  return CUDA_SUCCESS;
}

CUresult cuThreadExchangeStreamCaptureMode(int *mode) {
  BEGIN(INITIALIZED);
  GIVEN(mode && *mode >= 0 && *mode <= CU_CAPTURE_RELAXED);
  std::swap(*mode, self().capture_mode);
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long) {
  BEGIN(CURRENT);
  GIVEN(exec && graph);
  Lock lock(machine().lock);
  *exec = (CUgraphExec) new Graph(*(Graph *)graph);
  machine().execs++;
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec exec, CUstream handle) {
  BEGIN(CURRENT);
  GIVEN(exec);
  STREAM(handle);
  auto works = ((Graph *)exec)->works;
  Work work;
  work.name = "graph";
  for (Work &each : *works) work.accesses.insert(work.accesses.end(), each.accesses.begin(), each.accesses.end());
  // In the order of the capture, which is one of those that its edges allow.
  work.run = [works]() -> CUresult {
    for (Work &each : *works) {
      CUresult result = each.run ? each.run() : CUDA_SUCCESS;
      if (result != CUDA_SUCCESS) return result;
    }
    return CUDA_SUCCESS;
  };
  return enqueue(lock, s, std::move(work));
}

CUresult cuGraphExecDestroy(CUgraphExec exec) {
  BEGIN(INITIALIZED);
  GIVEN(exec);
  Lock lock(machine().lock);
  machine().execs--;
  delete (Graph *)exec;
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  BEGIN(INITIALIZED);
  GIVEN(graph);
  Lock lock(machine().lock);
  machine().graphs--;
  delete (Graph *)graph;
  return CUDA_SUCCESS;
}

} // extern "C"
