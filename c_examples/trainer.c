/* trainer.c - the part of train_digits that uses rsbucket: gradients go in as tensors, mean shards come out. */
#include "trainer.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const float beta_mean = 0.9f, beta_square = 0.999f, epsilon = 1e-8f;

/* For calls that take no rsb_error of their own. */
static rsb_status report_error(rsb_error *err, rsb_status status, const char *what) {
  rsb_error error = {RSB_OK, 0, -1, 0, ""};
  error.status = status;
  snprintf(error.message, sizeof error.message, "%s", what);
  *err = error;
  return status;
}

static float *own_part(const struct trainer *t) {
  return t->weights + t->rank * t->shard_numel;
}

/* Copies tensor `tensor`'s shards between the flat weights of the network and the parts of the ranks. The last shards
 * of a tensor may be padded, or hold padding only. */
static void copy_shards(struct trainer *t, size_t tensor, int to_network) {
  size_t numel = t->net->tensors[tensor].numel, shard = rsb_shard_numel(numel, t->size);
  float *flat = t->net->params + t->net->tensors[tensor].begin;
  for (uint32_t r = 0; r < t->size && r * shard < numel; r++) {
    size_t valid = numel - r * shard < shard ? numel - r * shard : shard;
    float *part = t->weights + r * t->shard_numel + t->shard_begin[tensor];
    if (to_network) {
      memcpy(flat + r * shard, part, valid * sizeof *part);
    } else {
      memcpy(part, flat + r * shard, valid * sizeof *part);
    }
  }
}

/* Called by rsbucket with this rank's shard of a tensor's mean gradient: Adam. */
static void on_mean_gradient(void *user_data, const rsb_result *result) {
  struct trainer *t = user_data;
  if (result->status != RSB_OK) {
    if (t->failed.status == RSB_OK) t->failed = *result->error;
    return;
  }
  const float *gradient = result->data;
  size_t begin = t->shard_begin[result->tag - 1];
  float *weight = own_part(t) + begin, *mean = t->mean + begin, *square = t->square + begin;
  float mean_scale = (float)(1 / (1 - t->mean_power)), square_scale = (float)(1 / (1 - t->square_power));
  for (size_t i = 0; i < result->valid_numel; i++) {
    mean[i] = beta_mean * mean[i] + (1 - beta_mean) * gradient[i];
    square[i] = beta_square * square[i] + (1 - beta_square) * gradient[i] * gradient[i];
    weight[i] -= t->learning_rate * (mean[i] * mean_scale) / (sqrtf(square[i] * square_scale) + epsilon);
  }
}

struct submission {
  struct trainer *trainer;
  rsb_error *err;
};

/* Called by the backward pass: the library copies the gradient, so its memory is free again at once. */
static int on_gradient(void *user_data, size_t tensor, const float *gradient) {
  struct submission *submission = user_data;
  struct trainer *t = submission->trainer;
  size_t numel = t->net->tensors[tensor].numel, shard = rsb_shard_numel(numel, t->size);

  rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
  args.flat_input = gradient;
  args.numel = numel;
  args.dtype = RSB_DTYPE_F32;
  args.op = RSB_OP_AVG;
  /* The gradients are sums over each rank's images, and a batch need not divide evenly among the ranks:
   * mean over ranks * size / count = sum over all images / count. */
  args.scale = (double)t->size / (double)t->batch_count;
  args.tag = tensor + 1; /* 0 would mean: no tag */
  args.callback = on_mean_gradient;
  args.user_data = t;
  if (shard <= t->bucket_numel) t->bucketed_bytes += shard * t->size * sizeof *gradient;
  return rsb_bucketer_submit(t->bucketer, t->comm, &args, NULL, submission->err);
}

