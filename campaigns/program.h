/* program.h - a random sequence of calls that all ranks make alike, but for one that may have been changed; and what
 * the library must say about the change. */
#ifndef PROGRAM_H
#define PROGRAM_H

#include <stddef.h>
#include <stdint.h>

#include "worker.h"

enum { PROGRAM_STEPS = 80 };

enum step_kind { STEP_SUBMIT, STEP_LAUNCH, STEP_FLUSH, STEP_GATHER };

struct step {
  enum step_kind kind;
  int plain;      /* a submit that may be changed or taken away */
  struct op op;   /* of a submit */
  uint32_t bytes; /* of an all-gather */
};

/* Every launch and flush comes after a submit whose bucket nothing else can have launched, so each is a part of the
 * sequence, and steps and calls correspond one to one. */
struct program {
  struct step steps[PROGRAM_STEPS];
  size_t count;
  int64_t bucket_bytes;
  int large; /* half of the submits have rows that threads read in place */
};

enum mutation {
  SWAPPED, TAG, NUMEL, DTYPE, OP, SCALE, FORM, EXTRA_OP, MISSING_OP, LAUNCH_FLUSH, NO_FLUSH, GATHER_BYTES,
  EXTRA_GATHER, MISSING_GATHER, BUCKET_BYTES, MUTATIONS
};

extern const char *const mutation_names[MUTATIONS];

void program_draw(struct program *program, int large, uint64_t *state);
void program_mutate(struct program *program, enum mutation mutation, uint64_t *state);

/* The first call in which the ranks differ. */
struct difference {
  size_t call;
  uint64_t tag;
  const char *field;
  int32_t peer; /* who is in the minority; -1: there is no majority */
};

/* `of_rank[r]` is what rank r runs. Not for equal programs. */
struct difference program_difference(struct program *const *of_rank, uint32_t size);

/* What became of a rank. */
struct outcome {
  rsb_status status, sticky;
  int32_t peer;
  char message[240];
};

/* Runs it as one rank, to the end or the first error. */
void program_run(const struct program *program, rsb_comm *comm, uint64_t seed, struct outcome *out);

#endif
