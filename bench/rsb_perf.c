/* rsb_perf.c: times the library, in the spirit of nccl-tests' reduce_scatter_perf, beside what the same work costs at
 * least on the same machine in the same run: rounds in which the library and the floors take turns.
 *
 * A pass begins at a barrier, with inputs ready, and ends when all ranks have all shards, callbacks included. Results
 * in the library's memory are kept until the next pass begins. */
#include <rsbucket.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "group.h"

/* ---- The library's pass ---------------------------------------------------------------------- */

/* Forms of a call: results in the caller's memory, inputs lent, results as f32, averages added to f32. */
enum { OUTPUT = 1, BORROW = 2, WIDE = 4, ADDED = 8 };

/* What a callback needs: where to note its result. */
typedef struct {
  const void **data;
  rsb_shard *kept;
} slot;

typedef struct {
  rsb_comm *comm;
  rsb_bucketer *bucketers[BENCH_NOTES]; /* one for each form */
  slot *slots;
  const void **pieces;
} library;

static const rsb_dtype dtypes[] = {RSB_DTYPE_F32, RSB_DTYPE_F16, RSB_DTYPE_BF16, RSB_DTYPE_F64, RSB_DTYPE_I32};
static const rsb_op ops[] = {RSB_OP_SUM, RSB_OP_AVG, RSB_OP_MIN, RSB_OP_MAX, RSB_OP_PROD};

static void need(rsb_status status, const char *what, const rsb_error *err) {
  if (status != RSB_OK) bench_die("%s: %s: %s", what, rsb_status_name(status), err->message);
}

static void on_shard(void *user_data, const rsb_result *result) {
  slot *mine = user_data;
  need(result->status, "a callback", result->error);
  *mine->data = result->data;
  if (result->shard) mine->kept = rsb_shard_retain(result->shard);
}

static void give_results_back(bench_rank *me) {
  library *lib = me->library;
  for (size_t t = 0; t < me->work->count; t++) {
    rsb_shard_release(lib->slots[t].kept);
    lib->slots[t].kept = NULL;
  }
}

static void library_pass(bench_rank *me, rsb_bucketer *bucketer, unsigned form) {
  library *lib = me->library;
  size_t size = bench_dtype_size(me->opt->dtype), ranks = (size_t)me->opt->ranks;
  size_t out_size = form & (WIDE | ADDED) ? sizeof(float) : size;
  rsb_error err;
  for (int call = 0; call < me->work->calls; call++) {
    give_results_back(me);
    for (size_t t = 0; t < me->work->count; t++) {
      const bench_tensor *tensor = &me->work->tensors[t];
      const char *input = me->in + tensor->in * size;
      rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
      if (me->work->lists) {
        for (size_t rank = 0; rank < ranks; rank++) lib->pieces[rank] = input + rank * tensor->shard * size;
        args.inputs = lib->pieces;
        args.numel = tensor->shard;
      } else {
        args.flat_input = input;
        args.numel = tensor->numel;
      }
      args.dtype = dtypes[me->opt->dtype];
      args.op = form & ADDED ? RSB_OP_AVG : ops[me->opt->op];
      args.flags = (form & BORROW ? RSB_SUBMIT_BORROW : 0) | (form & ADDED ? RSB_SUBMIT_ACCUMULATE : 0);
      args.output = form & OUTPUT ? me->out + tensor->out * out_size : NULL;
      args.output_dtype = form & (WIDE | ADDED) ? RSB_DTYPE_F32 : 0;
      args.callback = on_shard;
      args.user_data = &lib->slots[t];
      need(rsb_bucketer_submit(bucketer, lib->comm, &args, NULL, &err), "submit", &err);
    }
    need(rsb_bucketer_flush(bucketer, &err), "flush", &err);
  }
}

