// What the right answer is: test data that depends on rank, place and round, and an oracle that follows
// the header's words (rank order, f32 or f64 steps, one rounding at the end), written independently.
#ifndef RSBUCKET_CPP_TESTS_VALUES_H
#define RSBUCKET_CPP_TESTS_VALUES_H

#include <rsbucket.h>

#include <cstdint>
#include <string>
#include <vector>

namespace values {

using Bytes = std::vector<unsigned char>;

extern const std::vector<rsb_dtype> kAllDtypes;
extern const std::vector<rsb_op> kAllOps;
std::string dtype_name(rsb_dtype dtype);
std::string op_name(rsb_op op);
size_t size_of(rsb_dtype dtype);
bool is_float(rsb_dtype dtype);
/// AVG is for floats only.
bool takes(rsb_dtype dtype, rsb_op op);

/// A well mixed number for the coordinates of an element.
uint64_t hash(uint64_t a, uint64_t b = 0, uint64_t c = 0, uint64_t d = 0);

/// `x` rounded once, to nearest even, to a float format; integers wrap.
void store(rsb_dtype dtype, double x, unsigned char *at);
/// The value of one element; exact for all but large I64.
double load(rsb_dtype dtype, const unsigned char *at);

/// kExact: small numbers whose results are representable in every dtype, so the order cannot matter.
/// kRough: floats of mixed sign and size, integers of all bits, so the order and each rounding show.
enum class Data { kExact, kRough };

/// What one element is. `to` is the rank that gets it.
struct Place {
  uint64_t seed;
  uint32_t from;
  uint32_t to;
  size_t position;
};
void fill(Data data, rsb_dtype dtype, rsb_op op, const Place &place, unsigned char *at);

/// The piece of `numel` elements that `from` gives to `to`.
Bytes piece(Data data, rsb_dtype dtype, rsb_op op, uint64_t seed, uint32_t from, uint32_t to, size_t numel);

struct Reduction {
  rsb_dtype dtype = RSB_DTYPE_F32;
  rsb_dtype output_dtype = 0;
  rsb_op op = RSB_OP_SUM;
  double scale = 0.0;
};

/// The result of one element: `inputs` in rank order, `accumulate` the old output or NULL.
void reduce(const Reduction &reduction, const std::vector<const unsigned char *> &inputs,
            const unsigned char *accumulate, unsigned char *out);

/// The shard of `rank`, from the data of all ranks. `accumulate`: the old output, or empty.
Bytes shard(const Reduction &reduction, Data data, uint64_t seed, uint32_t rank, uint32_t size, size_t numel,
            const Bytes &accumulate = {});

}  // namespace values

#endif  // RSBUCKET_CPP_TESTS_VALUES_H
