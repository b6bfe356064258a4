// The stand-in's driver functions about modules, kernels, captures and graphs.
#include <cstring>

#include "driver_call.h"

using namespace fake;

extern "C" {

struct Module {
  Context *context;
  std::string text;
  bool known = false; // the text that kernels here were made from
  bool unloaded = false;
};

struct Function {
  Module *module;
  const Kernel *kernel;
};

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  BEGIN(CURRENT, true);
  GIVEN(module && image);
  auto *made = kept(new Module{self().current(), (const char *)image});
  auto lacks = [&](const char *line) { return made->text.find(line) == std::string::npos; };
  if (lacks("\n.version 6.4\n") || lacks("\n.target sm_70\n"))
    return CUDA_ERROR_INVALID_PTX;
  made->known = is_known_text(made->text);
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
  for (Stream *s : machine().streams)
    for (const Work &work : s->queue)
      if (s->context == m->context && kernel_named(work.name) != nullptr)
        breach("cuModuleUnload while %s is under way: the host waits for the device", work.name.c_str());
  m->unloaded = true;
  machine().modules--;
  return CUDA_SUCCESS;
}

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  BEGIN(CURRENT);
  GIVEN(function && module && name);
  auto *m = (Module *)module;
  // It must be in the text, and be made for the host.
  const Kernel *kernel = kernel_named(name);
  std::string entry = std::string(".entry ") + name + "(";
  if (kernel == nullptr || m->text.find(entry) == std::string::npos) return CUDA_ERROR_NOT_FOUND;
  *function = (CUfunction)kept(new Function{m, kernel});
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
  if (!f->module->known) {
    breach("%s is launched from another text than this stand-in was made from", kernel->name);
    return CUDA_ERROR_INVALID_PTX;
  }
  if (grid_y != 1 || grid_z != 1 || block_x != 256 || block_y != 1 || block_z != 1 || shared_bytes != 0 ||
      kernel->blocks(params[0]) != grid_x) {
    breach("%s is launched with a grid of %ux%ux%u blocks of %ux%ux%u; expected %ux1x1 of 256x1x1", kernel->name,
           grid_x, grid_y, grid_z, block_x, block_y, block_z, kernel->blocks(params[0]));
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
    CUresult result = CUDA_SUCCESS;
    for (unsigned i = 0; i < grid_x && result == CUDA_SUCCESS; i++)
      result = run_block(*kernel, copied->data(), grid_x % 2 == 0 ? grid_x - 1 - i : i);
    return result;
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
  auto *capture = kept(new Capture);
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
  if (capture->mode != CU_CAPTURE_RELAXED && capture->thread != self().id)
    return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
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
        if (each->context == s->context && (each->flags & CU_STREAM_NON_BLOCKING) == 0)
          return CUDA_ERROR_STREAM_CAPTURE_IMPLICIT;
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
