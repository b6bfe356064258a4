/* engine.c - see engine.h. Whoever starts a collective leaves a copy; whoever finds all copies takes its parts. */
#include "engine.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "campaign.h"

enum { RANKS = 16, OPEN = 16 };

/* The collective number n of all ranks lies in place n % OPEN. Four are open at most on each rank. */
struct place {
  unsigned char *copies[RANKS];
  size_t bytes[RANKS]; /* of one part */
  uint32_t taken;
};

struct fabric {
  pthread_mutex_t lock;
  uint32_t size, users;
  struct place places[OPEN];
};

struct request {
  struct place *place;
  void *recv;
  uint32_t kind;
};

struct end {
  struct fabric *fabric;
  uint32_t rank;
  uint64_t started;
  struct request requests[OPEN];
};

static int32_t start(void *ctx, const rsb_coll *coll, void **out) {
  struct end *end = ctx;
  struct fabric *f = end->fabric;
  uint64_t number = end->started++;
  struct place *place = &f->places[number % OPEN];
  size_t part = coll->count * rsb_dtype_size(coll->dtype);
  size_t total = coll->kind == RSB_COLL_ALL_TO_ALL ? part * f->size : part;
  unsigned char *copy = malloc(total + 1);
  if (copy == NULL) return 1;
  if (total != 0) memcpy(copy, coll->send, total);
  pthread_mutex_lock(&f->lock);
  int busy = place->copies[end->rank] != NULL;
  place->copies[end->rank] = copy;
  place->bytes[end->rank] = part;
  pthread_mutex_unlock(&f->lock);
  if (busy) violation("engine: more requests are open than the contract allows");
  struct request *request = &end->requests[number % OPEN];
  *request = (struct request){place, coll->recv, coll->kind};
  *out = request;
  return 0;
}

static int32_t test(void *ctx, void *name, int32_t *done) {
  struct end *end = ctx;
  struct fabric *f = end->fabric;
  struct request *request = name;
  struct place *place = request->place;
  int32_t code = 0;
  pthread_mutex_lock(&f->lock);
  *done = 1;
  for (uint32_t r = 0; r < f->size; r++) *done &= place->copies[r] != NULL;
  for (uint32_t r = 0; r < f->size && *done; r++) {
    size_t part = place->bytes[end->rank], from = request->kind == RSB_COLL_ALL_TO_ALL ? end->rank * part : 0;
    if (place->bytes[r] != part) code = 2;
    if (code == 0 && part != 0) memcpy((char *)request->recv + r * part, place->copies[r] + from, part);
  }
  if (*done && ++place->taken == f->size) {
    for (uint32_t r = 0; r < f->size; r++) {
      free(place->copies[r]);
      place->copies[r] = NULL;
    }
    place->taken = 0;
  }
  pthread_mutex_unlock(&f->lock);
  return code;
}

static void release(void *ctx) {
  struct end *end = ctx;
  struct fabric *f = end->fabric;
  pthread_mutex_lock(&f->lock);
  uint32_t left = --f->users;
  pthread_mutex_unlock(&f->lock);
  free(end);
  if (left != 0) return;
  for (size_t i = 0; i < OPEN; i++) {
    for (uint32_t r = 0; r < f->size; r++) free(f->places[i].copies[r]);
  }
  pthread_mutex_destroy(&f->lock);
  free(f);
}

static void describe(void *ctx, int32_t code, char *text, size_t size) {
  static const char *const texts[] = {"", "no memory", "ranks came with different sizes"};
  (void)ctx;
  if (code < 0 || code > 2 || size == 0) return;
  strncpy(text, texts[code], size - 1);
  text[size - 1] = '\0';
}

rsb_status engine_comms(uint32_t size, const rsb_comm_config *config, rsb_comm **out, rsb_error *err) {
  struct fabric *f = calloc(1, sizeof *f);
  if (f == NULL || size > RANKS) campaign_die("no engine for %u ranks", size);
  pthread_mutex_init(&f->lock, NULL);
  f->size = f->users = size;
  for (uint32_t r = 0; r < size; r++) {
    struct end *end = calloc(1, sizeof *end);
    if (end == NULL) campaign_die("no memory");
    end->fabric = f;
    end->rank = r;
    rsb_transport transport = {.struct_size = sizeof transport, .ctx = end, .start = start, .test = test};
    transport.flags = RSB_TRANSPORT_ALL_TO_ALL | RSB_TRANSPORT_ALL_GATHER;
    transport.release = release;
    transport.describe = describe;
    rsb_status status = rsb_comm_create_custom(&transport, r, size, config, &out[r], err);
    if (status != RSB_OK) return status;
  }
  return RSB_OK;
}
