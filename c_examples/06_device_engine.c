/* 06_device_engine.c - an engine of one's own for GPU memory: ranks are threads that share a GPU and read each other's
 * memory by copies on the device. Nothing here waits for the device; streams wait for each other's events.
 *
 * The driver is loaded at run time, so that this builds everywhere. Where there is no GPU it says so. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rsbucket.h"

enum { RANKS = 3, TENSORS = 50, NUMEL = 1000, OPEN = 4, SLOTS = 2 * OPEN };

static struct {
  int (*init)(unsigned);
  int (*device_count)(int *);
  int (*retain)(void **, int);
  int (*release)(int);
  int (*push)(void *);
  int (*pop)(void **);
  int (*stream_create)(void **, unsigned);
  int (*stream_destroy)(void *);
  int (*stream_synchronize)(void *);
  int (*stream_wait)(void *, void *, unsigned);
  int (*event_create)(void **, unsigned);
  int (*event_record)(void *, void *);
  int (*event_destroy)(void *);
  int (*alloc)(uint64_t *, size_t);
  int (*free)(uint64_t);
  int (*to_device)(uint64_t, const void *, size_t);
  int (*to_host_async)(void *, uint64_t, size_t, void *);
  int (*copy_async)(uint64_t, uint64_t, size_t, void *);
} cu;

static int load_cuda(void) {
  static const struct { const char *name; void *function; } table[] = {
      {"cuInit", &cu.init},
      {"cuDeviceGetCount", &cu.device_count},
      {"cuDevicePrimaryCtxRetain", &cu.retain},
      {"cuDevicePrimaryCtxRelease_v2", &cu.release},
      {"cuCtxPushCurrent_v2", &cu.push},
      {"cuCtxPopCurrent_v2", &cu.pop},
      {"cuStreamCreate", &cu.stream_create},
      {"cuStreamDestroy_v2", &cu.stream_destroy},
      {"cuStreamSynchronize", &cu.stream_synchronize},
      {"cuStreamWaitEvent", &cu.stream_wait},
      {"cuEventCreate", &cu.event_create},
      {"cuEventRecord", &cu.event_record},
      {"cuEventDestroy_v2", &cu.event_destroy},
      {"cuMemAlloc_v2", &cu.alloc},
      {"cuMemFree_v2", &cu.free},
      {"cuMemcpyHtoD_v2", &cu.to_device},
      {"cuMemcpyDtoHAsync_v2", &cu.to_host_async},
      {"cuMemcpyDtoDAsync_v2", &cu.copy_async},
  };
  void *library = dlopen("libcuda.so.1", RTLD_NOW);
  if (library == NULL) return 0;
  for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
    void *symbol = dlsym(library, table[i].name);
    if (symbol == NULL) return 0;
    memcpy(table[i].function, &symbol, sizeof symbol);
  }
  return 1;
}

static void must(int code, const char *what) {
  if (code == 0) return;
  fprintf(stderr, "%s failed with code %d\n", what, code);
  exit(EXIT_FAILURE);
}

static void check(rsb_status status, const rsb_error *err, const char *what) {
  if (status == RSB_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, rsb_status_name(status), err->message);
  exit(EXIT_FAILURE);
}

/* One rank's part in collective `number`. Its request ends when all ranks have enqueued their reading of it; a rank has at
 * most OPEN requests, so whoever is OPEN collectives ahead knows that this one has ended everywhere. */
typedef struct {
  uint64_t number;     /* counted from 1 */
  int has_read;        /* its copies are enqueued, and `read` is recorded behind them */
  uint64_t send;
  void *ready, *read;  /* events */
} part;

static struct {
  pthread_mutex_t lock;
  part parts[RANKS][SLOTS];
  int aborted;
} group = {.lock = PTHREAD_MUTEX_INITIALIZER};

typedef struct {
  uint64_t number;
  rsb_coll coll;
} request;

typedef struct {
  int rank;
  uint64_t started;
  request requests[SLOTS];
} engine;

