/* speed.c: what packing, submitting and bucketing cost on a GPU, each beside what it replaces in the same run, and that
 * packing goes on while a collective does. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu.h"

enum { WORLD = 8, ROUNDS = 21 };

/* The stand-ins are slow, and their times mean nothing. */
static int rounds(void) { return gpu_is_fake ? 2 : ROUNDS; }
static int warm(void) { return gpu_is_fake ? 1 : 3; }

static const size_t MEGA = 1 << 20;

/* ---- One kernel for a bucket, beside a copy of as many bytes ---------------------------------------------- */

/* Keeps a stream busy for longer than the host takes to enqueue what is measured behind it, and empties the caches:
 * copies half of `room` to the other half. */
static size_t half_room(void) { return gpu_is_fake ? 64 : 128 * MEGA; }

static void occupy(CUdeviceptr room, CUstream stream) {
  for (int i = 0; i < 3; i++) GPU_MUST(cuMemcpyDtoDAsync_v2, room + half_room(), room, half_room(), stream);
}

static double packing(gpu_rank *r, size_t bytes, double *copying) {
  enum { TENSORS = 64 };
  size_t numel = bytes / TENSORS / sizeof(float);
  gpu_engine engine = {0};
  rsb_comm *comm = gpu_alone(&engine, r, WORLD);
  rsb_bucketer *bucketer = gpu_bucketer((int64_t)(2 * bytes)); /* never full */
  CUdeviceptr in = gpu_memory(bytes), to = gpu_memory(bytes), room = gpu_memory(2 * half_room());
  CUevent begin = gpu_event(), end = gpu_event();
  double packs[ROUNDS], copies[ROUNDS];
  rsb_error err;
  for (int round = -warm(); round < rounds(); round++) {
    for (int t = 0; t < TENSORS; t++)
      gpu_submit(bucketer, comm, in + (size_t)t * numel * sizeof(float), 0, numel, RSB_SUBMIT_BORROW);
    /* The engine knows the comm's stream from the round before. */
    if (engine.stream != NULL) {
      occupy(room, engine.stream);
      GPU_MUST(cuEventRecord, begin, engine.stream);
    }
    gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
    GPU_MUST(cuStreamSynchronize, r->result);
    if (round >= 0) packs[round] = gpu_ms(begin, engine.packed);
    occupy(room, r->stream);
    GPU_MUST(cuEventRecord, begin, r->stream);
    GPU_MUST(cuMemcpyDtoDAsync_v2, to, in, bytes, r->stream);
    GPU_MUST(cuEventRecord, end, r->stream);
    GPU_MUST(cuStreamSynchronize, r->stream);
    if (round >= 0) copies[round] = gpu_ms(begin, end);
  }
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  GPU_MUST(cuStreamSynchronize, r->result);
  CUevent events[] = {begin, end, engine.packed, engine.sent};
  for (int i = 0; i < 4; i++) GPU_MUST(cuEventDestroy_v2, events[i]);
  GPU_MUST(cuMemFree_v2, in);
  GPU_MUST(cuMemFree_v2, to);
  GPU_MUST(cuMemFree_v2, room);
  *copying = gpu_median(copies, rounds());
  return gpu_median(packs, rounds());
}

void check_pack(void) {
  gpu_start();
  const size_t sizes[] = {25, 50, 100, 200};
  char text[400] = "";
  double least = INFINITY;
  gpu_rank r = {.size = 1};
  gpu_begin(&r);
  for (int i = 0; i < 4; i++) {
    size_t bytes = gpu_is_fake ? sizes[i] << 12 : sizes[i] * MEGA;
    double copied, packed = packing(&r, bytes, &copied);
    double share = 100 * copied / packed, rate = (double)bytes / packed * 1e-6;
    least = fmin(least, share);
    size_t used = strlen(text);
    snprintf(text + used, sizeof text - used, "%s%zu MB %.0f GB/s = %.0f %%", i ? ", " : "", sizes[i], rate, share);
  }
  gpu_finish(&r);
  GPU_GOAL(least >= 90, "of a copy (goal 90 %%): %s", text);
}

