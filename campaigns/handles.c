/* handles.c - calls every function with handles that are none, from several threads while handles come and go.
 *
 * Promise: RSB_ERR_BAD_HANDLE (or the answer that the header gives for it), never anything else. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "campaign.h"
#include "worker.h"

enum { THREADS = 2, STALE = 256 };

/* What a bad handle can be. */
enum kind { NONE, STALE_ONE, OTHER_KIND, GARBAGE, ADDRESS, NEAR_MISS, KINDS };
static const char *const kind_names[KINDS] = {"null", "stale", "other_kind", "garbage", "address", "near_miss"};

struct thread {
  uint64_t seed, calls, by_kind[KINDS], ns;
  pthread_t id;
};

static rsb_comm *live_comm, *stale_comms[STALE];
static rsb_bucketer *live_bucketer, *stale_bucketers[STALE];
static rsb_shard *stale_shards[STALE];
static atomic_int stop;

/* The three kinds of handle are looked for with what is none of them. */
enum wants { COMM, BUCKETER, SHARD };

static void *draw(enum wants wants, enum kind kind, uint64_t *state) {
  size_t i = below(state, STALE);
  uint64_t live = wants == COMM ? (uint64_t)live_comm : (uint64_t)live_bucketer;
  switch (kind) {
    case NONE: return NULL;
    case STALE_ONE:
      return wants == COMM ? (void *)stale_comms[i] : wants == BUCKETER ? (void *)stale_bucketers[i] : stale_shards[i];
    case OTHER_KIND: return wants == COMM ? (void *)live_bucketer : (void *)live_comm;
    case GARBAGE: return (void *)next_random(state);
    case ADDRESS: return i % 2 == 0 ? (void *)state : (void *)&live_comm;
    /* A live handle's generation is another one; the place is right. */
    default: return (void *)(live ^ (uint64_t)1 << (24 + below(state, 32)));
  }
}

static void one_call(void *handle, enum wants wants, enum kind kind, unsigned which) {
  static const float data[64];
  static unsigned char bytes[64];
  const void *inputs[2] = {data, data + 8};
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  rsb_stats stats;
  rsb_error err = {.status = RSB_OK};
  uint64_t completed;
  rsb_status status = RSB_ERR_BAD_HANDLE;
  rsb_comm *comm = handle, *made = NULL;
  rsb_bucketer *bucketer = handle;
  int with_err = 0, none_is_fine = 0;
  args.flat_input = data;
  args.numel = 4;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  if (wants == SHARD) {
    if (which % 2 == 0 && rsb_shard_retain(handle) != NULL) violation("rsb_shard_retain takes a bad handle");
    if (which % 2 == 1) rsb_shard_release(handle);
    return;
  }
  if (wants == COMM) {
    switch (which % 8) {
      case 0: status = rsb_comm_rank(comm) == UINT32_MAX ? RSB_ERR_BAD_HANDLE : RSB_OK; break;
      case 1: status = rsb_comm_size(comm) == 0 ? RSB_ERR_BAD_HANDLE : RSB_OK; break;
      case 2: with_err = 1, status = rsb_comm_status(comm, &err); break;
      case 3: with_err = 1, status = rsb_comm_all_gather(comm, bytes, bytes, 8, &err); break;
      case 4: with_err = 1, status = rsb_comm_shrink(comm, NULL, &made, &err); break;
      case 5: rsb_comm_abort(comm); break;
      case 6: rsb_comm_free(comm); break;
      default: with_err = 1, status = rsb_bucketer_submit(live_bucketer, comm, &args, NULL, &err);
    }
  } else {
    switch (which % 9) {
      case 0: with_err = 1, status = rsb_bucketer_submit(bucketer, live_comm, &args, NULL, &err); break;
      case 1: with_err = 1;
        status = rsb_bucketer_reduce_scatter_async(bucketer, live_comm, inputs, 8, RSB_DTYPE_F32, RSB_OP_SUM, NULL, NULL,
                                                   &err);
        break;
      case 2: with_err = 1, status = rsb_bucketer_launch(bucketer, &err); break;
      case 3: with_err = 1, status = rsb_bucketer_flush(bucketer, &err); break;
      case 4: with_err = 1, status = rsb_bucketer_poll(bucketer, &completed, &err); break;
      case 5: with_err = 1, status = rsb_bucketer_wait(bucketer, 1, 0, &err); break;
      case 6: with_err = 1, status = rsb_bucketer_release_buffers(bucketer, &err); break;
      case 7: status = rsb_bucketer_free(bucketer), none_is_fine = 1; break;
      default: status = rsb_bucketer_stats(bucketer, &stats, sizeof stats);
    }
  }
  rsb_status expected = none_is_fine && handle == NULL ? RSB_OK : RSB_ERR_BAD_HANDLE;
  if (status != expected || (with_err && err.status != status)) {
    violation("%s handle %p, call %u of %s: %s, expected %s", kind_names[kind], handle, which,
              wants == COMM ? "comm" : "bucketer", rsb_status_name(status), rsb_status_name(expected));
  }
}

