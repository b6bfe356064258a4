/* campaign.c - the harness of the campaigns. See campaign.h. */
#define _GNU_SOURCE
#include "campaign.h"

#include <dirent.h>
#include <errno.h>
#include <malloc.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { VIOLATIONS_SHOWN = 40 };

struct options options;

static struct {
  atomic_ullong violations;
} *board;

static const char *campaign;
static char directory[256], json[65536];
static size_t json_length;
static uint64_t begun;

/* ---- report ------------------------------------------------------------------------------------------- */

static void json_add(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  int n = vsnprintf(json + json_length, sizeof json - json_length, format, arguments);
  va_end(arguments);
  if (n < 0 || (size_t)n >= sizeof json - json_length) campaign_die("the report is too long");
  json_length += (size_t)n;
}

void report_number(const char *key, uint64_t value) {
  printf("  %-44s %llu\n", key, (unsigned long long)value);
  fflush(stdout);
  json_add(",\n  \"%s\": %llu", key, (unsigned long long)value);
}

/* Values are ours, of the machine, or names: none has a quote or a backslash. */
void report_text(const char *key, const char *value) {
  printf("  %-44s %s\n", key, value);
  fflush(stdout);
  json_add("%s\n  \"%s\": \"%s\"", json_length == 1 ? "" : ",", key, value);
}

static void cpu_model(char *out, size_t size) {
  char line[512];
  FILE *info = fopen("/proc/cpuinfo", "r");
  snprintf(out, size, "unknown");
  while (info != NULL && fgets(line, sizeof line, info) != NULL) {
    char *colon = strchr(line, ':');
    if (strncmp(line, "model name", 10) != 0 || colon == NULL) continue;
    line[strcspn(line, "\n")] = '\0';
    snprintf(out, size, "%s", colon + 2);
    break;
  }
  if (info != NULL) fclose(info);
}

/* Of the last minute, with what runs beside. */
static void report_load(const char *key) {
  char text[16];
  double load = 0;
  getloadavg(&load, 1);
  snprintf(text, sizeof text, "%.2f", load);
  report_text(key, text);
}

static void report_machine(void) {
  char cpu[256], date[32];
  struct utsname system;
  time_t now = time(NULL);
  struct tm utc;
  gmtime_r(&now, &utc);
  strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", &utc);
  cpu_model(cpu, sizeof cpu);
  uname(&system);
  json_add("{");
  report_text("campaign", campaign);
  report_text("date", date);
  report_text("cpu", cpu);
  report_number("cores", (uint64_t)sysconf(_SC_NPROCESSORS_ONLN));
  report_text("kernel", system.release);
  if (getenv("CAMPAIGN_COMMIT") != NULL) report_text("commit", getenv("CAMPAIGN_COMMIT"));
  report_load("load_at_begin");
  report_number("seed", options.seed);
  report_number("trials_asked", options.trials);
  if (options.ranks != 0) report_number("ranks_asked", options.ranks);
  if (options.only != NULL) report_text("only", options.only);
}

/* ---- begin and end ------------------------------------------------------------------------------------ */

static void guard(int signal_number) {
  static const char text[] = "campaign: HANG: the global guard rang (--limit)\n";
  (void)signal_number;
  if (write(STDERR_FILENO, text, sizeof text - 1) < 0) _exit(1);
  _exit(1);
}

static uint64_t number(const char *option, const char *text) {
  char *end;
  errno = 0;
  unsigned long long value = text == NULL ? 0 : strtoull(text, &end, 10);
  if (text == NULL || errno != 0 || *text < '0' || *text > '9' || *end != '\0') {
    campaign_die("%s needs a number (see --help)", option);
  }
  return value;
}