/* ---- The host's time of a submit ------------------------------------------------------------------------------ */

static double submitting(gpu_rank *r, uint32_t flags) {
  enum { OPS = 500, NUMEL = 1024 };
  gpu_engine engine = {0};
  rsb_comm *comm = gpu_alone(&engine, r, WORLD);
  rsb_bucketer *bucketer = gpu_bucketer(25 * (int64_t)MEGA);
  CUdeviceptr in = gpu_memory(OPS * NUMEL * sizeof(float));
  double times[ROUNDS];
  rsb_error err;
  for (int round = -warm(); round < rounds(); round++) {
    double begin = gpu_seconds();
    for (size_t i = 0; i < OPS; i++) gpu_submit(bucketer, comm, in + i * NUMEL * sizeof(float), 0, NUMEL, flags);
    if (round >= 0) times[round] = (gpu_seconds() - begin) / OPS * 1e6;
    gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
    GPU_MUST(cuStreamSynchronize, r->result);
  }
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  GPU_MUST(cuStreamSynchronize, r->result);
  GPU_MUST(cuEventDestroy_v2, engine.packed);
  GPU_MUST(cuEventDestroy_v2, engine.sent);
  GPU_MUST(cuMemFree_v2, in);
  return gpu_median(times, rounds());
}

void check_submit(void) {
  gpu_start();
  gpu_rank r = {.size = 1};
  gpu_begin(&r);
  double lent = submitting(&r, RSB_SUBMIT_BORROW), packed = submitting(&r, 0);
  gpu_finish(&r);
  GPU_GOAL(lent <= 2, "%.2f us with BORROW (goal 2), %.2f us without", lent, packed);
}

/* ---- Buckets beside NCCL alone, for the shapes of a model --------------------------------------------------- */

typedef struct {
  size_t count, shard[2000], at[2001]; /* of the output; inputs begin at size times that */
  double ms[4];
} model;

static void read_shapes(model *m, const char *path, int size) {
  char line[1024];
  FILE *file = fopen(path, "r");
  if (file == NULL) GPU_SKIPPED("%s cannot be read", path);
  size_t numels[2000], count = 0;
  while (count < 2000 && fgets(line, sizeof line, file)) {
    const char *column = strrchr(line, '\t');
    if (column != NULL) numels[count++] = strtoull(column, NULL, 10);
  }
  fclose(file);
  /* Gradients come from the last tensor to the first. */
  for (size_t i = 0; i < count; i++) {
    m->shard[i] = (numels[count - 1 - i] + (size_t)size - 1) / (size_t)size;
    m->at[i + 1] = m->at[i] + (m->shard[i] + 63) / 64 * 64;
  }
  m->count = count;
}

static void reduce_scatter(gpu_rank *r, const model *m, CUdeviceptr in, CUdeviceptr out, bool grouped) {
  if (grouped) GPU_MUST(ncclGroupStart);
  for (size_t t = 0; t < m->count; t++) {
    const void *from = (void *)(uintptr_t)(in + m->at[t] * (size_t)r->size * sizeof(float));
    void *to = (void *)(uintptr_t)(out + m->at[t] * sizeof(float));
    GPU_MUST(ncclReduceScatter, from, to, m->shard[t], ncclFloat32, ncclSum, r->nccl, r->result);
  }
  if (grouped) GPU_MUST(ncclGroupEnd);
}

