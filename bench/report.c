/* report.c: statistics of the timed passes, the table, and the JSON file with every one of them. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "bench.h"

int64_t bench_now(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

int64_t bench_cpu(bool of_process) {
  struct timespec now;
  clock_gettime(of_process ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_THREAD_CPUTIME_ID, &now);
  return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

bench_series bench_join(const char *key, const char *label, bool is_floor, int rounds, int iters,
                        const bench_sample *samples, int ranks) {
  int passes = rounds * iters;
  bench_series series = {key, label, is_floor, rounds, iters, calloc((size_t)passes, sizeof(double)),
                         calloc((size_t)passes, sizeof(double))};
  if (!series.ms || !series.cpu_ms) bench_die("no memory for %d passes", passes);
  for (int pass = 0; pass < passes; pass++) {
    const bench_sample *of = samples + (size_t)pass * (size_t)ranks;
    int64_t begin = of[0].begin, end = of[0].end, cpu = 0;
    for (int rank = 0; rank < ranks; rank++) {
      begin = of[rank].begin < begin ? of[rank].begin : begin;
      end = of[rank].end > end ? of[rank].end : end;
      cpu += of[rank].cpu;
    }
    series.ms[pass] = (double)(end - begin) / 1e6;
    series.cpu_ms[pass] = (double)cpu / 1e6;
  }
  return series;
}

void bench_free(bench_series *series) {
  free(series->ms);
  free(series->cpu_ms);
}

static int by_value(const void *a, const void *b) {
  double x = *(const double *)a, y = *(const double *)b;
  return (x > y) - (x < y);
}

static double median(const double *values, int count) {
  double sorted[count];
  memcpy(sorted, values, sizeof sorted);
  qsort(sorted, (size_t)count, sizeof *sorted, by_value);
  return (sorted[(count - 1) / 2] + sorted[count / 2]) / 2;
}

static double extreme(const double *values, int count, int sign) {
  double found = values[0];
  for (int i = 1; i < count; i++) found = sign * values[i] > sign * found ? values[i] : found;
  return found;
}

/* The median over rounds of the quotient of the two medians in a round: both see the machine in the same state. */
static double ratio(const bench_series *of, const bench_series *to) {
  double quotients[of->rounds];
  for (int round = 0; round < of->rounds; round++) {
    quotients[round] = median(of->ms + round * of->iters, of->iters) / median(to->ms + round * to->iters, to->iters);
  }
  return median(quotients, of->rounds);
}

void bench_print(const bench_options *opt, const bench_workload *work, const char *mode, const bench_series *series,
                 size_t count) {
  bool calls = work->calls > 1;
  double unit = calls ? 1e3 / work->calls : 1;
  bool small = work->bytes < 1 << 20;
  printf("\n%s: %s, %.4g %s a rank, %s %s, %d %s\n", work->name, work->what,
         (double)work->bytes / (small ? 1 : 1 << 20), small ? "bytes" : "MiB", bench_dtype_name(opt->dtype),
         bench_op_name(opt->op), opt->ranks, mode);
  printf("  %-26s %9s %9s %9s %8s %9s", calls ? "us a call" : "ms a pass", "median", "fastest", "slowest", "GB/s",
         "CPU");
  for (size_t f = 0; f < count; f++) {
    if (series[f].is_floor) printf("   x %-10s", series[f].key);
  }
  printf("\n");
  for (size_t i = 0; i < count; i++) {
    const bench_series *s = &series[i];
    int passes = s->rounds * s->iters;
    double middle = median(s->ms, passes), least = extreme(s->ms, passes, -1);
    printf("  %-26s %9.3f %9.3f %9.3f %8.3g %9.3f", s->label, middle * unit, least * unit,
           extreme(s->ms, passes, 1) * unit, (double)work->bytes * work->calls / middle / 1e6,
           median(s->cpu_ms, passes) * unit);
    for (size_t f = 0; f < count; f++) {
      if (!series[f].is_floor) continue;
      char text[32];
      snprintf(text, sizeof text, "%.2f (%.2f)", ratio(s, &series[f]),
               least / extreme(series[f].ms, series[f].rounds * series[f].iters, -1));
      printf("  %-12s", text);
    }
    printf("\n");
  }
  fflush(stdout);
}

