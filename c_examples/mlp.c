/* mlp.c - forward and backward of the small network in mlp.h, in plain loops. */
#include "mlp.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "rng.h"

static const size_t widths[MLP_LAYERS + 1] = {DIGIT_PIXELS, 128, 64, DIGIT_CLASSES};

enum { WIDTH_MAX = 128 };

/* A layer's first tensor, and where its weights begin (its bias follows them). */
static size_t first_tensor(size_t layer) {
  size_t tensor = 0;
  for (size_t l = 0; l < layer; l++) tensor += (widths[l + 1] + MLP_BLOCK_ROWS - 1) / MLP_BLOCK_ROWS + 1;
  return tensor;
}

static size_t first_weight(size_t layer) {
  size_t begin = 0;
  for (size_t l = 0; l < layer; l++) begin += (widths[l] + 1) * widths[l + 1];
  return begin;
}

static size_t block_rows(size_t outputs, size_t row) {
  return outputs - row < MLP_BLOCK_ROWS ? outputs - row : MLP_BLOCK_ROWS;
}

int mlp_init(struct mlp *net, size_t max_images, uint64_t seed) {
  memset(net, 0, sizeof *net);
  net->max_images = max_images;
  for (size_t l = 0; l <= MLP_LAYERS; l++) {
    net->activations[l] = malloc(max_images * widths[l] * sizeof(float));
    net->deltas[l] = l == 0 ? NULL : malloc(max_images * widths[l] * sizeof(float));
    if (net->activations[l] == NULL || (l > 0 && net->deltas[l] == NULL)) {
      mlp_free(net);
      return -1;
    }
  }

  size_t tensor = 0, at = 0;
  for (size_t l = 0; l < MLP_LAYERS; l++) {
    size_t inputs = widths[l], outputs = widths[l + 1];
    float range = sqrtf(6.0f / (float)inputs); /* He et al.; the bias starts at zero */
    for (size_t i = 0; i < inputs * outputs; i++) net->params[at + i] = range * rng_uniform(&seed);
    for (size_t row = 0; row < outputs; row += MLP_BLOCK_ROWS, tensor++) {
      net->tensors[tensor].begin = at;
      net->tensors[tensor].numel = block_rows(outputs, row) * inputs;
      at += net->tensors[tensor].numel;
    }
    net->tensors[tensor].begin = at;
    net->tensors[tensor].numel = outputs;
    at += outputs;
    tensor++;
  }
  return 0;
}

void mlp_free(struct mlp *net) {
  for (size_t l = 0; l <= MLP_LAYERS; l++) {
    free(net->activations[l]);
    free(net->deltas[l]);
  }
}

/* Four partial sums keep the processor's adders busy, and their order is fixed. Every width is a multiple of four. */
static float dot(const float *a, const float *b, size_t count) {
  float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  for (size_t i = 0; i < count; i += 4) {
    s0 += a[i] * b[i];
    s1 += a[i + 1] * b[i + 1];
    s2 += a[i + 2] * b[i + 2];
    s3 += a[i + 3] * b[i + 3];
  }
  return (s0 + s1) + (s2 + s3);
}

/* Turns logits into probabilities, in place; returns the loss, -log of the right one's. */
static double softmax(float *z, int label) {
  float max = z[0], sum = 0;
  for (size_t k = 1; k < DIGIT_CLASSES; k++) max = z[k] > max ? z[k] : max;
  double loss = max - z[label];
  for (size_t k = 0; k < DIGIT_CLASSES; k++) sum += z[k] = expf(z[k] - max);
  for (size_t k = 0; k < DIGIT_CLASSES; k++) z[k] /= sum;
  return loss + log(sum);
}

