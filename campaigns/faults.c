/* faults.c - makes each call of the C library fail once, in each phase of a job, on each rank in turn: processes, threads.
 *
 * Promises: a clean status on all ranks, RSB_ERR_NO_MEMORY where memory or descriptors run out; a refused call changed
 * nothing and can be made again; nothing leaks; what comes later works. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "campaign.h"
#include "shim.h"
#include "worker.h"

enum { GUARD_S = 20, ATTEMPTS = 6 };

enum phase { CREATE, BUCKETER, SUBMIT, FLUSH, GATHER, SHRINK, FREE, PHASES };
static const char *const phase_names[PHASES] = {"create", "bucketer", "submit", "flush", "gather", "shrink", "free"};
static const char *const fault_names[FAULT_COUNT] = {
#define X(name) #name,
    FAULTS(X)
#undef X
};

static shim_arm_fn *arm;
static shim_disarm_fn *disarm;

/* One trial: which call of which rank fails where; and what came of it. */
struct trial {
  uint64_t number;
  int threads; /* ranks are threads, not processes */
  enum phase phase;
  int fault;
  uint32_t failing;
  long nth, calls[FAULT_COUNT];
  int fired;
  rsb_status status[2];
  atomic_uint formed, tried;
};

static struct trial *trial;

static void begin(enum phase phase, uint32_t rank) {
  if (trial->phase == phase && trial->failing == rank) arm(trial->fault, trial->nth, trial->threads);
}

static void end(enum phase phase, uint32_t rank, rsb_status status) {
  if (trial->phase != phase) return;
  trial->status[rank] = status;
  if (trial->failing == rank) trial->fired = disarm(trial->calls);
}

static int is_gone(rsb_status status) {
  return status == RSB_ERR_PEER_LOST || status == RSB_ERR_TIMEOUT;
}

/* What a call may say: the failing rank that memory could not be had; another rank in create or shrink the same, for
 * that reason, or that the rank is not there. */
static void judge(uint32_t rank, rsb_status status, const rsb_error *err) {
  int failing = rank == trial->failing, shared_call = trial->phase == CREATE || trial->phase == SHRINK;
  if (status == RSB_OK || status == RSB_ERR_NO_MEMORY) return;
  if (!failing && shared_call && is_gone(status)) return;
  violation("%s%s, call %ld of %s fails on rank %u: rank %u gets %s: %s", trial->threads ? "threads, " : "",
            phase_names[trial->phase], trial->nth, fault_names[trial->fault], trial->failing, rank,
            rsb_status_name(status), err->message);
}

static rsb_comm *create(uint32_t rank, uint32_t size, const char *suffix, rsb_status *status) {
  char name[64];
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_comm *comm = NULL;
  rsb_error err;
  config.timeout_ns = 1000000000;
  config.staging_bytes = 1 << 20;
  snprintf(name, sizeof name, "faults-%llu%s", (unsigned long long)trial->number, suffix);
  *status = rsb_comm_create_shm(name, rank, size, &config, &comm, &err);
  if (*status != RSB_OK) judge(rank, *status, &err);
  return comm;
}

/* A submit that is refused for want of memory is made again: it must be as if it had never been. */
static void submit(struct worker *w, const struct op *op, rsb_status *worst) {
  rsb_error err;
  rsb_status status = worker_submit(w, op, &err);
  if (status == RSB_OK) return;
  *worst = status;
  judge(w->rank, status, &err);
  status = worker_submit(w, op, &err);
  if (status != RSB_OK) violation("a submit that was refused fails again: %s", err.message);
}

static void phases(struct worker *w) {
  uint64_t state = 5;
  uint32_t rank = w->rank;
  rsb_status worst = RSB_OK;
  rsb_error err;
  begin(SUBMIT, rank);
  for (uint64_t i = 0; i < 12; i++) {
    struct op op = random_op(&state, i, 9000);
    submit(w, &op, &worst);
  }
  end(SUBMIT, rank, worst);
  begin(FLUSH, rank);
  rsb_status status = rsb_bucketer_flush(w->bucketer, &err);
  end(FLUSH, rank, status);
  if (status != RSB_OK) violation("flush on rank %u: %s", rank, err.message);
  begin(GATHER, rank);
  status = worker_gather(w, 50000, 1, &err);
  end(GATHER, rank, status);
  if (status != RSB_OK) {
    judge(rank, status, &err);
    status = worker_gather(w, 50000, 1, &err);
    if (status != RSB_OK) violation("an all-gather that was refused fails again: %s", err.message);
  }
  worker_check(w, RSB_OK, "the phases");
}

