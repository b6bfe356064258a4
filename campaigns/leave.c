/* leave.c - ranks that are threads read each other's inputs in place, while one of them leaves, aborts or stays away.
 *
 * Promises: everybody else is told who and why, and alike; each accepted op is called back once; what is OK is right,
 * though every input is overwritten when its submit returns, and the same ops are OK on all; survivors of one that left
 * shrink and go on; freeing when nobody needs a rank is no error. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "campaign.h"
#include "worker.h"

enum { RANKS = 8, ROUNDS = 5, GOOD_ROUNDS = 3 };

/* What the odd rank does; BY_OTHER: a thread that is none of the ranks does it, at any time. */
enum manner { NOTHING, LEAVES, LEAVES_BY_OTHER, ABORTS, ABORTS_BY_OTHER, STAYS_AWAY, MANNERS };
static const char *const manner_names[MANNERS] = {"nothing",         "leaves",     "leaves_by_other", "aborts",
                                                  "aborts_by_other", "stays_away"};

struct trial {
  uint64_t seed, number, round, step;
  uint32_t size, odd;
  enum manner manner;
  int64_t bucket_bytes;
  atomic_uint opened, ended;
};

struct part {
  struct trial *trial;
  uint32_t rank;
  rsb_comm *comm;
  rsb_status status;
  uint64_t ok, ok_hash;
};

static uint64_t counts[MANNERS], ended_well[MANNERS];
static atomic_ullong in_place, shrinks;

static void draw(struct trial *t, uint64_t number) {
  uint64_t state = hash64(options.seed, number);
  memset(t, 0, sizeof *t);
  t->number = number;
  t->seed = next_random(&state);
  t->size = options.ranks != 0 ? options.ranks : (uint32_t[]){2, 3, 4, 4, 8}[below(&state, 5)];
  t->odd = (uint32_t)below(&state, t->size);
  /* Staying away costs a timeout. */
  t->manner = below(&state, 40) == 0 ? STAYS_AWAY : (enum manner)below(&state, STAYS_AWAY);
  t->bucket_bytes = below(&state, 3) == 0 ? -1 : 1024 << below(&state, 7);
  t->round = below(&state, ROUNDS);
  t->step = below(&state, 4);
}

/* Half of the ops are large enough to be read in place, from 32 KiB a row. */
static struct op draw_op(uint64_t *state, uint64_t id, uint32_t size) {
  struct op op = random_op(state, id, 600);
  if (below(state, 2) == 0) return op;
  op.numel = (op.flat ? size : 1) * (8200 + (uint32_t)below(state, 3000));
  atomic_fetch_add(&in_place, 1);
  return op;
}

static int is_odd(const struct part *p, enum manner manner) {
  return p->rank == p->trial->odd && p->trial->manner == manner;
}

/* The calls of a rank up to the first error; RSB_ERR_CANCELLED: it leaves. */
static rsb_status run(struct part *p, struct worker *w, rsb_error *err) {
  struct trial *t = p->trial;
  rsb_status status = RSB_OK;
  for (uint64_t round = 0; round < ROUNDS && status == RSB_OK; round++) {
    uint64_t state = hash64(t->seed, round), steps = 1 + below(&state, 4);
    for (uint64_t i = 0; i < steps && status == RSB_OK; i++) {
      uint64_t id = round * 100 + i;
      if (round == t->round && i == t->step % steps) {
        if (is_odd(p, LEAVES)) return RSB_ERR_CANCELLED;
        if (is_odd(p, ABORTS)) rsb_comm_abort(p->comm);
        if (is_odd(p, STAYS_AWAY)) await(&t->ended, t->size - 1);
      }
      if (below(&state, 6) == 0) {
        status = worker_gather(w, below(&state, 3000), id, err);
      } else {
        struct op op = draw_op(&state, id, t->size);
        status = worker_submit(w, &op, err);
      }
    }
    if (status == RSB_OK && below(&state, 2) == 0) status = rsb_bucketer_flush(w->bucketer, err);
  }
  if (status == RSB_OK) status = rsb_bucketer_flush(w->bucketer, err);
  return status == RSB_OK ? worker_gather(w, 0, 99, err) : status;
}

/* What a rank must be told. A call of another thread may come too late for anything. */
static void judge(const struct part *p, const rsb_error *err) {
  const struct trial *t = p->trial;
  int by_other = t->manner == LEAVES_BY_OTHER || t->manner == ABORTS_BY_OTHER;
  rsb_status expected = RSB_OK;
  int32_t peer = -1;
  const char *part = "";
  if (t->manner == ABORTS || t->manner == ABORTS_BY_OTHER) expected = RSB_ERR_ABORTED;
  if (t->manner == STAYS_AWAY) expected = RSB_ERR_TIMEOUT, peer = (int32_t)t->odd;
  if (t->manner == LEAVES || t->manner == LEAVES_BY_OTHER) {
    expected = RSB_ERR_PEER_LOST, peer = (int32_t)t->odd, part = "left";
    if (p->rank == t->odd) expected = t->manner == LEAVES ? RSB_ERR_CANCELLED : RSB_ERR_BAD_HANDLE;
  }
  if (p->status == RSB_OK && (expected == RSB_OK || by_other)) return;
  int named = p->rank == t->odd || ((peer < 0 || err->peer == peer) && strstr(err->message, part) != NULL);
  if (p->status == expected && named) return;
  violation("trial %llu (%s, rank %u of %u), rank %u: %s peer %d, expected %s peer %d: %s", (unsigned long long)t->number,
            manner_names[t->manner], t->odd, t->size, p->rank, rsb_status_name(p->status), err->peer,
            rsb_status_name(expected), peer, p->status == RSB_ERR_CANCELLED ? "" : err->message);
}

