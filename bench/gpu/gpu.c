/* gpu.c: the driver and NCCL loaded by name, ranks as threads, and the program: gpu_table CHECK runs one check.
 * GPU_TABLE_RANKS limits the ranks, GPU_TABLE_SHAPES names a list of shapes (as bench/shapes has them). */
#define _GNU_SOURCE
#include "gpu.h"

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

gpu_calls gpu;
int gpu_devices;
char gpu_name[256];
bool gpu_is_fake;
static pthread_barrier_t together;

void gpu_end(const char *state, const char *format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  printf("%s: %s\n", state, text);
  fflush(stdout);
  /* Other ranks may be in the middle of anything. */
  if (strcmp(state, "FAILED") == 0) _Exit(EXIT_FAILURE);
  exit(EXIT_SUCCESS);
}

void gpu_must(int code, const char *what) {
  if (code != 0) GPU_FAILED("%s says %d", what, code);
}

void gpu_check(rsb_status status, const rsb_error *err, const char *what) {
  if (status != RSB_OK) GPU_FAILED("%s: %s: %s", what, rsb_status_name(status), err->message);
}

/* ---- Libraries ----------------------------------------------------------------------------------------- */

static bool load(void *library, const char *name, void *into) {
  void *symbol = dlsym(library, name);
  memcpy(into, &symbol, sizeof symbol);
  return symbol != NULL;
}

