/* train_digits.c - trains a small network on handwritten digits, sharded over processes of this host, with rsbucket.
 *
 * The program starts its own ranks. It then trains again with other bucket sizes and with none, and shows that the
 * final weights are the same to the bit: bucketing changes the number of collectives, never the result. With --kill-rank
 * one rank kills itself on the way, and the others finish without it. */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "digits.h"
#include "mlp.h"
#include "rng.h"
#include "rsbucket.h"
#include "trainer.h"

enum { RANKS_MAX = 16, EXIT_USAGE = 2, LINE_SIZE = 512 };

static const uint64_t split_seed = 1, weight_seed = 2, order_seed = 3;
static const float first_learning_rate = 0.006f; /* falls to zero over the run */
static const uint64_t timeout_ns = UINT64_C(30000000000);

/* ---- options ------------------------------------------------------------------------------------ */

struct options {
  long ranks, epochs, batch, bucket_kb;
  long kill_rank, at_step; /* at_step 0: nobody is killed */
  const char *data;
};

static const char usage[] =
    "usage: train_digits [options]\n"
    "Trains a small network on handwritten digits with N processes that share the work by rsbucket.\n"
    "  --ranks N      processes, 1 to 16 (default 4)\n"
    "  --epochs N     passes over the training images, 1 to 1000 (default 20)\n"
    "  --batch N      images a step, from the number of ranks to 1437 (default 48)\n"
    "  --bucket-kb N  size of a bucket in KiB, 1 to 1048576 (default 16)\n"
    "  --kill-rank R  this rank kills itself, and the others go on without it (with --at-step)\n"
    "  --at-step S    when: at the beginning of step S, counted from 1\n"
    "  --data FILE    the images (default: data/digits.csv here or in the source tree of the program)\n"
    "  --help         this text\n";

