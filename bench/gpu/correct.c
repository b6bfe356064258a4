/* correct.c: that results are right on a GPU: against sums in a wider type, against the bits of a local comm; and that
 * captures of graphs are left alone or refused. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../half.h"
#include "gpu.h"

/* ---- Elements of any type ------------------------------------------------------------------------------ */

static bool is_float(rsb_dtype dtype) { return dtype >= RSB_DTYPE_F32 && dtype <= RSB_DTYPE_BF16; }

static long double element(rsb_dtype dtype, const void *at) {
  switch (dtype) {
    case RSB_DTYPE_F32: return *(const float *)at;
    case RSB_DTYPE_F64: return *(const double *)at;
    case RSB_DTYPE_F16: return f16_to_f32(*(const uint16_t *)at);
    case RSB_DTYPE_BF16: return bf16_to_f32(*(const uint16_t *)at);
    case RSB_DTYPE_I32: return *(const int32_t *)at;
    case RSB_DTYPE_I64: return *(const int64_t *)at;
    case RSB_DTYPE_U8: return *(const uint8_t *)at;
    default: return *(const int8_t *)at;
  }
}

static void put_random(rsb_dtype dtype, uint64_t a, uint64_t b, uint64_t c, void *at) {
  double x = gpu_random(a, b, c);
  /* Away from zero, so that products and 16-bit conversions stay in range. */
  x = x < 0 ? x - 0.25 : x + 0.25;
  uint64_t any = gpu_hash(a, b, c);
  switch (dtype) {
    case RSB_DTYPE_F32: *(float *)at = (float)x; break;
    case RSB_DTYPE_F64: *(double *)at = x; break;
    case RSB_DTYPE_F16: *(uint16_t *)at = f16_from_f32((float)x); break;
    case RSB_DTYPE_BF16: *(uint16_t *)at = bf16_from_f32((float)x); break;
    default: memcpy(at, &any, rsb_dtype_size(dtype)); /* all bits, which wrap around */
  }
}

/* Half the distance of neighbours around 1. */
static long double roundoff(rsb_dtype dtype) {
  const long double roundoffs[] = {0, 0x1p-24L, 0x1p-53L, 0x1p-11L, 0x1p-8L};
  return roundoffs[dtype];
}

/* ---- Ops --------------------------------------------------------------------------------------------------- */

typedef struct {
  rsb_dtype dtype, output;
  rsb_op op;
  double scale;
  bool borrow, accumulate;
  size_t shard; /* elements of a rank; inputs are flat */
} op;

enum { OPS_MOST = 1024 };
static op ops[OPS_MOST];
static int op_count;

/* Every dtype and op, every output, small and direct. */
static void make_ops(void) {
  const size_t shards[] = {1, 33, 700, 9001};
  for (rsb_dtype dtype = RSB_DTYPE_F32; dtype <= RSB_DTYPE_I8; dtype++) {
    for (rsb_op kind = RSB_OP_SUM; kind <= RSB_OP_PROD; kind++) {
      for (rsb_dtype output = RSB_DTYPE_F32; output <= RSB_DTYPE_I8; output++) {
        bool floats = is_float(dtype) && is_float(output);
        if ((!floats && output != dtype) || (kind == RSB_OP_AVG && !floats)) continue;
        for (int i = 0; i < 4; i++) {
          int n = op_count++;
          double scale = floats && i % 2 == 1 ? 0.7 : 0;
          ops[n] = (op){dtype, output, kind, scale, n % 3 == 1, n % 4 == 3, shards[(i + n / 4) % 4]};
        }
      }
    }
  }
}

/* What ranks give to op n, and what its output held before. */
static void fill(int n, int rank, int size, char *to) {
  size_t bytes = rsb_dtype_size(ops[n].dtype);
  for (size_t i = 0; i < ops[n].shard * (size_t)size; i++)
    put_random(ops[n].dtype, (uint64_t)rank + 1, (uint64_t)n, i, to + i * bytes);
}

static void fill_before(int n, char *to) {
  size_t bytes = rsb_dtype_size(ops[n].output);
  for (size_t i = 0; i < ops[n].shard; i++) put_random(ops[n].output, 77, (uint64_t)n, i, to + i * bytes);
}

static size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

/* Where the inputs and outputs of each op begin in the arenas; their ends. */
typedef struct {
  size_t in[OPS_MOST + 1], out[OPS_MOST + 1];
} places;

static void lay_out(places *p, int size) {
  for (int n = 0; n < op_count; n++) {
    p->in[n + 1] = p->in[n] + aligned(ops[n].shard * (size_t)size * rsb_dtype_size(ops[n].dtype));
    p->out[n + 1] = p->out[n] + aligned(ops[n].shard * rsb_dtype_size(ops[n].output));
  }
}