#define LOAD(name) \
  if (!load(library, #name, &gpu.name)) GPU_SKIPPED("no " #name " in %s", path);

static void *open_or_skip(const char *path) {
  void *library = dlopen(path, RTLD_NOW);
  if (library == NULL) GPU_SKIPPED("%s cannot be loaded", path);
  return library;
}

void gpu_start(void) {
  const char *path = "libcuda.so.1";
  void *library = open_or_skip(path);
  GPU_DRIVER(LOAD)
  if (gpu.cuInit(0) != 0 || gpu.cuDeviceGetCount(&gpu_devices) != 0 || gpu_devices == 0) GPU_SKIPPED("no device");
  GPU_MUST(cuDeviceGetName, gpu_name, sizeof gpu_name, 0);
  gpu_is_fake = strncmp(gpu_name, "stand-in", 8) == 0;
  if (gpu_devices == 1) {
    /* Two ranks on it, where NCCL can; it wants to know before it is loaded. */
    setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 0);
    setenv("NCCL_MAX_CTAS", "8", 0);
  }
}

static void load_nccl(void) {
  const char *path = getenv("RSBUCKET_NCCL_LIB");
  path = path != NULL ? path : "libnccl.so.2";
  void *library = open_or_skip(path);
  GPU_NCCL(LOAD)
}

/* ---- Ranks ------------------------------------------------------------------------------------------------ */

int gpu_ranks(int most) {
  int version = 0;
  load_nccl();
  GPU_MUST(ncclGetVersion, &version);
  int possible = gpu_devices > 1 ? gpu_devices : version >= 23000 ? 2 : 1;
  const char *limit = getenv("GPU_TABLE_RANKS");
  if (limit != NULL && atoi(limit) > 0 && atoi(limit) < most) most = atoi(limit);
  return possible < most ? possible : most;
}

void gpu_begin(gpu_rank *r) {
  GPU_MUST(cuDevicePrimaryCtxRetain, &r->context, r->device);
  GPU_MUST(cuCtxPushCurrent_v2, r->context);
  GPU_MUST(cuStreamCreate, &r->stream, CU_STREAM_NON_BLOCKING);
  GPU_MUST(cuStreamCreate, &r->result, CU_STREAM_NON_BLOCKING);
}

void gpu_finish(gpu_rank *r) {
  GPU_MUST(cuStreamDestroy_v2, r->result);
  GPU_MUST(cuStreamDestroy_v2, r->stream);
  GPU_MUST(cuCtxPopCurrent_v2, &r->context);
  GPU_MUST(cuDevicePrimaryCtxRelease_v2, r->device);
}

typedef struct {
  gpu_rank rank;
  ncclUniqueId id;
  void (*fn)(gpu_rank *);
} job;

static void *run(void *given) {
  job *j = given;
  gpu_begin(&j->rank);
  GPU_MUST(ncclCommInitRank, &j->rank.nccl, j->rank.size, j->id, j->rank.rank);
  j->fn(&j->rank);
  gpu_meet();
  if (j->rank.nccl != NULL) GPU_MUST(ncclCommDestroy, j->rank.nccl);
  gpu_finish(&j->rank);
  return NULL;
}

void gpu_run(int size, void (*fn)(gpu_rank *), void *arg) {
  job jobs[16];
  pthread_t threads[16];
  ncclUniqueId id;
  GPU_MUST(ncclGetUniqueId, &id);
  gpu_must(pthread_barrier_init(&together, NULL, (unsigned)size), "pthread_barrier_init");
  for (int r = 0; r < size; r++) {
    jobs[r] = (job){{.rank = r, .size = size, .device = r % gpu_devices, .arg = arg}, id, fn};
    gpu_must(pthread_create(&threads[r], NULL, run, &jobs[r]), "pthread_create");
  }
  for (int r = 0; r < size; r++) gpu_must(pthread_join(threads[r], NULL), "pthread_join");
}

void gpu_meet(void) { pthread_barrier_wait(&together); }

/* ---- Little helpers ------------------------------------------------------------------------------------------ */

CUdeviceptr gpu_memory(size_t bytes) {
  CUdeviceptr at = 0;
  GPU_MUST(cuMemAlloc_v2, &at, bytes);
  return at;
}

uint64_t gpu_hash(uint64_t a, uint64_t b, uint64_t c) {
  uint64_t h = a * 0x9e3779b97f4a7c15u + b * 0xbf58476d1ce4e5b9u + c;
  h = (h ^ h >> 30) * 0xbf58476d1ce4e5b9u;
  h = (h ^ h >> 27) * 0x94d049bb133111ebu;
  return h ^ h >> 31;
}

double gpu_random(uint64_t a, uint64_t b, uint64_t c) { return (double)(int64_t)gpu_hash(a, b, c) * 0x1p-63; }

double gpu_seconds(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

float gpu_ms(CUevent from, CUevent to) {
  float ms = 0;
  GPU_MUST(cuEventElapsedTime, &ms, from, to);
  return ms;
}

static int ascending(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

double gpu_median(double *values, int count) {
  qsort(values, (size_t)count, sizeof *values, ascending);
  return values[count / 2];
}

CUevent gpu_event(void) {
  CUevent event;
  GPU_MUST(cuEventCreate, &event, CU_EVENT_DEFAULT);
  return event;
}

static int32_t start(void *ctx, const rsb_coll *coll, void **request) {
  gpu_engine *e = ctx;
  (void)request;
  e->stream = coll->stream;
  int code = gpu.cuEventRecord(e->packed, e->stream);
  for (int i = 0; i < e->copies && code == 0; i++) code = gpu.cuMemcpyDtoDAsync_v2(e->to, e->from, e->bytes, e->stream);
  return code != 0 ? code : gpu.cuEventRecord(e->sent, e->stream);
}

static int32_t is_enqueued(void *ctx, void *request, int32_t *done) {
  (void)ctx, (void)request;
  *done = 1;
  return 0;
}

static void release(void *ctx) { (void)ctx; }

rsb_comm *gpu_alone(gpu_engine *engine, const gpu_rank *rank, uint32_t size) {
  engine->packed = gpu_event();
  engine->sent = gpu_event();
  rsb_transport transport = {
      .struct_size = sizeof transport,
      .flags = RSB_TRANSPORT_DEVICE | RSB_TRANSPORT_REDUCE_SCATTER,
      .ctx = engine,
      .start = start,
      .test = is_enqueued,
      .release = release,
  };
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = rank->stream;
  config.result_stream = rank->result;
  rsb_comm *comm;
  rsb_error err;
  gpu_check(rsb_comm_create_custom(&transport, 0, size, &config, &comm, &err), &err, "rsb_comm_create_custom");
  return comm;
}

rsb_bucketer *gpu_bucketer(int64_t bucket_bytes) {
  rsb_config config = RSB_CONFIG_INIT;
  rsb_bucketer *bucketer;
  rsb_error err;
  config.bucket_bytes = bucket_bytes;
  gpu_check(rsb_bucketer_create(&config, &bucketer, &err), &err, "rsb_bucketer_create");
  return bucketer;
}

void gpu_submit(rsb_bucketer *bucketer, rsb_comm *comm, CUdeviceptr input, CUdeviceptr output, size_t numel,
                uint32_t flags) {
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  rsb_error err;
  args.flat_input = (void *)(uintptr_t)input;
  args.output = (void *)(uintptr_t)output;
  args.numel = numel;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  args.flags = flags;
  gpu_check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
}

/* ---- The program ------------------------------------------------------------------------------------------------ */

static const struct {
  const char *name;
  void (*run)(void);
} checks[] = {
    {"values", check_values}, {"exact", check_exact},   {"captures", check_captures}, {"pack", check_pack},
    {"submit", check_submit}, {"shapes", check_shapes}, {"overlap", check_overlap},   {"absent", check_absent},
    {"killed", check_killed}, {"sticky", check_sticky},
};

int main(int argc, char **argv) {
  for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) {
    if (argc == 2 && strcmp(argv[1], checks[i].name) == 0) checks[i].run();
  }
  fprintf(stderr, "usage: gpu_table CHECK, one of:");
  for (size_t i = 0; i < sizeof checks / sizeof *checks; i++) fprintf(stderr, " %s", checks[i].name);
  fprintf(stderr, "\n");
  return 2;
}
