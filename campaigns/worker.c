/* worker.c - see worker.h. */
#define _GNU_SOURCE
#include "worker.h"

#include <stdlib.h>
#include <string.h>

#include "campaign.h"

/* Element `at` of what `rank` gives to op `id`: small integers, so that every sum is exact in every type. */
static int64_t element(const struct worker *w, uint32_t rank, const struct op *op, size_t at) {
  uint64_t h = hash64(w->seed ^ op->id * UINT64_C(0x9e3779b97f4a7c15), (uint64_t)rank << 40 | at);
  return op->dtype == RSB_DTYPE_U8 ? (int64_t)(h % 16) : (int64_t)(h % 1024) - 512;
}

static void store(void *to, rsb_dtype dtype, size_t at, int64_t value) {
  switch (dtype) {
    case RSB_DTYPE_F32: ((float *)to)[at] = (float)value; break;
    case RSB_DTYPE_F64: ((double *)to)[at] = (double)value; break;
    case RSB_DTYPE_I32: ((int32_t *)to)[at] = (int32_t)value; break;
    case RSB_DTYPE_I64: ((int64_t *)to)[at] = value; break;
    default: ((uint8_t *)to)[at] = (uint8_t)value;
  }
}

static double load(const void *from, rsb_dtype dtype, size_t at) {
  switch (dtype) {
    case RSB_DTYPE_F32: return ((const float *)from)[at];
    case RSB_DTYPE_F64: return ((const double *)from)[at];
    case RSB_DTYPE_I32: return ((const int32_t *)from)[at];
    case RSB_DTYPE_I64: return (double)((const int64_t *)from)[at];
    default: return ((const uint8_t *)from)[at];
  }
}

static double expected(const struct worker *w, const struct op *op, size_t at) {
  double result = 0;
  for (uint32_t r = 0; r < w->size; r++) {
    double x = (double)element(w, r, op, at);
    if (r == 0) {
      result = x;
    } else if (op->op == RSB_OP_SUM) {
      result += x;
    } else {
      result = (op->op == RSB_OP_MIN) == (x < result) ? x : result;
    }
  }
  return op->scale == 0 ? result : result * op->scale;
}

static void check_data(struct record *record, const rsb_result *result) {
  struct worker *w = record->worker;
  const struct op *op = &record->op;
  size_t shard = op->flat ? rsb_shard_numel(op->numel, w->size) : op->numel, begin = w->rank * shard;
  size_t end = op->flat ? op->numel : w->size * (size_t)op->numel;
  if (result->numel != shard) violation("rank %u: a shard of %zu, expected %zu", w->rank, result->numel, shard);
  for (size_t i = 0; i < result->numel && begin + i < end; i++) {
    double got = load(result->data, op->dtype, i), want = expected(w, op, begin + i);
    if (got == want) continue;
    violation("rank %u of %u: WRONG RESULT with RSB_OK: op %llu element %zu is %g, expected %g", w->rank, w->size,
              (unsigned long long)op->id, i, got, want);
    return;
  }
}

static void on_result(void *user_data, const rsb_result *result) {
  struct record *record = user_data;
  struct worker *w = record->worker;
  if (++record->calls != 1) violation("rank %u: callback number %d of one op", w->rank, record->calls);
  record->status = result->status;
  if (result->status == RSB_OK) {
    if (result->tag != record->op.tag) violation("rank %u: a result of another tag", w->rank);
    check_data(record, result);
    w->ok++;
    w->ok_hash += hash64(record->op.id, 1);
  } else {
    if (result->data != NULL) violation("rank %u: data with %s", w->rank, rsb_status_name(result->status));
    w->failed++;
  }
  if (w->hook != NULL) w->hook(w->hook_data);
}

struct op random_op(uint64_t *state, uint64_t id, uint32_t most) {
  static const rsb_dtype dtypes[] = {RSB_DTYPE_F32, RSB_DTYPE_F64, RSB_DTYPE_I32, RSB_DTYPE_I64};
  static const rsb_op ops[] = {RSB_OP_SUM, RSB_OP_SUM, RSB_OP_MIN, RSB_OP_MAX};
  struct op op = {.id = id, .tag = id + 1};
  op.dtype = dtypes[below(state, 4)];
  op.op = ops[below(state, 4)];
  op.flat = (int)below(state, 2);
  /* Mostly small, some large, a few empty. */
  uint32_t bound = below(state, 4) == 0 ? most : 1 + most / 16;
  op.numel = below(state, 20) == 0 ? 0 : 1 + (uint32_t)below(state, bound);
  if (op.dtype == RSB_DTYPE_F32 || op.dtype == RSB_DTYPE_F64) op.scale = (double[]){0, 0.5, 2}[below(state, 3)];
  return op;
}

