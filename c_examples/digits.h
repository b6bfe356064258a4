/* digits.h - the handwritten digits that train_digits learns: reading, checking and splitting them. */
#ifndef DIGITS_H
#define DIGITS_H

#include <stddef.h>
#include <stdint.h>

enum {
  DIGIT_PIXELS = 64,
  DIGIT_CLASSES = 10,
  DIGITS_TOTAL = 1797,
  DIGITS_TRAIN = 1437,
  DIGITS_TEST = DIGITS_TOTAL - DIGITS_TRAIN
};

struct digit {
  float pixel[DIGIT_PIXELS]; /* 0..1 */
  int label;                 /* 0..9 */
};

struct digits {
  struct digit train[DIGITS_TRAIN];
  struct digit test[DIGITS_TEST];
};

/* Reads `path`, or where it is NULL the first digits.csv found in data/ below the current directory or in ../data or
 * ../../data beside the program, and splits the images by `seed`. Returns 0, or -1 with one line in `message`. */
int digits_load(const char *path, uint64_t seed, struct digits *out, char *message, size_t message_size);

#endif
