/* soak.c - a long life: millions of ops, and thousands of groups that come and go, in flat memory.
 *
 * Promises: resident memory, descriptors and threads do not grow, on threads, processes and an engine, and neither where
 * groups end by a failure. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "campaign.h"
#include "engine.h"
#include "worker.h"

enum { RANKS = 4, CYCLES = 200, MOST_CYCLES = 10000, STAGING = 1 << 20 };
static const uint64_t slack = 64 << 10;
/* Ops before memory counts, beside a quarter of all: until an allocator's arenas are as they stay. */
static const uint64_t warm_up = 100000;

enum kind { THREADS, ENGINE };

/* One rank that is a thread. */
struct soak {
  uint32_t rank;
  uint64_t ops;
  rsb_comm *comm;
};

/* Ops of fixed data, since this is about memory and not about sums, 8 a flush; a retained shard now and then. */
struct keeper {
  rsb_shard *kept;
  uint64_t calls;
};

static void on_result(void *data, const rsb_result *result) {
  struct keeper *k = data;
  if (result->status != RSB_OK) violation("soak: %s", result->error->message);
  if (++k->calls % 64 == 0 && result->shard != NULL) {
    rsb_shard_release(k->kept);
    k->kept = rsb_shard_retain(result->shard);
  }
}

static void flushes(rsb_comm *comm, uint64_t ops) {
  static const float data[4096];
  struct keeper keeper = {NULL, 0};
  rsb_config config = RSB_CONFIG_INIT;
  rsb_bucketer *bucketer;
  rsb_error err;
  config.bucket_bytes = 8192;
  rsb_status status = rsb_bucketer_create(&config, &bucketer, &err);
  for (uint64_t i = 0; i < ops && status == RSB_OK; i++) {
    rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
    uint64_t h = hash64(i, 3);
    args.flat_input = data;
    args.numel = h % 512 == 0 ? 4096 : h % 128;
    args.dtype = RSB_DTYPE_F32;
    args.op = h % 3 == 0 ? RSB_OP_MAX : RSB_OP_SUM;
    args.callback = on_result;
    args.user_data = &keeper;
    status = rsb_bucketer_submit(bucketer, comm, &args, NULL, &err);
    if (status == RSB_OK && i % 8 == 7) status = rsb_bucketer_flush(bucketer, &err);
    if (status == RSB_OK && i % 4096 == 4095) status = rsb_bucketer_release_buffers(bucketer, &err);
  }
  if (status == RSB_OK) status = rsb_bucketer_flush(bucketer, &err);
  if (status != RSB_OK) violation("soak: %s", err.message);
  rsb_shard_release(keeper.kept);
  rsb_bucketer_free(bucketer);
  if (keeper.calls != ops) violation("soak: %llu callbacks", (unsigned long long)keeper.calls);
}

/* Staging is taken as it is used, and how much depends on how far a rank gets ahead. Here each gets ahead as far as it
 * can, while another one stays away for a moment: what is used later is there already. */
static void fill_staging(rsb_comm *comm) {
  uint32_t size = rsb_comm_size(comm);
  rsb_error err;
  unsigned char *in = calloc(1, 2 * STAGING), *out = malloc(size * (size_t)(2 * STAGING));
  if (in == NULL || out == NULL) campaign_die("no memory");
  for (uint32_t r = 0; r < size; r++) {
    if (rsb_comm_rank(comm) == r) sleep_ns(50000000);
    if (rsb_comm_all_gather(comm, in, out, 2 * STAGING, &err) != RSB_OK) violation("soak: %s", err.message);
  }
  free(in);
  free(out);
}

struct growth {
  uint64_t before;
  struct holdings held;
};

static void report_growth(const char *what, struct growth *g) {
  char key[96];
  uint64_t now = resident_bytes();
  snprintf(key, sizeof key, "%s_growth_bytes", what);
  report_number(key, now > g->before ? now - g->before : 0);
  if (now > g->before + slack) violation("%s: %llu bytes more", what, (unsigned long long)(now - g->before));
  check_holdings(g->held, what);
}

