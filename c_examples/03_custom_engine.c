/* 03_custom_engine.c - rsbucket over an engine of your own: rsb_transport in about 100 lines.
 *
 * The engine moves bytes between the threads of this process by all-to-all and all-gather; rsbucket reduces. A real
 * one would sit on MPI, a vendor's library or a network. Its parts are the same: start and test never block, the
 * requests of all ranks with the same number are one collective, and release ends what is still open. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rsbucket.h"

enum { RANKS = 3, NUMEL = 5 };
enum { ENGINE_ABORTED = 1, ENGINE_NO_MEMORY, ENGINE_PEER_GONE };

/* ---- the engine ---------------------------------------------------------------------------------- */

/* One collective: every rank's request, by the number of its start call. */
struct round {
  struct round *next;
  unsigned long number;
  int posted, copied, ended; /* how many ranks have come so far */
  struct post {
    const char *send;
    char *recv;
    size_t bytes; /* from each rank to each */
    uint32_t kind;
    int copied;
  } posts[RANKS];
};

struct engine {
  pthread_mutex_t lock;
  struct round *rounds;
  unsigned long started[RANKS];
  int aborted, released[RANKS];
};

/* A transport's ctx: one rank's end. */
struct end {
  struct engine *engine;
  uint32_t rank;
};

/* The round of that number, made by the first rank that needs it. */
static struct round *find_round(struct engine *engine, unsigned long number) {
  struct round *round = engine->rounds;
  while (round != NULL && round->number != number) round = round->next;
  if (round == NULL && (round = calloc(1, sizeof *round)) != NULL) {
    round->number = number;
    round->next = engine->rounds;
    engine->rounds = round;
  }
  return round;
}

static void remove_round(struct engine *engine, struct round *round) {
  struct round **link = &engine->rounds;
  while (*link != round) link = &(*link)->next;
  *link = round->next;
  free(round);
}

static int32_t engine_start(void *ctx, const rsb_coll *coll, void **request) {
  struct end *end = ctx;
  struct engine *engine = end->engine;
  int32_t code = 0;
  pthread_mutex_lock(&engine->lock); /* held for copying at most, never while waiting for a rank */
  struct round *round = engine->aborted ? NULL : find_round(engine, engine->started[end->rank]);
  if (round == NULL) {
    code = engine->aborted ? ENGINE_ABORTED : ENGINE_NO_MEMORY;
  } else {
    struct post post = {coll->send, coll->recv, coll->count * rsb_dtype_size(coll->dtype), coll->kind, 0};
    engine->started[end->rank]++;
    round->posts[end->rank] = post;
    round->posted++;
    *request = round;
  }
  pthread_mutex_unlock(&engine->lock);
  return code;
}

/* This rank's part of a round that every rank has posted. */
static void copy(struct round *round, uint32_t rank) {
  struct post *mine = &round->posts[rank];
  for (uint32_t r = 0; r < RANKS && mine->bytes > 0; r++) {
    const char *from = round->posts[r].send + (mine->kind == RSB_COLL_ALL_TO_ALL ? rank * mine->bytes : 0);
    char *to = mine->recv + r * mine->bytes;
    if (to != from) memcpy(to, from, mine->bytes); /* an all-gather may be in place */
  }
  mine->copied = 1;
  round->copied++;
}

static int32_t engine_test(void *ctx, void *request, int32_t *done) {
  struct end *end = ctx;
  struct engine *engine = end->engine;
  struct round *round = request;
  int32_t code = 0, gone = 0;
  pthread_mutex_lock(&engine->lock);
  for (uint32_t r = 0; r < RANKS; r++) gone |= engine->released[r];
  *done = round->copied == RANKS; /* only now no rank reads this one's `send` any more */
  if (!*done && engine->aborted) code = ENGINE_ABORTED;
  if (!*done && gone) code = ENGINE_PEER_GONE;
  if (!*done && code == 0 && round->posted == RANKS && !round->posts[end->rank].copied) {
    copy(round, end->rank);
    *done = round->copied == RANKS;
  }
  if (*done && ++round->ended == RANKS) remove_round(engine, round);
  pthread_mutex_unlock(&engine->lock);
  return code;
}