double mlp_forward(struct mlp *net, const struct digit *const *images, size_t count) {
  double loss = 0;
  for (size_t s = 0; s < count; s++) {
    memcpy(net->activations[0] + s * DIGIT_PIXELS, images[s]->pixel, sizeof images[s]->pixel);
    for (size_t l = 0; l < MLP_LAYERS; l++) {
      size_t inputs = widths[l], outputs = widths[l + 1];
      const float *weights = net->params + first_weight(l), *bias = weights + inputs * outputs;
      const float *in = net->activations[l] + s * inputs;
      float *out = net->activations[l + 1] + s * outputs;
      for (size_t o = 0; o < outputs; o++) {
        float z = dot(weights + o * inputs, in, inputs) + bias[o];
        out[o] = l + 1 < MLP_LAYERS && z < 0 ? 0 : z;
      }
    }
    loss += softmax(net->activations[MLP_LAYERS] + s * DIGIT_CLASSES, images[s]->label);
  }
  return loss;
}

/* The derivative by the output of the layer below `layer`: zero where its ReLU was closed. */
static void propagate(struct mlp *net, size_t layer, size_t count) {
  size_t inputs = widths[layer], outputs = widths[layer + 1];
  const float *weights = net->params + first_weight(layer);
  for (size_t s = 0; s < count; s++) {
    const float *delta = net->deltas[layer + 1] + s * outputs, *in = net->activations[layer] + s * inputs;
    float *below = net->deltas[layer] + s * inputs;
    memset(below, 0, inputs * sizeof *below);
    for (size_t o = 0; o < outputs; o++) {
      if (delta[o] == 0) continue;
      for (size_t i = 0; i < inputs; i++) below[i] += delta[o] * weights[o * inputs + i];
    }
    for (size_t i = 0; i < inputs; i++) below[i] = in[i] > 0 ? below[i] : 0;
  }
}

/* The gradient of rows [row, row + rows) of a layer's matrix, summed over the images. */
static void block_gradient(const struct mlp *net, size_t layer, size_t row, size_t rows, size_t count, float *gradient) {
  size_t inputs = widths[layer], outputs = widths[layer + 1];
  memset(gradient, 0, rows * inputs * sizeof *gradient);
  for (size_t s = 0; s < count; s++) {
    const float *delta = net->deltas[layer + 1] + s * outputs + row, *in = net->activations[layer] + s * inputs;
    for (size_t r = 0; r < rows; r++) {
      if (delta[r] == 0) continue;
      for (size_t i = 0; i < inputs; i++) gradient[r * inputs + i] += delta[r] * in[i];
    }
  }
}

int mlp_backward(struct mlp *net, const struct digit *const *images, size_t count, mlp_gradient_fn ready,
                 void *user_data) {
  float gradient[MLP_BLOCK_ROWS * WIDTH_MAX]; /* one tensor's: it is given away before the next one is computed */
  for (size_t s = 0; s < count; s++) {
    for (size_t k = 0; k < DIGIT_CLASSES; k++) {
      size_t at = s * DIGIT_CLASSES + k;
      net->deltas[MLP_LAYERS][at] = net->activations[MLP_LAYERS][at] - (images[s]->label == (int)k ? 1.0f : 0.0f);
    }
  }
  for (size_t l = MLP_LAYERS; l-- > 0;) {
    size_t outputs = widths[l + 1], tensor = first_tensor(l);
    for (size_t row = 0; row < outputs; row += MLP_BLOCK_ROWS, tensor++) {
      block_gradient(net, l, row, block_rows(outputs, row), count, gradient);
      int status = ready(user_data, tensor, gradient);
      if (status != 0) return status;
    }
    memset(gradient, 0, outputs * sizeof *gradient);
    for (size_t s = 0; s < count; s++) {
      for (size_t o = 0; o < outputs; o++) gradient[o] += net->deltas[l + 1][s * outputs + o];
    }
    int status = ready(user_data, tensor, gradient);
    if (status != 0) return status;
    if (l > 0) propagate(net, l, count);
  }
  return 0;
}

size_t mlp_correct(const struct mlp *net, const struct digit *const *images, size_t count) {
  size_t correct = 0;
  for (size_t s = 0; s < count; s++) {
    const float *p = net->activations[MLP_LAYERS] + s * DIGIT_CLASSES;
    size_t best = 0;
    for (size_t k = 1; k < DIGIT_CLASSES; k++) best = p[k] > p[best] ? k : best;
    correct += (int)best == images[s]->label;
  }
  return correct;
}
