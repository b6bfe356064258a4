/* 05_nccl.c - gradients on GPUs: one rank for each GPU of this host, a thread each, over NCCL.
 *
 * Both libraries of NVIDIA's are loaded at run time, so that this builds everywhere; a program with the toolkit would
 * include <cuda.h> and <nccl.h>. Where there is no GPU it says so. Usage: 05_nccl [ranks] (more ranks than GPUs needs
 * NCCL 2.30 and NCCL_MULTI_RANK_GPU_ENABLE=1). */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "rsbucket.h"

enum { TENSORS = 100, NUMEL = 1000, MOST = 16 };
typedef struct { char internal[128]; } unique_id;

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
  int (*alloc)(uint64_t *, size_t);
  int (*free)(uint64_t);
  int (*to_device)(uint64_t, const void *, size_t);
  int (*to_host_async)(void *, uint64_t, size_t, void *);
} cu;

static struct {
  int (*get_unique_id)(unique_id *);
  int (*init_rank)(void **, int, unique_id, int);
  int (*destroy)(void *);
} nccl;

/* Writes a symbol's address into the function pointer at `function`; 0: there is none. */
static int load(void *library, const char *name, void *function) {
  void *symbol = dlsym(library, name);
  memcpy(function, &symbol, sizeof symbol);
  return symbol != NULL;
}

static int load_cuda(void) {
  void *l = dlopen("libcuda.so.1", RTLD_NOW);
  return l != NULL && load(l, "cuInit", &cu.init) && load(l, "cuDeviceGetCount", &cu.device_count) &&
         load(l, "cuDevicePrimaryCtxRetain", &cu.retain) && load(l, "cuDevicePrimaryCtxRelease_v2", &cu.release) &&
         load(l, "cuCtxPushCurrent_v2", &cu.push) && load(l, "cuCtxPopCurrent_v2", &cu.pop) &&
         load(l, "cuStreamCreate", &cu.stream_create) && load(l, "cuStreamDestroy_v2", &cu.stream_destroy) &&
         load(l, "cuStreamSynchronize", &cu.stream_synchronize) && load(l, "cuMemAlloc_v2", &cu.alloc) &&
         load(l, "cuMemFree_v2", &cu.free) && load(l, "cuMemcpyHtoD_v2", &cu.to_device) &&
         load(l, "cuMemcpyDtoHAsync_v2", &cu.to_host_async);
}

