/* program.c - see program.h. */
#include "program.h"

#include <string.h>

#include "campaign.h"

const char *const mutation_names[MUTATIONS] = {
    "swapped",  "tag",        "numel",        "dtype",        "op",           "scale",          "form",        "extra_op",
    "missing_op", "launch_flush", "no_flush", "gather_bytes", "extra_gather", "missing_gather", "bucket_bytes"};

static void add(struct program *p, struct step step) {
  if (p->count == PROGRAM_STEPS) campaign_die("a program is too long");
  p->steps[p->count++] = step;
}

static struct step plain_submit(int large, uint64_t *state) {
  struct step step = {.kind = STEP_SUBMIT, .plain = 1, .op = random_op(state, 0, 600)};
  if (large && below(state, 2) == 0) step.op.numel = 8200 + (uint32_t)below(state, 3000);
  step.op.tag = 1 + below(state, UINT64_C(1) << 40);
  return step;
}

/* The only use of its bucket, so it waits there for the launch or flush that follows. */
static void add_call(struct program *p, enum step_kind kind, uint64_t *state) {
  struct step mark = {.kind = STEP_SUBMIT, .op = {.numel = 1, .dtype = RSB_DTYPE_U8, .op = RSB_OP_MAX}};
  mark.op.tag = below(state, 1000);
  add(p, mark);
  add(p, (struct step){.kind = kind});
}

void program_draw(struct program *p, int large, uint64_t *state) {
  enum { BLOCKS = 12 };
  enum step_kind blocks[BLOCKS];
  size_t count = 4 + below(state, BLOCKS - 3);
  for (size_t i = 0; i < count; i++) blocks[i] = i < 4 ? (enum step_kind)i : (enum step_kind)below(state, 4);
  for (size_t i = count; i > 1; i--) {
    size_t j = below(state, i);
    enum step_kind block = blocks[i - 1];
    blocks[i - 1] = blocks[j];
    blocks[j] = block;
  }
  p->count = 0;
  p->large = large;
  p->bucket_bytes = 1024 << below(state, 7);
  for (size_t i = 0; i < count; i++) {
    if (blocks[i] == STEP_SUBMIT) {
      struct step first = plain_submit(p->large, state);
      /* One of a pair is a float and has elements, so that scale and form can be changed. */
      first.op.dtype = below(state, 2) == 0 ? RSB_DTYPE_F32 : RSB_DTYPE_F64;
      first.op.numel |= 1;
      add(p, first);
      add(p, plain_submit(p->large, state));
    } else if (blocks[i] == STEP_GATHER) {
      add(p, (struct step){.kind = STEP_GATHER, .bytes = (uint32_t)below(state, 3000)});
    } else {
      add_call(p, blocks[i], state);
    }
  }
  add_call(p, STEP_FLUSH, state);
}

static int is_float(rsb_dtype dtype) {
  return dtype == RSB_DTYPE_F32 || dtype == RSB_DTYPE_F64;
}

/* Whether `step` is something that `mutation` can change. */
static int fits(const struct step *step, enum mutation mutation) {
  switch (mutation) {
    case LAUNCH_FLUSH:
    case NO_FLUSH: return step->kind == STEP_LAUNCH || step->kind == STEP_FLUSH;
    case GATHER_BYTES:
    case MISSING_GATHER: return step->kind == STEP_GATHER;
    case EXTRA_OP:
    case EXTRA_GATHER: return 1;
    case SWAPPED: return step->plain && step[1].plain;
    case SCALE: return step->plain && is_float(step->op.dtype);
    case FORM: return step->plain && step->op.numel != 0; /* no elements have no form */
    default: return step->plain;
  }
}

static void erase(struct program *p, size_t at) {
  memmove(p->steps + at, p->steps + at + 1, (p->count - at - 1) * sizeof p->steps[0]);
  p->count--;
}

static void insert(struct program *p, size_t at, struct step step) {
  add(p, step);
  memmove(p->steps + at + 1, p->steps + at, (p->count - at - 1) * sizeof p->steps[0]);
  p->steps[at] = step;
}

void program_mutate(struct program *p, enum mutation mutation, uint64_t *state) {
  if (mutation == BUCKET_BYTES) {
    p->bucket_bytes = below(state, 4) == 0 ? -1 : p->bucket_bytes + 1 + (int64_t)below(state, 5000);
    return;
  }
  size_t at;
  do {
    at = below(state, p->count);
  } while (!fits(&p->steps[at], mutation));
  struct step *step = &p->steps[at], other = *step;
  switch (mutation) {
    case SWAPPED:
      *step = step[1];
      step[1] = other;
      break;
    case TAG: step->op.tag = below(state, 10) == 0 ? 0 : step->op.tag + 1 + below(state, 1000); break;
    case NUMEL: step->op.numel = step->op.numel + 1 + (uint32_t)below(state, 50); break;
    case DTYPE:
      step->op.dtype = step->op.dtype == RSB_DTYPE_F32 ? RSB_DTYPE_I32 : RSB_DTYPE_F32;
      if (step->op.dtype == RSB_DTYPE_I32) step->op.scale = 0;
      break;
    case OP: step->op.op = step->op.op == RSB_OP_SUM ? RSB_OP_MAX : RSB_OP_SUM; break;
    case SCALE: step->op.scale = 4; break;
    case FORM: step->op.flat = !step->op.flat; break;
    case EXTRA_OP: insert(p, at, plain_submit(p->large, state)); break;
    case LAUNCH_FLUSH: step->kind = step->kind == STEP_FLUSH ? STEP_LAUNCH : STEP_FLUSH; break;
    case GATHER_BYTES: step->bytes += 1 + (uint32_t)below(state, 100); break;
    case EXTRA_GATHER: insert(p, at, (struct step){.kind = STEP_GATHER, .bytes = 3}); break;
    default: erase(p, at);
  }
}

