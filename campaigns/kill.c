/* kill.c - kills ranks at random times and in every phase of their life, and checks what the survivors get.
 *
 * Promises: every survivor gets RSB_ERR_PEER_LOST that names the victim, fast; each accepted op is called back exactly
 * once; a result that is OK is right; survivors agree on what was; they shrink and go on; nothing is left. */
#define _GNU_SOURCE
#include "kill.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "campaign.h"

enum { GUARD_S = 40 };

static const char *const phase_names[PHASES] = {
    "before_create", "in_create", "any_time",    "idle",      "between_submits", "before_flush",
    "others_flush",  "in_flush",  "in_callback", "in_gather", "in_free",         "in_shrink"};
enum { TARGETS = PHASES - 1 };
static const enum phase targets[TARGETS] = {BEFORE_CREATE, IN_CREATE, IDLE,      BETWEEN_SUBMITS, BEFORE_FLUSH, OTHERS_FLUSH,
                                            IN_FLUSH,      IN_CALLBACK, IN_GATHER, IN_FREE,        IN_SHRINK};
static const char *const manner_names[MANNERS] = {"sigkill", "exit", "exec"};

static struct {
  uint64_t phases[PHASES], manners[MANNERS], sizes[KILL_RANKS + 1], fat, family, formed, unformed, sockets, shrinks;
} counts;

/* Latencies from the death to the error: of lean, of heavy victims, of those with children; per size. */
static struct latency *all, *fat, *family, *exec_or_exit, *shrink, *shrink_again, *by_size[KILL_RANKS + 1],
    *by_phase[PHASES];

/* The first `random` trials kill at any time, the others in every phase in turn. */
static struct plan draw(uint64_t number, uint64_t random) {
  uint64_t state = hash64(options.seed, number);
  struct plan p = {.seed = next_random(&state), .number = number, .second = UINT32_MAX, .phase = ANY_TIME};
  p.size = options.ranks != 0 ? options.ranks : 2 + (uint32_t)below(&state, 3);
  if (number >= random) p.phase = targets[(number - random) % TARGETS];
  if (p.phase == IN_SHRINK && p.size < 3) p.size = 3;
  p.victim = (uint32_t[]){0, p.size - 1, (uint32_t)below(&state, p.size)}[below(&state, 3)];
  int timed = p.phase == IN_CREATE || p.phase == ANY_TIME || p.phase == IN_FLUSH || p.phase == IN_GATHER ||
              p.phase == IN_FREE || p.phase == IN_SHRINK;
  p.manner = timed || below(&state, 3) != 0 ? BY_SIGKILL : (enum manner)(1 + below(&state, MANNERS - 1));
  p.fat = p.phase > ANY_TIME && below(&state, 20) == 0;
  p.family = p.phase > ANY_TIME && below(&state, 8) == 0;
  p.round = below(&state, 12);
  p.step = below(&state, 12);
  p.delay_ns = below(&state, p.phase == IN_CREATE ? 1500000 : p.phase == ANY_TIME ? 25000000 : 1000000);
  if (p.phase == IN_SHRINK) p.second = (p.victim + 1 + (uint32_t)below(&state, p.size - 1)) % p.size;
  return p;
}

/* What all survivors must agree on. */
static void compare(const struct stage *stage) {
  const struct plan *p = &stage->plan;
  const struct account *first = NULL;
  for (uint32_t r = 0; r < p->size; r++) {
    const struct account *a = &stage->ranks[r];
    if (r == p->victim || r == p->second) continue;
    if (first == NULL) first = a;
    if ((a->create_status == RSB_OK) != (first->create_status == RSB_OK)) {
      violation("trial %llu: the group formed for some survivors only", (unsigned long long)p->number);
    }
    if (a->ok != first->ok || a->ok_hash != first->ok_hash) {
      violation("trial %llu: rank %u has %llu ops that are OK, another survivor %llu: they differ",
                (unsigned long long)p->number, r, (unsigned long long)a->ok, (unsigned long long)first->ok);
    }
    uint32_t left = p->size - (p->second == UINT32_MAX ? 1 : 2);
    if (a->create_status == RSB_OK && a->last_size != left) {
      violation("trial %llu: rank %u ends in a comm of %u, expected %u", (unsigned long long)p->number, r,
                a->last_size, left);
    }
  }
}

