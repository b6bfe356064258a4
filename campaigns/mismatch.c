/* mismatch.c - lets ranks differ in every way at random places of random programs, and checks what they are told.
 *
 * Promises: RSB_ERR_DESYNC on every rank, with one text that names the first call, the field and, where there is a strict
 * majority, the culprit; no callback with RSB_OK and a wrong result; and no alarm where ranks do not differ. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "campaign.h"
#include "engine.h"
#include "program.h"

enum { RANKS = 8, BATCH = 50, GUARD_S = 120 };
static const uint64_t timeout_ns = UINT64_C(20000000000);

/* IN_PLACE: threads with ops so large that they read each other's inputs. */
enum kind { THREADS, ENGINE, PROCESSES, IN_PLACE };
static const char *const kind_names[] = {"threads", "engine", "processes", "in_place"};

/* One trial: what each rank runs, and what must come of it. */
struct trial {
  uint64_t seed;
  uint32_t size, culprits;
  enum mutation mutation;
  struct program common, odd[2];
  struct program *of_rank[RANKS];
};

static uint64_t counts[MUTATIONS], named, two_culprits, matched, nothing;

/* Every eighth trial has no mismatch; some have two culprits. */
static void draw(struct trial *t, enum kind kind, uint64_t number) {
  static const uint32_t sizes[] = {2, 3, 4, 8};
  uint64_t state = hash64(options.seed + (uint64_t)kind, number);
  t->seed = next_random(&state);
  t->size = options.ranks != 0 ? options.ranks : sizes[below(&state, kind == PROCESSES ? 3 : 4)];
  t->culprits = below(&state, 8) == 0 ? 0 : t->size > 2 && below(&state, 8) == 0 ? 2 : 1;
  program_draw(&t->common, kind == IN_PLACE, &state);
  for (uint32_t r = 0; r < t->size; r++) t->of_rank[r] = &t->common;
  uint32_t culprit = (uint32_t)below(&state, t->size);
  for (uint32_t i = 0; i < t->culprits; i++) {
    t->odd[i] = t->common;
    t->mutation = (enum mutation)below(&state, MUTATIONS);
    program_mutate(&t->odd[i], t->mutation, &state);
    t->of_rank[(culprit + i) % t->size] = &t->odd[i];
  }
}

static void judge(const struct trial *t, enum kind kind, uint64_t number, const struct outcome *outcomes) {
  char part[128];
  if (t->culprits == 0) {
    matched++;
    for (uint32_t r = 0; r < t->size; r++) {
      if (outcomes[r].status != RSB_OK) {
        violation("%s trial %llu: FALSE ALARM on rank %u: %s", kind_names[kind], (unsigned long long)number, r,
                  outcomes[r].message);
      }
    }
    return;
  }
  struct difference d = program_difference(t->of_rank, t->size);
  counts[t->mutation]++;
  two_culprits += t->culprits == 2;
  named += d.peer >= 0;
  snprintf(part, sizeof part, "first at call %zu (tag %llu), %s is ", d.call, (unsigned long long)d.tag, d.field);
  for (uint32_t r = 0; r < t->size; r++) {
    const struct outcome *o = &outcomes[r];
    /* A rank that had not yet come to that call is said to have made none. */
    int none = strstr(o->message, "nothing on rank") != NULL;
    nothing += none && r == 0;
    if (none) snprintf(part, sizeof part, "first at call %zu (", d.call);
    if (o->status != RSB_ERR_DESYNC || o->peer != d.peer || strstr(o->message, part) == NULL ||
        strcmp(o->message, outcomes[0].message) != 0) {
      violation("%s trial %llu (%s, %u ranks) rank %u: %s peer %d, expected RSB_ERR_DESYNC peer %d '%s': %s",
                kind_names[kind], (unsigned long long)number, mutation_names[t->mutation], t->size, r,
                rsb_status_name(o->status), o->peer, d.peer, part, o->message);
    }
  }
}

/* ---- ranks as threads ----------------------------------------------------------------------------------- */

struct part {
  const struct program *program;
  rsb_comm *comm;
  uint64_t seed;
  struct outcome *out;
};