static void *hammer(void *data) {
  struct thread *t = data;
  uint64_t state = t->seed, begin = now_ns();
  for (uint64_t i = 0; i < t->calls; i++) {
    enum wants wants = (enum wants)below(&state, 3);
    enum kind kind = (enum kind)below(&state, KINDS);
    one_call(draw(wants, kind, &state), wants, kind, (unsigned)below(&state, 72));
    t->by_kind[kind]++;
  }
  t->ns = now_ns() - begin;
  return NULL;
}

/* Makes and frees handles all the time, so that places are taken again. */
static void *churn(void *data) {
  (void)data;
  while (!atomic_load(&stop)) {
    rsb_comm *comm;
    rsb_bucketer *bucketer;
    if (rsb_comm_create_local(1, NULL, &comm, NULL) != RSB_OK || rsb_bucketer_create(NULL, &bucketer, NULL) != RSB_OK) {
      violation("a good call fails among the bad ones");
      return NULL;
    }
    if (rsb_bucketer_free(bucketer) != RSB_OK) violation("a live handle is taken for a bad one");
    rsb_comm_free(comm);
    sleep_ns(20000);
  }
  return NULL;
}

static void keep_shard(void *place, const rsb_result *result) {
  *(rsb_shard **)place = rsb_shard_retain(result->shard);
}

/* Handles that were good once. */
static void make_stale(void) {
  static const float data[4];
  for (size_t i = 0; i < STALE; i++) {
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = data;
    args.numel = 4;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.callback = keep_shard;
    args.user_data = &stale_shards[i];
    if (rsb_comm_create_local(1, NULL, &stale_comms[i], NULL) != RSB_OK ||
        rsb_bucketer_create(NULL, &stale_bucketers[i], NULL) != RSB_OK ||
        rsb_bucketer_submit(stale_bucketers[i], stale_comms[i], &args, NULL, NULL) != RSB_OK ||
        rsb_bucketer_flush(stale_bucketers[i], NULL) != RSB_OK || stale_shards[i] == NULL) {
      campaign_die("no handles to make stale");
    }
    rsb_shard_release(stale_shards[i]);
    rsb_bucketer_free(stale_bucketers[i]);
    rsb_comm_free(stale_comms[i]);
  }
}

int main(int argc, char **argv) {
  static struct thread threads[THREADS];
  char key[64];
  pthread_t churner;
  uint64_t ns = 0, done = 0;
  campaign_begin("handles", "N calls with bad handles of every kind, on two threads.", NULL, 10000000, argc, argv);
  make_stale();
  struct holdings before = holdings();
  rsb_stats stats;
  if (rsb_comm_create_local(1, NULL, &live_comm, NULL) != RSB_OK ||
      rsb_bucketer_create(NULL, &live_bucketer, NULL) != RSB_OK || pthread_create(&churner, NULL, churn, NULL) != 0) {
    campaign_die("no handles");
  }
  for (int i = 0; i < THREADS; i++) {
    threads[i].seed = hash64(options.seed, (uint64_t)i);
    threads[i].calls = options.trials / THREADS;
    if (pthread_create(&threads[i].id, NULL, hammer, &threads[i]) != 0) campaign_die("no thread");
  }
  for (int i = 0; i < THREADS; i++) {
    pthread_join(threads[i].id, NULL);
    ns += threads[i].ns;
    done += threads[i].calls;
  }
  atomic_store(&stop, 1);
  pthread_join(churner, NULL);
  for (int kind = 0; kind < KINDS; kind++) {
    uint64_t calls = 0;
    for (int i = 0; i < THREADS; i++) calls += threads[i].by_kind[kind];
    snprintf(key, sizeof key, "calls_%s", kind_names[kind]);
    report_number(key, calls);
  }
  report_number("calls", done);
  report_number("ns_a_call_with_its_drawing", done == 0 ? 0 : ns / done);
  /* What is alive has not noticed anything. */
  if (rsb_comm_status(live_comm, NULL) != RSB_OK) violation("the live comm has failed");
  if (rsb_bucketer_stats(live_bucketer, &stats, sizeof stats) != RSB_OK || stats.ops_submitted != 0) {
    violation("the live bucketer has taken an op");
  }
  if (rsb_bucketer_free(live_bucketer) != RSB_OK) violation("the live bucketer cannot be freed");
  rsb_comm_free(live_comm);
  check_holdings(before, "after all calls");
  return campaign_end();
}