/* ---- what must be said about it ----------------------------------------------------------------------- */

/* The fields of a call in the order in which they are compared. The last all-gather of the runner ends each program. */
enum { FIELDS = 8 };
static const char *const field_names[FIELDS] = {"call", "tag", "numel", "dtype", "op", "scale", "form", "bucket_bytes"};

static void fields(const struct program *p, size_t call, double out[FIELDS]) {
  const struct step last = {.kind = STEP_GATHER}, *step = call < p->count ? &p->steps[call] : &last;
  memset(out, 0, FIELDS * sizeof *out);
  out[0] = call > p->count ? -1 : (double)step->kind;
  if (step->kind == STEP_GATHER) {
    out[2] = step->bytes;
    return;
  }
  out[7] = (double)p->bucket_bytes;
  if (step->kind != STEP_SUBMIT) return;
  out[1] = (double)step->op.tag;
  out[2] = step->op.numel;
  out[3] = step->op.dtype;
  out[4] = step->op.op;
  out[5] = step->op.scale == 0 ? 1 : step->op.scale;
  out[6] = step->op.flat;
}

struct difference program_difference(struct program *const *of_rank, uint32_t size) {
  for (size_t call = 0;; call++) {
    double seen[16][FIELDS];
    for (uint32_t r = 0; r < size; r++) fields(of_rank[r], call, seen[r]);
    uint32_t reference = 0, odd = 0;
    int majority = 0;
    for (uint32_t r = 0; r < size && !majority; r++) {
      uint32_t votes = 0;
      for (uint32_t s = 0; s < size; s++) votes += memcmp(seen[r], seen[s], sizeof seen[r]) == 0;
      majority = votes * 2 > size;
      if (majority) reference = r;
    }
    while (odd < size && memcmp(seen[odd], seen[reference], sizeof seen[odd]) == 0) odd++;
    if (odd == size) continue;
    size_t field = 0;
    while (seen[odd][field] == seen[reference][field]) field++;
    int bytes = field == 2 && seen[reference][0] == STEP_GATHER;
    return (struct difference){call, (uint64_t)seen[reference][1], bytes ? "bytes" : field_names[field],
                               majority ? (int32_t)odd : -1};
  }
}

/* ---- a rank --------------------------------------------------------------------------------------------- */

static rsb_status run_step(struct worker *w, const struct step *step, uint64_t position, rsb_error *err) {
  struct op op = step->op;
  op.id = position;
  switch (step->kind) {
    case STEP_SUBMIT: return worker_submit(w, &op, err);
    case STEP_LAUNCH: return rsb_bucketer_launch(w->bucketer, err);
    case STEP_FLUSH: return rsb_bucketer_flush(w->bucketer, err);
    default: return worker_gather(w, step->bytes, position, err);
  }
}

void program_run(const struct program *p, rsb_comm *comm, uint64_t seed, struct outcome *out) {
  struct worker worker = {.space = NULL};
  rsb_error err = {.peer = -1};
  rsb_status status = worker_open(&worker, comm, p->bucket_bytes, seed, &err);
  for (size_t i = 0; i < p->count && status == RSB_OK; i++) status = run_step(&worker, &p->steps[i], i, &err);
  if (status == RSB_OK) status = worker_gather(&worker, 0, p->count, &err);
  if (status == RSB_OK) status = rsb_bucketer_flush(worker.bucketer, &err);
  memset(out, 0, sizeof *out);
  out->status = status;
  out->peer = status == RSB_OK ? -1 : err.peer;
  if (status != RSB_OK) memcpy(out->message, err.message, sizeof out->message);
  /* What is still owed runs now; the comm keeps its cause. */
  rsb_bucketer_flush(worker.bucketer, &err);
  worker_check(&worker, RSB_ERR_DESYNC, "after the program");
  out->sticky = rsb_comm_status(comm, &err);
  if (out->sticky != out->status || (out->sticky != RSB_OK && strcmp(err.message, out->message) != 0)) {
    violation("a rank got %s (%s), its comm keeps %s (%s)", rsb_status_name(out->status), out->message,
              rsb_status_name(out->sticky), out->sticky == RSB_OK ? "" : err.message);
  }
  worker_close(&worker);
}
