/* shim.c - preloaded into the fault campaign: makes one chosen call of the C library fail. See shim.h. */
#define _GNU_SOURCE
#include "shim.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LARGE = 4096 };

static atomic_int armed, chosen, fired;
static _Thread_local int armed_here;
static atomic_long left, counts[FAULT_COUNT];
static void *next[FAULT_COUNT];

void shim_arm(int fault, long nth, int this_thread);
int shim_disarm(long calls[FAULT_COUNT]);

void shim_arm(int fault, long nth, int this_thread) {
  for (int i = 0; i < FAULT_COUNT; i++) counts[i] = 0;
  fired = 0;
  chosen = fault;
  left = nth;
  armed_here = this_thread;
  armed = !this_thread;
}

int shim_disarm(long calls[FAULT_COUNT]) {
  armed = armed_here = 0;
  for (int i = 0; i < FAULT_COUNT; i++) calls[i] = counts[i];
  return fired;
}

/* Whether this call is the one. */
static int fails(enum fault fault, int error) {
  if (!armed && !armed_here) return 0;
  atomic_fetch_add(&counts[fault], 1);
  if (fault != (enum fault)chosen || left == 0 || atomic_fetch_sub(&left, 1) != 1) return 0;
  left = 0;
  fired = 1;
  errno = error;
  return 1;
}

__attribute__((constructor)) static void find(void) {
#define X(name) next[FAULT_##name] = dlsym(RTLD_NEXT, #name);
  FAULTS(X)
#undef X
}