rsb_status worker_open(struct worker *w, rsb_comm *comm, int64_t bucket_bytes, uint64_t seed, rsb_error *err) {
  rsb_config config = RSB_CONFIG_INIT;
  unsigned char *space = w->space;
  memset(w, 0, offsetof(struct worker, space));
  w->comm = comm;
  w->rank = rsb_comm_rank(comm);
  w->size = rsb_comm_size(comm);
  w->seed = seed;
  w->space = space != NULL ? space : malloc(WORKER_SPACE);
  if (w->space == NULL) campaign_die("no memory");
  config.bucket_bytes = bucket_bytes;
  return rsb_bucketer_create(&config, &w->bucketer, err);
}

rsb_status worker_submit(struct worker *w, const struct op *op, rsb_error *err) {
  const void *inputs[64];
  size_t element_size = rsb_dtype_size(op->dtype), total = op->flat ? op->numel : w->size * (size_t)op->numel;
  if (w->count == WORKER_OPS || w->size > 64 || total * element_size > WORKER_SPACE) {
    campaign_die("the worker is too small for op %llu", (unsigned long long)op->id);
  }
  struct record *record = &w->records[w->count++];
  *record = (struct record){.worker = w, .op = *op, .status = RSB_PENDING};
  for (size_t i = 0; i < total; i++) store(w->space, op->dtype, i, element(w, w->rank, op, i));
  for (uint32_t r = 0; r < w->size; r++) inputs[r] = w->space + r * (size_t)op->numel * element_size;

  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  if (op->flat) args.flat_input = w->space;
  if (!op->flat) args.inputs = inputs;
  args.numel = op->numel;
  args.dtype = op->dtype;
  args.op = op->op;
  args.scale = op->scale;
  args.tag = op->tag;
  args.callback = on_result;
  args.user_data = record;
  rsb_status status = rsb_bucketer_submit(w->bucketer, w->comm, &args, NULL, err);
  record->accepted = status == RSB_OK;
  /* The input is the caller's again: whoever still reads it gets a wrong sum. */
  memset(w->space, 0xa5, total * element_size);
  return status;
}

rsb_status worker_gather(struct worker *w, size_t bytes, uint64_t id, rsb_error *err) {
  struct op op = {.id = id, .dtype = RSB_DTYPE_U8};
  unsigned char *in = w->space, *out = w->space + bytes;
  for (size_t i = 0; i < bytes; i++) store(in, RSB_DTYPE_U8, i, element(w, w->rank, &op, i));
  rsb_status status = rsb_comm_all_gather(w->comm, in, out, bytes, err);
  if (status != RSB_OK) return status;
  w->ok++;
  w->ok_hash += hash64(id, 2);
  for (size_t i = 0; i < bytes * w->size; i++) {
    if (out[i] == element(w, (uint32_t)(i / bytes), &op, i % bytes)) continue;
    violation("rank %u of %u: WRONG all_gather with RSB_OK: byte %zu", w->rank, w->size, i);
    break;
  }
  return RSB_OK;
}

void worker_check(struct worker *w, rsb_status status, const char *when) {
  for (size_t i = 0; i < w->count; i++) {
    const struct record *r = &w->records[i];
    if (r->calls != r->accepted) {
      violation("rank %u, %s: op %llu was %s and called back %d times", w->rank, when, (unsigned long long)r->op.id,
                r->accepted ? "accepted" : "refused", r->calls);
    } else if (r->accepted && r->status != RSB_OK && r->status != status) {
      violation("rank %u, %s: a callback with %s, expected %s", w->rank, when, rsb_status_name(r->status),
                rsb_status_name(status));
    }
  }
  w->count = 0;
}

void worker_close(struct worker *w) {
  rsb_status status = rsb_bucketer_free(w->bucketer);
  if (status != RSB_OK) violation("rank %u: rsb_bucketer_free gives %s", w->rank, rsb_status_name(status));
  free(w->space);
  w->space = NULL;
}

int worker_rounds(struct worker *w, uint64_t rounds, const char *when) {
  uint64_t state = hash64(w->seed, 77), id = UINT64_C(1) << 40;
  rsb_error err;
  for (uint64_t round = 0; round < rounds; round++) {
    rsb_status status = RSB_OK;
    for (uint64_t n = 1 + below(&state, 6); n > 0 && status == RSB_OK; n--) {
      struct op op = random_op(&state, id++, 600);
      status = worker_submit(w, &op, &err);
    }
    if (status == RSB_OK) status = rsb_bucketer_flush(w->bucketer, &err);
    if (status == RSB_OK && round % 4 == 3) status = worker_gather(w, below(&state, 300), id++, &err);
    if (status != RSB_OK) {
      violation("rank %u, %s: round %llu: %s", w->rank, when, (unsigned long long)round, err.message);
      return 0;
    }
    worker_check(w, RSB_OK, when);
  }
  return 1;
}