/* Where the library's own counters say that rank 0's passes went, as a line for the report. */
static void note_counters(const bench_rank *me, const char *label, const rsb_stats *before, const rsb_stats *after,
                          char *note) {
  double passes = (double)(after->ops_submitted - before->ops_submitted) / (double)me->work->count / me->work->calls;
  double to_unit = me->work->calls > 1 ? 1e-3 / me->work->calls / passes : 1e-6 / passes;
  snprintf(note, BENCH_NOTE,
           "    %s: packing %.3f, reducing %.3f, waiting %.3f, callbacks %.3f; %.4g MiB copied", label,
           (double)(after->pack_ns - before->pack_ns) * to_unit,
           (double)(after->reduce_ns - before->reduce_ns) * to_unit,
           (double)(after->wait_ns - before->wait_ns) * to_unit,
           (double)(after->callback_ns - before->callback_ns) * to_unit,
           (double)(after->copied_bytes - before->copied_bytes) / passes / (1 << 20));
}

/* Memory since `before`, when inputs and outputs were there, while the results of a pass are still kept. */
static bench_memory memory_of(const bench_memory *before, const rsb_stats *stats) {
  bench_memory now = bench_memory_now();
  now.private_growth -= before->private_growth < now.private_growth ? before->private_growth : now.private_growth;
  now.staging_peak = stats->staging_bytes_peak;
  now.buffer_peak = stats->buffer_bytes_peak;
  return now;
}

/* ---- Contenders ------------------------------------------------------------------------------ */

/* The library in one of its forms, or a floor. */
typedef struct {
  const char *key, *label;
  unsigned form;
  void (*floor)(bench_rank *);
  bool fused_only;
} contender;

static const contender forms[BENCH_NOTES] = {
    {.key = "rsbucket", .label = "rsbucket", .form = 0},
    {.key = "rsbucket-output", .label = "rsbucket, output", .form = OUTPUT},
    {.key = "rsbucket-borrow", .label = "rsbucket, borrow", .form = BORROW},
    {.key = "rsbucket-output-borrow", .label = "rsbucket, output, borrow", .form = OUTPUT | BORROW},
    {.key = "rsbucket-wide", .label = "rsbucket, sum as f32", .form = OUTPUT | WIDE, .fused_only = true},
    {.key = "rsbucket-added", .label = "rsbucket, average added", .form = OUTPUT | ADDED, .fused_only = true}};
static const contender floors[] = {
    {.key = "staged", .label = "floor: all rows staged", .floor = bench_floor_staged},
    {.key = "own-row", .label = "floor: own row from input", .floor = bench_floor_own_row},
    {.key = "in-place", .label = "floor: summed in place", .floor = bench_floor_in_place},
    {.key = "barrier", .label = "floor: a barrier", .floor = bench_floor_barrier},
    {.key = "wide", .label = "floor: staged, as f32", .floor = bench_floor_staged_wide, .fused_only = true},
    {.key = "added", .label = "floor: staged, added", .floor = bench_floor_staged_added, .fused_only = true}};

typedef struct {
  contender list[BENCH_NOTES + sizeof floors / sizeof *floors];
  size_t count;
} contenders;

static contenders contenders_for(const bench_options *opt, const bench_workload *work) {
  contenders all = {.count = 0};
  unsigned chosen = (opt->output || opt->fused ? OUTPUT : 0u) | (opt->borrow ? BORROW : 0u);
  for (size_t i = 0; i < BENCH_NOTES; i++) {
    const contender *c = &forms[i];
    if (c->fused_only ? opt->fused : opt->forms || c->form == chosen) all.list[all.count++] = *c;
  }
  for (size_t i = 0; opt->floors && i < sizeof floors / sizeof *floors; i++) {
    const contender *c = &floors[i];
    if (c->fused_only && !opt->fused) continue;
    if (c->floor == bench_floor_barrier && work->calls == 1 && !opt->sizes) continue;
    all.list[all.count++] = *c;
  }
  return all;
}

static rsb_bucketer *bucketer_of(const library *lib, const contender *who) {
  for (size_t i = 0; i < BENCH_NOTES; i++) {
    if (forms[i].form == who->form) return lib->bucketers[i];
  }
  return NULL;
}

static void do_pass(bench_rank *me, const contender *who) {
  if (who->floor) {
    who->floor(me);
  } else {
    library_pass(me, bucketer_of(me->library, who), who->form);
  }
}

