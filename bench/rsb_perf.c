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

enum { OUTPUT = 1, BORROW = 2 };

/* What a callback needs: where to note its result. */
typedef struct {
  const void **data;
  rsb_shard *kept;
} slot;

typedef struct {
  rsb_comm *comm;
  rsb_bucketer *bucketers[4]; /* one for each combination of OUTPUT and BORROW */
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

static void library_pass(bench_rank *me, unsigned form) {
  library *lib = me->library;
  size_t size = bench_dtype_size(me->opt->dtype), ranks = (size_t)me->opt->ranks;
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
      args.op = ops[me->opt->op];
      args.flags = form & BORROW ? RSB_SUBMIT_BORROW : 0;
      args.output = form & OUTPUT ? me->out + tensor->out * size : NULL;
      args.callback = on_shard;
      args.user_data = &lib->slots[t];
      need(rsb_bucketer_submit(lib->bucketers[form], lib->comm, &args, NULL, &err), "submit", &err);
    }
    need(rsb_bucketer_flush(lib->bucketers[form], &err), "flush", &err);
  }
}

static void pass_plain(bench_rank *me) {
  library_pass(me, 0);
}
static void pass_output(bench_rank *me) {
  library_pass(me, OUTPUT);
}
static void pass_borrow(bench_rank *me) {
  library_pass(me, BORROW);
}
static void pass_both(bench_rank *me) {
  library_pass(me, OUTPUT | BORROW);
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

/* ---- Contenders ------------------------------------------------------------------------------ */

typedef struct {
  const char *key, *label;
  bool is_floor;
  void (*pass)(bench_rank *);
} contender;

static const contender forms[] = {{"rsbucket", "rsbucket", false, pass_plain},
                                  {"rsbucket-output", "rsbucket, output", false, pass_output},
                                  {"rsbucket-borrow", "rsbucket, borrow", false, pass_borrow},
                                  {"rsbucket-output-borrow", "rsbucket, output, borrow", false, pass_both}};
static const contender floors[] = {{"staged", "floor: all rows staged", true, bench_floor_staged},
                                   {"own-row", "floor: own row from input", true, bench_floor_own_row},
                                   {"in-place", "floor: summed in place", true, bench_floor_in_place},
                                   {"barrier", "floor: a barrier", true, bench_floor_barrier}};

typedef struct {
  contender list[8];
  size_t count;
} contenders;

static contenders contenders_for(const bench_options *opt, const bench_workload *work) {
  contenders all = {.count = 0};
  for (unsigned form = 0; form < 4; form++) {
    unsigned chosen = (opt->output ? OUTPUT : 0u) | (opt->borrow ? BORROW : 0u);
    if (opt->forms || form == chosen) all.list[all.count++] = forms[form];
  }
  if (opt->floors) {
    for (int i = 0; i < (work->calls > 1 ? 4 : 3); i++) all.list[all.count++] = floors[i];
  }
  return all;
}

/* ---- One rank -------------------------------------------------------------------------------- */

/* All workloads, and the ranks' samples of each. */
static const bench_workload *works;
static size_t work_count;

static size_t samples_of(const bench_options *opt, const bench_workload *work) {
  size_t passes = (size_t)opt->rounds * (size_t)bench_iters(opt, work);
  return contenders_for(opt, work).count * passes * (size_t)opt->ranks;
}

static void say_progress(const bench_rank *me, int round) {
  if (me->rank != 0 || !isatty(STDERR_FILENO)) return;
  if (round < me->opt->rounds) {
    fprintf(stderr, "\r%s: round %d of %d ", me->work->name, round + 1, me->opt->rounds);
  } else {
    fprintf(stderr, "\r%40s\r", "");
  }
}

/* An untimed pass whose results are checked; the memory of the outputs is spoilt before. */
static void checked_pass(bench_rank *me, const contender *who, int round) {
  memset(me->out, 0x5a, me->work->out_numel * bench_dtype_size(me->opt->dtype));
  for (size_t t = 0; t < me->work->count; t++) {
    me->shards[t] = me->out + me->work->tensors[t].out * bench_dtype_size(me->opt->dtype);
  }
  bench_barrier(me);
  who->pass(me);
  if (who->pass == bench_floor_barrier) return;
  bench_options what = *me->opt;
  if (who->is_floor) what.op = BENCH_SUM;
  if (who->is_floor && me->opt->op == BENCH_PROD) return; /* inputs made for products */
  bench_check_outputs(&what, me->work, me->shards, me->rank, round, who->label);
}

static bench_sample timed_pass(bench_rank *me, const contender *who) {
  bench_sample sample;
  bench_barrier(me);
  sample.cpu = bench_cpu(!me->group->threads);
  sample.begin = bench_now();
  who->pass(me);
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
  rsb_stats before[4], after;
  contenders all = contenders_for(opt, me->work);
  int iters = bench_iters(opt, me->work);
  fill(me, 0);
  for (size_t i = 0; i < all.count; i++) checked_pass(me, &all.list[i], 0);
  fill(me, 1);
  for (size_t i = 0; i < all.count; i++) {
    for (int pass = 0; pass < opt->warmup; pass++) timed_pass(me, &all.list[i]);
  }
  for (int form = 0; form < 4; form++) rsb_bucketer_stats(lib->bucketers[form], &before[form], sizeof before[form]);
  for (int round = 0; round < opt->rounds; round++) {
    say_progress(me, round);
    for (size_t turn = 0; turn < all.count; turn++) {
      size_t i = (turn + (size_t)round) % all.count;
      timed_pass(me, &all.list[i]);
      for (int pass = 0; pass < iters; pass++) {
        size_t at = (i * (size_t)opt->rounds + (size_t)round) * (size_t)iters + (size_t)pass;
        samples[at * (size_t)opt->ranks + (size_t)me->rank] = timed_pass(me, &all.list[i]);
        if (opt->check) checked_pass(me, &all.list[i], 1);
      }
    }
  }
  say_progress(me, opt->rounds);
  for (size_t i = 0; i < all.count; i++) checked_pass(me, &all.list[i], 1);
  give_results_back(me);
  for (int form = 0; me->rank == 0 && form < 4; form++) {
    rsb_bucketer_stats(lib->bucketers[form], &after, sizeof after);
    if (after.ops_submitted == before[form].ops_submitted) continue;
    note_counters(me, forms[form].label, &before[form], &after, me->group->notes[(me->work - works) * 4 + form]);
  }
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
  for (int form = 0; form < 4; form++) {
    need(rsb_bucketer_create(&config, &lib->bucketers[form], &err), "rsb_bucketer_create", &err);
  }
  bench_sample *samples = me->group->samples;
  for (size_t w = 0; w < work_count; w++) {
    size_t size = bench_dtype_size(opt->dtype), in = works[w].in_numel * size, out = works[w].out_numel * size;
    me->work = &works[w];
    me->in = arena(in);
    me->out = arena(out);
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
    munmap(me->out, out);
    munmap(me->shards, me->work->count * sizeof *me->shards);
    munmap(lib->slots, me->work->count * sizeof *lib->slots);
  }
  for (int form = 0; form < 4; form++) rsb_bucketer_free(lib->bucketers[form]);
  rsb_comm_free(lib->comm);
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
  printf("rsbucket %s, %d ranks as %s; x: time as a multiple of each floor's, by medians (by fastest passes)\n",
         rsb_version_string(), opt.ranks, mode);
  bench_group_run(&group, ranks, run_rank);

  bench_json_open(&opt, "rsb_perf", rsb_version_string(), mode);
  const bench_sample *at = group.samples;
  for (size_t w = 0; w < work_count; w++) {
    contenders all = contenders_for(&opt, &works[w]);
    int iters = bench_iters(&opt, &works[w]);
    bench_series series[8];
    for (size_t i = 0; i < all.count; i++) {
      series[i] = bench_join(all.list[i].key, all.list[i].label, all.list[i].is_floor, opt.rounds, iters, at,
                             opt.ranks);
      at += (size_t)opt.rounds * (size_t)iters * (size_t)opt.ranks;
    }
    bench_print(&opt, &works[w], mode, series, all.count);
    printf("  the library's counters, the mean of rank 0's passes:\n");
    for (size_t note = w * 4; note < w * 4 + 4; note++) {
      if (*group.notes[note]) puts(group.notes[note]);
    }
    bench_json_add(&works[w], series, all.count);
  }
  bench_json_close();
  return 0;
}