static void parse(int argc, char **argv, const char *what, const char *kinds, uint64_t trials) {
  for (int i = 1; i < argc; i++) {
    const char *o = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
    if (strcmp(o, "--help") == 0) {
      printf("usage: %s [options]\n%s\n  --trials N  default %llu\n  --seed S    default 1\n"
             "  --ranks W   default: every number it knows\n  --limit S   seconds after which it is a hang, default 1800\n"
             "  --json F    writes the report there too\n", campaign, what, (unsigned long long)trials);
      if (kinds != NULL) printf("  --only K    one of: %s\n", kinds);
      exit(0);
    } else if (strcmp(o, "--trials") == 0) {
      options.trials = number(o, value);
    } else if (strcmp(o, "--seed") == 0) {
      options.seed = number(o, value);
    } else if (strcmp(o, "--ranks") == 0) {
      options.ranks = (uint32_t)number(o, value);
    } else if (strcmp(o, "--limit") == 0) {
      options.limit_s = (unsigned)number(o, value);
    } else if (strcmp(o, "--json") == 0 && value != NULL) {
      options.json = value;
    } else if (strcmp(o, "--only") == 0 && value != NULL && kinds != NULL && strstr(kinds, value) != NULL) {
      options.only = value;
    } else {
      campaign_die("unknown option or value: '%s' (see --help)", o);
    }
    i++;
  }
}

static void remove_run_dir(void) {
  rmdir(directory);
}

void campaign_begin(const char *name, const char *what, const char *kinds, uint64_t trials, int argc, char **argv) {
  const char *temporary = getenv("TMPDIR");
  campaign = name;
  options = (struct options){.trials = trials, .seed = 1, .limit_s = 1800};
  parse(argc, argv, what, kinds, trials);
  begun = now_ns();
  board = shared(sizeof *board);
  snprintf(directory, sizeof directory, "%s/campaign-XXXXXX", temporary != NULL ? temporary : P_tmpdir);
  if (mkdtemp(directory) == NULL) campaign_die("no run directory %s: %s", directory, strerror(errno));
  setenv("RSBUCKET_RUN_DIR", directory, 1);
  /* Orphans of killed ranks come to us, so that none is overlooked. */
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  signal(SIGALRM, guard);
  signal(SIGPIPE, SIG_IGN);
  alarm(options.limit_s);
  report_machine();
}

int campaign_end(void) {
  uint64_t n = violations();
  if (run_dir_entries() != 0) {
    violation("the run directory has %u entries left", run_dir_entries());
    n = violations();
  }
  remove_run_dir();
  report_load("load_at_end");
  report_number("seconds", (now_ns() - begun) / 1000000000);
  report_number("violations", n);
  json_add("\n}\n");
  if (options.json != NULL) {
    FILE *file = fopen(options.json, "w");
    if (file == NULL || fputs(json, file) < 0 || fclose(file) != 0) campaign_die("cannot write %s", options.json);
  }
  printf("%s: %s\n", campaign, n == 0 ? "every promise held" : "BROKEN PROMISES");
  return n != 0;
}

int wanted(const char *kind) {
  return options.only == NULL || strcmp(options.only, kind) == 0;
}

void violation(const char *format, ...) {
  char text[512];
  va_list arguments;
  if (atomic_fetch_add(&board->violations, 1) >= VIOLATIONS_SHOWN) return;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  fprintf(stderr, "VIOLATION %s\n", text);
}

uint64_t violations(void) {
  return atomic_load(&board->violations);
}

void campaign_die(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(stderr, "%s: ", campaign);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(2);
}

/* ---- randomness, time --------------------------------------------------------------------------------- */

/* The finisher of splitmix64 (public domain). */
static uint64_t mix(uint64_t z) {
  z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
  z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
  return z ^ z >> 31;
}

uint64_t hash64(uint64_t a, uint64_t b) {
  return mix(a * UINT64_C(0x9e3779b97f4a7c15) + mix(b + UINT64_C(0x9e3779b97f4a7c15)));
}

uint64_t next_random(uint64_t *state) {
  return mix(*state += UINT64_C(0x9e3779b97f4a7c15));
}

uint64_t below(uint64_t *state, uint64_t n) {
  return n == 0 ? 0 : next_random(state) % n;
}

uint64_t now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000 + (uint64_t)t.tv_nsec;
}

void sleep_ns(uint64_t ns) {
  struct timespec t = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
  while (nanosleep(&t, &t) != 0 && errno == EINTR) continue;
}

/* ---- latencies ---------------------------------------------------------------------------------------- */

struct latency {
  size_t capacity;
  atomic_size_t count;
  uint64_t ns[];
};

