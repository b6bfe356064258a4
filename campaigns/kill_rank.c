/* kill_rank.c - one rank of a kill trial: works until a peer dies, or dies as planned; then checks, shrinks, goes on. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "campaign.h"
#include "kill.h"
#include "worker.h"

enum { GOOD_FLUSHES = 20, FAT_BYTES = 256 << 20 };

struct life {
  struct stage *stage;
  const struct plan *plan;
  struct account *account;
  struct worker worker;
  uint32_t rank;
  int doomed; /* this rank is a victim */
  uint64_t callbacks;
};

static void die(struct life *l) {
  static char *const truth[] = {"true", NULL};
  atomic_store(&l->stage->death_ns, now_ns());
  if (l->plan->manner == BY_EXIT) exit(0);
  if (l->plan->manner == BY_EXEC) execv("/bin/true", truth);
  raise(SIGKILL);
  _exit(1);
}

/* The kernel kills this process in `ns`, wherever it is then. */
static void die_in(struct life *l, uint64_t ns) {
  struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGKILL};
  struct itimerspec when = {.it_value = {0, (long)(ns + 1)}};
  timer_t timer;
  atomic_store(&l->stage->death_ns, now_ns() + ns);
  if (timer_create(CLOCK_MONOTONIC, &event, &timer) != 0 || timer_settime(timer, 0, &when, NULL) != 0) die(l);
}

static int now_is(const struct life *l, enum phase phase, uint64_t round) {
  return l->doomed && l->plan->phase == phase && l->plan->round == round;
}

static void on_callback(void *data) {
  struct life *l = data;
  if (l->doomed && l->plan->phase == IN_CALLBACK && l->callbacks++ == l->plan->step + l->plan->round) die(l);
}

static void burden(struct life *l) {
  if (l->plan->fat) {
    char *memory = malloc(FAT_BYTES);
    if (memory == NULL) campaign_die("no memory");
    memset(memory, 1, FAT_BYTES);
    __asm__ volatile("" : : "r"(memory) : "memory");
  }
}

/* A child that holds whatever a child inherits, until the campaign ends it. */
static void have_child(struct life *l) {
  pid_t child = fork();
  if (child == 0) {
    alarm(20);
    for (;;) pause();
  }
  atomic_store(&l->stage->orphan, child);
}

/* The first error, as this rank sees it. */
static void note(struct life *l, rsb_status status, const rsb_error *err) {
  struct account *a = l->account;
  if (a->error_ns != 0) return;
  a->error_ns = now_ns();
  a->status = status;
  a->peer = err->peer;
  if (status != RSB_ERR_PEER_LOST || err->peer != (int32_t)l->plan->victim) {
    violation("trial %llu rank %u: %s peer %d, expected RSB_ERR_PEER_LOST peer %u: %s",
              (unsigned long long)l->plan->number, l->rank, rsb_status_name(status), err->peer, l->plan->victim,
              err->message);
  }
}

/* One round; the first status that is not OK. */
static rsb_status round_of(struct life *l, uint64_t round, rsb_error *err) {
  uint64_t state = hash64(l->plan->seed, round), submits = 1 + below(&state, 8);
  struct worker *w = &l->worker;
  rsb_status status = RSB_OK;
  for (uint64_t i = 0; i < submits && status == RSB_OK; i++) {
    struct op op = random_op(&state, round * 100 + i, 6000);
    if (now_is(l, BETWEEN_SUBMITS, round) && i == l->plan->step % submits) die(l);
    status = worker_submit(w, &op, err);
  }
  if (status != RSB_OK) return status;
  if (now_is(l, BEFORE_FLUSH, round) || now_is(l, IN_SHRINK, round)) die(l);
  if (now_is(l, OTHERS_FLUSH, round)) {
    for (uint32_t r = 0; r < l->plan->size; r++) {
      if (r != l->rank) await(&l->stage->ranks[r].flushing, (unsigned)round + 1);
    }
    sleep_ns(l->plan->delay_ns);
    die(l);
  }
  if (now_is(l, IN_FLUSH, round)) die_in(l, l->plan->delay_ns / 8);
  atomic_store(&l->account->flushing, (unsigned)round + 1);
  status = rsb_bucketer_flush(w->bucketer, err);
  if (status != RSB_OK) return status;
  worker_check(w, RSB_OK, "a good flush");
  if (below(&state, 2) != 0 || l->plan->phase == IN_GATHER) {
    size_t bytes = below(&state, 3) == 0 ? below(&state, 40000) : below(&state, 200);
    if (now_is(l, IN_GATHER, round)) die_in(l, l->plan->delay_ns / 8);
    if (!l->doomed && l->plan->phase == IN_GATHER && l->plan->round == round && l->plan->step % 2 == 0) sleep_ns(100000);
    status = worker_gather(w, bytes, round * 100 + 99, err);
  }
  if (now_is(l, IDLE, round)) {
    sleep_ns(l->plan->delay_ns);
    die(l);
  }
  return status;
}

/* Works until the first error. IN_FREE: the victim frees in its round, and the others notice. */
static rsb_status work(struct life *l, rsb_error *err) {
  for (uint64_t round = 0;; round++) {
    rsb_status status = round_of(l, round, err);
    if (status != RSB_OK) return status;
    if (now_is(l, IN_FREE, round)) {
      die_in(l, l->plan->delay_ns / 16);
      worker_close(&l->worker);
      rsb_comm_free(l->worker.comm);
      die(l);
    }
  }
}

