// The stand-in's driver functions about devices and contexts, and what every call begins with.
#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

#include "driver_call.h"

namespace fake {

static std::atomic<uint64_t> threads{1};

Thread::Thread() : id(threads++) {}

Thread::~Thread() {
  for (Entry &entry : stack)
    if (entry.pushed) breach("a thread ended with a context that it had pushed and not popped");
  Lock lock(machine().lock);
  for (auto &own : streams) own.second->destroyed = true;
  machine().changed.notify_all();
}

Thread &self() {
  static thread_local Thread t;
  return t;
}

CUresult begin(const char *name, Need need, bool unsafe) {
  Thread &t = self();
  t.later = CUDA_SUCCESS;
  if (t.in_host_function) breach("%s inside a host function", name);
  CUresult ordered = ordered_error(name, "*", &t.later);
  Machine &m = machine();
  Lock lock(m.lock);
  if (ordered != CUDA_SUCCESS) {
    if (is_sticky(ordered) && t.current() != nullptr) t.current()->sticky = ordered;
    return ordered;
  }
  if (need >= INITIALIZED && !m.initialized) return CUDA_ERROR_NOT_INITIALIZED;
  if (need == CURRENT) {
    Context *current = t.current();
    if (current == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
    if (current->destroyed) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    if (current->primary && current->retained == 0) {
      breach("%s in a primary context that nobody retains", name);
      return CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
    if (current->sticky != CUDA_SUCCESS) return current->sticky;
  }
  if (unsafe && t.capture_mode != CU_CAPTURE_RELAXED) {
    bool refused = false;
    for (Capture *capture : m.captures) {
      bool own = capture->mode != CU_CAPTURE_RELAXED && capture->thread == t.id;
      bool hit = own || (capture->mode == CU_CAPTURE_GLOBAL && t.capture_mode == CU_CAPTURE_GLOBAL);
      if (hit) capture->invalid = refused = true;
    }
    if (refused) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return CUDA_SUCCESS;
}

} // namespace fake

using namespace fake;

extern "C" {

CUresult cuInit(unsigned flags) {
  BEGIN(NOTHING);
  GIVEN(flags == 0);
  Lock lock(machine().lock);
  machine().initialized = true;
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  BEGIN(NOTHING);
  GIVEN(version);
  *version = machine().driver_version;
  return CUDA_SUCCESS;
}

static const struct {
  int code;
  const char *name, *text;
} ERRORS[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain"},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {716, "CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned address"},
    {709, "CUDA_ERROR_CONTEXT_IS_DESTROYED", "context is destroyed"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {900, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED", "operation not permitted when stream is capturing"},
    {901, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", "operation failed due to a previous error during capture"},
    {905, "CUDA_ERROR_STREAM_CAPTURE_ISOLATION", "dependency created on uncaptured work in another stream"},
    {906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", "operation would make the legacy stream depend on a capturing stream"},
    {907, "CUDA_ERROR_CAPTURED_EVENT", "operation not permitted on an event last recorded in a capturing stream"},
};

CUresult cuGetErrorName(CUresult error, const char **text) {
  GIVEN(text);
  for (auto &each : ERRORS)
    if (each.code == error) return *text = each.name, CUDA_SUCCESS;
  *text = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetErrorString(CUresult error, const char **text) {
  GIVEN(text);
  for (auto &each : ERRORS)
    if (each.code == error) return *text = each.text, CUDA_SUCCESS;
  *text = nullptr;
  return CUDA_ERROR_INVALID_VALUE;
}

CUresult cuGetProcAddress_v2(const char *name, void **function, int, uint64_t, int *found) {
  BEGIN(NOTHING);
  GIVEN(name && function);
  // The newest version of a function, as the real one answers.
  std::string versioned = name;
  *function = dlsym(RTLD_DEFAULT, (versioned + "_v2").c_str());
  if (*function == nullptr) *function = dlsym(RTLD_DEFAULT, name);
  if (found != nullptr) *found = *function == nullptr ? 1 : 0;
  return *function == nullptr ? CUDA_ERROR_NOT_FOUND : CUDA_SUCCESS;
}

static bool is_device(int device) { return device >= 0 && device < machine().devices; }

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  BEGIN(INITIALIZED);
  GIVEN(device);
  if (!is_device(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  BEGIN(INITIALIZED);
  GIVEN(count);
  *count = machine().devices;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(name && length > 0);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  snprintf(name, (size_t)length, "stand-in %d", device);
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(value);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  switch (attribute) {
  case 75: *value = 9; break;   // compute capability, major
  case 76: *value = 0; break;   // minor
  case 16: *value = 132; break; // multiprocessors
  default: *value = 1;          // memory pools, unified addressing, ...: all there
  }
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(bytes);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *bytes = machine().memory;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(pool);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  *pool = (CUmemoryPool)machine().primaries[(size_t)device];
  return CUDA_SUCCESS;
}

CUresult cuMemPoolSetAttribute(CUmemoryPool pool, int, void *value) {
  BEGIN(INITIALIZED);
  GIVEN(pool && value);
  return CUDA_SUCCESS;
}

CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t) {
  BEGIN(INITIALIZED);
  GIVEN(pool);
  return CUDA_SUCCESS;
}

// ---- Contexts ---------------------------------------------------------------------------------------------

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(context);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Lock lock(machine().lock);
  Context *primary = machine().primaries[(size_t)device];
  primary->retained++;
  *context = (CUcontext)primary;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  BEGIN(INITIALIZED);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Lock lock(machine().lock);
  Context *primary = machine().primaries[(size_t)device];
  if (primary->retained == 0) {
    breach("cuDevicePrimaryCtxRelease of device %d more often than it was retained", device);
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  primary->retained--;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  BEGIN(INITIALIZED);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Lock lock(machine().lock);
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = machine().primaries[(size_t)device]->retained > 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxCreate_v2(CUcontext *context, unsigned, CUdevice device) {
  BEGIN(INITIALIZED);
  GIVEN(context);
  if (!is_device(device)) return CUDA_ERROR_INVALID_DEVICE;
  Lock lock(machine().lock);
  auto *made = new Context;
  made->device = device;
  machine().contexts.insert(made);
  self().stack.push_back({made, true});
  *context = (CUcontext)made;
  return CUDA_SUCCESS;
}

// A context that lives, or null.
static Context *living(CUcontext handle) {
  auto *context = (Context *)handle;
  return machine().contexts.count(context) != 0 && !context->destroyed ? context : nullptr;
}

CUresult cuCtxDestroy_v2(CUcontext handle) {
  BEGIN(INITIALIZED);
  Lock lock(machine().lock);
  Context *context = living(handle);
  if (context == nullptr || context->primary) return CUDA_ERROR_INVALID_CONTEXT;
  context->destroyed = true;
  auto &stack = self().stack;
  if (!stack.empty() && stack.back().context == context) stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  BEGIN(INITIALIZED);
  GIVEN(context);
  *context = (CUcontext)self().current();
  return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext handle) {
  BEGIN(INITIALIZED);
  Lock lock(machine().lock);
  auto &stack = self().stack;
  bool pushed = !stack.empty() && stack.back().pushed;
  if (!stack.empty()) stack.pop_back();
  if (handle == nullptr) return CUDA_SUCCESS;
  Context *context = living(handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  stack.push_back({context, pushed});
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent_v2(CUcontext handle) {
  BEGIN(INITIALIZED);
  Lock lock(machine().lock);
  Context *context = living(handle);
  if (context == nullptr) return CUDA_ERROR_INVALID_CONTEXT;
  self().stack.push_back({context, true});
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
  BEGIN(INITIALIZED);
  auto &stack = self().stack;
  if (stack.empty()) {
    breach("cuCtxPopCurrent of an empty stack");
    return CUDA_ERROR_INVALID_CONTEXT;
  }
  if (context != nullptr) *context = (CUcontext)stack.back().context;
  stack.pop_back();
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  BEGIN(CURRENT);
  GIVEN(device);
  *device = self().current()->device;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  BEGIN(CURRENT);
  if (least != nullptr) *least = 0;
  if (greatest != nullptr) *greatest = -5;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
  BEGIN(CURRENT, true);
  waits("cuCtxSynchronize");
  Lock lock(machine().lock);
  drain_all(lock);
  return self().current()->sticky;
}

int fake_cuda_stack_depth(void) { return (int)self().stack.size(); }

} // extern "C"