struct latency *latency_new(size_t capacity) {
  struct latency *latency = shared(sizeof *latency + capacity * sizeof latency->ns[0]);
  latency->capacity = capacity;
  return latency;
}

void latency_add(struct latency *latency, uint64_t ns) {
  size_t at = atomic_fetch_add(&latency->count, 1);
  if (at < latency->capacity) latency->ns[at] = ns;
}

static int by_value(const void *a, const void *b) {
  uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return (x > y) - (x < y);
}

void latency_report(const char *key, struct latency *latency) {
  static const struct {
    const char *name;
    double part;
  } quantiles[] = {{"p50", 0.5}, {"p99", 0.99}, {"max", 1}};
  char name[96];
  size_t count = latency->count < latency->capacity ? latency->count : latency->capacity;
  qsort(latency->ns, count, sizeof latency->ns[0], by_value);
  snprintf(name, sizeof name, "%s_count", key);
  report_number(name, count);
  for (size_t i = 0; i < 3 && count > 0; i++) {
    size_t at = (size_t)(quantiles[i].part * (double)count);
    snprintf(name, sizeof name, "%s_%s_us", key, quantiles[i].name);
    report_number(name, latency->ns[at < count ? at : count - 1] / 1000);
  }
}

/* ---- memory and processes ----------------------------------------------------------------------------- */

void *shared(size_t bytes) {
  void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) campaign_die("no shared memory: %s", strerror(errno));
  return at;
}

void await(const atomic_uint *word, unsigned value) {
  while (atomic_load(word) < value) sleep_ns(50000);
}

pid_t fork_guarded(unsigned guard_s) {
  fflush(NULL);
  pid_t child = fork();
  if (child < 0) campaign_die("fork: %s", strerror(errno));
  if (child == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGALRM, SIG_DFL);
    alarm(guard_s);
  }
  return child;
}

int reap(pid_t child, const char *who, int doomed) {
  int status;
  while (waitpid(child, &status, 0) < 0) {
    if (errno != EINTR) campaign_die("waitpid: %s", strerror(errno));
  }
  if (WIFEXITED(status) && WEXITSTATUS(status) == 0) return 1;
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGALRM) {
    violation("%s: HANG: its guard rang", who);
  } else if (WIFSIGNALED(status) && !doomed) {
    violation("%s: killed by signal %d", who, WTERMSIG(status));
  } else if (!doomed) {
    violation("%s: exit status %d", who, WEXITSTATUS(status));
  }
  return 0;
}

static unsigned entries(const char *path) {
  DIR *dir = opendir(path);
  unsigned n = 0;
  if (dir == NULL) return 0;
  for (struct dirent *e; (e = readdir(dir)) != NULL;) n += strcmp(e->d_name, ".") != 0 && strcmp(e->d_name, "..") != 0;
  closedir(dir);
  return n;
}

struct holdings holdings(void) {
  return (struct holdings){entries("/proc/self/fd"), entries("/proc/self/task")};
}

void check_holdings(struct holdings before, const char *when) {
  struct holdings after = holdings();
  /* A thread that was joined is still listed for a moment. */
  for (int i = 0; i < 200 && after.threads != before.threads; i++) {
    sleep_ns(500000);
    after = holdings();
  }
  if (after.fds != before.fds) violation("%s: %u descriptors, %u before", when, after.fds, before.fds);
  if (after.threads != before.threads) violation("%s: %u threads, %u before", when, after.threads, before.threads);
}

/* Pages of programs come in with the first call of this or that function, and what has been freed the allocator may
 * keep: neither is the library's. */
uint64_t resident_bytes(void) {
  char line[256];
  unsigned long long anonymous = 0, shared_memory = 0;
  malloc_trim(0);
  FILE *file = fopen("/proc/self/status", "r");
  int found = 0;
  while (file != NULL && fgets(line, sizeof line, file) != NULL) {
    found += sscanf(line, "RssAnon: %llu kB", &anonymous) == 1;
    found += sscanf(line, "RssShmem: %llu kB", &shared_memory) == 1;
  }
  if (found != 2) campaign_die("cannot read /proc/self/status");
  fclose(file);
  return (anonymous + shared_memory) * 1024;
}

unsigned run_dir_entries(void) {
  return entries(directory);
}

const char *run_dir(void) {
  return directory;
}
