// The stand-in's driver functions about memory: giving it out and back, copies, what a pointer is.
#include <cstdlib>
#include <cstring>

#include "driver_call.h"

using namespace fake;

extern "C" {

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
  BEGIN(CURRENT);
  GIVEN(available && total);
  Lock lock(machine().lock);
  *total = machine().memory;
  *available = machine().memory - machine().live[(size_t)self().current()->device];
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc_v2(CUdeviceptr *ptr, size_t bytes) {
  BEGIN(CURRENT, true);
  GIVEN(ptr && bytes > 0);
  Lock lock(machine().lock);
  *ptr = allocate(self().current()->device, bytes, false);
  return *ptr == 0 ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_SUCCESS;
}

// The memory that begins at `ptr`, if it may be freed.
static Allocation *freeable(const char *name, uint64_t ptr, bool host) {
  Allocation *a = find(ptr);
  if (a == nullptr || a->start != ptr || a->host != host || a->freed) {
    const char *why = a != nullptr && a->freed ? "was freed before" : "is no such memory";
    breach("%s of %#llx, which %s", name, (unsigned long long)ptr, why);
    return nullptr;
  }
  return a;
}

static void freed(Allocation *a) {
  a->freed = true;
  if (!a->host) machine().live[(size_t)a->device] -= a->bytes;
}

// Freeing at once waits for the device.
static void must_be_idle(const char *name) {
  for (Stream *s : machine().streams)
    if (s->context == self().current() && s->done != s->ticks)
      return waits(std::string(name) + " while work is under way");
}

CUresult cuMemFree_v2(CUdeviceptr ptr) {
  BEGIN(CURRENT, true);
  if (ptr == 0) return CUDA_SUCCESS;
  Lock lock(machine().lock);
  Allocation *a = freeable("cuMemFree", ptr, false);
  if (a == nullptr) return CUDA_ERROR_INVALID_VALUE;
  must_be_idle("cuMemFree");
  drain_all(lock);
  freed(a);
  poison(*a);
  return CUDA_SUCCESS;
}

CUresult cuMemAllocAsync(CUdeviceptr *ptr, size_t bytes, CUstream handle) {
  BEGIN(CURRENT);
  GIVEN(ptr && bytes > 0);
  Lock lock(machine().lock);
  CUresult error;
  Stream *s = stream_of(handle, &error);
  if (s == nullptr) return error;
  if (s->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  *ptr = allocate(s->context->device, bytes, true);
  if (*ptr == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  // Whoever uses it must come after this.
  Work work;
  work.name = "cuMemAllocAsync";
  work.accesses = {{*ptr, bytes, true}};
  return enqueue(lock, s, std::move(work));
}

CUresult cuMemFreeAsync(CUdeviceptr ptr, CUstream handle) {
  BEGIN(CURRENT);
  Lock lock(machine().lock);
  CUresult error;
  Stream *s = stream_of(handle, &error);
  if (s == nullptr) return error;
  Allocation *a = freeable("cuMemFreeAsync", ptr, false);
  if (a == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (s->capture != nullptr) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  Work work;
  work.name = "cuMemFreeAsync";
  work.accesses = {{ptr, a->bytes, true}};
  Allocation copy = *a;
  copy.history.clear();
  work.run = [copy]() -> CUresult { return poison(copy), CUDA_SUCCESS; };
  CUresult result = enqueue(lock, s, std::move(work));
  if (result == CUDA_SUCCESS) freed(a);
  return result;
}

CUresult cuMemHostAlloc(void **ptr, size_t bytes, unsigned) {
  BEGIN(CURRENT, true);
  GIVEN(ptr && bytes > 0);
  *ptr = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
  if (*ptr == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(*ptr, 0xCB, bytes);
  Lock lock(machine().lock);
  allocate_host(*ptr, bytes, self().current()->device);
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *ptr) {
  BEGIN(CURRENT, true);
  Lock lock(machine().lock);
  Allocation *a = freeable("cuMemFreeHost", (uint64_t)ptr, true);
  if (a == nullptr) return CUDA_ERROR_INVALID_VALUE;
  must_be_idle("cuMemFreeHost");
  drain_all(lock);
  machine().allocations.erase(a->start);
  free(ptr);
  return CUDA_SUCCESS;
}

CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *bytes, CUdeviceptr ptr) {
  BEGIN(CURRENT);
  Lock lock(machine().lock);
  Allocation *a = find(ptr);
  if (a == nullptr || a->freed) return CUDA_ERROR_NOT_FOUND;
  if (base != nullptr) *base = a->start;
  if (bytes != nullptr) *bytes = a->bytes;
  return CUDA_SUCCESS;
}

// Writes the attribute, or its null value where `a` is null.
static CUresult attribute_of(void *data, int attribute, Allocation *a, CUdeviceptr ptr) {
  switch (attribute) {
  case CU_POINTER_ATTRIBUTE_CONTEXT:
    // Memory of pools belongs to no context.
    *(Context **)data = a == nullptr || a->ordered ? nullptr : machine().primaries[(size_t)a->device];
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    *(unsigned *)data = a == nullptr ? 0 : a->host ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)data = a == nullptr ? 0 : ptr; return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_HOST_POINTER:
    if (a != nullptr && !a->host) return CUDA_ERROR_INVALID_VALUE;
    *(CUdeviceptr *)data = a == nullptr ? 0 : ptr;
    return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)data = 0; return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = a == nullptr ? -2 : a->device; return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)data = a == nullptr ? 0 : a->start; return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)data = a == nullptr ? 0 : a->bytes; return CUDA_SUCCESS;
  case CU_POINTER_ATTRIBUTE_MAPPED: *(unsigned *)data = a != nullptr; return CUDA_SUCCESS;
  default: return CUDA_ERROR_INVALID_VALUE;
  }
}