static void *thread_flushes(void *data) {
  struct soak *s = data;
  flushes(s->comm, s->ops);
  return NULL;
}

/* One long life of threads, whose memory is looked at while all of them stand still. */
struct life {
  const char *what;
  uint64_t ops;
  pthread_barrier_t still;
};
static struct life life;

static void *thread_lives(void *data) {
  static struct growth g;
  struct soak *s = data;
  fill_staging(s->comm);
  flushes(s->comm, life.ops / 4 + warm_up);
  pthread_barrier_wait(&life.still);
  if (s->rank == 0) g = (struct growth){resident_bytes(), holdings()};
  pthread_barrier_wait(&life.still);
  flushes(s->comm, life.ops);
  pthread_barrier_wait(&life.still);
  if (s->rank == 0) report_growth(life.what, &g);
  pthread_barrier_wait(&life.still);
  return NULL;
}

static void *thread_fails(void *data) {
  struct soak *s = data;
  struct worker *w = calloc(1, sizeof *w);
  rsb_error err;
  if (w == NULL) campaign_die("no memory");
  worker_open(w, s->comm, 4096, s->ops, &err);
  struct op op = {.id = 1, .tag = s->rank == 0 ? 1 : 2, .numel = 100, .dtype = RSB_DTYPE_F32, .op = RSB_OP_SUM};
  worker_submit(w, &op, &err);
  if (rsb_bucketer_flush(w->bucketer, &err) != RSB_ERR_DESYNC) violation("soak: a mismatch was not noticed");
  worker_check(w, RSB_ERR_DESYNC, "a failing cycle");
  worker_close(w);
  free(w);
  return NULL;
}

/* One group of threads: makes it, runs `body` in every rank, frees it. */
static void group(enum kind kind, uint32_t size, uint64_t ops, void *(*body)(void *)) {
  rsb_comm *comms[RANKS];
  struct soak parts[RANKS];
  pthread_t threads[RANKS];
  rsb_error err;
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  if (kind == THREADS) config.staging_bytes = STAGING;
  rsb_status status = kind == ENGINE ? engine_comms(size, &config, comms, &err)
                                     : rsb_comm_create_local(size, &config, comms, &err);
  if (status != RSB_OK) campaign_die("soak: %s", err.message);
  for (uint32_t r = 0; r < size; r++) {
    parts[r] = (struct soak){r, ops, comms[r]};
    if (pthread_create(&threads[r], NULL, body, &parts[r]) != 0) campaign_die("no thread");
  }
  for (uint32_t r = 0; r < size; r++) pthread_join(threads[r], NULL);
  for (uint32_t r = 0; r < size; r++) rsb_comm_free(comms[r]);
}

/* Warms up, then `cycles` times the same; memory must be where it was. */
static void cycles(const char *what, enum kind kind, uint32_t size, uint64_t ops, uint64_t n, void *(*body)(void *)) {
  for (uint64_t i = 0; i < n / 4 + 20; i++) group(kind, size, ops, body);
  struct growth g = {resident_bytes(), holdings()};
  for (uint64_t i = 0; i < n; i++) group(kind, size, ops, body);
  report_growth(what, &g);
}

static void long_life(const char *what, enum kind kind, uint32_t size, uint64_t ops) {
  char key[64];
  life.what = what;
  life.ops = ops;
  pthread_barrier_init(&life.still, NULL, size);
  group(kind, size, 0, thread_lives);
  pthread_barrier_destroy(&life.still);
  snprintf(key, sizeof key, "%s_of_a_rank", what);
  report_number(key, ops);
}

