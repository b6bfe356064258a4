/* digits.c - reads digits.csv strictly: a training program that shrugs at damaged data hides the damage in its result. */
#define _POSIX_C_SOURCE 200809L
#include "digits.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "rng.h"

enum { PIXEL_MAX = 16, FILE_MAX = 1 << 20, PATH_SIZE = 4096 };

/* A position in the text, for parsing and for messages. */
struct cursor {
  const char *at;
  const char *end;
  int line;
  int column;
};

static int truncated(const struct cursor *c, const char *path, char *message, size_t size) {
  snprintf(message, size, "%s: line %d: the file ends within the line (truncated?)", path, c->line);
  return -1;
}

/* A decimal number 0..max; -1 and a message otherwise. */
static int parse_value(struct cursor *c, const char *path, int max, char *message, size_t size) {
  int value = 0;
  const char *begin = c->at;
  if (c->at == c->end) return truncated(c, path, message, size);
  while (c->at < c->end && *c->at >= '0' && *c->at <= '9' && c->at - begin < 4) value = value * 10 + (*c->at++ - '0');
  if (c->at == begin) {
    snprintf(message, size, "%s: line %d, column %d: no number found, expected 0 to %d", path, c->line, c->column, max);
    return -1;
  }
  if (value > max) {
    snprintf(message, size, "%s: line %d, column %d: found %d, expected 0 to %d", path, c->line, c->column, value, max);
    return -1;
  }
  return value;
}

/* One image: 64 pixels and the label, each followed by a comma, the last by the end of the line. */
static int parse_digit(struct cursor *c, const char *path, struct digit *out, char *message, size_t size) {
  for (c->column = 1; c->column <= DIGIT_PIXELS + 1; c->column++) {
    int last = c->column == DIGIT_PIXELS + 1;
    int value = parse_value(c, path, last ? DIGIT_CLASSES - 1 : PIXEL_MAX, message, size);
    if (value < 0) return -1;
    if (c->at == c->end) return truncated(c, path, message, size);
    if (*c->at != (last ? '\n' : ',')) {
      if (*c->at == '\n' || *c->at == ',') {
        snprintf(message, size, "%s: line %d: %s %d columns, expected %d", path, c->line, last ? "more than" : "only",
                 c->column, DIGIT_PIXELS + 1);
      } else {
        snprintf(message, size, "%s: line %d, column %d: a character that belongs to no number", path, c->line,
                 c->column);
      }
      return -1;
    }
    c->at++;
    if (last) {
      out->label = value;
    } else {
      out->pixel[c->column - 1] = (float)value / PIXEL_MAX;
    }
  }
  return 0;
}

static int parse_digits(const char *path, const char *text, size_t length, struct digit *out, char *message,
                        size_t size) {
  struct cursor c = {text, text + length, 1, 1};
  for (; c.at < c.end && c.line <= DIGITS_TOTAL; c.line++) {
    if (parse_digit(&c, path, &out[c.line - 1], message, size) != 0) return -1;
  }
  if (c.line <= DIGITS_TOTAL || c.at < c.end) {
    snprintf(message, size, "%s: %s %d lines, expected %d", path, c.at < c.end ? "more than" : "only", c.line - 1,
             DIGITS_TOTAL);
    return -1;
  }
  return 0;
}

/* The file's bytes, to be freed; NULL and a message on failure. */
static char *read_file(const char *path, size_t *length, char *message, size_t size) {
  FILE *file = fopen(path, "rb");
  if (file == NULL) {
    snprintf(message, size, "%s: cannot open the data file: %s", path, strerror(errno));
    return NULL;
  }
  char *text = malloc(FILE_MAX);
  if (text == NULL) {
    snprintf(message, size, "%s: no memory to read the data file", path);
  } else {
    *length = fread(text, 1, FILE_MAX, file);
    if (ferror(file)) {
      snprintf(message, size, "%s: cannot read the data file: %s", path, strerror(errno));
      free(text);
      text = NULL;
    }
  }
  fclose(file);
  return text;
}

/* Where digits.csv lies in a source or build tree. Returns 0, or -1 when it is in none of the known places. */
static int find_file(char *path, size_t size) {
  static const char *const beside[] = {"../data/digits.csv", "../../data/digits.csv"};
  snprintf(path, size, "data/digits.csv");
  if (access(path, R_OK) == 0) return 0;

  char program[PATH_SIZE];
  ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
  if (length <= 0) return -1;
  program[length] = '\0';
  char *slash = strrchr(program, '/');
  if (slash == NULL) return -1;
  *slash = '\0';
  for (size_t i = 0; i < sizeof beside / sizeof beside[0]; i++) {
    int needed = snprintf(path, size, "%s/%s", program, beside[i]);
    if (needed > 0 && (size_t)needed < size && access(path, R_OK) == 0) return 0;
  }
  return -1;
}

int digits_load(const char *path, uint64_t seed, struct digits *out, char *message, size_t message_size) {
  char found[PATH_SIZE];
  if (path == NULL) {
    if (find_file(found, sizeof found) != 0) {
      snprintf(message, message_size,
               "data/digits.csv: not found in the current directory, nor in ../data or ../../data beside the "
               "program; name it with --data FILE");
      return -1;
    }
    path = found;
  }

  size_t length = 0;
  char *text = read_file(path, &length, message, message_size);
  if (text == NULL) return -1;
  struct digit *all = malloc(DIGITS_TOTAL * sizeof *all);
  if (all == NULL) snprintf(message, message_size, "%s: no memory for the images", path);
  int status = all == NULL ? -1 : parse_digits(path, text, length, all, message, message_size);
  if (status == 0) {
    size_t order[DIGITS_TOTAL];
    rng_permutation(order, DIGITS_TOTAL, &seed);
    for (size_t i = 0; i < DIGITS_TRAIN; i++) out->train[i] = all[order[i]];
    for (size_t i = 0; i < DIGITS_TEST; i++) out->test[i] = all[order[DIGITS_TRAIN + i]];
  }
  free(all);
  free(text);
  return status;
}