static void time_model(gpu_rank *r) {
  model *m = r->arg;
  size_t outputs = m->at[m->count] * sizeof(float), inputs = outputs * (size_t)r->size;
  CUdeviceptr in = gpu_memory(inputs), out = gpu_memory(outputs);
  GPU_MUST(cuMemsetD8Async, in, 0, inputs, r->stream);
  GPU_MUST(cuStreamSynchronize, r->stream);
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = r->stream;
  config.result_stream = r->result;
  rsb_comm *comm;
  rsb_error err;
  gpu_check(rsb_comm_wrap_nccl(r->nccl, &config, &comm, &err), &err, "rsb_comm_wrap_nccl");
  rsb_bucketer *bucketer = gpu_bucketer(0);
  for (int way = 0; way < 4; way++) {
    double ms[ROUNDS];
    for (int round = -warm(); round < rounds(); round++) {
      gpu_meet();
      double begin = gpu_seconds();
      if (way < 2) {
        for (size_t t = 0; t < m->count; t++)
          gpu_submit(bucketer, comm, in + m->at[t] * (size_t)r->size * sizeof(float), out + m->at[t] * sizeof(float),
                     m->shard[t] * (size_t)r->size, way == 0 ? RSB_SUBMIT_BORROW : 0);
        gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
      } else {
        reduce_scatter(r, m, in, out, way == 2);
      }
      GPU_MUST(cuStreamSynchronize, r->result);
      if (round >= 0) ms[round] = (gpu_seconds() - begin) * 1e3;
    }
    if (r->rank == 0) m->ms[way] = gpu_median(ms, rounds());
  }
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  gpu_meet();
  GPU_MUST(cuMemFree_v2, in);
  GPU_MUST(cuMemFree_v2, out);
}

void check_shapes(void) {
  gpu_start();
  static model m;
  int size = gpu_ranks(8);
  const char *path = getenv("GPU_TABLE_SHAPES");
  read_shapes(&m, path != NULL ? path : "bench/shapes/resnet50.tsv", size);
  gpu_run(size, time_model, &m);
  GPU_OK("%zu tensors, %d rank(s): %.2f ms lent, %.2f packed, %.2f in a group of NCCL's, %.2f one by one", m.count, size,
         m.ms[0], m.ms[1], m.ms[2], m.ms[3]);
}

/* ---- Packing while a collective goes on ------------------------------------------------------------------------- */

void check_overlap(void) {
  gpu_start();
  gpu_rank r = {.size = 1};
  gpu_begin(&r);
  size_t bytes = gpu_is_fake ? 1 << 16 : 64 * MEGA;
  gpu_engine engine = {.bytes = bytes, .copies = 40, .from = gpu_memory(bytes), .to = gpu_memory(bytes)};
  rsb_comm *comm = gpu_alone(&engine, &r, WORLD);
  rsb_bucketer *bucketer = gpu_bucketer((int64_t)(2 * bytes));
  CUdeviceptr in = gpu_memory(bytes);
  CUevent packed = gpu_event();
  rsb_error err;
  double sent = 0, next = 0;
  for (int round = 0; round < warm(); round++) {
    gpu_submit(bucketer, comm, in, 0, bytes / sizeof(float), 0);
    gpu_check(rsb_bucketer_launch(bucketer, &err), &err, "rsb_bucketer_launch");
    /* While that is sent, the next one is packed, whose own collective comes later. */
    CUevent began = engine.packed, ended = engine.sent;
    engine.packed = gpu_event();
    engine.sent = gpu_event();
    gpu_submit(bucketer, comm, in, 0, bytes / sizeof(float), 0);
    GPU_MUST(cuEventRecord, packed, r.stream);
    gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
    GPU_MUST(cuStreamSynchronize, r.result);
    sent = gpu_ms(began, ended);
    next = gpu_ms(began, packed);
    GPU_MUST(cuEventDestroy_v2, began);
    GPU_MUST(cuEventDestroy_v2, ended);
  }
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  GPU_MUST(cuStreamSynchronize, r.result);
  CUevent events[] = {packed, engine.packed, engine.sent};
  for (int i = 0; i < 3; i++) GPU_MUST(cuEventDestroy_v2, events[i]);
  CUdeviceptr memory[] = {in, engine.from, engine.to};
  for (int i = 0; i < 3; i++) GPU_MUST(cuMemFree_v2, memory[i]);
  gpu_finish(&r);
  const char *text = "the next bucket is packed %.3f ms after a collective began that takes %.3f ms";
  gpu_end(gpu_is_fake || next < sent ? "ok" : "FAILED", text, next, sent);
}
