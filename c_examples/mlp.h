/* mlp.h - a small classifier (64-128-64-10, ReLU, softmax) whose gradients are handed out tensor by tensor.
 *
 * It knows nothing of ranks: the trainer decides which images a network sees and what becomes of its gradients. */
#ifndef MLP_H
#define MLP_H

#include <stddef.h>
#include <stdint.h>

#include "digits.h"

enum {
  MLP_LAYERS = 3,
  MLP_BLOCK_ROWS = 8, /* a layer's matrix is cut into tensors of this many output rows */
  MLP_TENSORS = (16 + 1) + (8 + 1) + (2 + 1),
  MLP_PARAMS = (64 + 1) * 128 + (128 + 1) * 64 + (64 + 1) * 10
};

struct mlp_tensor {
  size_t begin; /* in params */
  size_t numel;
};

struct mlp {
  float params[MLP_PARAMS];
  struct mlp_tensor tensors[MLP_TENSORS]; /* by layer: the blocks of the matrix, then the bias */
  size_t max_images;
  float *activations[MLP_LAYERS + 1]; /* [max_images][width]; the first is the input, the last the probabilities */
  float *deltas[MLP_LAYERS + 1];      /* the loss's derivative by each layer's output, before its ReLU; [0] is unused */
};

/* Called as soon as the gradient of tensor `tensor` is complete; it is valid during the call only. Non-zero ends the
 * backward pass. */
typedef int (*mlp_gradient_fn)(void *user_data, size_t tensor, const float *gradient);

/* Returns 0, or -1 when there is no memory. Same seed, same weights. */
int mlp_init(struct mlp *net, size_t max_images, uint64_t seed);
void mlp_free(struct mlp *net);

/* Runs `count` images forward and keeps what backward needs. Returns the sum of their losses. */
double mlp_forward(struct mlp *net, const struct digit *const *images, size_t count);
/* The gradients of that sum, last layer first. Returns 0 or what `ready` returned. */
int mlp_backward(struct mlp *net, const struct digit *const *images, size_t count, mlp_gradient_fn ready,
                 void *user_data);
/* How many of the images of the last forward the network names correctly. */
size_t mlp_correct(const struct mlp *net, const struct digit *const *images, size_t count);

#endif