static void submit_all(rsb_comm *comm, const places *p, char *in, char *out) {
  rsb_error err;
  rsb_bucketer *bucketer = gpu_bucketer(1 << 14);
  for (int n = 0; n < op_count; n++) {
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    args.flat_input = in + p->in[n];
    args.numel = ops[n].shard * rsb_comm_size(comm);
    args.dtype = ops[n].dtype;
    args.output_dtype = ops[n].output;
    args.op = ops[n].op;
    args.scale = ops[n].scale;
    args.output = out + p->out[n];
    args.flags = (ops[n].borrow ? RSB_SUBMIT_BORROW : 0) | (ops[n].accumulate ? RSB_SUBMIT_ACCUMULATE : 0);
    gpu_check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "rsb_bucketer_submit");
  }
  gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "rsb_bucketer_flush");
  rsb_bucketer_free(bucketer);
}

/* ---- Against a wider type -------------------------------------------------------------------------------- */

/* Whether element i of op n, at `got`, is what the ranks' values make, as exactly as its types allow. */
static bool is_right(int n, const places *p, char *const *inputs, int size, int rank, size_t i, const char *got) {
  const op *o = &ops[n];
  size_t width = rsb_dtype_size(o->dtype), out = rsb_dtype_size(o->output);
  long double value = 0, magnitude = 0;
  uint64_t bits = 0;
  for (int r = 0; r < size; r++) {
    const char *at = inputs[r] + p->in[n] + ((size_t)rank * o->shard + i) * width;
    long double x = element(o->dtype, at);
    uint64_t whole = is_float(o->dtype) ? 0 : (uint64_t)(int64_t)x;
    bool first = r == 0;
    switch (o->op) {
      case RSB_OP_MIN: value = first || x < value ? x : value; break;
      case RSB_OP_MAX: value = first || x > value ? x : value; break;
      case RSB_OP_PROD: value = first ? x : value * x, bits = first ? whole : bits * whole; break;
      default: value += x, bits += whole;
    }
    magnitude += fabsl(x);
  }
  char before[8];
  bool adds = o->accumulate;
  if (adds) put_random(o->output, 77, (uint64_t)n, i, before);
  if (!is_float(o->dtype)) {
    if (o->op == RSB_OP_MIN || o->op == RSB_OP_MAX) bits = (uint64_t)(int64_t)value;
    uint64_t held = adds ? (uint64_t)(int64_t)element(o->output, before) : 0;
    bits += held;
    return memcmp(&bits, got, out) == 0; /* little endian: the low bytes */
  }
  if (o->op == RSB_OP_PROD) magnitude = fabsl(value);
  if (o->op == RSB_OP_MIN || o->op == RSB_OP_MAX) magnitude = 0;
  long double factor = (o->op == RSB_OP_AVG ? 1.0L / size : 1.0L) * (o->scale == 0 ? 1.0L : o->scale);
  long double held = adds ? element(o->output, before) : 0, expected = value * factor + held;
  bool wide = o->dtype == RSB_DTYPE_F64 || o->output == RSB_DTYPE_F64;
  /* NCCL rounds to the wire's type after each rank; our last step rounds in f32, or f64, and at the end to the
   * output's. A scale is given as a double, and rounded to f32 once. */
  long double allowed = size * roundoff(o->dtype) * magnitude * fabsl(factor) + roundoff(o->output) * fabsl(expected) +
                        6 * (wide ? 0x1p-53L : 0x1p-24L) * (fabsl(value * factor) + fabsl(held));
  if (o->output == RSB_DTYPE_F16 || o->dtype == RSB_DTYPE_F16) allowed += size * 0x1p-25L; /* its least is coarse */
  return fabsl(element(o->output, got) - expected) <= allowed;
}

typedef struct {
  uint64_t flags;
  rsb_comm *local[16]; /* EXACT: compare with these; else with a wider type */
  char *inputs[16];
  int wrong[16];
} comparison;