/* `real` as a function of that name's type. */
#define REAL(name)            \
  __typeof__(&name) real = 0; \
  *(void **)&real = next[FAULT_##name]

/* A function that gives -1. */
#define SHIM(type, name, error, parameters, arguments) \
  type name parameters {                               \
    REAL(name);                                        \
    return fails(FAULT_##name, error) ? -1 : real arguments; \
  }

SHIM(int, mprotect, ENOMEM, (void *at, size_t n, int p), (at, n, p))
SHIM(int, madvise, ENOMEM, (void *at, size_t n, int advice), (at, n, advice))
SHIM(int, fallocate, ENOSPC, (int fd, int mode, off_t at, off_t n), (fd, mode, at, n))
SHIM(int, ftruncate64, ENOMEM, (int fd, off64_t n), (fd, n))
SHIM(int, memfd_create, EMFILE, (const char *name, unsigned flags), (name, flags))
SHIM(int, socket, EMFILE, (int domain, int type, int protocol), (domain, type, protocol))
SHIM(int, bind, ENOMEM, (int fd, __CONST_SOCKADDR_ARG a, socklen_t n), (fd, a, n))
SHIM(int, listen, ENOBUFS, (int fd, int n), (fd, n))
SHIM(int, connect, ENOMEM, (int fd, __CONST_SOCKADDR_ARG a, socklen_t n), (fd, a, n))
SHIM(int, accept4, EMFILE, (int fd, __SOCKADDR_ARG a, socklen_t *n, int flags), (fd, a, n, flags))
SHIM(int, getsockopt, ENOBUFS, (int fd, int level, int name, void *to, socklen_t *n), (fd, level, name, to, n))
SHIM(ssize_t, sendmsg, ENOBUFS, (int fd, const struct msghdr *m, int flags), (fd, m, flags))
SHIM(ssize_t, recvmsg, ENOMEM, (int fd, struct msghdr *m, int flags), (fd, m, flags))
SHIM(int, poll, ENOMEM, (struct pollfd *fds, nfds_t n, int timeout), (fds, n, timeout))
SHIM(int, mkdir, ENOSPC, (const char *path, mode_t mode), (path, mode))
SHIM(ssize_t, read, ENOMEM, (int fd, void *to, size_t n), (fd, to, n))
SHIM(ssize_t, readlink, ENOMEM, (const char *path, char *to, size_t n), (path, to, n))
SHIM(int, fstat64, ENOMEM, (int fd, struct stat64 *to), (fd, to))
SHIM(int, stat64, ENOMEM, (const char *path, struct stat64 *to), (path, to))
SHIM(int, lstat64, ENOMEM, (const char *path, struct stat64 *to), (path, to))
SHIM(int, statx, ENOMEM, (int fd, const char *path, int flags, unsigned mask, struct statx *to),
     (fd, path, flags, mask, to))
SHIM(int, flock, ENOLCK, (int fd, int operation), (fd, operation))
SHIM(int, unlink, ENOMEM, (const char *path), (path))

void *mmap(void *at, size_t n, int access, int flags, int fd, off_t offset) {
  REAL(mmap);
  return fails(FAULT_mmap, ENOMEM) ? MAP_FAILED : real(at, n, access, flags, fd, offset);
}

void *mmap64(void *at, size_t n, int access, int flags, int fd, off64_t offset) {
  return mmap(at, n, access, flags, fd, offset);
}

void *mremap(void *at, size_t old, size_t n, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  void *to = flags & MREMAP_FIXED ? va_arg(arguments, void *) : NULL;
  va_end(arguments);
  REAL(mremap);
  return fails(FAULT_mremap, ENOMEM) ? MAP_FAILED : real(at, old, n, flags, to);
}

DIR *opendir(const char *path) {
  REAL(opendir);
  return fails(FAULT_opendir, EMFILE) ? NULL : real(path);
}

/* Only a sleep can fail, by a signal. The rest that comes this way (gettid, a wake) has nothing to fail for. */
long syscall(long number, ...) {
  long a[6];
  va_list arguments;
  va_start(arguments, number);
  for (int i = 0; i < 6; i++) a[i] = va_arg(arguments, long);
  va_end(arguments);
  REAL(syscall);
  long what = a[1] & FUTEX_CMD_MASK;
  int sleeps = number == SYS_futex && (what == FUTEX_WAIT || what == FUTEX_WAIT_BITSET);
  return sleeps && fails(FAULT_syscall, EINTR) ? -1 : real(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

int pthread_create(pthread_t *id, const pthread_attr_t *attr, void *(*run)(void *), void *data) {
  REAL(pthread_create);
  return fails(FAULT_pthread_create, EAGAIN) ? EAGAIN : real(id, attr, run, data);
}

int open64(const char *path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  int mode = va_arg(arguments, int);
  va_end(arguments);
  REAL(open64);
  return fails(FAULT_open64, EMFILE) ? -1 : real(path, flags, mode);
}

int fcntl(int fd, int command, ...) {
  va_list arguments;
  va_start(arguments, command);
  long value = va_arg(arguments, long);
  va_end(arguments);
  REAL(fcntl);
  /* Questions cannot fail for want of anything. */
  int takes = command == F_DUPFD || command == F_DUPFD_CLOEXEC || command == F_ADD_SEALS;
  return takes && fails(FAULT_fcntl, EMFILE) ? -1 : real(fd, command, value);
}

/* The allocator's own names: dlsym may itself allocate. */
void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void *__libc_memalign(size_t, size_t);

void *malloc(size_t n) {
  return n >= LARGE && fails(FAULT_malloc, ENOMEM) ? NULL : __libc_malloc(n);
}

void *calloc(size_t count, size_t n) {
  return count * n >= LARGE && fails(FAULT_calloc, ENOMEM) ? NULL : __libc_calloc(count, n);
}

void *realloc(void *at, size_t n) {
  return n >= LARGE && fails(FAULT_realloc, ENOMEM) ? NULL : __libc_realloc(at, n);
}

int posix_memalign(void **out, size_t align, size_t n) {
  if (n >= LARGE && fails(FAULT_posix_memalign, ENOMEM)) return ENOMEM;
  *out = __libc_memalign(align, n);
  return *out == NULL ? ENOMEM : 0;
}
