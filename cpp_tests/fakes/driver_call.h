// How every function of the driver's stand-in begins.
#ifndef RSB_FAKES_DRIVER_CALL_H
#define RSB_FAKES_DRIVER_CALL_H

#include "machine.h"

// Counting, ordered errors, and what the function needs.
#define BEGIN(...)                                               \
  do {                                                           \
    CUresult begun = begin(__func__, __VA_ARGS__);               \
    if (begun != CUDA_SUCCESS) return begun;                     \
  } while (0)
#define GIVEN(condition) \
  if (!(condition)) return CUDA_ERROR_INVALID_VALUE
// `s` becomes the stream of `handle`, and the machine is locked from here on.
#define STREAM(handle)                   \
  Lock lock(machine().lock);             \
  CUresult error;                        \
  Stream *s = stream_of(handle, &error); \
  if (s == nullptr) return error

#endif