static int load_nccl(void) {
  const char *named = getenv("RSBUCKET_NCCL_LIB");
  void *l = dlopen(named != NULL ? named : "libnccl.so.2", RTLD_NOW);
  return l != NULL && load(l, "ncclGetUniqueId", &nccl.get_unique_id) &&
         load(l, "ncclCommInitRank", &nccl.init_rank) && load(l, "ncclCommDestroy", &nccl.destroy);
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

typedef struct {
  int rank, size, device;
  unique_id id;
  float first[TENSORS]; /* of each shard, when its stream has come to it */
} rank_args;

/* Ranks that share a GPU must not allocate or free there while another's collective waits for them: that may wait for the
 * whole device. */
static pthread_barrier_t together;

typedef struct { float *to; } destination;

/* "Enqueued": the shard is ready in the order of result->stream. So the copy goes there, and nobody waits. */
static void on_shard(void *user_data, const rsb_result *result) {
  check(result->status, result->error, "the reduce-scatter failed");
  must(cu.to_host_async(((destination *)user_data)->to, (uint64_t)(uintptr_t)result->data, sizeof(float), result->stream),
       "cuMemcpyDtoHAsync");
}

static void *run(void *given) {
  rank_args *a = given;
  void *context, *stream, *comm;
  must(cu.retain(&context, a->device), "cuDevicePrimaryCtxRetain");
  must(cu.push(context), "cuCtxPushCurrent");
  must(cu.stream_create(&stream, 1 /* non-blocking */), "cuStreamCreate");
  must(nccl.init_rank(&comm, a->size, a->id, a->rank), "ncclCommInitRank");

  /* Tensor t is t + rank everywhere, so shard t is size * t plus the sum of the ranks, halved. */
  size_t bytes = sizeof(float) * NUMEL * (size_t)a->size;
  float *host = malloc(bytes);
  uint64_t *tensors = malloc(sizeof *tensors * TENSORS);
  destination *to = malloc(sizeof *to * TENSORS);
  if (host == NULL || tensors == NULL || to == NULL) exit(EXIT_FAILURE);
  for (int t = 0; t < TENSORS; t++) {
    for (size_t i = 0; i < bytes / sizeof(float); i++) host[i] = (float)(t + a->rank);
    must(cu.alloc(&tensors[t], bytes), "cuMemAlloc");
    must(cu.to_device(tensors[t], host, bytes), "cuMemcpyHtoD");
  }

  pthread_barrier_wait(&together);
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = stream;
  config.result_stream = stream;
  rsb_comm *wrapped;
  rsb_bucketer *bucketer;
  rsb_error err;
  check(rsb_comm_wrap_nccl(comm, &config, &wrapped, &err), &err, "rsb_comm_wrap_nccl");
  check(rsb_bucketer_create(NULL, &bucketer, &err), &err, "rsb_bucketer_create");
  for (int t = 0; t < TENSORS; t++) {
    to[t].to = &a->first[t];
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = (const void *)(uintptr_t)tensors[t];
    args.numel = NUMEL * (size_t)a->size;
    args.dtype = RSB_DTYPE_F32;
    args.op = RSB_OP_SUM;
    args.scale = 0.5;
    args.callback = on_shard;
    args.user_data = &to[t];
    check(rsb_bucketer_submit(bucketer, wrapped, &args, NULL, &err), &err, "rsb_bucketer_submit");
  }
  check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush"); /* everything is enqueued */
  must(cu.stream_synchronize(stream), "cuStreamSynchronize");            /* and now it is done */

  rsb_bucketer_free(bucketer);
  rsb_comm_free(wrapped);
  must(cu.stream_synchronize(stream), "cuStreamSynchronize");
  pthread_barrier_wait(&together);
  must(nccl.destroy(comm), "ncclCommDestroy");
  for (int t = 0; t < TENSORS; t++) must(cu.free(tensors[t]), "cuMemFree");
  must(cu.stream_destroy(stream), "cuStreamDestroy");
  must(cu.pop(&context), "cuCtxPopCurrent");
  must(cu.release(a->device), "cuDevicePrimaryCtxRelease");
  free(to);
  free(tensors);
  free(host);
  return NULL;
}

int main(int argc, char **argv) {
  static rank_args ranks[MOST];
  pthread_t threads[MOST];
  unique_id id;
  int devices = 0;
  if (!load_cuda() || cu.init(0) != 0 || cu.device_count(&devices) != 0 || devices == 0) {
    puts("no GPU here: libcuda.so.1 is missing, or has no device");
    return EXIT_SUCCESS;
  }
  if (!load_nccl()) {
    puts("no NCCL here: libnccl.so.2 is missing; RSBUCKET_NCCL_LIB may name it");
    return EXIT_SUCCESS;
  }
  int size = argc > 1 ? atoi(argv[1]) : devices;
  if (size < 1 || size > MOST) {
    fprintf(stderr, "ranks: %d; expected 1 to %d\n", size, MOST);
    return EXIT_FAILURE;
  }
  must(pthread_barrier_init(&together, NULL, (unsigned)size), "pthread_barrier_init");
  must(nccl.get_unique_id(&id), "ncclGetUniqueId");
  for (int r = 0; r < size; r++) {
    ranks[r] = (rank_args){.rank = r, .size = size, .device = r % devices, .id = id};
    must(pthread_create(&threads[r], NULL, run, &ranks[r]), "pthread_create");
  }
  int wrong = 0;
  for (int r = 0; r < size; r++) must(pthread_join(threads[r], NULL), "pthread_join");
  for (int r = 0; r < size; r++) {
    for (int t = 0; t < TENSORS; t++) {
      wrong += ranks[r].first[t] != 0.5f * (float)(size * t + size * (size - 1) / 2);
    }
  }
  printf("%d rank(s) on %d GPU(s): %d tensors each, %d wrong\n", size, devices, TENSORS, wrong);
  return wrong == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