/* Each rank of two processes: one long life in one group, then groups that come and go. */
static void process_rank(uint32_t rank, uint64_t ops, uint64_t n, uint64_t growth[2]) {
  struct holdings first = holdings();
  struct growth g = {0, first};
  rsb_comm *comm;
  rsb_error err;
  for (uint64_t i = 0; i < n + n / 4 + 20; i++) {
    char name[32];
    if (i == n / 4 + 20) g = (struct growth){resident_bytes(), holdings()};
    snprintf(name, sizeof name, "soak-%llu", (unsigned long long)i);
    if (rsb_comm_create_shm(name, rank, 2, NULL, &comm, &err) != RSB_OK) campaign_die("soak: %s", err.message);
    flushes(comm, 64);
    rsb_comm_free(comm);
  }
  uint64_t now = resident_bytes();
  growth[0] = now > g.before ? now - g.before : 0;
  check_holdings(first, "groups of processes that came and went");
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.staging_bytes = STAGING;
  if (rsb_comm_create_shm("soak", rank, 2, &config, &comm, &err) != RSB_OK) campaign_die("soak: %s", err.message);
  fill_staging(comm);
  flushes(comm, ops / 4 + warm_up);
  g = (struct growth){resident_bytes(), holdings()};
  flushes(comm, ops);
  now = resident_bytes();
  growth[1] = now > g.before ? now - g.before : 0;
  check_holdings(g.held, "a long life of processes");
  rsb_comm_free(comm);
  check_holdings(first, "the end of a long life");
  for (int i = 0; i < 2; i++) {
    if (growth[i] > slack) violation("processes: %llu bytes more", (unsigned long long)growth[i]);
  }
  _exit(0);
}

static void processes(uint64_t ops, uint64_t n) {
  uint64_t (*growth)[2] = shared(2 * sizeof *growth);
  pid_t children[2];
  for (uint32_t r = 0; r < 2; r++) {
    children[r] = fork_guarded(options.limit_s);
    if (children[r] == 0) process_rank(r, ops, n, growth[r]);
  }
  for (uint32_t r = 0; r < 2; r++) reap(children[r], "a rank of the soak", 0);
  report_number("processes_ops_of_a_rank", ops);
  report_number("processes_flushes_of_a_rank", ops / 8);
  report_number("processes_groups", n);
  for (int r = 0; r < 2; r++) {
    report_number(r == 0 ? "rank_0_groups_growth_bytes" : "rank_1_groups_growth_bytes", growth[r][0]);
    report_number(r == 0 ? "rank_0_ops_growth_bytes" : "rank_1_ops_growth_bytes", growth[r][1]);
  }
}

/* Each thread's arena and cache of free blocks has leftovers of its own, which would be counted once for each rank, and
 * caches fill for hours as block by block takes another way round. Both are glibc's and set at a program's start. */
static void count_live_memory_only(char **argv) {
  static const char tunables[] = "glibc.malloc.tcache_count=0:glibc.malloc.arena_max=1";
  const char *set = getenv("GLIBC_TUNABLES");
  if (set != NULL && strcmp(set, tunables) == 0) return;
  if (setenv("GLIBC_TUNABLES", tunables, 1) == 0) execv("/proc/self/exe", argv);
  campaign_die("cannot start anew");
}

int main(int argc, char **argv) {
  count_live_memory_only(argv);
  campaign_begin("soak", "N ops of each rank on two processes, N / 2 on two threads, N / 20 on an engine; N / 2000 groups,\n10000 at most, of each.",
                 "threads processes engine", 2000000, argc, argv);
  uint64_t n = options.trials, groups = n / 2000 < CYCLES ? CYCLES : n / 2000 > MOST_CYCLES ? MOST_CYCLES : n / 2000;
  if (wanted("processes")) processes(n, groups);
  if (wanted("threads")) {
    uint32_t size = options.ranks != 0 && options.ranks <= RANKS ? options.ranks : 2;
    cycles("threads_groups", THREADS, size, 64, groups, thread_flushes);
    cycles("threads_groups_that_fail", THREADS, size, 0, groups, thread_fails);
    report_number("threads_groups", 2 * groups);
    long_life("threads_ops", THREADS, size, n / 2);
  }
  if (wanted("engine")) {
    cycles("engine_groups", ENGINE, 2, 64, groups, thread_flushes);
    cycles("engine_groups_that_fail", ENGINE, 2, 0, groups, thread_fails);
    long_life("engine_ops", ENGINE, 2, n / 20);
  }
  return campaign_end();
}