/* What a checked pass should leave; the floors sum whatever the operation. */
static bench_expected expected_of(const bench_options *opt, const contender *who) {
  bool added = who->form & ADDED || who->floor == bench_floor_staged_added;
  bool wide = who->form & WIDE || who->floor == bench_floor_staged_wide;
  return (bench_expected){.dtype = added || wide ? BENCH_F32 : opt->dtype,
                          .op = added ? BENCH_AVG : who->floor ? BENCH_SUM : opt->op,
                          .added = added};
}

/* ---- One rank -------------------------------------------------------------------------------- */

/* All workloads, and the ranks' samples of each. */
static const bench_workload *works;
static size_t work_count;

static size_t samples_of(const bench_options *opt, const bench_workload *work) {
  size_t passes = (size_t)opt->rounds * (size_t)bench_iters(opt, work);
  return contenders_for(opt, work).count * passes * (size_t)opt->ranks;
}

/* A line on a terminal, once a second at most; a negative round takes it away. */
static void say_progress(const bench_rank *me, int round) {
  static int64_t last;
  if (me->rank != 0 || !isatty(STDERR_FILENO)) return;
  if (round < 0) {
    fprintf(stderr, "\r%60s\r", "");
  } else if (last == 0 || bench_now() - last > 1000000000) {
    last = bench_now();
    fprintf(stderr, "\r%s (%zu of %zu), round %d of %d%10s", me->work->name, (size_t)(me->work - works) + 1, work_count,
            round + 1, me->opt->rounds, "");
  }
}

/* An untimed call whose results are checked; the memory of the outputs is spoilt before, or filled if it is added to. */
static void checked_call(bench_rank *me, const contender *who, int round) {
  if (who->floor == bench_floor_barrier) return;
  const bench_workload *work = me->work;
  const bench_expected expected = expected_of(me->opt, who);
  size_t size = bench_dtype_size(expected.dtype);
  bench_workload once = *work;
  once.calls = 1;
  memset(me->out, 0x5a, work->out_numel * size);
  if (expected.added) bench_fill_before((float *)me->out, work->out_numel);
  for (size_t t = 0; t < work->count; t++) me->shards[t] = me->out + work->tensors[t].out * size;
  me->work = &once;
  bench_barrier(me);
  do_pass(me, who);
  me->work = work;
  /* The floors sum, also what was made for products, and average by the inverse, which is exact for powers of two. */
  bool inverse = expected.added && (me->opt->ranks & (me->opt->ranks - 1)) != 0;
  if (who->floor && (me->opt->op == BENCH_PROD || inverse)) return;
  bench_check_outputs(me->opt, work, &expected, me->shards, me->rank, round, who->label);
}

static bench_sample timed_pass(bench_rank *me, const contender *who) {
  bench_sample sample;
  bench_barrier(me);
  sample.cpu = bench_cpu(!me->group->threads);
  sample.begin = bench_now();
  do_pass(me, who);
  sample.end = bench_now();
  sample.cpu = bench_cpu(!me->group->threads) - sample.cpu;
  return sample;
}

static void fill(bench_rank *me, int round) {
  bench_barrier(me);
  bench_fill_inputs(me->opt, me->work, me->in, me->rank, round);
  if (me->group->input_stride) {
    memcpy(me->group->inputs + (size_t)me->rank * me->group->input_stride, me->in,
           me->work->in_numel * bench_dtype_size(me->opt->dtype));
  }
  bench_barrier(me);
}