static void compare(gpu_rank *r) {
  comparison *c = r->arg;
  static places shared;
  if (r->rank == 0) lay_out(&shared, r->size);
  gpu_meet();
  const places *p = &shared;
  size_t in_bytes = p->in[op_count], out_bytes = p->out[op_count];
  char *in = calloc(1, in_bytes), *out = calloc(1, out_bytes), *before = calloc(1, out_bytes), *got = NULL;
  if (in == NULL || out == NULL || before == NULL) GPU_FAILED("no memory");
  for (int n = 0; n < op_count; n++) fill(n, r->rank, r->size, in + p->in[n]), fill_before(n, before + p->out[n]);
  c->inputs[r->rank] = in;
  memcpy(out, before, out_bytes);
  CUdeviceptr device_in = gpu_memory(in_bytes), device_out = gpu_memory(out_bytes);
  GPU_MUST(cuMemHostAlloc, (void **)&got, out_bytes, 0);
  GPU_MUST(cuMemcpyHtoD_v2, device_in, in, in_bytes);
  GPU_MUST(cuMemcpyHtoD_v2, device_out, before, out_bytes);
  gpu_meet();
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.flags = c->flags;
  config.stream = r->stream;
  config.result_stream = r->result;
  rsb_comm *comm;
  rsb_error err;
  gpu_check(rsb_comm_wrap_nccl(r->nccl, &config, &comm, &err), &err, "rsb_comm_wrap_nccl");
  submit_all(comm, p, (char *)device_in, (char *)device_out);
  GPU_MUST(cuMemcpyDtoHAsync_v2, got, device_out, out_bytes, r->result);
  GPU_MUST(cuStreamSynchronize, r->result);
  gpu_check(rsb_comm_status(comm, &err), &err, "rsb_comm_status");
  if (c->local[r->rank] != NULL) {
    submit_all(c->local[r->rank], p, in, out);
    rsb_comm_free(c->local[r->rank]);
  }
  for (int n = 0; n < op_count; n++) {
    size_t width = rsb_dtype_size(ops[n].output);
    for (size_t i = 0; i < ops[n].shard; i++) {
      size_t at = p->out[n] + i * width;
      bool right = c->flags != 0 ? memcmp(got + at, out + at, width) == 0
                                 : is_right(n, p, c->inputs, r->size, r->rank, i, got + at);
      c->wrong[r->rank] += !right;
      if (!right && c->wrong[r->rank] == 1)
        fprintf(stderr, "rank %d, op %d of dtype %u and op %u, output %u, element %zu of %zu: %Lg\n", r->rank, n,
                ops[n].dtype, ops[n].op, ops[n].output, i, ops[n].shard,
                element(ops[n].output, got + at));
    }
  }
  gpu_meet();
  rsb_comm_free(comm);
  GPU_MUST(cuMemFreeHost, got);
  GPU_MUST(cuMemFree_v2, device_in);
  GPU_MUST(cuMemFree_v2, device_out);
  free(in), free(out), free(before);
}

static _Noreturn void compared(comparison *c, const char *with) {
  int size = gpu_ranks(4), wrong = 0;
  make_ops();
  rsb_error err;
  if (c->flags != 0)
    gpu_check(rsb_comm_create_local((uint32_t)size, NULL, c->local, &err), &err, "rsb_comm_create_local");
  gpu_run(size, compare, c);
  for (int r = 0; r < size; r++) wrong += c->wrong[r];
  if (wrong > 0) GPU_FAILED("%d elements are wrong, beside %s", wrong, with);
  GPU_OK("%d ops on %d rank(s), beside %s", op_count, size, with);
}

void check_values(void) {
  gpu_start();
  static comparison c;
  compared(&c, "sums in a wider type");
}

void check_exact(void) {
  gpu_start();
  static comparison c = {.flags = RSB_COMM_EXACT};
  compared(&c, "a local comm, bit by bit");
}

/* ---- Captures ---------------------------------------------------------------------------------------------- */

static void capture(gpu_rank *r) {
  CUdeviceptr in = gpu_memory(1 << 16);
  GPU_MUST(cuMemsetD8Async, in, 1, 1 << 16, r->stream);
  GPU_MUST(cuStreamSynchronize, r->stream);
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.stream = r->stream;
  rsb_comm *comm;
  rsb_bucketer *bucketer = gpu_bucketer(0);
  rsb_error err;
  gpu_check(rsb_comm_wrap_nccl(r->nccl, &config, &comm, &err), &err, "rsb_comm_wrap_nccl");
  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.flat_input = (void *)(uintptr_t)in;
  args.numel = 1 << 14;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_SUM;
  CUgraph graph;
  /* NCCL's first collective sets up connections, which no capture allows. */
  for (int captured = 0; captured < 2; captured++) {
    if (captured) {
      GPU_MUST(cuStreamBeginCapture_v2, r->result, CU_CAPTURE_GLOBAL);
      GPU_MUST(cuMemsetD8Async, in + 60000, 2, 4, r->result);
    }
    for (int i = 0; i < 3; i++) {
      gpu_check(rsb_bucketer_submit(bucketer, comm, &args, NULL, &err), &err, "a submit beside a capture");
      gpu_check(rsb_bucketer_launch(bucketer, &err), &err, "a launch beside a capture");
      gpu_check(rsb_comm_status(comm, &err), &err, "polling beside a capture");
    }
    gpu_check(rsb_bucketer_flush(bucketer, &err), &err, "a flush beside a capture");
    if (captured) GPU_MUST(cuStreamEndCapture, r->result, &graph);
  }
  GPU_MUST(cuGraphDestroy, graph);
  GPU_MUST(cuStreamBeginCapture_v2, r->stream, CU_CAPTURE_GLOBAL);
  rsb_status refused = rsb_bucketer_submit(bucketer, comm, &args, NULL, &err);
  if (refused != RSB_ERR_UNSUPPORTED) GPU_FAILED("a captured stream is not refused: %s", rsb_status_name(refused));
  GPU_MUST(cuStreamEndCapture, r->stream, &graph);
  GPU_MUST(cuGraphDestroy, graph);
  GPU_MUST(cuStreamSynchronize, r->stream);
  rsb_bucketer_free(bucketer);
  rsb_comm_free(comm);
  GPU_MUST(cuMemFree_v2, in);
}

void check_captures(void) {
  gpu_start();
  (void)gpu_ranks(1);
  gpu_run(1, capture, NULL);
  GPU_OK("one beside is not spoilt, one of the op's stream is refused");
}
