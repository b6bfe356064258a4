/* campaign.h - what all campaigns share: options, randomness, violations that any process may report, latencies, what a
 * process holds, and the report. It knows no rsbucket. */
#ifndef CAMPAIGN_H
#define CAMPAIGN_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* ---- options and report --------------------------------------------------------------------------- */

struct options {
  uint64_t trials, seed;
  uint32_t ranks; /* 0: every number that the campaign knows */
  const char *json, *only;
  unsigned limit_s; /* of the whole campaign */
};

extern struct options options;

/* Reads the command line, makes the shared memory and a private run directory (RSBUCKET_RUN_DIR), starts the global
 * guard. `kinds`: what --only may name, or NULL. Ends the program on --help and bad options. */
void campaign_begin(const char *name, const char *what, const char *kinds, uint64_t trials, int argc, char **argv);

/* A line of the report, on stdout and in the JSON file. */
void report_number(const char *key, uint64_t value);
void report_text(const char *key, const char *value);

/* Prints the verdict, writes the JSON file, removes the run directory. Returns the exit status. */
int campaign_end(void);

/* Whether `kind` is to run: --only names it, or nothing. */
int wanted(const char *kind);

/* ---- violations ------------------------------------------------------------------------------------- */

/* A broken promise, from any process or thread of the campaign. */
void violation(const char *format, ...) __attribute__((format(printf, 1, 2)));
uint64_t violations(void);

/* Ends the program: the campaign itself cannot go on. */
_Noreturn void campaign_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- randomness ------------------------------------------------------------------------------------- */

uint64_t hash64(uint64_t a, uint64_t b);
uint64_t next_random(uint64_t *state);
/* 0..n-1 */
uint64_t below(uint64_t *state, uint64_t n);

/* ---- time, latencies -------------------------------------------------------------------------------- */

uint64_t now_ns(void);
void sleep_ns(uint64_t ns);

/* Samples that any process may add. */
struct latency;
struct latency *latency_new(size_t capacity);
void latency_add(struct latency *latency, uint64_t ns);
/* KEY_count, KEY_p50_us, KEY_p99_us, KEY_max_us */
void latency_report(const char *key, struct latency *latency);

/* ---- memory, processes ------------------------------------------------------------------------------ */

/* Zeroed memory that forked processes share. */
void *shared(size_t bytes);

/* Waits until *word is at least `value`. The alarm of the process bounds it. */
void await(const atomic_uint *word, unsigned value);

/* A child that ends after `guard_s` seconds at the latest, and with its parent. As fork(). */
pid_t fork_guarded(unsigned guard_s);

/* Waits for a child; 1 if it ended with exit status 0. Else a violation that says how it ended, unless `doomed`. */
int reap(pid_t child, const char *who, int doomed);

/* What a process holds. */
struct holdings {
  unsigned fds, threads;
};
struct holdings holdings(void);
void check_holdings(struct holdings before, const char *when);
/* What it has in memory, but for the pages of programs. */
uint64_t resident_bytes(void);

/* Entries of the run directory. */
unsigned run_dir_entries(void);
const char *run_dir(void);

#endif
