/* options.c: the command line of the benchmark programs. */
#include <errno.h>
#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "bench.h"

void bench_die(const char *format, ...) {
  va_list args;
  va_start(args, format);
  fputs("bench: ", stderr);
  vfprintf(stderr, format, args);
  fputc('\n', stderr);
  va_end(args);
  exit(1);
}

enum { RANKS = 256, THREADS, PROCESSES, DTYPE, OP, SIZES, SHAPES, FORWARD, WORKLOAD, BUCKET, STAGING, PIECE, BORROW,
       OUTPUT, FORMS, FUSED, COUNT, MEMORY, NO_FLOORS, ROUNDS, ITERS, WARMUP, CHECK, JSON, HELP };

static const struct option options[] = {
    {"ranks", required_argument, NULL, RANKS},
    {"threads", no_argument, NULL, THREADS},
    {"processes", no_argument, NULL, PROCESSES},
    {"dtype", required_argument, NULL, DTYPE},
    {"op", required_argument, NULL, OP},
    {"workload", required_argument, NULL, WORKLOAD},
    {"sizes", required_argument, NULL, SIZES},
    {"shapes", required_argument, NULL, SHAPES},
    {"forward", no_argument, NULL, FORWARD},
    {"bucket-bytes", required_argument, NULL, BUCKET},
    {"staging-bytes", required_argument, NULL, STAGING},
    {"piece-bytes", required_argument, NULL, PIECE},
    {"borrow", no_argument, NULL, BORROW},
    {"output", no_argument, NULL, OUTPUT},
    {"forms", no_argument, NULL, FORMS},
    {"fused", no_argument, NULL, FUSED},
    {"count", required_argument, NULL, COUNT},
    {"memory", no_argument, NULL, MEMORY},
    {"no-floors", no_argument, NULL, NO_FLOORS},
    {"rounds", required_argument, NULL, ROUNDS},
    {"iters", required_argument, NULL, ITERS},
    {"warmup", required_argument, NULL, WARMUP},
    {"check", no_argument, NULL, CHECK},
    {"json", required_argument, NULL, JSON},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

static void print_help(const char *program) {
  printf(
      "usage: %s [options]\n"
      "Times reduce-scatters: a pass begins with inputs ready and ends with all shards readable on all ranks.\n"
      "\n"
      "  --ranks N           ranks (2)\n"
      "  --processes         the ranks are processes (the default)\n"
      "  --threads           the ranks are threads of one process\n"
      "  --dtype NAME        f32 (the default), f16, bf16, f64 or i32\n"
      "  --op NAME           sum (the default), avg, min, max or prod; the floors sum in any case\n"
      "\n"
      "  --workload LIST     of A,B,C,D (A,B,C,D)\n"
      "                        A  1,000 small tensors, shards of 1,024 elements\n"
      "                        B  ResNet-50's 161 gradients, last one first\n"
      "                        C  one tensor of 256 MiB\n"
      "                        D  one op with a shard of 8 bytes and a flush; time a call\n"
      "  --sizes LIST        instead: one tensor of each size, in bytes of a rank's input (K, M, G); one line a size\n"
      "  --count N           with --sizes: N tensors of that size a flush (1)\n"
      "  --shapes FILE       instead: the tensors of a list (name, shape, numel), last one first\n"
      "  --forward           take a list of tensors, that of B too, from its first to its last\n"
      "\n"
      "  --bucket-bytes N    rsb_config.bucket_bytes; MPI: bytes of a bucket (25M); -1: no buckets\n"
      "  --staging-bytes N   rsb_comm_config.staging_bytes (the library's default)\n"
      "  --borrow            submit with RSB_SUBMIT_BORROW\n"
      "  --output            give the library the memory of the results; else it is the library's, and kept\n"
      "  --forms             time all four: plain, --output, --borrow, and both\n"
      "  --fused             time, beside the plain sum: the sum as f32, and the average added to f32 (f32, f16, bf16)\n"
      "  --no-floors         leave the floors out\n"
      "  --piece-bytes N     the piece of a row that the floors stage at a time (256K)\n"
      "\n"
      "  --rounds N          rounds; in each, all contenders take their turns (10)\n"
      "  --iters N           timed passes of a turn (by size), after one that warms the caches\n"
      "  --warmup N          untimed passes before the first round (2)\n"
      "  --check             check the results of every pass, not of the first and last only\n"
      "  --memory            say what memory rank 0 used, by rsb_stats and by /proc (processes, one form)\n"
      "  --json FILE         write every timed pass there\n"
      "  --help              this\n",
      program);
}

/* A number with a suffix K, M or G. */
static long long number(const char *text, const char *name, long long least, long long most) {
  char *end;
  errno = 0;
  long long value = strtoll(text, &end, 10);
  const char *suffixes = "KMG", *suffix = *end ? strchr(suffixes, *end) : NULL;
  bool right = !errno && end > text && (*end == '\0' || (suffix && end[1] == '\0')) && value <= most && value >= -most;
  if (right && suffix) value *= 1LL << 10 * (suffix - suffixes + 1);
  if (!right || value < least || value > most) {
    bench_die("--%s %s: expected a number from %lld to %lld", name, text, least, most);
  }
  return value;
}

static int choice(const char *text, const char *name, const char *(*name_of)(int), int count) {
  for (int i = 0; i < count; i++) {
    if (strcmp(text, name_of(i)) == 0) return i;
  }
  bench_die("--%s %s: unknown; see --help", name, text);
}

bench_options bench_parse(int argc, char **argv, const char *program) {
  bench_options opt = {.ranks = 2, .workloads = "A,B,C,D", .piece_bytes = 256 << 10, .rounds = 10, .warmup = 2,
                       .count = 1, .floors = true};
  const long long most = 1LL << 32; /* times G, it still fits */
  for (int option, at; (option = getopt_long(argc, argv, "", options, &at)) != -1;) {
    switch (option) {
      case RANKS: opt.ranks = (int)number(optarg, "ranks", 1, 1024); break;
      case THREADS: opt.threads = true; break;
      case PROCESSES: opt.threads = false; break;
      case DTYPE: opt.dtype = choice(optarg, "dtype", bench_dtype_name, BENCH_I32 + 1); break;
      case OP: opt.op = choice(optarg, "op", bench_op_name, BENCH_PROD + 1); break;
      case WORKLOAD: opt.workloads = optarg; break;
      case SIZES: opt.sizes = optarg; break;
      case SHAPES: opt.shapes = optarg; break;
      case FORWARD: opt.forward = true; break;
      case BUCKET: opt.bucket_bytes = number(optarg, "bucket-bytes", -1, most); break;
      case STAGING: opt.staging_bytes = (size_t)number(optarg, "staging-bytes", 0, most); break;
      case PIECE: opt.piece_bytes = (size_t)number(optarg, "piece-bytes", 64, most) / 64 * 64; break;
      case BORROW: opt.borrow = true; break;
      case OUTPUT: opt.output = true; break;
      case FORMS: opt.forms = true; break;
      case FUSED: opt.fused = true; break;
      case COUNT: opt.count = (int)number(optarg, "count", 1, 1000000); break;
      case MEMORY: opt.memory = true; break;
      case NO_FLOORS: opt.floors = false; break;
      case ROUNDS: opt.rounds = (int)number(optarg, "rounds", 1, 100000); break;
      case ITERS: opt.iters = (int)number(optarg, "iters", 1, 100000); break;
      case WARMUP: opt.warmup = (int)number(optarg, "warmup", 0, 100000); break;
      case CHECK: opt.check = true; break;
      case JSON: opt.json = optarg; break;
      case HELP: print_help(program); exit(0);
      default: exit(2);
    }
  }
  if (optind < argc) bench_die("%s: unexpected; see --help", argv[optind]);
  if (opt.op == BENCH_AVG && opt.dtype == BENCH_I32) bench_die("--op avg: expected a float dtype, not i32");
  if (opt.op == BENCH_PROD && opt.ranks > 15) bench_die("--op prod: expected at most 15 ranks, not %d", opt.ranks);
  if (opt.fused && (opt.dtype > BENCH_BF16 || opt.op != BENCH_SUM || opt.forms || opt.borrow)) {
    bench_die("--fused: expected f32, f16 or bf16, the default --op, and no other form");
  }
  if (opt.memory && (opt.threads || opt.forms || opt.fused)) bench_die("--memory: expected processes and one form");
  if (opt.count > 1 && !opt.sizes) bench_die("--count: expected --sizes, too");
  return opt;
}
