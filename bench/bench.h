/* bench.h: what the two benchmark programs share, rsb_perf (the library and the floors) and mpi_perf (MPI): options,
 * workloads, values that can be checked, statistics, and the report. It knows neither rsbucket.h nor mpi.h. */
#ifndef BENCH_H
#define BENCH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* ---- Types of elements, and values ----------------------------------------------------------- */

enum bench_dtype { BENCH_F32, BENCH_F16, BENCH_BF16, BENCH_F64, BENCH_I32 };
enum bench_op { BENCH_SUM, BENCH_AVG, BENCH_MIN, BENCH_MAX, BENCH_PROD };

const char *bench_dtype_name(int dtype);
size_t bench_dtype_size(int dtype);
const char *bench_op_name(int op);

/* The values depend on rank, tensor, position and round, and every result is exact or rounded once, so that a check
 * compares bits. Elements from `valid` on are padding: zeros. */
void bench_fill(void *to, int dtype, int op, int rank, size_t tensor, size_t numel, size_t valid, int round);

/* What results should be: of which type, by which operation, and whether they were added to what bench_fill_before had
 * written there. */
typedef struct {
  int dtype, op;
  bool added;
} bench_expected;

/* Writes to outputs what results are added to: values that depend on the position. */
void bench_fill_before(float *to, size_t numel);

/* ---- Options --------------------------------------------------------------------------------- */

typedef struct {
  int ranks, dtype, op;
  bool threads, borrow, output, forms, fused, floors, check, forward, memory;
  const char *workloads, *sizes, *shapes, *json;
  long long bucket_bytes;
  size_t staging_bytes, piece_bytes;
  int rounds, iters, warmup, count;
} bench_options;

/* Reads the command line. It ends the program after --help and on a wrong option. */
bench_options bench_parse(int argc, char **argv, const char *program);

/* Says why on stderr and ends the process with status 1. */
_Noreturn void bench_die(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* ---- Workloads ------------------------------------------------------------------------------- */

/* One reduce-scatter. Positions are in elements, in a rank's arenas of inputs and outputs. Outputs lie one after the
 * other, so the row of a rank is its whole output arena. */
typedef struct {
  size_t numel; /* of the input, without padding */
  size_t shard; /* of a rank: numel / ranks, rounded up */
  size_t in;    /* where the input begins; size * shard elements, the tail zero */
  size_t out;   /* where the rank's shard begins */
} bench_tensor;

typedef struct {
  char name[24], what[112];
  bench_tensor *tensors;
  size_t count;
  size_t in_numel, out_numel; /* of the arenas */
  size_t bytes;               /* of a rank's inputs, without padding */
  bool lists;                 /* submitted as one pointer a rank; else as a flat input */
  int calls;                  /* how often a pass does all of it: 1, or many where it is tiny */
} bench_workload;

/* The workloads that the options ask for. */
bench_workload *bench_workloads(const bench_options *opt, size_t *count);

/* Timed passes of a turn: --iters, or as many as the size of the workload asks for. */
int bench_iters(const bench_options *opt, const bench_workload *work);

void bench_fill_inputs(const bench_options *opt, const bench_workload *work, void *in, int rank, int round);

/* Ends the program if a shard is wrong. shards[i]: where the rank's shard of tensor i is. */
void bench_check_outputs(const bench_options *opt, const bench_workload *work, const bench_expected *expected,
                         const void *const *shards, int rank, int round, const char *who);

/* ---- Time ------------------------------------------------------------------------------------ */

/* One rank's view of a timed pass, in nanoseconds of clocks that all ranks share. */
typedef struct {
  int64_t begin, end, cpu;
} bench_sample;

int64_t bench_now(void);
int64_t bench_cpu(bool of_process);

/* ---- Report ---------------------------------------------------------------------------------- */

/* The timed passes of one contender on one workload, round by round, `iters` passes each. */
typedef struct {
  const char *key, *label;
  bool is_floor;
  int rounds, iters;
  double *ms, *cpu_ms; /* a pass: from the first rank's begin to the last one's end; CPU time of all ranks */
} bench_series;

/* Joins the ranks' samples, samples[pass * ranks + rank], into a series. */
bench_series bench_join(const char *key, const char *label, bool is_floor, int rounds, int iters,
                        const bench_sample *samples, int ranks);

void bench_free(bench_series *series);

void bench_print(const bench_options *opt, const bench_workload *work, const char *mode, const bench_series *series,
                 size_t count);

/* One line a size instead, as nccl-tests and the OSU benchmarks print them; the first call prints the header, too. */
void bench_print_size(const bench_options *opt, const bench_workload *work, const bench_series *series, size_t count);

/* What a rank's memory was used for, by the library's own counters and by the kernel's (KiB in /proc). */
typedef struct {
  uint64_t staging_peak, buffer_peak;       /* rsb_stats: staging_bytes_peak, buffer_bytes_peak */
  uint64_t staging_resident, private_growth; /* /proc/self/smaps: shared with peers; private, beyond inputs and outputs */
} bench_memory;

/* Reads the two that /proc knows; private_growth is all private memory of the process. */
bench_memory bench_memory_now(void);

/* The raw results, as JSON: open, one call a workload, close. A NULL path: nothing is written. memory: may be NULL. */
void bench_json_open(const bench_options *opt, const char *program, const char *version, const char *mode);
void bench_json_add(const bench_workload *work, const bench_series *series, size_t count, const bench_memory *memory);
void bench_json_close(void);

#endif
