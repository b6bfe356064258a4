/* kill.h - what the two halves of the kill campaign share: the plan of a trial and what the ranks say about it. */
#ifndef KILL_H
#define KILL_H

#include <rsbucket.h>
#include <stdatomic.h>
#include <stdint.h>

enum { KILL_RANKS = 8 };

/* Where the victim ends. */
enum phase {
  BEFORE_CREATE,
  IN_CREATE, /* killed by the parent at a random time */
  ANY_TIME,  /* the same, later */
  IDLE,
  BETWEEN_SUBMITS,
  BEFORE_FLUSH,
  OTHERS_FLUSH, /* when the others wait in flush already */
  IN_FLUSH,     /* a timer kills it inside */
  IN_CALLBACK,
  IN_GATHER,
  IN_FREE,
  IN_SHRINK, /* after another rank's death */
  PHASES
};

/* How it ends. */
enum manner { BY_SIGKILL, BY_EXIT, BY_EXEC, MANNERS };

struct plan {
  uint64_t seed, number;
  uint32_t size, victim, second; /* second: dies in shrink, or UINT32_MAX */
  enum phase phase;
  enum manner manner;
  int fat, family; /* 256 MB; with a forked child that lives on */
  uint64_t round, step, delay_ns;
};

/* What one rank did. */
struct account {
  atomic_uint entering, flushing; /* goes into create now; the round in which it is in flush, plus one */
  rsb_status create_status, status;
  int32_t peer;
  uint64_t ok, ok_hash, error_ns, shrinks, shrink_ns;
  uint32_t last_size;
};

struct stage {
  struct plan plan;
  struct account ranks[KILL_RANKS];
  atomic_ullong death_ns;
  atomic_int orphan; /* the victim's child */
};

/* A rank's life, in a process of its own. Returns the exit status. */
int kill_rank(struct stage *stage, uint32_t rank);

#endif