static void measure(const struct stage *stage) {
  const struct plan *p = &stage->plan;
  for (uint32_t r = 0; r < p->size; r++) {
    const struct account *a = &stage->ranks[r];
    if (r == p->victim || r == p->second || p->phase == BEFORE_CREATE) continue;
    /* A second death overwrites the first's time: only its shrink is of interest. */
    if (a->shrinks != 0) latency_add(p->second == UINT32_MAX ? shrink : shrink_again, a->shrink_ns);
    counts.shrinks += a->shrinks;
    if (p->second != UINT32_MAX || a->create_status != RSB_OK || a->error_ns == 0) continue;
    uint64_t death = stage->death_ns, ns = a->error_ns > death ? a->error_ns - death : 0;
    latency_add(p->fat ? fat : all, ns);
    if (!p->fat) latency_add(by_size[p->size], ns);
    if (!p->fat) latency_add(by_phase[p->phase], ns);
    if (p->family) latency_add(family, ns);
    if (p->manner != BY_SIGKILL) latency_add(exec_or_exit, ns);
  }
}

/* Nobody of this trial is left, in no form. */
static void check_remains(struct stage *stage, unsigned *sockets) {
  const struct plan *p = &stage->plan;
  int orphan = stage->orphan;
  if (orphan > 0) {
    kill(orphan, SIGKILL);
    waitpid(orphan, NULL, 0);
  }
  if (waitpid(-1, NULL, WNOHANG) != -1 || errno != ECHILD) {
    violation("trial %llu: a process is left", (unsigned long long)p->number);
  }
  /* Who forms a group and is killed cannot remove its socket; whoever forms the next one does. */
  unsigned entries = run_dir_entries();
  int excused = (p->victim == 0 && p->phase <= ANY_TIME) || p->second != UINT32_MAX;
  if (entries > (excused ? 1u : 0u)) {
    violation("trial %llu (%s): %u entries in the run directory", (unsigned long long)p->number,
              phase_names[p->phase], entries);
  }
  counts.sockets += entries > *sockets;
  *sockets = entries;
}

static void trial(struct stage *stage, struct plan plan, unsigned *sockets) {
  pid_t children[KILL_RANKS];
  char who[64];
  memset(stage, 0, sizeof *stage);
  stage->plan = plan;
  const struct plan *p = &stage->plan;
  for (uint32_t r = 0; r < p->size; r++) {
    children[r] = fork_guarded(GUARD_S);
    if (children[r] == 0) _exit(kill_rank(stage, r));
  }
  if (p->phase == IN_CREATE || p->phase == ANY_TIME) {
    await(&stage->ranks[p->victim].entering, 1);
    sleep_ns(p->delay_ns);
    atomic_store(&stage->death_ns, now_ns());
    kill(children[p->victim], SIGKILL);
  }
  for (uint32_t r = 0; r < p->size; r++) {
    int doomed = r == p->victim || r == p->second;
    snprintf(who, sizeof who, "trial %llu (%s, victim %u) rank %u of %u", (unsigned long long)p->number,
             phase_names[p->phase], p->victim, r, p->size);
    reap(children[r], who, doomed);
  }
  check_remains(stage, sockets);
  compare(stage);
  measure(stage);
  uint32_t witness = 0;
  while (witness == p->victim || witness == p->second) witness++;
  *(stage->ranks[witness].create_status == RSB_OK ? &counts.formed : &counts.unformed) += 1;
  counts.phases[p->phase]++;
  counts.manners[p->manner]++;
  counts.sizes[p->size]++;
  counts.fat += (uint64_t)p->fat;
  counts.family += (uint64_t)p->family;
}