/* After an error: everything owed is called back, the comm keeps its cause. */
static void settle(struct life *l) {
  rsb_error err;
  rsb_status status = rsb_bucketer_flush(l->worker.bucketer, &err);
  if (status != RSB_OK && status != RSB_ERR_PEER_LOST) {
    violation("trial %llu rank %u: flush after the death gives %s", (unsigned long long)l->plan->number, l->rank,
              rsb_status_name(status));
  }
  worker_check(&l->worker, RSB_ERR_PEER_LOST, "after the death");
  status = rsb_comm_status(l->worker.comm, &err);
  if (status != RSB_ERR_PEER_LOST || err.peer != l->account->peer) {
    violation("trial %llu rank %u: rsb_comm_status gives %s peer %d", (unsigned long long)l->plan->number, l->rank,
              rsb_status_name(status), err.peer);
  }
  l->account->ok = l->worker.ok;
  l->account->ok_hash = l->worker.ok_hash;
}

/* Shrinks until a comm of survivors does 20 good flushes; the comm that did. */
static rsb_comm *recover(struct life *l, rsb_comm *comm) {
  const struct plan *p = l->plan;
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_error err;
  config.timeout_ns = 5000000000;
  config.staging_bytes = 1 << 20;
  if (l->rank == p->second) {
    if (p->step % 4 == 0) die(l);
    die_in(l, p->delay_ns / 2);
  }
  for (int attempt = 0; attempt < 8; attempt++) {
    rsb_comm *next = NULL;
    uint64_t begin = now_ns();
    rsb_status status = rsb_comm_shrink(comm, &config, &next, &err);
    l->account->shrinks++;
    l->account->shrink_ns = now_ns() - begin;
    if (status != RSB_OK) {
      if (p->second != UINT32_MAX && (status == RSB_ERR_PEER_LOST || status == RSB_ERR_TIMEOUT)) continue;
      violation("trial %llu rank %u: rsb_comm_shrink: %s", (unsigned long long)p->number, l->rank, err.message);
      return comm;
    }
    rsb_comm_free(comm);
    comm = next;
    rsb_status opened = worker_open(&l->worker, comm, 4096, hash64(p->seed, 5), &err);
    if (opened != RSB_OK) violation("a bucketer after shrink: %s", err.message);
    l->account->last_size = rsb_comm_size(comm);
    int second_alive = p->second != UINT32_MAX && l->account->last_size == p->size - 1;
    if (!second_alive) {
      worker_rounds(&l->worker, GOOD_FLUSHES, "after shrink");
      return comm;
    }
    /* The other victim is still in: it goes before long, or has gone. */
    do {
      status = worker_gather(&l->worker, 8, l->worker.ok, &err);
    } while (status == RSB_OK);
    if (status != RSB_ERR_PEER_LOST) violation("after the second death: %s", err.message);
    worker_close(&l->worker);
  }
  violation("trial %llu rank %u: no comm after 8 attempts", (unsigned long long)p->number, l->rank);
  return comm;
}

int kill_rank(struct stage *stage, uint32_t rank) {
  static struct life life;
  struct life *l = &life;
  *l = (struct life){.stage = stage, .plan = &stage->plan, .account = &stage->ranks[rank], .rank = rank};
  const struct plan *p = l->plan;
  l->doomed = rank == p->victim;
  struct holdings before = holdings();
  if (l->doomed) burden(l);
  if (l->doomed && p->phase == BEFORE_CREATE) die(l);

  char name[64];
  snprintf(name, sizeof name, "kill-%llu", (unsigned long long)p->number);
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.timeout_ns = p->phase == BEFORE_CREATE ? 300000000 : p->phase <= ANY_TIME ? 500000000 : 10000000000;
  config.staging_bytes = 1 << 20;
  rsb_comm *comm = NULL;
  rsb_error err;
  atomic_store(&l->account->entering, 1);
  rsb_status status = rsb_comm_create_shm(name, rank, p->size, &config, &comm, &err);
  l->account->create_status = status;
  if (status != RSB_OK) {
    l->account->error_ns = now_ns();
    if (p->phase > ANY_TIME || (status != RSB_ERR_PEER_LOST && status != RSB_ERR_TIMEOUT) ||
        err.peer != (int32_t)p->victim) {
      violation("trial %llu rank %u: create: %s peer %d (victim %u): %s", (unsigned long long)p->number, rank,
                rsb_status_name(status), err.peer, p->victim, err.message);
    }
    check_holdings(before, "after a failed create");
    return 0;
  }
  uint64_t state = p->seed;
  if (worker_open(&l->worker, comm, 1024 << below(&state, 7), p->seed, &err) != RSB_OK) violation("%s", err.message);
  l->worker.hook = on_callback;
  l->worker.hook_data = l;
  if (l->doomed && p->family) have_child(l);

  status = work(l, &err);
  note(l, status, &err);
  settle(l);
  worker_close(&l->worker);
  comm = recover(l, comm);
  worker_close(&l->worker);
  rsb_comm_free(comm);
  check_holdings(before, "after everything was freed");
  return 0;
}
