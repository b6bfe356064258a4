// The stand-in's driver functions about streams and events.
#include "driver_call.h"

using namespace fake;

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
  waits("cuStreamSynchronize");
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

CUresult cuEventCreate(CUevent *event, unsigned flags) {
  BEGIN(CURRENT);
  GIVEN(event);
  Lock lock(machine().lock);
  auto *made = new Event;
  made->context = self().current();
  made->timed = (flags & CU_EVENT_DISABLE_TIMING) == 0;
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
  waits("cuEventSynchronize");
  Lock lock(machine().lock);
  Event *e = event_of(event);
  if (e == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  if (e->capture != nullptr) return CUDA_ERROR_CAPTURED_EVENT;
  if (e->stream == nullptr) return CUDA_SUCCESS;
  machine().changed.wait(lock, [&] { return e->stream->done >= e->tick; });
  join(machine().host, e->clock);
  return e->context->sticky;
}

CUresult cuEventElapsedTime(float *milliseconds, CUevent from, CUevent to) {
  BEGIN(CURRENT);
  GIVEN(milliseconds);
  Lock lock(machine().lock);
  Event *a = event_of(from), *b = event_of(to);
  if (a == nullptr || b == nullptr || !a->timed || !b->timed || a->stream == nullptr || b->stream == nullptr)
    return CUDA_ERROR_INVALID_HANDLE;
  if (a->context->sticky != CUDA_SUCCESS) return a->context->sticky;
  if (a->stream->done < a->tick || b->stream->done < b->tick) return CUDA_ERROR_NOT_READY;
  *milliseconds = (float)(b->passed - a->passed);
  return CUDA_SUCCESS;
}

} // extern "C"
