/* worker.h - one rank's user of rsbucket: submits ops whose results can be told from everything else, and checks in
 * every callback what was promised: called once, and the right sum if the status says OK. */
#ifndef WORKER_H
#define WORKER_H

#include <rsbucket.h>
#include <stddef.h>
#include <stdint.h>

enum { WORKER_OPS = 64, WORKER_SPACE = 1 << 20 };

/* What is asked; equal on all ranks. */
struct op {
  uint64_t id; /* tells its data from other ops' */
  uint64_t tag;
  uint32_t numel; /* of one rank's part, or in total if flat */
  rsb_dtype dtype; /* F32, F64, I32, I64, U8 */
  rsb_op op;       /* SUM, MIN, MAX */
  double scale;    /* a power of two, or 0 */
  int flat;
};

struct worker;

/* An accepted or refused op. */
struct record {
  struct worker *worker;
  struct op op;
  int accepted, calls;
  rsb_status status;
};

/* One rank. Ops are kept until worker_check. */
struct worker {
  rsb_comm *comm;
  rsb_bucketer *bucketer;
  uint32_t rank, size;
  uint64_t seed;
  struct record records[WORKER_OPS];
  size_t count;
  uint64_t ok, failed, ok_hash; /* callbacks with RSB_OK, with another status, which ops the former were */
  void (*hook)(void *);         /* called in every callback */
  void *hook_data;
  unsigned char *space; /* for inputs */
};

/* Random, as a function of `state`: an op with the identity `id`. */
struct op random_op(uint64_t *state, uint64_t id, uint32_t most);

/* The worker's bucketer; 0 if it could not be made, which is reported as `err`. */
rsb_status worker_open(struct worker *worker, rsb_comm *comm, int64_t bucket_bytes, uint64_t seed, rsb_error *err);
rsb_status worker_submit(struct worker *worker, const struct op *op, rsb_error *err);
rsb_status worker_gather(struct worker *worker, size_t bytes, uint64_t id, rsb_error *err);
/* Checks that every op was called back exactly as often as it must be, with OK or `expected`, and forgets them all. */
void worker_check(struct worker *worker, rsb_status expected, const char *when);
/* Frees the bucketer; launched and open ops end. */
void worker_close(struct worker *worker);

/* `rounds` rounds of random ops, flush and an all-gather, all of which must succeed. */
int worker_rounds(struct worker *worker, uint64_t rounds, const char *when);

#endif