static void run_workload(bench_rank *me, bench_sample *samples) {
  const bench_options *opt = me->opt;
  const library *lib = me->library;
  rsb_stats before[BENCH_NOTES], after;
  contenders all = contenders_for(opt, me->work);
  int iters = bench_iters(opt, me->work);
  size_t number = (size_t)(me->work - works);
  fill(me, 0);
  memset(me->out, 0, me->out_bytes);
  bench_memory memory = opt->memory ? bench_memory_now() : (bench_memory){0};
  say_progress(me, 0);
  for (size_t i = 0; i < all.count; i++) checked_call(me, &all.list[i], 0);
  fill(me, 1);
  for (size_t i = 0; i < all.count; i++) {
    for (int pass = 0; pass < opt->warmup; pass++) timed_pass(me, &all.list[i]);
  }
  for (int form = 0; form < BENCH_NOTES; form++) {
    rsb_bucketer_stats(lib->bucketers[form], &before[form], sizeof before[form]);
  }
  for (int round = 0; round < opt->rounds; round++) {
    say_progress(me, round);
    for (size_t turn = 0; turn < all.count; turn++) {
      size_t i = (turn + (size_t)round) % all.count;
      timed_pass(me, &all.list[i]);
      for (int pass = 0; pass < iters; pass++) {
        size_t at = (i * (size_t)opt->rounds + (size_t)round) * (size_t)iters + (size_t)pass;
        samples[at * (size_t)opt->ranks + (size_t)me->rank] = timed_pass(me, &all.list[i]);
        if (opt->check) checked_call(me, &all.list[i], 1);
      }
    }
  }
  say_progress(me, -1);
  for (size_t i = 0; i < all.count; i++) checked_call(me, &all.list[i], 1);
  for (size_t form = 0; me->rank == 0 && form < BENCH_NOTES; form++) {
    rsb_bucketer_stats(lib->bucketers[form], &after, sizeof after);
    if (after.ops_submitted == before[form].ops_submitted) continue;
    note_counters(me, forms[form].label, &before[form], &after, me->group->notes[number * BENCH_NOTES + form]);
    if (opt->memory) me->group->memories[number] = memory_of(&memory, &after);
  }
  give_results_back(me);
}

static void *arena(size_t bytes) {
  void *memory = mmap(NULL, bytes ? bytes : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) bench_die("no memory for %zu bytes", bytes);
  return memory;
}

static void run_rank(bench_rank *me) {
  const bench_options *opt = me->opt;
  library *lib = me->library;
  rsb_error err;
  if (!opt->threads) {
    char name[64];
    snprintf(name, sizeof name, "rsb_perf-%ld", (long)getppid());
    rsb_comm_config config = RSB_COMM_CONFIG_INIT;
    config.staging_bytes = opt->staging_bytes;
    need(rsb_comm_create_shm(name, (uint32_t)me->rank, (uint32_t)opt->ranks, &config, &lib->comm, &err),
         "rsb_comm_create_shm", &err);
  }
  rsb_config config = RSB_CONFIG_INIT;
  config.bucket_bytes = opt->bucket_bytes;
  for (int form = 0; form < BENCH_NOTES; form++) {
    need(rsb_bucketer_create(&config, &lib->bucketers[form], &err), "rsb_bucketer_create", &err);
  }
  bench_sample *samples = me->group->samples;
  for (size_t w = 0; w < work_count; w++) {
    size_t size = bench_dtype_size(opt->dtype), in = works[w].in_numel * size;
    me->work = &works[w];
    me->out_bytes = works[w].out_numel * (opt->fused ? sizeof(float) : size);
    me->in = arena(in);
    me->out = arena(me->out_bytes);
    me->shards = arena(me->work->count * sizeof *me->shards);
    lib->slots = arena(me->work->count * sizeof *lib->slots);
    for (size_t t = 0; t < me->work->count; t++) lib->slots[t].data = &me->shards[t];
    for (int rank = 0; !opt->threads && rank < opt->ranks; rank++) {
      me->readable[rank] = me->group->inputs + (size_t)rank * me->group->input_stride;
    }
    if (opt->threads) me->readable[me->rank] = me->in; /* one table for all threads */
    run_workload(me, samples);
    samples += samples_of(opt, me->work);
    bench_barrier(me);
    munmap(me->in, in);
    munmap(me->out, me->out_bytes);
    munmap(me->shards, me->work->count * sizeof *me->shards);
    munmap(lib->slots, me->work->count * sizeof *lib->slots);
  }
  for (int form = 0; form < BENCH_NOTES; form++) rsb_bucketer_free(lib->bucketers[form]);
  rsb_comm_free(lib->comm);
}