static void engine_abort(void *ctx) {
  struct end *end = ctx;
  pthread_mutex_lock(&end->engine->lock);
  end->engine->aborted = 1;
  pthread_mutex_unlock(&end->engine->lock);
}

/* From here on nobody copies from or to this rank's memory: every test sees `released` first. */
static void engine_release(void *ctx) {
  struct end *end = ctx;
  struct engine *engine = end->engine;
  int all = 1;
  pthread_mutex_lock(&engine->lock);
  engine->released[end->rank] = 1;
  for (uint32_t r = 0; r < RANKS; r++) all &= engine->released[r];
  while (all && engine->rounds != NULL) remove_round(engine, engine->rounds); /* what failed half-way */
  pthread_mutex_unlock(&engine->lock);
}

static void engine_describe(void *ctx, int32_t code, char *text, size_t size) {
  static const char *const texts[] = {"no error", "aborted", "no memory for a request", "a rank has left"};
  (void)ctx;
  snprintf(text, size, "%s", code >= 0 && code <= ENGINE_PEER_GONE ? texts[code] : "unknown code");
}

/* ---- its use ------------------------------------------------------------------------------------- */

struct rank {
  struct end end;
  double shard[NUMEL], gathered[RANKS][NUMEL];
};

static void check(rsb_status status, const rsb_error *err, const char *what) {
  if (status == RSB_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, rsb_status_name(status), err->message);
  exit(EXIT_FAILURE);
}

static void on_shard(void *user_data, const rsb_result *result) {
  struct rank *rank = user_data;
  check(result->status, result->error, "a reduce-scatter failed");
  memcpy(rank->shard, result->data, result->numel * sizeof(double));
}

static void *run_rank(void *argument) {
  struct rank *rank = argument;
  rsb_transport transport = {0};
  rsb_comm *comm;
  rsb_bucketer *bucketer;
  rsb_error err;
  transport.struct_size = sizeof transport;
  transport.flags = RSB_TRANSPORT_ALL_TO_ALL | RSB_TRANSPORT_ALL_GATHER;
  transport.ctx = &rank->end;
  transport.start = engine_start;
  transport.test = engine_test;
  transport.abort = engine_abort;
  transport.release = engine_release;
  transport.describe = engine_describe;
  check(rsb_comm_create_custom(&transport, rank->end.rank, RANKS, NULL, &comm, &err), &err, "rsb_comm_create_custom");
  check(rsb_bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");

  double pieces[RANKS][NUMEL];
  const void *inputs[RANKS];
  for (uint32_t r = 0; r < RANKS; r++) {
    for (uint32_t i = 0; i < NUMEL; i++) pieces[r][i] = (double)((7 * r + 3 * i + 5 * rank->end.rank) % 11);
    inputs[r] = pieces[r];
  }
  check(rsb_bucketer_reduce_scatter_async(bucketer, comm, inputs, NUMEL, RSB_DTYPE_F64, RSB_OP_MAX, on_shard, rank,
                                          &err),
        &err, "rsb_bucketer_reduce_scatter_async");
  check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
  check(rsb_comm_all_gather(comm, rank->shard, rank->gathered, sizeof rank->shard, &err), &err, "rsb_comm_all_gather");
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  return NULL;
}

int main(void) {
  static struct engine engine = {.lock = PTHREAD_MUTEX_INITIALIZER};
  static struct rank ranks[RANKS];
  pthread_t threads[RANKS];
  for (uint32_t r = 0; r < RANKS; r++) {
    ranks[r].end.engine = &engine;
    ranks[r].end.rank = r;
    if (pthread_create(&threads[r], NULL, run_rank, &ranks[r]) != 0) {
      fprintf(stderr, "cannot start the thread of rank %u\n", (unsigned)r);
      return EXIT_FAILURE;
    }
  }
  for (uint32_t r = 0; r < RANKS; r++) pthread_join(threads[r], NULL);
  for (uint32_t r = 0; r < RANKS; r++) {
    printf("rank %u: maximum", (unsigned)r);
    for (size_t i = 0; i < NUMEL; i++) printf(" %g", ranks[r].shard[i]);
    printf(", gathered");
    for (size_t i = 0; i < RANKS * NUMEL; i++) printf(" %g", ranks[r].gathered[i / NUMEL][i % NUMEL]);
    putchar('\n');
  }
  return EXIT_SUCCESS;
}
