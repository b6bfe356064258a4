/* shim.h - what the preloaded shim of the fault campaign can make fail. */
#ifndef SHIM_H
#define SHIM_H

#define FAULTS(X) \
  X(mmap) X(mremap) X(mprotect) X(madvise) X(fallocate) X(ftruncate64) X(memfd_create) X(socket) X(bind) X(listen) \
  X(connect) X(accept4) X(getsockopt) X(sendmsg) X(recvmsg) X(poll) X(pthread_create) X(open64) X(fcntl) X(mkdir) \
  X(read) X(readlink) X(fstat64) X(stat64) X(lstat64) X(statx) X(opendir) X(flock) X(unlink) X(syscall) \
  X(malloc) X(calloc) X(realloc) X(posix_memalign)

enum fault {
#define X(name) FAULT_##name,
  FAULTS(X)
#undef X
  FAULT_COUNT
};

/* From now on calls are counted, of this thread or of all, and call number `nth` (from 1; 0: none) of `fault` fails, once.
 * Allocations count from 4 KiB on: for less the library may end the process. */
typedef void shim_arm_fn(int fault, long nth, int this_thread);
/* Ends that; gives the calls of each function, and whether one has failed. */
typedef int shim_disarm_fn(long calls[FAULT_COUNT]);

#endif
