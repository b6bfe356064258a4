// The library's kernels, their PTX and their source, run by the driver's stand-in: every type and operation
// against an independent oracle, and against what the library computes on the host, bit for bit; tails,
// any alignment, padding, many tensors in one launch, special values.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "gpu.h"
#include "harness.h"
#include "values.h"

namespace {

using gpu::Device;
using values::Bytes;

constexpr size_t kChunk = 16384;

template <size_t N>
struct Pack {
  uint64_t dst, stride;
  uint32_t rows, segments;
  struct {
    uint64_t src, at, count;
    uint32_t end, flat;
  } segment[N];
};

struct Reduce {
  uint64_t src, stride;
  double divisor, factor;
  uint32_t rows, op, segments, reserved;
  struct {
    uint64_t dst, at, count;
    double scale;
    uint32_t end, output;
  } segment[101];
};

static_assert(sizeof(Pack<127>) == 4088 && sizeof(Pack<16>) == 536 && sizeof(Reduce) == 4088, "as in kernels.cu");

uint32_t chunks(uint64_t count, size_t width) { return static_cast<uint32_t>((count * width + kChunk - 1) / kChunk); }

Bytes noise(size_t bytes, uint64_t seed) {
  Bytes data(bytes);
  for (size_t i = 0; i < bytes; ++i) {
    data[i] = static_cast<unsigned char>(values::hash(seed, i) >> 24);
  }
  return data;
}

class Kernels : public ::testing::Test {
 protected:
  Kernels() : stream(device.stream()) {}
  /// One launch, carried out.
  void run(const std::string &kernel, uint32_t blocks, const void *params) {
    ASSERT_CUDA(device.launch(kernel, blocks, params, stream));
    fake_cuda_wait(stream);
  }
  Device device;
  CUstream stream;
};

// ---- Pack -----------------------------------------------------------------------------------------

TEST_F(Kernels, PiecesAreCopiedAtAnyAlignmentAndLength) {
  for (const size_t bytes : {1u, 2u, 3u, 15u, 16u, 17u, 100u, 4095u, 16384u, 16385u, 33000u}) {
    for (const size_t from : {0u, 1u, 2u, 4u, 8u, 13u}) {
      for (const size_t to : {0u, 1u, 2u, 8u, 12u}) {
        const Bytes data = noise(bytes, bytes * 64 + from * 16 + to);
        Pack<16> p{};
        p.dst = device.memory(bytes, to);
        p.segments = 1;
        p.segment[0] = {device.memory(data, from), 0, bytes, chunks(bytes, 1), 0};
        run("rsb_pack_few", p.segment[0].end, &p);
        ASSERT_EQ(Device::read(p.dst, bytes), data) << bytes << " bytes from " << from << " to " << to;
        ASSERT_TRUE(device.surroundings_untouched());
        device.free_memory();
      }
    }
  }
}

TEST_F(Kernels, FlatTensorsAreCutIntoRowsAndPadded) {
  for (const uint32_t rows : {1u, 2u, 3u, 8u}) {
    for (const size_t numel : {1u, 2u, 7u, 8u, 9u, 1000u, 8191u, 40001u}) {
      for (const size_t width : {1u, 2u, 4u, 8u}) {
        const size_t shard = (numel + rows - 1) / rows, stride = shard + 5, at = 3;
        const Bytes data = noise(numel * width, numel + rows);
        Pack<127> p{};
        p.dst = device.memory(Bytes(stride * rows * width, 0x11));
        p.stride = stride * width;
        p.rows = rows;
        p.segments = 1;
        p.segment[0] = {device.memory(data), at * width, shard * width, rows * chunks(shard, width),
                        static_cast<uint32_t>(1 + (shard * rows - numel) * width)};
        run("rsb_pack", p.segment[0].end, &p);
        Bytes expected(stride * rows * width, 0x11);
        for (size_t r = 0; r < rows; ++r) {
          for (size_t i = 0; i < shard * width; ++i) {
            const size_t in = r * shard * width + i;
            expected[(r * stride + at) * width + i] = in < data.size() ? data[in] : 0;
          }
        }
        ASSERT_EQ(Device::read(p.dst, expected.size()), expected) << numel << " elements of " << width << ", " << rows;
        ASSERT_TRUE(device.surroundings_untouched());
        device.free_memory();
      }
    }
  }
}

TEST_F(Kernels, OneLaunchPacksManyTensors) {
  Pack<127> p{};
  const uint32_t rows = 3;
  p.rows = rows;
  p.segments = 127;
  size_t fill = 0;
  std::vector<Bytes> data(127);
  for (size_t i = 0; i < 127; ++i) {
    // Some are empty, some take several chunks.
    const size_t bytes = i % 10 == 3 ? 0 : i % 25 == 7 ? 20000 + i : values::hash(i) % 700;
    data[i] = noise(bytes * (i % 2 == 0 ? rows : 1), i);
    fill += bytes;
  }
  p.stride = fill;
  p.dst = device.memory(Bytes(fill * rows, 0x22));
  Bytes expected(fill * rows, 0x22);
  size_t at = 0;
  uint32_t end = 0;
  for (size_t i = 0; i < 127; ++i) {
    const bool flat = i % 2 == 0;
    const size_t bytes = data[i].size() / (flat ? rows : 1);
    const uint64_t src = data[i].empty() ? 0 : device.memory(data[i], i % 7);
    end += chunks(bytes, 1) * (flat ? rows : 1);
    // A piece goes to one row; its other rows stay as they were.
    const size_t row = flat ? 0 : i % rows;
    p.segment[i] = {src, at + row * fill, bytes, end, flat ? 1u : 0u};
    for (size_t r = 0; r < (flat ? rows : 1); ++r) {
      std::copy_n(data[i].begin() + static_cast<ptrdiff_t>(r * bytes), bytes,
                  expected.begin() + static_cast<ptrdiff_t>((row + r) * fill + at));
    }
    at += bytes;
  }
  run("rsb_pack", end, &p);
  EXPECT_EQ(Device::read(p.dst, expected.size()), expected);
  EXPECT_TRUE(device.surroundings_untouched());
}

// ---- Reduce ---------------------------------------------------------------------------------------

const char *suffix(rsb_dtype dtype) {
  const char *const names[] = {"", "f32", "f64", "f16", "bf16", "i32", "i64", "u8", "i8"};
  return names[dtype];
}

/// One op: rows of `dtype`, combined and finished.
struct Case {
  rsb_dtype dtype;
  rsb_dtype output;
  rsb_op op;
  double scale;
  bool accumulate;
  std::string text() const {
    return values::dtype_name(dtype) + " " + values::op_name(op) + " to " + values::dtype_name(output) + " scale " +
           std::to_string(scale) + (accumulate ? " accumulated" : "");
  }
};

std::vector<Case> all_cases() {
  std::vector<Case> cases;
  for (const rsb_dtype dtype : values::kAllDtypes) {
    for (const rsb_op op : values::kAllOps) {
      for (const rsb_dtype output : values::kAllDtypes) {
        const bool floats = values::is_float(dtype) && values::is_float(output);
        if (!values::takes(dtype, op) || (output != dtype && !floats)) {
          continue;
        }
        for (const bool accumulate : {false, true}) {
          cases.push_back({dtype, output, op, 1.0, accumulate});
          if (floats) {
            cases.push_back({dtype, output, op, 0.3, accumulate});
          }
        }
      }
    }
  }
  return cases;
}

/// What a kernel computes from these rows; `misaligned`: how far rows and result are from alignment. Only with 0
/// every row is aligned, as it must be for several elements to be moved at once.
Bytes reduced(Device &device, CUstream stream, const Case &c, const std::vector<Bytes> &rows, const Bytes &held,
              size_t misaligned = 0) {
  const size_t in = values::size_of(c.dtype), out = values::size_of(c.output), count = rows[0].size() / in;
  const auto ranks = static_cast<uint32_t>(rows.size());
  // Elements around each row's part, so that places in it count.
  const size_t before = 16 / in, room = before + count + before;
  const size_t stride = misaligned == 0 ? (room + before - 1) / before * before : room;
  Bytes data(stride * in * rows.size(), 0x33);
  for (size_t r = 0; r < rows.size(); ++r) {
    std::copy(rows[r].begin(), rows[r].end(), data.begin() + static_cast<ptrdiff_t>((r * stride + before) * in));
  }
  Reduce p{};
  p.src = device.memory(data, misaligned);
  p.stride = stride;
  p.rows = ranks;
  p.op = c.op;
  p.divisor = p.factor = 1.0;
  if (c.op == RSB_OP_AVG) {
    const bool power = (ranks & (ranks - 1)) == 0;
    (power ? p.factor : p.divisor) = power ? 1.0 / ranks : ranks;
  }
  const uint32_t flags = c.output | (c.accumulate ? 0x100u : 0u);
  // Two segments, cut somewhere.
  const size_t cut = count / 3 / before * before;
  p.segments = 2;
  const CUdeviceptr dst = device.memory(held, misaligned);
  p.segment[0] = {dst, before, cut, c.scale, chunks(cut, in), flags};
  const uint32_t end = chunks(cut, in) + chunks(count - cut, in);
  p.segment[1] = {dst + cut * out, before + cut, count - cut, c.scale, end, flags};
  EXPECT_CUDA(device.launch(std::string("rsb_reduce_") + suffix(c.dtype), p.segment[1].end, &p, stream));
  fake_cuda_wait(stream);
  EXPECT_TRUE(device.surroundings_untouched()) << c.text();
  const Bytes result = Device::read(dst, count * out);
  device.free_memory();
  return result;
}

bool is_nan(rsb_dtype dtype, const unsigned char *at) {
  return values::is_float(dtype) && std::isnan(values::load(dtype, at));
}

TEST_F(Kernels, AllHalvesAreConvertedExactly) {
  for (const rsb_dtype dtype : {RSB_DTYPE_F16, RSB_DTYPE_BF16}) {
    Bytes data(65536 * 2), expected(65536 * 4);
    for (uint32_t bits = 0; bits < 65536; ++bits) {
      const auto half = static_cast<uint16_t>(bits);
      std::memcpy(&data[bits * 2], &half, 2);
      const double value = values::load(dtype, &data[bits * 2]);
      const auto single = static_cast<float>(value);
      const uint32_t canonical = 0x7FC00000;
      std::memcpy(&expected[bits * 4], std::isnan(value) ? static_cast<const void *>(&canonical) : &single, 4);
    }
    const Case c{dtype, RSB_DTYPE_F32, RSB_OP_SUM, 1.0, false};
    for (const size_t misaligned : {0u, 1u, 2u}) {
      EXPECT_EQ(reduced(device, stream, c, {data}, Bytes(expected.size()), misaligned), expected) << c.text();
    }
  }
}

TEST_F(Kernels, EveryReductionIsTheOracles) {
  const size_t counts[] = {1, 7, 100, 1025};
  size_t n = 0;
  for (const Case &c : all_cases()) {
    for (const uint32_t ranks : {1u, 2u, 3u, 8u}) {
      const size_t count = counts[n++ % 4], out = values::size_of(c.output);
      std::vector<Bytes> rows;
      for (uint32_t from = 0; from < ranks; ++from) {
        rows.push_back(values::piece(values::Data::kRough, c.dtype, c.op, n, from, 0, count));
      }
      const Bytes held = values::piece(values::Data::kRough, c.output, c.op, n, 99, 0, count);
      const values::Reduction reduction{c.dtype, c.output, c.op, c.scale == 1.0 ? 0.0 : c.scale};
      const Bytes expected =
          values::shard(reduction, values::Data::kRough, n, 0, ranks, count, c.accumulate ? held : Bytes());
      const Bytes result = reduced(device, stream, c, rows, held, n % 5 == 0 ? n % 17 : 0);
      for (size_t i = 0; i < count; ++i) {
        const Bytes want(&expected[i * out], &expected[i * out] + out), got(&result[i * out], &result[i * out] + out);
        ASSERT_EQ(got, want) << c.text() << ", " << ranks << " ranks, element " << i << " of " << count;
      }
    }
  }
}

TEST_F(Kernels, WideTensorsTakeManyChunks) {
  for (const rsb_dtype dtype : values::kAllDtypes) {
    const Case c{dtype, dtype, RSB_OP_SUM, 1.0, false};
    const size_t count = 3 * kChunk / values::size_of(dtype) + 5;
    std::vector<Bytes> rows;
    for (uint32_t from = 0; from < 2; ++from) {
      rows.push_back(values::piece(values::Data::kRough, dtype, RSB_OP_SUM, 5, from, 0, count));
    }
    const Bytes expected = values::shard({dtype, dtype, RSB_OP_SUM, 0.0}, values::Data::kRough, 5, 0, 2, count);
    EXPECT_EQ(reduced(device, stream, c, rows, Bytes(expected.size())), expected) << c.text();
  }
}

/// Any bits: NaNs of all kinds, infinities, subnormals, zeros of both signs.
Bytes special(rsb_dtype dtype, size_t count, uint64_t seed) {
  const size_t width = values::size_of(dtype);
  Bytes data = noise(count * width, seed);
  for (size_t i = 0; i < count && values::is_float(dtype); ++i) {
    unsigned char *top = &data[i * width + width - 1];
    const uint64_t h = values::hash(seed, i, 77);
    // Little endian: sign and exponent are in the last bytes.
    if (h % 8 == 0) {
      std::memset(&data[i * width], 0, width);
      *top = h % 16 == 0 ? 0x80 : 0;
    } else if (h % 8 == 1 || h % 8 == 2) {
      const unsigned char second = dtype == RSB_DTYPE_F16 ? 0x7C : dtype == RSB_DTYPE_F64 ? 0xF0 : 0x80;
      if (h % 8 == 1) {
        std::memset(&data[i * width], 0, width);
      }
      *top = static_cast<unsigned char>((h & 64) | 0x7F);
      if (dtype == RSB_DTYPE_F16) {
        *top = second;
      } else {
        top[-1] = static_cast<unsigned char>(top[-1] | second);
      }
    } else if (h % 8 == 3) {
      *top = static_cast<unsigned char>((h & 128) | 0);
    } else if (h % 8 == 4) {
      values::store(dtype, static_cast<double>(h % 9) - 4.0, &data[i * width]);
    }
  }
  return data;
}

TEST_F(Kernels, SpecialValuesAreWhatTheHostComputes) {
  const size_t count = 301;
  const std::vector<Case> cases = all_cases();
  for (const uint32_t ranks : {1u, 2u, 3u, 4u}) {
    std::vector<Bytes> host(cases.size());
    harness::run_ranks(ranks, [&](uint32_t rank, rsb_comm *comm) {
      rsb_bucketer *bucketer = nullptr;
      ASSERT_EQ(rsb_bucketer_create(nullptr, &bucketer, nullptr), RSB_OK);
      std::vector<Bytes> outputs(cases.size());
      for (size_t n = 0; n < cases.size(); ++n) {
        const Case &c = cases[n];
        const Bytes data = special(c.dtype, count, n * 16 + rank);
        const std::vector<const void *> inputs(ranks, data.data());
        outputs[n] = special(c.output, count, n * 16 + 15);
        rsb_submit_args args = RSB_SUBMIT_ARGS_INIT;
        args.inputs = inputs.data();
        args.numel = count;
        args.dtype = c.dtype;
        args.output_dtype = c.output;
        args.op = c.op;
        args.scale = c.scale;
        args.output = outputs[n].data();
        args.flags = c.accumulate ? RSB_SUBMIT_ACCUMULATE : 0;
        harness::Error error;
        ASSERT_EQ(rsb_bucketer_submit(bucketer, comm, &args, nullptr, error), RSB_OK) << error.message();
      }
      ASSERT_EQ(rsb_bucketer_flush(bucketer, nullptr), RSB_OK);
      rsb_bucketer_free(bucketer);
      if (rank == 0) {
        host = outputs;
      }
    });
    for (size_t n = 0; n < cases.size(); ++n) {
      const Case &c = cases[n];
      std::vector<Bytes> rows;
      for (uint32_t from = 0; from < ranks; ++from) {
        rows.push_back(special(c.dtype, count, n * 16 + from));
      }
      const Bytes held = special(c.output, count, n * 16 + 15);
      const Bytes result = reduced(device, stream, c, rows, held, n % 3 == 0 ? n % 8 : 0);
      const size_t out = values::size_of(c.output);
      for (size_t i = 0; i < count; ++i) {
        const Bytes want(&host[n][i * out], &host[n][i * out] + out), got(&result[i * out], &result[i * out] + out);
        ASSERT_EQ(got, want) << c.text() << ", " << ranks << " ranks, element " << i
                             << (is_nan(c.output, want.data()) ? ", not a number" : "");
      }
    }
  }
}

TEST_F(Kernels, OneRowIsCopiedBitForBitAtAnyAlignment) {
  for (const size_t bytes : {1u, 15u, 16u, 17u, 1000u, 4100u, 16384u, 40001u}) {
    for (const size_t from : {0u, 1u, 2u, 4u, 8u, 13u}) {
      for (const size_t to : {0u, 1u, 2u, 4u, 8u, 12u}) {
        const Bytes data = noise(bytes, bytes * 64 + from * 16 + to);
        Reduce p{};
        p.src = device.memory(data, from);
        p.stride = bytes;
        p.divisor = p.factor = 1.0;
        p.rows = p.segments = 1;
        p.op = RSB_OP_SUM;
        p.segment[0] = {device.memory(bytes, to), 0, bytes, 1.0, chunks(bytes, 1), RSB_DTYPE_U8};
        run("rsb_reduce_u8", p.segment[0].end, &p);
        ASSERT_EQ(Device::read(p.segment[0].dst, bytes), data) << bytes << " bytes from " << from << " to " << to;
        ASSERT_TRUE(device.surroundings_untouched());
        device.free_memory();
      }
    }
  }
}

TEST_F(Kernels, TheLastStepIsTakenOfARowThatWasReducedElsewhere) {
  // One row, as a reduce-scatter leaves it, and an average over more ranks than rows.
  for (const uint32_t ranks : {2u, 3u, 12u}) {
    const size_t count = 500;
    const Bytes row = values::piece(values::Data::kRough, RSB_DTYPE_BF16, RSB_OP_SUM, ranks, 0, 0, count);
    Reduce p{};
    p.src = device.memory(row);
    p.stride = count;
    p.divisor = ranks == 2 ? 1.0 : ranks;
    p.factor = ranks == 2 ? 0.5 : 1.0;
    p.rows = 1;
    p.op = RSB_OP_AVG;
    p.segments = 1;
    // In place.
    p.segment[0] = {p.src, 0, count, 3.0, chunks(count, 2), RSB_DTYPE_BF16};
    run("rsb_reduce_bf16", 1, &p);
    const Bytes result = Device::read(p.src, count * 2);
    for (size_t i = 0; i < count; ++i) {
      const auto value = static_cast<float>(values::load(RSB_DTYPE_BF16, &row[i * 2]));
      unsigned char want[2];
      values::store(RSB_DTYPE_BF16, static_cast<double>(value / static_cast<float>(ranks) * 3.0f), want);
      ASSERT_EQ(std::memcmp(&result[i * 2], want, 2), 0) << "element " << i << " over " << ranks;
    }
    EXPECT_TRUE(device.surroundings_untouched());
    device.free_memory();
  }
}

}  // namespace