static size_t size_of(rsb_dtype dtype) { return rsb_dtype_size(dtype); }

/* Says where this rank's rows are, and from when on in its stream they may be read. */
static int32_t start(void *ctx, const rsb_coll *coll, void **out) {
  engine *self = ctx;
  uint64_t number = ++self->started;
  request *r = &self->requests[number % SLOTS];
  part *mine = &group.parts[self->rank][number % SLOTS];
  r->number = number;
  r->coll = *coll;
  *out = r;
  int code = cu.event_record(mine->ready, coll->stream);
  if (code != 0) return code;
  pthread_mutex_lock(&group.lock);
  mine->number = number;
  mine->has_read = 0;
  mine->send = (uint64_t)(uintptr_t)coll->send;
  pthread_mutex_unlock(&group.lock);
  return 0;
}

/* How many ranks have come to collective `number`, and how many have enqueued their reading. */
static void count(uint64_t number, int *come, int *have_read) {
  *come = *have_read = 0;
  for (int rank = 0; rank < RANKS; rank++) {
    const part *p = &group.parts[rank][number % SLOTS];
    *come += p->number == number;
    *have_read += p->number == number && p->has_read;
  }
}

/* An all-to-all: copies this rank's row from every rank, behind that rank's event. */
static int copy_rows(const engine *self, const request *r) {
  size_t bytes = r->coll.count * size_of(r->coll.dtype);
  uint64_t recv = (uint64_t)(uintptr_t)r->coll.recv;
  int code = 0;
  for (int rank = 0; rank < RANKS && code == 0; rank++) {
    const part *theirs = &group.parts[rank][r->number % SLOTS];
    code = cu.stream_wait(r->coll.stream, theirs->ready, 0);
    if (code == 0 && bytes > 0) {
      code = cu.copy_async(recv + (size_t)rank * bytes, theirs->send + (size_t)self->rank * bytes, bytes, r->coll.stream);
    }
  }
  return code;
}

static int32_t test(void *ctx, void *open, int32_t *done) {
  engine *self = ctx;
  const request *r = open;
  part *mine = &group.parts[self->rank][r->number % SLOTS];
  int come, have_read, code = 0;
  pthread_mutex_lock(&group.lock);
  count(r->number, &come, &have_read);
  if (group.aborted) code = -1;
  if (code == 0 && come == RANKS && !mine->has_read) {
    code = copy_rows(self, r);
    if (code == 0) code = cu.event_record(mine->read, r->coll.stream);
    mine->has_read = code == 0;
    count(r->number, &come, &have_read);
  }
  if (code == 0 && have_read == RANKS) {
    /* What comes next in this stream may overwrite the rows: all ranks' reading comes before it. */
    for (int rank = 0; rank < RANKS && code == 0; rank++) {
      code = cu.stream_wait(r->coll.stream, group.parts[rank][r->number % SLOTS].read, 0);
    }
    *done = code == 0;
  }
  pthread_mutex_unlock(&group.lock);
  return code;
}

static void stop(void *ctx) {
  (void)ctx;
  pthread_mutex_lock(&group.lock);
  group.aborted = 1;
  pthread_mutex_unlock(&group.lock);
}

static void nothing(void *ctx) { (void)ctx; }

typedef struct {
  int rank;
  float first[TENSORS];
} rank_args;

static pthread_barrier_t together;

/* "Enqueued": the shard is ready in the order of result->stream. */
static void on_shard(void *user_data, const rsb_result *result) {
  check(result->status, result->error, "the reduce-scatter failed");
  must(cu.to_host_async(user_data, (uint64_t)(uintptr_t)result->data, sizeof(float), result->stream),
       "cuMemcpyDtoHAsync");
}