static int usage_error(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("train_digits: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  return EXIT_USAGE;
}

/* A decimal number min..max; 0 when `text` is none. */
static int parse_number(const char *text, long min, long max, long *out) {
  char *end;
  if (*text < '0' || *text > '9') return 0;
  errno = 0;
  *out = strtol(text, &end, 10);
  return errno == 0 && *end == '\0' && *out >= min && *out <= max;
}

static int parse_options(int argc, char **argv, struct options *o) {
  const struct {
    const char *name;
    long min, max;
    long *value;
  } numbers[] = {
      {"--ranks", 1, RANKS_MAX, &o->ranks},
      {"--epochs", 1, 1000, &o->epochs},
      {"--batch", 1, DIGITS_TRAIN, &o->batch},
      {"--bucket-kb", 1, 1048576, &o->bucket_kb},
      {"--kill-rank", 0, RANKS_MAX - 1, &o->kill_rank},
      {"--at-step", 1, 1000L * DIGITS_TRAIN, &o->at_step},
  };
  enum { NUMBERS = sizeof numbers / sizeof numbers[0] };
  for (int i = 1; i < argc; i++) {
    size_t n = 0;
    while (n < NUMBERS && strcmp(argv[i], numbers[n].name) != 0) n++;
    if (n == NUMBERS && strcmp(argv[i], "--data") != 0) {
      return usage_error("unknown option '%s' (see --help)", argv[i]);
    }
    if (i + 1 == argc) return usage_error("%s needs a value (see --help)", argv[i]);
    const char *value = argv[++i];
    if (n == NUMBERS) {
      o->data = value;
    } else if (!parse_number(value, numbers[n].min, numbers[n].max, numbers[n].value)) {
      return usage_error("%s is '%s', expected a number from %ld to %ld", numbers[n].name, value, numbers[n].min,
                         numbers[n].max);
    }
  }
  if (o->batch < o->ranks) {
    return usage_error("--batch is %ld, expected at least one image for each of the %ld ranks", o->batch, o->ranks);
  }
  if ((o->kill_rank < 0) != (o->at_step == 0)) return usage_error("--kill-rank and --at-step need each other");
  if (o->kill_rank >= o->ranks || (o->kill_rank >= 0 && o->ranks < 2)) {
    return usage_error("--kill-rank is %ld, expected one of at least two ranks, below %ld", o->kill_rank, o->ranks);
  }
  long steps = (DIGITS_TRAIN + o->batch - 1) / o->batch * o->epochs;
  if (o->at_step > steps) return usage_error("--at-step is %ld, expected at most the %ld steps", o->at_step, steps);
  return 0;
}

/* ---- one rank ------------------------------------------------------------------------------------ */

struct job {
  const struct options *options;
  const struct digits *digits;
  rsb_comm *comm;
  uint32_t rank, size;
  int doomed; /* this rank will kill itself */
};

struct outcome {
  uint64_t hash;  /* of the final weights */
  int agreed;     /* all ranks had that hash */
  size_t correct; /* test images, on rank 0 */
  struct trainer_report report;
};

static rsb_comm_config comm_config(void) {
  rsb_comm_config config = RSB_COMM_CONFIG_INIT;
  config.timeout_ns = timeout_ns;
  config.label = "train_digits";
  return config;
}

static double now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static size_t test_correct(struct mlp *net, const struct digits *digits) {
  const struct digit *images[DIGITS_TEST];
  size_t correct = 0;
  for (size_t i = 0; i < DIGITS_TEST; i++) images[i] = &digits->test[i];
  for (size_t i = 0; i < DIGITS_TEST; i += net->max_images) {
    size_t count = DIGITS_TEST - i < net->max_images ? DIGITS_TEST - i : net->max_images;
    mlp_forward(net, images + i, count);
    correct += mlp_correct(net, images + i, count);
  }
  return correct;
}

static double percent(size_t correct) {
  return 100.0 * (double)correct / DIGITS_TEST;
}

static void draw_bar(long epoch, long epochs, size_t done) {
  static const char full[] = "##############################";
  int width = (int)(sizeof full - 1);
  printf("\repoch %3ld/%ld  [%-*.*s]", epoch, epochs, width, (int)((size_t)width * done / DIGITS_TRAIN), full);
  fflush(stdout);
}

/* A rank is lost: the others share its part, and their ranks may have changed. */
static rsb_status survive(struct job *job, struct trainer *trainer, int64_t bucket_bytes, size_t step, rsb_error *err) {
  rsb_error cause = *err;
  rsb_comm_config config = comm_config();
  rsb_status status = trainer_survive(trainer, &job->comm, &config, bucket_bytes, err);
  if (status != RSB_OK) return status;
  job->rank = rsb_comm_rank(job->comm);
  job->size = rsb_comm_size(job->comm);
  if (job->rank == 0) {
    printf("%sstep %zu: %s; %u go on with new shards, Adam's state starts again\n",
           isatty(STDOUT_FILENO) ? "\r" : "", step + 1, cause.message, (unsigned)job->size);
  }
  return RSB_OK;
}

/* All epochs with one network, one bucketer and buckets of `bucket_bytes`. Only rank 0 of a loud run prints. */
static rsb_status train_epochs(struct job *job, struct trainer *trainer, int64_t bucket_bytes, int loud,
                               struct outcome *out, rsb_error *err) {
  const struct options *o = job->options;
  size_t batch = (size_t)o->batch, steps = (DIGITS_TRAIN + batch - 1) / batch, step = 0;
  uint64_t seed = order_seed;
  for (long epoch = 1; epoch <= o->epochs; epoch++) {
    const struct digit *images[DIGITS_TRAIN];
    size_t order[DIGITS_TRAIN];
    rng_permutation(order, DIGITS_TRAIN, &seed);
    for (size_t i = 0; i < DIGITS_TRAIN; i++) images[i] = &job->digits->train[order[i]];

    double loss = 0, losses[RANKS_MAX], begin = now();
    size_t seen = 0; /* images in the loss: those of this epoch, or since a rank was lost */
    for (size_t at = 0; at < DIGITS_TRAIN;) {
      size_t count = DIGITS_TRAIN - at < batch ? DIGITS_TRAIN - at : batch;
      float rate = first_learning_rate * (1 - (float)step / (float)(steps * (size_t)o->epochs));
      if (job->doomed && step + 1 == (size_t)o->at_step) raise(SIGKILL);
      rsb_status status = trainer_step(trainer, images + at, count, rate, &loss, err);
      if (status == RSB_ERR_PEER_LOST && o->at_step != 0) {
        status = survive(job, trainer, bucket_bytes, step, err);
        if (status != RSB_OK) return status;
        loss = 0;
        seen = 0;
        continue; /* the same step again */
      }
      if (status != RSB_OK) return status;
      at += count;
      seen += count;
      step++;
      if (loud && job->rank == 0 && isatty(STDOUT_FILENO)) draw_bar(epoch, o->epochs, at);
    }
    double step_ms = (now() - begin) * 1e3 / (double)steps;

    rsb_status status = rsb_comm_all_gather(job->comm, &loss, losses, sizeof loss, err);
    if (status != RSB_OK) return status;
    if (!loud || job->rank != 0) continue;
    for (uint32_t r = 1; r < job->size; r++) losses[0] += losses[r];
    out->correct = test_correct(trainer->net, job->digits);
    printf("%sepoch %3ld/%ld  loss %.4f  test accuracy %6.2f %%  %.2f ms a step\n",
           isatty(STDOUT_FILENO) ? "\r" : "", epoch, o->epochs, losses[0] / (double)seen, percent(out->correct), step_ms);
    fflush(stdout);
  }
  return RSB_OK;
}

/* FNV-1a of the weights' bytes, and whether all ranks have the same. */
static rsb_status compare_weights(const struct job *job, const struct mlp *net, struct outcome *out, rsb_error *err) {
  const unsigned char *bytes = (const unsigned char *)net->params;
  uint64_t hashes[RANKS_MAX];
  out->hash = UINT64_C(0xcbf29ce484222325);
  for (size_t i = 0; i < sizeof net->params; i++) out->hash = (out->hash ^ bytes[i]) * UINT64_C(0x100000001b3);
  rsb_status status = rsb_comm_all_gather(job->comm, &out->hash, hashes, sizeof out->hash, err);
  if (status != RSB_OK) return status;
  out->agreed = 1;
  for (uint32_t r = 0; r < job->size; r++) out->agreed &= hashes[r] == out->hash;
  return RSB_OK;
}

static rsb_status train(struct job *job, int64_t bucket_bytes, int loud, struct outcome *out, rsb_error *err) {
  struct mlp net;
  struct trainer trainer;
  /* If a rank is to be lost, the others will have more. */
  size_t sharers = job->size - (job->options->at_step != 0), batch = (size_t)job->options->batch;
  size_t own_images = (batch + sharers - 1) / sharers;
  rsb_status status;
  if (mlp_init(&net, own_images, weight_seed) != 0) {
    rsb_error none = {RSB_ERR_NO_MEMORY, 0, -1, 0, "no memory for the network"};
    *err = none;
    return none.status;
  }
  status = trainer_open(&trainer, job->comm, &net, bucket_bytes, err);
  if (status == RSB_OK) {
    status = train_epochs(job, &trainer, bucket_bytes, loud, out, err);
    if (status == RSB_OK) status = compare_weights(job, &net, out, err);
    if (status == RSB_OK) status = trainer_report(&trainer, bucket_bytes, &out->report, err);
    rsb_error close_error;
    rsb_status close_status = trainer_close(&trainer, &close_error);
    if (status == RSB_OK && close_status != RSB_OK) {
      status = close_status;
      *err = close_error;
    }
  }
  mlp_free(&net);
  return status;
}

static void print_report(const struct job *job, const struct outcome *out) {
  const rsb_stats *s = &out->report.stats;
  printf("bucketing: %llu tensors in, %llu collectives out, ", (unsigned long long)s->ops_submitted,
         (unsigned long long)s->collectives_launched);
  if (out->report.fill < 0) {
    printf("every tensor larger than a bucket\n");
  } else {
    printf("buckets %.1f %% full on average\n", 100 * out->report.fill);
  }
  printf("           %.1f MB reduced, peak memory %.1f KB (this rank, one of %u)\n", (double)s->payload_bytes / 1e6,
         (double)(s->buffer_bytes_peak + s->staging_bytes_peak) / 1024, (unsigned)job->size);
  printf("weights %016llx on %s\n", (unsigned long long)out->hash,
         out->agreed ? "every rank" : "rank 0, others differ: MISMATCH");
}

/* The loud run, then the same run with bucketing off and with two other bucket sizes. *same: all weights are equal. */
static rsb_status train_and_prove(struct job *job, int *same, rsb_error *err) {
  int64_t bucket = (int64_t)job->options->bucket_kb * 1024, others[] = {-1, bucket / 4, bucket * 4};
  struct outcome first, other;
  memset(&first, 0, sizeof first);
  memset(&other, 0, sizeof other);
  rsb_status status = train(job, bucket, 1, &first, err);
  if (status != RSB_OK) return status;
  if (job->rank == 0) print_report(job, &first);
  *same = first.agreed;
  /* Where in the sequence of ops a rank is lost is not the same twice: there is nothing to compare with. */
  size_t again = job->options->at_step != 0 ? 0 : sizeof others / sizeof others[0];
  if (again == 0 && job->rank == 0) printf("not trained again with other bucket sizes: a rank was lost\n");
  for (size_t i = 0; i < again; i++) {
    if (job->rank == 0) fflush(stdout);
    status = train(job, others[i], 0, &other, err);
    if (status != RSB_OK) return status;
    int equal = other.agreed && other.hash == first.hash;
    *same &= equal;
    if (job->rank != 0) continue;
    char name[64];
    if (others[i] < 0) {
      snprintf(name, sizeof name, "bucketing off");
    } else {
      snprintf(name, sizeof name, "buckets of %g KiB", (double)others[i] / 1024);
    }
    printf("trained again, %-20s weights %016llx: %s\n", name, (unsigned long long)other.hash,
           equal ? "bit-identical on every rank" : "MISMATCH");
  }
  if (job->rank == 0) printf("final test accuracy: %.2f %%\n", percent(first.correct));
  return RSB_OK;
}

/* One line for the parent; short enough to arrive in one piece. */
static int rank_failed(int errors, uint32_t rank, const char *what, const char *message) {
  char line[LINE_SIZE];
  int length = snprintf(line, sizeof line, "rank %u: %s: %s\n", (unsigned)rank, what, message);
  /* Where even this write fails, the exit status still tells. */
  if (write(errors, line, (size_t)length) != length) return EXIT_FAILURE;
  return EXIT_FAILURE;
}

static int run_rank(struct job *job, const char *name, int errors) {
  rsb_comm_config config = comm_config();
  rsb_error err;
  rsb_status status = rsb_comm_create_shm(name, job->rank, job->size, &config, &job->comm, &err);
  if (status != RSB_OK) return rank_failed(errors, job->rank, rsb_status_name(status), err.message);

  int same = 0;
  if (job->rank == 0) {
    const struct options *o = job->options;
    printf("%ld ranks, %d training and %d test images, %d weights in %d tensors, batches of %ld, buckets of %ld KiB\n",
           o->ranks, DIGITS_TRAIN, DIGITS_TEST, MLP_PARAMS, MLP_TENSORS, o->batch, o->bucket_kb);
  }
  status = train_and_prove(job, &same, &err);
  rsb_comm_free(job->comm);
  if (status != RSB_OK) return rank_failed(errors, job->rank, rsb_status_name(status), err.message);
  if (fflush(stdout) != 0 || ferror(stdout)) return rank_failed(errors, job->rank, "cannot write", strerror(errno));
  if (!same) return rank_failed(errors, job->rank, "MISMATCH", "bucket sizes or ranks ended with different weights");
  return EXIT_SUCCESS;
}

/* ---- the ranks' processes ------------------------------------------------------------------------ */

/* Reads until every rank has closed its end; keeps the first line. */
static void first_line(int errors, char *line, size_t size) {
  char chunk[LINE_SIZE];
  size_t length = 0;
  int complete = 0;
  for (;;) {
    ssize_t got = read(errors, chunk, sizeof chunk);
    if (got == 0 || (got < 0 && errno != EINTR)) break;
    for (ssize_t i = 0; i < got && !complete; i++) {
      complete = chunk[i] == '\n' || length + 1 == size;
      if (!complete) line[length++] = chunk[i];
    }
  }
  line[length] = '\0';
}

/* Starts every rank as a process and waits for all. Forks first: the library lives in the children only. */
static int run_ranks(const struct options *options, const struct digits *digits) {
  pid_t children[RANKS_MAX];
  char name[64], line[LINE_SIZE], killed[64] = "";
  int errors[2], status, failed = 0;
  snprintf(name, sizeof name, "train-digits-%ld", (long)getpid());
  if (pipe(errors) != 0) {
    fprintf(stderr, "train_digits: cannot make a pipe: %s\n", strerror(errno));
    return EXIT_FAILURE;
  }
  for (long rank = 0; rank < options->ranks; rank++) {
    children[rank] = fork();
    if (children[rank] == 0) {
      struct job job = {options, digits, NULL, (uint32_t)rank, (uint32_t)options->ranks, rank == options->kill_rank};
      close(errors[0]);
      exit(run_rank(&job, name, errors[1]));
    }
    if (children[rank] < 0) {
      fprintf(stderr, "train_digits: cannot start rank %ld: %s\n", rank, strerror(errno));
      while (rank-- > 0) {
        kill(children[rank], SIGKILL);
        waitpid(children[rank], &status, 0);
      }
      return EXIT_FAILURE;
    }
  }
  close(errors[1]);
  first_line(errors[0], line, sizeof line);
  close(errors[0]);
  for (long rank = 0; rank < options->ranks; rank++) {
    while (waitpid(children[rank], &status, 0) < 0 && errno == EINTR) continue;
    if (rank == options->kill_rank && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL) continue; /* as asked */
    if (WIFSIGNALED(status) && killed[0] == '\0') {
      snprintf(killed, sizeof killed, "rank %ld was killed by signal %d", rank, WTERMSIG(status));
    }
    failed |= !WIFEXITED(status) || WEXITSTATUS(status) != EXIT_SUCCESS;
  }
  if (!failed) return EXIT_SUCCESS;
  if (isatty(STDOUT_FILENO)) putchar('\n'); /* a bar may stand there */
  fflush(stdout);
  fprintf(stderr, "train_digits: %s%s%s\n", killed, killed[0] != '\0' && line[0] != '\0' ? "; " : "", line);
  return EXIT_FAILURE;
}

int main(int argc, char **argv) {
  static struct digits digits;
  struct options options = {4, 20, 48, 16, -1, 0, NULL};
  char message[LINE_SIZE];
  for (int i = 1; i < argc; i++) {
    if (strcmp(argv[i], "--help") == 0) return fputs(usage, stdout) < 0 ? EXIT_FAILURE : EXIT_SUCCESS;
  }
  int status = parse_options(argc, argv, &options);
  if (status != 0) return status;
  if (digits_load(options.data, split_seed, &digits, message, sizeof message) != 0) {
    return usage_error("%s", message);
  }
  return run_ranks(&options, &digits);
}