rsb_status trainer_open(struct trainer *t, rsb_comm *comm, struct mlp *net, int64_t bucket_bytes, rsb_error *err) {
  memset(t, 0, sizeof *t);
  t->comm = comm;
  t->net = net;
  t->rank = rsb_comm_rank(comm);
  t->size = rsb_comm_size(comm);
  t->mean_power = t->square_power = 1;
  for (size_t i = 0; i < MLP_TENSORS; i++) {
    t->shard_begin[i] = t->shard_numel;
    t->shard_numel += rsb_shard_numel(net->tensors[i].numel, t->size);
  }
  if (bucket_bytes > 0) t->bucket_numel = (size_t)bucket_bytes / (t->size * sizeof(float));

  rsb_config config = RSB_CONFIG_INIT;
  config.bucket_bytes = bucket_bytes;
  rsb_status status = rsb_bucketer_create(&config, &t->bucketer, err);
  if (status != RSB_OK) return status;

  t->mine = malloc(net->max_images * sizeof *t->mine);
  t->weights = calloc(t->size * t->shard_numel, sizeof *t->weights);
  t->mean = calloc(t->shard_numel, sizeof *t->mean);
  t->square = calloc(t->shard_numel, sizeof *t->square);
  if (t->mine == NULL || t->weights == NULL || t->mean == NULL || t->square == NULL) {
    rsb_error ignored;
    trainer_close(t, &ignored);
    return report_error(err, RSB_ERR_NO_MEMORY, "no memory for the weights and Adam's state");
  }
  for (size_t i = 0; i < MLP_TENSORS; i++) copy_shards(t, i, 0);
  return RSB_OK;
}

rsb_status trainer_step(struct trainer *t, const struct digit *const *images, size_t count, float learning_rate,
                        double *loss, rsb_error *err) {
  t->learning_rate = learning_rate;
  t->batch_count = count;
  t->mean_power *= beta_mean;
  t->square_power *= beta_square;

  size_t own = 0;
  for (size_t i = t->rank; i < count; i += t->size) t->mine[own++] = images[i];
  *loss += mlp_forward(t->net, t->mine, own);

  struct submission submission = {t, err};
  rsb_status status = mlp_backward(t->net, t->mine, own, on_gradient, &submission);
  if (status != RSB_OK) return status;
  status = rsb_bucketer_flush(t->bucketer, err);
  if (status != RSB_OK) return status;
  if (t->failed.status != RSB_OK) {
    *err = t->failed;
    return t->failed.status;
  }

  /* Every callback has run: this rank's part holds its new weights, in its place of the gathered vector. */
  status = rsb_comm_all_gather(t->comm, own_part(t), t->weights, t->shard_numel * sizeof *t->weights, err);
  if (status != RSB_OK) return status;
  for (size_t i = 0; i < MLP_TENSORS; i++) copy_shards(t, i, 1);
  return RSB_OK;
}

rsb_status trainer_survive(struct trainer *t, rsb_comm **comm, const rsb_comm_config *config, int64_t bucket_bytes,
                           rsb_error *err) {
  struct mlp *net = t->net;
  rsb_comm *smaller;
  rsb_status status = trainer_close(t, err);
  if (status == RSB_OK) status = rsb_comm_shrink(*comm, config, &smaller, err);
  if (status != RSB_OK) return status;
  rsb_comm_free(*comm);
  *comm = smaller;
  return trainer_open(t, smaller, net, bucket_bytes, err);
}

rsb_status trainer_report(const struct trainer *t, int64_t bucket_bytes, struct trainer_report *out, rsb_error *err) {
  rsb_status status = rsb_bucketer_stats(t->bucketer, &out->stats, sizeof out->stats);
  if (status != RSB_OK) return report_error(err, status, "rsb_bucketer_stats was refused");
  uint64_t buckets = out->stats.collectives_launched - out->stats.ops_direct;
  out->fill = buckets == 0 ? -1 : (double)t->bucketed_bytes / ((double)buckets * (double)bucket_bytes);
  return RSB_OK;
}

rsb_status trainer_close(struct trainer *t, rsb_error *err) {
  rsb_status status = rsb_bucketer_free(t->bucketer);
  free(t->mine);
  free(t->weights);
  free(t->mean);
  free(t->square);
  memset(t, 0, sizeof *t);
  return status == RSB_OK ? status : report_error(err, status, "rsb_bucketer_free was refused");
}