/* Those that lost a rank go on without it. */
static void go_on(struct part *p) {
  struct worker *w = calloc(1, sizeof *w);
  rsb_comm *next = NULL;
  rsb_error err;
  if (w == NULL) campaign_die("no memory");
  rsb_status status = rsb_comm_shrink(p->comm, NULL, &next, &err);
  if (status == RSB_OK) status = worker_open(w, next, p->trial->bucket_bytes, p->trial->seed, &err);
  if (status != RSB_OK) {
    violation("trial %llu: shrink on rank %u: %s", (unsigned long long)p->trial->number, p->rank, err.message);
  } else {
    if (w->size != p->trial->size - 1) violation("shrink gives a group of %u", w->size);
    worker_rounds(w, GOOD_ROUNDS, "after a rank has left");
    worker_close(w);
    atomic_fetch_add(&shrinks, 1);
  }
  rsb_comm_free(next);
  free(w);
}

static void *rank_of(void *data) {
  struct part *p = data;
  struct trial *t = p->trial;
  struct worker *w = calloc(1, sizeof *w);
  rsb_error err = {.peer = -1}, again;
  if (w == NULL) campaign_die("no memory");
  p->status = worker_open(w, p->comm, t->bucket_bytes, t->seed, &err);
  atomic_fetch_add(&t->opened, 1);
  if (p->status == RSB_OK) p->status = run(p, w, &err);
  judge(p, &err);
  int leaves = p->status == RSB_ERR_CANCELLED || p->status == RSB_ERR_BAD_HANDLE;
  if (!leaves) rsb_bucketer_flush(w->bucketer, &again);
  size_t owed = w->count;
  worker_close(w);
  w->count = owed;
  worker_check(w, leaves ? RSB_ERR_CANCELLED : p->status, manner_names[t->manner]);
  p->ok = w->ok;
  p->ok_hash = w->ok_hash;
  atomic_fetch_add(&t->ended, 1);
  if (p->status == RSB_ERR_PEER_LOST && p->rank != t->odd) go_on(p);
  rsb_comm_free(p->comm);
  free(w);
  return NULL;
}

static void trial(uint64_t number) {
  static struct trial t;
  struct part parts[RANKS];
  pthread_t threads[RANKS];
  rsb_comm *comms[RANKS];
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_error err;
  draw(&t, number);
  uint64_t state = t.seed;
  config.timeout_ns = t.manner == STAYS_AWAY ? 300000000 : UINT64_C(20000000000);
  config.staging_bytes = 1 << 20;
  if (rsb_comm_create_local(t.size, &config, comms, &err) != RSB_OK) campaign_die("a group: %s", err.message);
  for (uint32_t r = 0; r < t.size; r++) {
    parts[r] = (struct part){.trial = &t, .rank = r, .comm = comms[r]};
    if (pthread_create(&threads[r], NULL, rank_of, &parts[r]) != 0) campaign_die("no thread");
  }
  if (t.manner == LEAVES_BY_OTHER || t.manner == ABORTS_BY_OTHER) {
    await(&t.opened, t.size);
    sleep_ns(below(&state, 8000000));
    if (t.manner == ABORTS_BY_OTHER) rsb_comm_abort(comms[t.odd]);
    if (t.manner == LEAVES_BY_OTHER) rsb_comm_free(comms[t.odd]);
  }
  for (uint32_t r = 0; r < t.size; r++) pthread_join(threads[r], NULL);
  int leaves = t.manner == LEAVES || t.manner == LEAVES_BY_OTHER;
  uint32_t first = leaves && t.odd == 0 ? 1 : 0;
  for (uint32_t r = first; r < t.size; r++) {
    if (leaves && r == t.odd) continue;
    if (parts[r].ok != parts[first].ok || parts[r].ok_hash != parts[first].ok_hash ||
        parts[r].status != parts[first].status) {
      violation("trial %llu (%s): rank %u has %llu ops that are OK and ends with %s, rank %u %llu and %s",
                (unsigned long long)number, manner_names[t.manner], r, (unsigned long long)parts[r].ok,
                rsb_status_name(parts[r].status), first, (unsigned long long)parts[first].ok,
                rsb_status_name(parts[first].status));
    }
  }
  counts[t.manner]++;
  ended_well[t.manner] += parts[first].status == RSB_OK;
}

int main(int argc, char **argv) {
  char key[64];
  campaign_begin("leave", "Threads that read inputs in place; one leaves, aborts or stays away.", NULL, 2000, argc, argv);
  if (options.ranks == 1 || options.ranks > RANKS) campaign_die("--ranks: 2 to %d", RANKS);
  struct holdings before = holdings();
  for (uint64_t i = 0; i < options.trials && violations() < 100; i++) trial(i);
  check_holdings(before, "after all groups");
  for (int i = 0; i < MANNERS; i++) {
    snprintf(key, sizeof key, "trials_%s", manner_names[i]);
    report_number(key, counts[i]);
  }
  report_number("left_too_late_for_anything", ended_well[LEAVES_BY_OTHER]);
  report_number("aborted_too_late_for_anything", ended_well[ABORTS_BY_OTHER]);
  report_number("submits_of_32_kib_a_row", in_place);
  report_number("shrinks", shrinks);
  return campaign_end();
}