CUresult cuPointerGetAttribute(void *data, int attribute, CUdeviceptr ptr) {
  BEGIN(CURRENT);
  GIVEN(data);
  Lock lock(machine().lock);
  Allocation *a = find(ptr);
  // Host memory that nobody has registered is unknown here.
  if (a == nullptr || a->freed) return CUDA_ERROR_INVALID_VALUE;
  return attribute_of(data, attribute, a, ptr);
}

CUresult cuPointerGetAttributes(unsigned count, int *attributes, void **data, CUdeviceptr ptr) {
  BEGIN(CURRENT);
  GIVEN(attributes && data && count > 0);
  Lock lock(machine().lock);
  Allocation *a = find(ptr);
  if (a != nullptr && a->freed) a = nullptr;
  for (unsigned i = 0; i < count; i++) {
    CUresult result = attribute_of(data[i], attributes[i], a, ptr);
    if (result != CUDA_SUCCESS && attributes[i] != CU_POINTER_ATTRIBUTE_HOST_POINTER) return result;
  }
  return CUDA_SUCCESS;
}

// ---- Copies ---------------------------------------------------------------------------------------

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
  bool unpinned = pageable(dst);
  if (unpinned) waits(std::string(name) + " to memory that is not pinned");
  for (size_t r = 0; r < rows; r++) {
    if (!staged) work.accesses.push_back({src + r * src_pitch, bytes, false});
    if (!unpinned) work.accesses.push_back({dst + r * dst_pitch, bytes, true});
  }
  work.run = [=]() -> CUresult {
    for (size_t r = 0; r < rows; r++) {
      const void *from = staged ? staged->data() + r * bytes : reach(src + r * src_pitch);
      memmove(reach(dst + r * dst_pitch), from, bytes);
    }
    return CUDA_SUCCESS;
  };
  CUresult result = enqueue(lock, s, std::move(work));
  if (result == CUDA_SUCCESS && unpinned) drain(lock, s);
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
  waits(name);
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
  uint64_t dst = c->dstDevice + c->dstY * c->dstPitch + c->dstXInBytes;
  uint64_t src = c->srcDevice + c->srcY * c->srcPitch + c->srcXInBytes;
  return copy(stream, "cuMemcpy2DAsync", dst, src, c->WidthInBytes, c->Height, c->dstPitch, c->srcPitch);
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

} // extern "C"