static void *run_part(void *data) {
  struct part *part = data;
  program_run(part->program, part->comm, part->seed, part->out);
  return NULL;
}

static void thread_trial(enum kind kind, uint64_t number) {
  static struct trial t;
  struct outcome outcomes[RANKS];
  struct part parts[RANKS];
  pthread_t threads[RANKS];
  rsb_comm *comms[RANKS];
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  rsb_error err;
  draw(&t, kind, number);
  config.timeout_ns = timeout_ns;
  if (kind != ENGINE) config.staging_bytes = 1 << 18;
  rsb_status status = kind != ENGINE ? rsb_comm_create_local(t.size, &config, comms, &err)
                                     : engine_comms(t.size, &config, comms, &err);
  if (status != RSB_OK) campaign_die("a group of threads: %s", err.message);
  for (uint32_t r = 0; r < t.size; r++) {
    parts[r] = (struct part){t.of_rank[r], comms[r], t.seed, &outcomes[r]};
    if (pthread_create(&threads[r], NULL, run_part, &parts[r]) != 0) campaign_die("no thread");
  }
  for (uint32_t r = 0; r < t.size; r++) pthread_join(threads[r], NULL);
  for (uint32_t r = 0; r < t.size; r++) rsb_comm_free(comms[r]);
  judge(&t, kind, number, outcomes);
}

/* ---- ranks as processes --------------------------------------------------------------------------------- */

static void process_rank(uint32_t rank, uint64_t first, struct outcome (*outcomes)[RANKS]) {
  static struct trial t;
  for (uint64_t i = 0; i < BATCH; i++) {
    char name[64];
    rsb_comm_config config = RSB_COMM_CONFIG_INIT;
    rsb_comm *comm;
    rsb_error err;
    draw(&t, PROCESSES, first + i);
    if (rank >= t.size) continue;
    snprintf(name, sizeof name, "mismatch-%llu", (unsigned long long)(first + i));
    config.timeout_ns = timeout_ns;
    config.staging_bytes = 1 << 18;
    if (rsb_comm_create_shm(name, rank, t.size, &config, &comm, &err) != RSB_OK) {
      violation("processes trial %llu: create: %s", (unsigned long long)(first + i), err.message);
      _exit(1);
    }
    program_run(t.of_rank[rank], comm, t.seed, &outcomes[i][rank]);
    rsb_comm_free(comm);
  }
  _exit(0);
}

/* Whole batches in processes that live on: no trial spoils the next. */
static void process_batch(uint64_t first, struct outcome (*outcomes)[RANKS]) {
  static struct trial t;
  pid_t children[4];
  uint32_t most = options.ranks != 0 ? options.ranks : 4;
  if (most > 4) campaign_die("--ranks: at most 4 with processes");
  memset(outcomes, 0, BATCH * sizeof *outcomes);
  for (uint32_t r = 0; r < most; r++) {
    children[r] = fork_guarded(GUARD_S);
    if (children[r] == 0) process_rank(r, first, outcomes);
  }
  for (uint32_t r = 0; r < most; r++) reap(children[r], "a rank of the process trials", 0);
  for (uint64_t i = 0; i < BATCH; i++) {
    draw(&t, PROCESSES, first + i);
    judge(&t, PROCESSES, first + i, outcomes[i]);
  }
}

/* ---- no mismatch, many times ---------------------------------------------------------------------------- */

struct long_run {
  rsb_comm *comm;
  uint64_t flushes;
};

/* Few small ops a flush; now and then an all-gather. */
static void *run_long(void *data) {
  struct long_run *run = data;
  struct worker *w = calloc(1, sizeof *w);
  rsb_error err;
  if (w == NULL) campaign_die("no memory");
  rsb_status status = worker_open(w, run->comm, 2048, options.seed, &err);
  for (uint64_t i = 0; i < run->flushes && status == RSB_OK; i++) {
    uint64_t state = hash64(options.seed, i);
    for (uint64_t n = 1 + below(&state, 3); n > 0 && status == RSB_OK; n--) {
      struct op op = random_op(&state, i * 4 + n, 32);
      status = worker_submit(w, &op, &err);
    }
    if (status == RSB_OK) status = rsb_bucketer_flush(w->bucketer, &err);
    if (status == RSB_OK && i % 64 == 0) status = worker_gather(w, i % 100, i, &err);
    worker_check(w, RSB_OK, "a matched flush");
  }
  if (status != RSB_OK) violation("FALSE ALARM among matched flushes: %s", err.message);
  worker_close(w);
  free(w);
  return NULL;
}