/* ---- Report ---------------------------------------------------------------------------------- */

static void print_notes(const bench_options *opt, const bench_group *group, size_t number) {
  printf("  the library's counters, the mean of rank 0's passes:\n");
  for (size_t note = number * BENCH_NOTES; note < (number + 1) * BENCH_NOTES; note++) {
    if (*group->notes[note]) puts(group->notes[note]);
  }
  const bench_memory *memory = &group->memories[number];
  const double kib = 1024;
  if (opt->memory) {
    printf("  memory of rank 0, KiB: staging %.0f by rsb_stats, %.0f resident with its control memory; results and"
           " buffers %.0f by rsb_stats, %.0f private growth\n",
           (double)memory->staging_peak / kib, (double)memory->staging_resident / kib,
           (double)memory->buffer_peak / kib, (double)memory->private_growth / kib);
  }
}

/* Prints what came of one workload, whose samples begin at `at`; returns where the next one's begin. */
static const bench_sample *report(const bench_options *opt, const bench_group *group, const char *mode, size_t number,
                                  const bench_sample *at) {
  const bench_workload *work = &works[number];
  contenders all = contenders_for(opt, work);
  int iters = bench_iters(opt, work);
  bench_series series[all.count];
  for (size_t i = 0; i < all.count; i++) {
    const contender *c = &all.list[i];
    series[i] = bench_join(c->key, c->label, c->floor != NULL, opt->rounds, iters, at, opt->ranks);
    at += (size_t)opt->rounds * (size_t)iters * (size_t)opt->ranks;
  }
  if (opt->sizes) {
    bench_print_size(opt, work, series, all.count);
  } else {
    bench_print(opt, work, mode, series, all.count);
    print_notes(opt, group, number);
  }
  bench_json_add(work, series, all.count, opt->memory ? &group->memories[number] : NULL);
  for (size_t i = 0; i < all.count; i++) bench_free(&series[i]);
  return at;
}

/* ---- The program ----------------------------------------------------------------------------- */

int main(int argc, char **argv) {
  bench_options opt = bench_parse(argc, argv, "rsb_perf");
  works = bench_workloads(&opt, &work_count);
  size_t samples = 0;
  for (size_t w = 0; w < work_count; w++) samples += samples_of(&opt, &works[w]);
  bench_group group = bench_group_make(&opt, works, work_count, samples);

  rsb_error err;
  rsb_comm *comms[opt.ranks];
  memset(comms, 0, sizeof comms);
  if (opt.threads) {
    rsb_comm_config config = RSB_COMM_CONFIG_INIT;
    config.staging_bytes = opt.staging_bytes;
    need(rsb_comm_create_local((uint32_t)opt.ranks, &config, comms, &err), "rsb_comm_create_local", &err);
  }
  bench_rank ranks[opt.ranks];
  library libraries[opt.ranks];
  const char *readable[opt.ranks];
  const void *pieces[opt.ranks][opt.ranks];
  for (int i = 0; i < opt.ranks; i++) {
    libraries[i] = (library){.comm = comms[i], .pieces = pieces[i]};
    ranks[i] = (bench_rank){.opt = &opt, .group = &group, .rank = i, .readable = readable, .library = &libraries[i]};
  }
  const char *mode = opt.threads ? "threads" : "processes";
  if (!opt.sizes) {
    printf("rsbucket %s, %d ranks as %s; x: time as a multiple of each floor's, by medians (by fastest passes)\n",
           rsb_version_string(), opt.ranks, mode);
  } else {
    printf("# rsbucket %s, %d ranks as %s, %d tensor%s a flush; x: median time as a multiple of each floor's\n",
           rsb_version_string(), opt.ranks, mode, opt.count, opt.count > 1 ? "s" : "");
  }
  bench_group_run(&group, ranks, run_rank);

  bench_json_open(&opt, "rsb_perf", rsb_version_string(), mode);
  const bench_sample *at = group.samples;
  for (size_t w = 0; w < work_count; w++) {
    at = report(&opt, &group, mode, w, at);
  }
  bench_json_close();
  return 0;
}