static void *run(void *given) {
  rank_args *a = given;
  void *context, *stream;
  must(cu.retain(&context, 0), "cuDevicePrimaryCtxRetain");
  must(cu.push(context), "cuCtxPushCurrent");
  must(cu.stream_create(&stream, 1 /* non-blocking */), "cuStreamCreate");
  for (int s = 0; s < SLOTS; s++) {
    must(cu.event_create(&group.parts[a->rank][s].ready, 2 /* no timing */), "cuEventCreate");
    must(cu.event_create(&group.parts[a->rank][s].read, 2), "cuEventCreate");
  }

  /* Tensor t is t + rank everywhere, so shard t is RANKS * t plus the sum of the ranks. */
  static const size_t elements = (size_t)NUMEL * RANKS;
  float *host = malloc(sizeof(float) * elements);
  uint64_t tensors[TENSORS];
  if (host == NULL) exit(EXIT_FAILURE);
  for (int t = 0; t < TENSORS; t++) {
    for (size_t i = 0; i < elements; i++) host[i] = (float)(t + a->rank);
    must(cu.alloc(&tensors[t], sizeof(float) * elements), "cuMemAlloc");
    must(cu.to_device(tensors[t], host, sizeof(float) * elements), "cuMemcpyHtoD");
  }

  pthread_barrier_wait(&together);
  engine self = {.rank = a->rank};
  rsb_transport transport = {.struct_size = sizeof transport,
                             .flags = RSB_TRANSPORT_ALL_TO_ALL | RSB_TRANSPORT_DEVICE,
                             .ctx = &self,
                             .start = start,
                             .test = test,
                             .abort = stop,
                             .release = nothing};
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = stream;
  config.result_stream = stream;
  rsb_comm *comm;
  rsb_bucketer *bucketer;
  rsb_error err;
  check(rsb_comm_create_custom(&transport, (uint32_t)a->rank, RANKS, &config, &comm, &err), &err,
        "rsb_comm_create_custom");
  check(rsb_bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");
  for (int t = 0; t < TENSORS; t++) {
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = (const void *)(uintptr_t)tensors[t];
    args.numel = elements;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.callback = on_shard;
    args.user_data = &a->first[t];
    check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  }
  check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush"); /* everything is enqueued */
  must(cu.stream_synchronize(stream), "cuStreamSynchronize");            /* and now it is done */

  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  must(cu.stream_synchronize(stream), "cuStreamSynchronize");
  pthread_barrier_wait(&together);
  for (int t = 0; t < TENSORS; t++) must(cu.free(tensors[t]), "cuMemFree");
  for (int s = 0; s < SLOTS; s++) {
    must(cu.event_destroy(group.parts[a->rank][s].ready), "cuEventDestroy");
    must(cu.event_destroy(group.parts[a->rank][s].read), "cuEventDestroy");
  }
  must(cu.stream_destroy(stream), "cuStreamDestroy");
  must(cu.pop(&context), "cuCtxPopCurrent");
  must(cu.release(0), "cuDevicePrimaryCtxRelease");
  free(host);
  return NULL;
}

int main(void) {
  static rank_args ranks[RANKS];
  pthread_t threads[RANKS];
  int devices = 0, wrong = 0;
  if (!load_cuda() || cu.init(0) != 0 || cu.device_count(&devices) != 0 || devices == 0) {
    puts("no GPU here: libcuda.so.1 is missing, or has no device");
    return EXIT_SUCCESS;
  }
  must(pthread_barrier_init(&together, NULL, RANKS), "pthread_barrier_init");
  for (int r = 0; r < RANKS; r++) {
    ranks[r].rank = r;
    must(pthread_create(&threads[r], NULL, run, &ranks[r]), "pthread_create");
  }
  for (int r = 0; r < RANKS; r++) must(pthread_join(threads[r], NULL), "pthread_join");
  for (int r = 0; r < RANKS; r++) {
    for (int t = 0; t < TENSORS; t++) wrong += ranks[r].first[t] != (float)(RANKS * t + RANKS * (RANKS - 1) / 2);
  }
  printf("%d ranks on one GPU: %d tensors each, %d wrong\n", RANKS, TENSORS, wrong);
  return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