/* Rank 2 is killed, or leaves; the others shrink, again if need be. */
static rsb_comm *shrink(rsb_comm *comm, uint32_t rank) {
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_comm *next = NULL;
  rsb_error err;
  rsb_status status;
  config.timeout_ns = 1000000000;
  config.staging_bytes = 1 << 20;
  if (rank == 2 && !trial->threads) raise(SIGKILL);
  if (rank == 2) {
    rsb_comm_free(comm);
    return NULL;
  }
  status = rsb_comm_all_gather(comm, NULL, NULL, 0, &err);
  if (status != RSB_ERR_PEER_LOST) violation("a death is %s", rsb_status_name(status));
  for (int attempt = 0; attempt < ATTEMPTS && next == NULL; attempt++) {
    if (attempt == 0) begin(SHRINK, rank);
    status = rsb_comm_shrink(comm, &config, &next, &err);
    if (attempt == 0) end(SHRINK, rank, status);
    if (status != RSB_OK) judge(rank, status, &err);
  }
  if (next == NULL) violation("call %ld of %s fails on rank %u: rank %u never shrinks: %s", trial->nth,
                              fault_names[trial->fault], trial->failing, rank, err.message);
  rsb_comm_free(comm);
  return next;
}

/* A rank's life from create to free. */
static void live(rsb_comm *comm, uint32_t rank) {
  static struct worker workers[3];
  struct worker *worker = &workers[rank];
  rsb_error err;
  if (trial->phase == SHRINK) comm = shrink(comm, rank);
  if (comm == NULL) return;
  worker->space = malloc(WORKER_SPACE);
  begin(BUCKETER, rank);
  rsb_status status = worker_open(worker, comm, 32768, 9, &err);
  end(BUCKETER, rank, status);
  if (status != RSB_OK) {
    judge(rank, status, &err);
    if (worker_open(worker, comm, 32768, 9, &err) != RSB_OK) violation("no bucketer: %s", err.message);
  }
  phases(worker);
  worker_rounds(worker, 5, "after the fault");
  begin(FREE, rank);
  worker_close(worker);
  rsb_comm_free(comm);
  end(FREE, rank, RSB_OK);
}

static void run_rank(uint32_t rank, uint32_t size) {
  struct holdings before = holdings();
  rsb_status status;
  begin(CREATE, rank);
  rsb_comm *comm = create(rank, size, "", &status);
  end(CREATE, rank, status);
  if (status != RSB_OK) check_holdings(before, "after a failed create");
  atomic_fetch_add(&trial->formed, status == RSB_OK);
  atomic_fetch_add(&trial->tried, 1);
  /* A rank that has crashed never comes; that is reported where it is reaped. */
  for (int i = 0; i < 4000 && trial->tried < size; i++) sleep_ns(1000000);
  if (trial->tried < size) _exit(0);
  if (trial->formed != size) {
    rsb_comm_free(comm);
    comm = create(rank, size, "-again", &status);
    if (comm == NULL) {
      violation("create fails again on rank %u", rank);
      _exit(0);
    }
  }
  live(comm, rank);
  check_holdings(before, "after a fault and free");
  _exit(0);
}

struct end {
  rsb_comm *comm;
  uint32_t rank;
  pthread_t thread;
};

static void *live_thread(void *data) {
  struct end *end = data;
  live(end->comm, end->rank);
  return NULL;
}

/* All ranks, which are threads of this process. */
static void run_threads(uint32_t size) {
  struct end ends[3];
  rsb_comm *comms[3];
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  struct holdings before = holdings();
  rsb_error err;
  config.timeout_ns = 1000000000;
  config.staging_bytes = 1 << 20;
  begin(CREATE, trial->failing);
  rsb_status status = rsb_comm_create_local(size, &config, comms, &err);
  end(CREATE, trial->failing, status);
  if (status != RSB_OK) {
    judge(trial->failing, status, &err);
    check_holdings(before, "after a failed create");
    status = rsb_comm_create_local(size, &config, comms, &err);
    if (status != RSB_OK) violation("create fails again: %s", err.message);
    if (status != RSB_OK) _exit(0);
  }
  for (uint32_t r = 0; r < size; r++) {
    ends[r].comm = comms[r];
    ends[r].rank = r;
    if (pthread_create(&ends[r].thread, NULL, live_thread, &ends[r]) != 0) campaign_die("no thread");
  }
  for (uint32_t r = 0; r < size; r++) pthread_join(ends[r].thread, NULL);
  check_holdings(before, "after a fault and free");
  _exit(0);
}