void bench_print_size(const bench_options *opt, const bench_workload *work, const bench_series *series, size_t count) {
  static bool begun;
  if (!begun) {
    printf("#%11s %12s %5s %5s %12s %12s %9s %12s", "size", "count", "type", "redop", "time", "fastest", "in",
           "CPU, all");
    for (size_t f = 0; f < count; f++) {
      if (series[f].is_floor) printf(" %9s", series[f].key);
    }
    printf("  form\n#%11s %12s %5s %5s %12s %12s %9s %12s", "(B)", "(elements)", "", "", "(us)", "(us)", "(GB/s)",
           "(us)");
    for (size_t f = 0; f < count; f++) {
      if (series[f].is_floor) printf(" %9s", "(x)");
    }
    printf("\n");
    begun = true;
  }
  for (size_t i = 0; i < count; i++) {
    const bench_series *s = &series[i];
    if (s->is_floor) continue;
    int passes = s->rounds * s->iters;
    double unit = 1e3 / work->calls, middle = median(s->ms, passes);
    printf("%12zu %12zu %5s %5s %12.3f %12.3f %9.3g %12.3f", work->bytes / work->count, work->tensors[0].numel,
           bench_dtype_name(opt->dtype), bench_op_name(opt->op), middle * unit, extreme(s->ms, passes, -1) * unit,
           (double)work->bytes * work->calls / middle / 1e6, median(s->cpu_ms, passes) * unit);
    for (size_t f = 0; f < count; f++) {
      if (series[f].is_floor) printf(" %9.2f", ratio(s, &series[f]));
    }
    printf("  %s\n", s->label);
  }
  fflush(stdout);
}

/* ---- JSON ------------------------------------------------------------------------------------ */

static FILE *json;
static bool json_first;

static void json_text(const char *text) {
  fputc('"', json);
  for (; *text; text++) {
    if (*text == '"' || *text == '\\') fputc('\\', json);
    fputc((unsigned char)*text < ' ' ? ' ' : *text, json);
  }
  fputc('"', json);
}

void bench_json_open(const bench_options *opt, const char *program, const char *version, const char *mode) {
  if (!opt->json) return;
  json = fopen(opt->json, "w");
  if (!json) bench_die("--json %s: cannot be written", opt->json);
  json_first = true;
  fputs("{\"program\": ", json);
  json_text(program);
  fputs(", \"version\": ", json);
  json_text(version);
  fprintf(json,
          ", \"mode\": \"%s\", \"ranks\": %d, \"dtype\": \"%s\", \"op\": \"%s\", \"bucket_bytes\": %lld,"
          " \"staging_bytes\": %zu, \"piece_bytes\": %zu, \"count\": %d, \"results\": [",
          mode, opt->ranks, bench_dtype_name(opt->dtype), bench_op_name(opt->op), opt->bucket_bytes,
          opt->staging_bytes, opt->piece_bytes, opt->count);
}

static void json_numbers(const char *name, const double *values, int count) {
  fprintf(json, ", \"%s\": [", name);
  for (int i = 0; i < count; i++) fprintf(json, "%s%.4g", i ? "," : "", values[i]);
  fputc(']', json);
}

static void json_memory(const bench_memory *memory) {
  fprintf(json,
          ", \"memory\": {\"staging_bytes_peak\": %" PRIu64 ", \"staging_resident\": %" PRIu64
          ", \"buffer_bytes_peak\": %" PRIu64 ", \"private_growth\": %" PRIu64 "}",
          memory->staging_peak, memory->staging_resident, memory->buffer_peak, memory->private_growth);
}

void bench_json_add(const bench_workload *work, const bench_series *series, size_t count, const bench_memory *memory) {
  for (size_t i = 0; json && i < count; i++) {
    const bench_series *s = &series[i];
    fprintf(json, "%s\n{\"workload\": \"%s\", \"what\": ", json_first ? "" : ",", work->name);
    json_first = false;
    json_text(work->what);
    fprintf(json, ", \"tensors\": %zu, \"bytes\": %zu, \"calls\": %d, \"contender\": \"%s\", \"label\": ", work->count,
            work->bytes, work->calls, s->key);
    json_text(s->label);
    fprintf(json, ", \"floor\": %s, \"rounds\": %d, \"iters\": %d", s->is_floor ? "true" : "false", s->rounds,
            s->iters);
    json_numbers("pass_ms", s->ms, s->rounds * s->iters);
    json_numbers("cpu_ms", s->cpu_ms, s->rounds * s->iters);
    if (memory && !s->is_floor) json_memory(memory);
    fputc('}', json);
  }
}

void bench_json_close(void) {
  if (!json) return;
  fputs("\n]}\n", json);
  if (fclose(json) != 0) bench_die("the JSON file could not be written");
  json = NULL;
}
