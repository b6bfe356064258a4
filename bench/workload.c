/* workload.c: what is reduced: the workloads A to D, a sweep over sizes, or a list of tensors from a file. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bench.h"

/* Where the lists of shapes are in the source tree, and, seen from the installed program, beside it. */
#ifndef BENCH_SHAPES
#define BENCH_SHAPES "bench/shapes"
#endif
#ifndef BENCH_SHAPES_INSTALLED
#define BENCH_SHAPES_INSTALLED "../share/rsbucket/shapes"
#endif

static void *grown(void *memory, size_t bytes) {
  memory = realloc(memory, bytes);
  if (!memory) bench_die("no memory for %zu bytes", bytes);
  return memory;
}

/* Inputs begin at multiples of 64 elements, as tensors of a framework are aligned. */
static void add_tensor(bench_workload *work, const bench_options *opt, size_t numel) {
  size_t ranks = (size_t)opt->ranks, shard = (numel + ranks - 1) / ranks;
  work->tensors = grown(work->tensors, (work->count + 1) * sizeof *work->tensors);
  work->tensors[work->count++] = (bench_tensor){numel, shard, work->in_numel, work->out_numel};
  work->in_numel += (shard * ranks + 63) / 64 * 64;
  work->out_numel += shard;
  work->bytes += numel * bench_dtype_size(opt->dtype);
}

/* Reads the third column of a list of tensors. Gradients become ready from the last tensor to the first. */
static void add_file(bench_workload *work, const bench_options *opt, const char *path) {
  FILE *file = fopen(path, "r");
  if (!file) bench_die("%s: cannot be opened", path);
  size_t *numels = NULL, count = 0;
  char line[1024];
  while (fgets(line, sizeof line, file)) {
    char *column = strchr(line, '\t');
    column = column ? strchr(column + 1, '\t') : NULL;
    size_t numel = column ? strtoull(column + 1, NULL, 10) : 0;
    if (numel == 0) bench_die("%s, line %zu: expected name, shape and numel, with tabs between", path, count + 1);
    numels = grown(numels, (count + 1) * sizeof *numels);
    numels[count++] = numel;
  }
  fclose(file);
  if (count == 0) bench_die("%s: no tensors", path);
  for (size_t i = 0; i < count; i++) add_tensor(work, opt, numels[opt->forward ? i : count - 1 - i]);
  free(numels);
}

/* A list that comes with the benchmark. */
static void add_own_file(bench_workload *work, const bench_options *opt, const char *name) {
  char path[4096 + 256];
  ssize_t length = readlink("/proc/self/exe", path, 4096);
  char *slash = length > 0 ? memrchr(path, '/', (size_t)length) : NULL;
  if (slash) {
    snprintf(slash + 1, 256, "%s/%s", BENCH_SHAPES_INSTALLED, name);
    if (access(path, R_OK) == 0) {
      add_file(work, opt, path);
      return;
    }
  }
  snprintf(path, sizeof path, "%s/%s", BENCH_SHAPES, name);
  add_file(work, opt, path);
}

/* Calls a pass, so that a pass of tiny ops is long enough to time; fewer where each needs the scheduler. */
static int calls_for(const bench_options *opt, size_t bytes) {
  size_t most = opt->ranks > sysconf(_SC_NPROCESSORS_ONLN) ? 100 : 1000, calls = (1 << 20) / (bytes + 1);
  return (int)(calls < 1 ? 1 : calls > most ? most : calls);
}

static void make(bench_workload *work, const bench_options *opt, char letter) {
  size_t size = bench_dtype_size(opt->dtype), ranks = (size_t)opt->ranks;
  *work = (bench_workload){.name = {letter}, .calls = 1};
  switch (letter) {
    case 'A':
      snprintf(work->what, sizeof work->what, "1,000 tensors, shards of 1,024");
      for (int i = 0; i < 1000; i++) add_tensor(work, opt, ranks * 1024);
      work->lists = true;
      break;
    case 'B':
      snprintf(work->what, sizeof work->what, "ResNet-50's 161 gradients");
      add_own_file(work, opt, "resnet50.tsv");
      break;
    case 'C':
      snprintf(work->what, sizeof work->what, "one tensor");
      add_tensor(work, opt, ((size_t)256 << 20) / size);
      break;
    case 'D':
      snprintf(work->what, sizeof work->what, "one op with a shard of 8 bytes");
      add_tensor(work, opt, ranks * (8 / size));
      work->lists = true;
      work->calls = calls_for(opt, 8);
      break;
    default:
      bench_die("--workload %c: expected A, B, C or D", letter);
  }
}

static void make_size(bench_workload *work, const bench_options *opt, const char *text) {
  char *end;
  size_t bytes = strtoull(text, &end, 10), width = strcspn(text, ",");
  const char *suffixes = "KMG", *suffix = *end && *end != ',' ? strchr(suffixes, *end) : NULL;
  if (suffix) bytes <<= 10 * (suffix - suffixes + 1);
  if (bytes < bench_dtype_size(opt->dtype) || (*end != ',' && *end && !suffix) || width >= sizeof work->name) {
    bench_die("--sizes %s: expected bytes, with commas between", text);
  }
  *work = (bench_workload){.calls = calls_for(opt, bytes * (size_t)opt->count)};
  memcpy(work->name, text, width);
  snprintf(work->what, sizeof work->what, "%d tensor%s", opt->count, opt->count > 1 ? "s" : "");
  for (int i = 0; i < opt->count; i++) add_tensor(work, opt, bytes / bench_dtype_size(opt->dtype));
}

bench_workload *bench_workloads(const bench_options *opt, size_t *count) {
  bench_workload *works = grown(NULL, sizeof *works);
  *count = 0;
  if (opt->shapes) {
    works[0] = (bench_workload){.name = "list", .calls = 1};
    const char *slash = strrchr(opt->shapes, '/');
    add_file(&works[0], opt, opt->shapes);
    snprintf(works[0].what, sizeof works[0].what, "%zu tensors of %.60s", works[0].count,
             slash ? slash + 1 : opt->shapes);
    *count = 1;
    return works;
  }
  for (const char *at = opt->sizes ? opt->sizes : opt->workloads; *at; at += *at == ',') {
    works = grown(works, (*count + 1) * sizeof *works);
    if (opt->sizes) {
      make_size(&works[(*count)++], opt, at);
    } else {
      make(&works[(*count)++], opt, *at);
    }
    at += opt->sizes ? strcspn(at, ",") : 1;
    if (*at && *at != ',') bench_die("%s: expected a comma", at);
  }
  if (*count == 0) bench_die("no workload; see --help");
  return works;
}

int bench_iters(const bench_options *opt, const bench_workload *work) {
  if (opt->iters) return opt->iters;
  size_t iters = ((size_t)512 << 20) / (work->bytes * (size_t)work->calls + 1);
  return iters < 3 ? 3 : iters > 50 ? 50 : (int)iters;
}
