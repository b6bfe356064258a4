/* trainer.h - one rank of a sharded (ZeRO-2) training run over rsbucket.
 *
 * Every rank computes with all weights, but owns only a shard of each tensor: it gets the mean gradient of that shard
 * alone (reduce-scatter), keeps Adam's state for it alone, updates it, and shares the result (all-gather). */
#ifndef TRAINER_H
#define TRAINER_H

#include <stdint.h>

#include "mlp.h"
#include "rsbucket.h"

struct trainer {
  rsb_comm *comm; /* borrowed */
  struct mlp *net;
  rsb_bucketer *bucketer;
  uint32_t rank, size;
  const struct digit **mine; /* this rank's images of a batch */

  size_t shard_begin[MLP_TENSORS]; /* where each tensor's shard begins in a rank's part */
  size_t shard_numel;              /* of all tensors together */
  float *weights;                  /* [size][shard_numel]: every rank's part; this rank updates its own */
  float *mean, *square;            /* Adam's state, [shard_numel] */
  double mean_power, square_power; /* beta to the power of the step */

  float learning_rate;    /* of this step */
  size_t batch_count;     /* images of this step, on all ranks */
  size_t bucket_numel;    /* elements of a rank's part of a bucket */
  uint64_t bucketed_bytes; /* of the tensors that went through buckets, padding included */
  rsb_error failed;       /* the first error a callback saw */
};

/* What a run's bucketing did. */
struct trainer_report {
  rsb_stats stats;
  double fill; /* mean fill of the buckets, 0..1; negative: there were none */
};

/* All return RSB_OK, or an error that is written to `err`. A trainer that failed to open needs no close; a
 * second close does nothing. */
rsb_status trainer_open(struct trainer *trainer, rsb_comm *comm, struct mlp *net, int64_t bucket_bytes,
                        rsb_error *err);
/* One step on images[0..count), of which this rank takes every size-th. Adds its images' losses to *loss. */
rsb_status trainer_step(struct trainer *trainer, const struct digit *const *images, size_t count, float learning_rate,
                        double *loss, rsb_error *err);
/* After RSB_ERR_PEER_LOST: the survivors form a smaller comm, which takes the place of *comm, and cut the shards anew
 * from the weights of the last whole step, which every rank has. Adam's state was sharded: it starts again. */
rsb_status trainer_survive(struct trainer *trainer, rsb_comm **comm, const rsb_comm_config *config,
                           int64_t bucket_bytes, rsb_error *err);
rsb_status trainer_report(const struct trainer *trainer, int64_t bucket_bytes, struct trainer_report *out,
                          rsb_error *err);
rsb_status trainer_close(struct trainer *trainer, rsb_error *err);

#endif