static void long_run(enum kind kind, uint32_t size, uint64_t flushes) {
  char key[64];
  rsb_comm *comms[RANKS];
  struct long_run runs[RANKS];
  pthread_t threads[RANKS];
  pid_t children[RANKS];
  rsb_error err;
  rsb_status status = RSB_OK;
  if (kind == THREADS) status = rsb_comm_create_local(size, NULL, comms, &err);
  if (kind == ENGINE) status = engine_comms(size, NULL, comms, &err);
  if (status != RSB_OK) campaign_die("a group: %s", err.message);
  for (uint32_t r = 0; r < size; r++) {
    if (kind != PROCESSES) {
      runs[r] = (struct long_run){comms[r], flushes};
      if (pthread_create(&threads[r], NULL, run_long, &runs[r]) != 0) campaign_die("no thread");
    } else if ((children[r] = fork_guarded(1000)) == 0) {
      if (rsb_comm_create_shm("matched", r, size, NULL, &runs[r].comm, &err) != RSB_OK) violation("%s", err.message);
      runs[r].flushes = flushes;
      run_long(&runs[r]);
      rsb_comm_free(runs[r].comm);
      _exit(0);
    }
  }
  for (uint32_t r = 0; r < size; r++) {
    if (kind == PROCESSES) {
      reap(children[r], "a rank of the matched flushes", 0);
    } else {
      pthread_join(threads[r], NULL);
      rsb_comm_free(comms[r]);
    }
  }
  snprintf(key, sizeof key, "matched_flushes_%s_%u", kind_names[kind], size);
  report_number(key, flushes);
}

int main(int argc, char **argv) {
  char key[64];
  campaign_begin("mismatch",
                 "Ranks that differ: N trials on threads, N / 4 on an engine, N / 10 on processes\nand on threads in place, 50 N flushes alike.",
                 "threads engine processes in_place matched", 20000, argc, argv);
  if (options.ranks == 1 || options.ranks > RANKS) campaign_die("--ranks: 2 to %d", RANKS);
  /* Processes first: they are forked before this process's first rsb_ call. */
  struct outcome (*outcomes)[RANKS] = shared(BATCH * sizeof *outcomes);
  uint64_t n = options.trials, batches = (n / 10 + BATCH - 1) / BATCH, flushes = 50 * n;
  if (!wanted("processes")) batches = 0;
  for (uint64_t i = 0; i < batches && violations() < 100; i++) process_batch(i * BATCH, outcomes);
  report_number("trials_processes", batches * BATCH);
  if (wanted("matched")) long_run(PROCESSES, 2, flushes / 4);
  for (int kind = THREADS; kind <= IN_PLACE; kind++) {
    if (kind == PROCESSES) continue;
    uint64_t trials = !wanted(kind_names[kind]) ? 0 : kind == THREADS ? n : kind == ENGINE ? n / 4 : n / 10;
    for (uint64_t i = 0; i < trials && violations() < 100; i++) thread_trial((enum kind)kind, i);
    snprintf(key, sizeof key, "trials_%s", kind_names[kind]);
    report_number(key, trials);
  }
  if (wanted("matched")) {
    long_run(THREADS, 2, flushes / 2);
    long_run(THREADS, 4, flushes / 8);
    long_run(ENGINE, 2, flushes / 8);
  }
  for (int i = 0; i < MUTATIONS; i++) {
    snprintf(key, sizeof key, "mismatch_%s", mutation_names[i]);
    report_number(key, counts[i]);
  }
  report_number("trials_with_two_culprits", two_culprits);
  report_number("trials_without_mismatch", matched);
  report_number("culprit_named", named);
  report_number("rank_said_to_have_made_no_call", nothing);
  return campaign_end();
}