static void run(int threads, enum phase phase, int fault, uint32_t failing, long nth) {
  pid_t children[3];
  char who[128];
  uint32_t size = phase == SHRINK ? 3 : 2;
  uint64_t number = trial->number + 1;
  memset(trial, 0, sizeof *trial);
  trial->number = number;
  trial->threads = threads;
  trial->phase = phase;
  trial->fault = fault;
  trial->failing = failing;
  trial->nth = nth;
  uint32_t processes = threads ? 1 : size;
  for (uint32_t r = 0; r < processes; r++) {
    children[r] = fork_guarded(GUARD_S);
    if (children[r] == 0 && threads) run_threads(size);
    if (children[r] == 0) run_rank(r, size);
  }
  for (uint32_t r = 0; r < processes; r++) {
    snprintf(who, sizeof who, "%s, call %ld of %s fails on rank %u: rank %u", phase_names[phase], nth,
             fault_names[fault], failing, r);
    reap(children[r], who, r == 2);
  }
  /* Created on one rank only: some rank has a group that is none. */
  if (!threads && phase == CREATE && trial->formed == 1) {
    violation("%s, call %ld of %s fails on rank %u: the group formed on one rank alone", phase_names[phase], nth,
              fault_names[fault], failing);
  }
}

/* Starts this program anew with the shim, unless it is there. */
static void preload(char **argv) {
  char self[4096], shim[4200];
  ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
  *(void **)&arm = dlsym(RTLD_DEFAULT, "shim_arm");
  *(void **)&disarm = dlsym(RTLD_DEFAULT, "shim_disarm");
  if (arm != NULL && disarm != NULL) return;
  if (n < 0 || getenv("LD_PRELOAD") != NULL) campaign_die("libshim.so cannot be preloaded");
  self[n] = '\0';
  snprintf(shim, sizeof shim, "%.*s/libshim.so", (int)(strrchr(self, '/') - self), self);
  setenv("LD_PRELOAD", shim, 1);
  setenv("RUST_BACKTRACE", "0", 1);
  execv(self, argv);
  campaign_die("cannot start again");
}

int main(int argc, char **argv) {
  static uint64_t points[2][PHASES], by_fault[FAULT_COUNT];
  uint64_t refused = 0, tolerated = 0, missed = 0, seen = 0;
  char key[64];
  preload(argv);
  campaign_begin("faults", "Every call of the C library fails once, in every phase, on both ranks, which are\nprocesses, then threads. N > 1: each Nth only.",
                 "create bucketer submit flush gather shrink free", 1, argc, argv);
  trial = shared(sizeof *trial);
  for (int which = 0; which < 2 * PHASES; which++) {
    int phase = which % PHASES, threads = which >= PHASES;
    if (!wanted(phase_names[phase])) continue;
    for (uint32_t failing = 0; failing < 2; failing++) {
      long calls[FAULT_COUNT];
      run(threads, (enum phase)phase, 0, failing, 0);
      memcpy(calls, trial->calls, sizeof calls);
      for (int fault = 0; fault < FAULT_COUNT; fault++) {
        for (long nth = 1; nth <= calls[fault] && violations() < 200; nth++) {
          if (seen++ % options.trials != 0) continue;
          run(threads, (enum phase)phase, fault, failing, nth);
          points[threads][phase]++;
          by_fault[fault]++;
          missed += !trial->fired;
          *(trial->status[failing] == RSB_OK ? &tolerated : &refused) += (uint64_t)trial->fired;
        }
      }
    }
  }
  for (int i = 0; i < 2 * PHASES; i++) {
    snprintf(key, sizeof key, "points_%s_%s", i < PHASES ? "processes" : "threads", phase_names[i % PHASES]);
    report_number(key, points[i / PHASES][i % PHASES]);
  }
  for (int i = 0; i < FAULT_COUNT; i++) {
    if (by_fault[i] == 0) continue;
    snprintf(key, sizeof key, "failures_of_%s", fault_names[i]);
    report_number(key, by_fault[i]);
  }
  report_number("calls_refused", refused);
  report_number("faults_without_effect", tolerated);
  report_number("calls_that_did_not_come_again", missed);
  return campaign_end();
}