/* One group that nobody disturbs: what killed jobs left is gone after it. */
static void sweep(struct stage *stage) {
  memset(stage, 0, sizeof *stage);
  for (uint32_t r = 0; r < 2; r++) {
    if (fork_guarded(GUARD_S) != 0) continue;
    rsb_comm *comm;
    rsb_error err;
    rsb_status status = rsb_comm_create_shm("sweep", r, 2, NULL, &comm, &err);
    if (status != RSB_OK) violation("the sweeping group: %s", err.message);
    rsb_comm_free(comm);
    _exit(0);
  }
  while (waitpid(-1, NULL, 0) > 0) continue;
}

static void report(void) {
  char key[64];
  for (int i = 0; i < PHASES; i++) {
    snprintf(key, sizeof key, "kills_%s", phase_names[i]);
    report_number(key, counts.phases[i]);
  }
  for (int i = 0; i < MANNERS; i++) {
    snprintf(key, sizeof key, "by_%s", manner_names[i]);
    report_number(key, counts.manners[i]);
  }
  for (uint32_t w = 2; w <= KILL_RANKS; w++) {
    if (counts.sizes[w] == 0) continue;
    snprintf(key, sizeof key, "kills_of_%u_ranks", w);
    report_number(key, counts.sizes[w]);
  }
  report_number("victims_of_256_mb", counts.fat);
  report_number("victims_with_a_living_child", counts.family);
  report_number("groups_that_had_formed", counts.formed);
  report_number("groups_that_had_not", counts.unformed);
  report_number("sockets_left_for_the_next_group", counts.sockets);
  report_number("shrinks", counts.shrinks);
  latency_report("death_to_error", all);
  for (uint32_t w = 2; w <= KILL_RANKS; w++) {
    if (counts.sizes[w] == 0) continue;
    snprintf(key, sizeof key, "death_to_error_of_%u", w);
    latency_report(key, by_size[w]);
  }
  for (int i = 0; i < PHASES; i++) {
    if (counts.phases[i] == 0 || i == BEFORE_CREATE || i == IN_CREATE || i == IN_SHRINK) continue;
    snprintf(key, sizeof key, "death_to_error_%s", phase_names[i]);
    latency_report(key, by_phase[i]);
  }
  latency_report("death_to_error_256_mb", fat);
  latency_report("death_to_error_living_child", family);
  latency_report("death_to_error_exit_or_exec", exec_or_exit);
  latency_report("shrink", shrink);
  latency_report("shrink_after_a_death_in_shrink", shrink_again);
}

int main(int argc, char **argv) {
  unsigned sockets = 0;
  campaign_begin("kill", "Kills ranks of 2 to 4 processes: N times at random, 3 N / 100 times in each phase.",
                 "random targeted", 2000, argc, argv);
  if (options.ranks == 1 || options.ranks > KILL_RANKS) campaign_die("--ranks: 2 to %d", KILL_RANKS);
  struct stage *stage = shared(sizeof *stage);
  uint64_t random = wanted("random") ? options.trials : 0;
  uint64_t targeted = wanted("targeted") ? (options.trials * 3 + 99) / 100 * TARGETS : 0;
  size_t most = (random + targeted) * KILL_RANKS + 1;
  struct latency **latencies[] = {&all, &fat, &family, &exec_or_exit, &shrink, &shrink_again};
  for (size_t i = 0; i < sizeof latencies / sizeof latencies[0]; i++) *latencies[i] = latency_new(most);
  for (int w = 0; w <= KILL_RANKS; w++) by_size[w] = latency_new(most);
  for (int i = 0; i < PHASES; i++) by_phase[i] = latency_new(most);
  for (uint64_t i = 0; i < random + targeted && violations() < 100; i++) trial(stage, draw(i, random), &sockets);
  sweep(stage);
  report();
  return campaign_end();
}
