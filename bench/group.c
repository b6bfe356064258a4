/* group.c: starts the ranks as threads or as processes, over one mapping of a memfd that all of them share. */
#define _GNU_SOURCE
#include "group.h"

#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if defined(__x86_64__)
#define PAUSE() __builtin_ia32_pause()
#elif defined(__aarch64__)
#define PAUSE() __asm__ volatile("isb")
#else
#define PAUSE() ((void)0)
#endif

static char *take(size_t *at, char *base, size_t bytes) {
  char *memory = base + *at;
  *at += (bytes + 4095) / 4096 * 4096;
  return memory;
}

/* Lays the shared memory out from `base`; returns how much there is. */
static size_t lay_out(bench_group *group, char *base, size_t samples, size_t workloads) {
  size_t at = 0, ranks = (size_t)group->ranks;
  group->lines = (bench_line *)take(&at, base, ranks * sizeof(bench_line));
  group->samples = (bench_sample *)take(&at, base, samples * sizeof(bench_sample));
  group->notes = (char (*)[BENCH_NOTE])take(&at, base, workloads * BENCH_NOTES * BENCH_NOTE);
  group->memories = (bench_memory *)take(&at, base, workloads * sizeof(bench_memory));
  group->staging = take(&at, base, ranks * group->staging_stride);
  group->inputs = take(&at, base, ranks * group->input_stride);
  return at;
}

bench_group bench_group_make(const bench_options *opt, const bench_workload *works, size_t count, size_t samples) {
  size_t largest = 0;
  for (size_t i = 0; i < count; i++) largest = works[i].in_numel > largest ? works[i].in_numel : largest;
  bench_group group = {.ranks = opt->ranks, .threads = opt->threads,
                       .spins = opt->ranks > sysconf(_SC_NPROCESSORS_ONLN) ? 0 : 2000,
                       .staging_stride = 2 * (size_t)opt->ranks * opt->piece_bytes};
  if (opt->floors && !opt->threads) group.input_stride = (largest * bench_dtype_size(opt->dtype) + 4095) / 4096 * 4096;

  static char nowhere[1];
  size_t bytes = lay_out(&group, nowhere, samples, count);
  int fd = memfd_create("rsb_perf", MFD_CLOEXEC);
  if (fd < 0 || ftruncate(fd, (off_t)bytes) != 0) bench_die("shared memory of %zu bytes: none to be had", bytes);
  char *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (base == MAP_FAILED) bench_die("shared memory of %zu bytes: cannot be mapped", bytes);
  close(fd);
  lay_out(&group, base, samples, count);
  return group;
}

/* Wakes the ranks that wait for this one, but may miss one that falls asleep just now: the barrier is a floor too, and
   the fence that it would take is left out. */
static void ring(const bench_group *group, bench_line *own) {
  for (int rank = 0; rank < group->ranks; rank++) {
    if (!atomic_load_explicit(&group->lines[rank].asleep, memory_order_relaxed)) continue;
    atomic_fetch_add(&own->bell, 1);
    syscall(SYS_futex, &own->bell, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
    return;
  }
}

/* Sleeps until `peer` has reached barrier `now`, or less. A core that is given away by a yield instead, to whoever wants
   it, comes back up to 32 ms later. */
static void nap(bench_line *own, bench_line *peer, uint64_t now) {
  const struct timespec slice = {.tv_nsec = 500000};
  uint32_t seen = atomic_load(&peer->bell);
  atomic_store(&own->asleep, 1);
  if (atomic_load(&peer->reached) < now) syscall(SYS_futex, &peer->bell, FUTEX_WAIT, seen, &slice, NULL, 0);
  atomic_store(&own->asleep, 0);
}

void bench_barrier(bench_rank *me) {
  const bench_group *group = me->group;
  bench_line *own = &group->lines[me->rank];
  uint64_t now = ++me->barriers;
  atomic_store_explicit(&own->reached, now, memory_order_release);
  if (group->spins) ring(group, own);
  for (int rank = 0, spun = 0; rank < group->ranks;) {
    if (atomic_load_explicit(&group->lines[rank].reached, memory_order_acquire) >= now) {
      rank++;
    } else if (spun < group->spins) {
      spun++;
      PAUSE();
    } else if (group->spins) {
      nap(own, &group->lines[rank], now);
    } else {
      sched_yield();
    }
  }
}

/* ---- Starting -------------------------------------------------------------------------------- */

typedef struct {
  bench_rank *rank;
  void (*body)(bench_rank *);
} start;

static void *run_thread(void *argument) {
  const start *thread = argument;
  thread->body(thread->rank);
  return NULL;
}

static void run_threads(bench_group *group, bench_rank *ranks, void (*body)(bench_rank *)) {
  pthread_t threads[group->ranks];
  start starts[group->ranks];
  for (int i = 0; i < group->ranks; i++) {
    starts[i] = (start){&ranks[i], body};
    if (pthread_create(&threads[i], NULL, run_thread, &starts[i]) != 0) bench_die("rank %d: no thread", i);
  }
  for (int i = 0; i < group->ranks; i++) pthread_join(threads[i], NULL);
}

static void run_processes(bench_group *group, bench_rank *ranks, void (*body)(bench_rank *)) {
  pid_t pids[group->ranks], parent = getpid();
  fflush(NULL);
  for (int i = 0; i < group->ranks; i++) {
    pids[i] = fork();
    if (pids[i] < 0) bench_die("rank %d: no process", i);
    if (pids[i] > 0) continue;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(1);
    body(&ranks[i]);
    fflush(NULL);
    _exit(0);
  }
  for (int left = group->ranks; left > 0; left--) {
    int status;
    pid_t ended = wait(&status);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 0) continue;
    for (int i = 0; i < group->ranks; i++) {
      if (pids[i] != ended) kill(pids[i], SIGKILL);
    }
    bench_die("a rank failed");
  }
}

void bench_group_run(bench_group *group, bench_rank *ranks, void (*body)(bench_rank *)) {
  (group->threads ? run_threads : run_processes)(group, ranks, body);
}
