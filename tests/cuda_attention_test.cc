// Attention in fast mode, emulated (see cuda_emulation/cuda_runtime.h) or on the module that OCTET_CUDA_MODULE names,
// against the reference, which computes in double.
#include "kernels/cuda/flash_attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "kernels/ops.h"
#include "kernels/reference/reference.h"
#include "tests/op_cases.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

Stream& gpu() {
  static Stream& stream = *[] {
    const auto opened = cuda::open_module(cuda_module_under_test());
    if (!opened.ok()) ADD_FAILURE() << opened.status();
    return new Stream(**opened, 0, Arithmetic::kFast, {.threads = 1, .isa = Isa::kPortable, .spin = false});
  }();
  return stream;
}

// Tensors on the device.
class DeviceMemory {
 public:
  Tensor put(const Tensor& host) {
    memory_.emplace_back(host.bytes(), gpu());
    const Tensor there = memory_.back().tensor(host.dtype(), host.shape());
    copy(gpu(), host, there);
    return there;
  }

 private:
  std::vector<Buffer> memory_;
};

int64_t most(const std::vector<int64_t>& values) { return *std::ranges::max_element(values); }

struct Sequences {
  std::vector<int64_t> lengths, new_tokens;
};

// Tables with room for contexts of so many positions.
Owned widened(const Tensor& tables, int64_t context) {
  Owned wide(DType::kI32, {tables.dim(0), std::max(tables.dim(1), (context - 1) / kKvBlockTokens + 1)});
  for (int64_t s = 0; s < tables.dim(0); ++s) {
    std::copy_n(tables.as<int32_t>() + s * tables.dim(1), tables.dim(1),
                wide.tensor.as<int32_t>() + s * wide.tensor.dim(1));
  }
  return wide;
}

// With a grid that does for contexts of up to `context` positions.
Owned attend(const CacheCase& setup, int64_t context, const KvLayer& cache) {
  DeviceMemory device;
  Owned out(setup.q);
  const Tensor there = device.put(out);
  const AttentionBatch batch = setup.batch();
  attention(gpu(), device.put(setup.q),
            {.keys = device.put(cache.keys),
             .values = device.put(cache.values),
             .key_scale = cache.key_scale,
             .value_scale = cache.value_scale},
            {.positions = device.put(batch.positions),
             .sequence_of = device.put(batch.sequence_of),
             .sequence_ends = device.put(batch.sequence_ends),
             .block_tables = device.put(widened(batch.block_tables, context)),
             .context = context},
            there);
  copy(gpu(), there, out);
  return out;
}

double largest(const Tensor& tensor) {
  double most = 0;
  for (int64_t i = 0; i < tensor.elements(); ++i) {
    const double value = std::abs(value_at(tensor, i));
    if (value > most) most = value;  // NaN is not
  }
  return most;
}

// Both results are rounded to BF16 (2^-8 of them each). Ours weighs values by probabilities rounded to BF16, which is
// off by at most 2^-8 of the average magnitude of the values. Beside that, FP32 is off by some 2^-22 for each addition
// that a tensor core rounds: one per 16 positions in the sum of values, and in a score (twice: numerator and
// denominator) one per 16 elements of a head, of its largest possible magnitude.
void expect_attention(const std::string& what, const Tensor& actual, const CacheCase& setup, const KvLayer& cache,
                      int64_t longest) {
  Owned expected(setup.q), magnitudes(setup.q), absolute(DType::kBF16, cache.values.shape());
  for (int64_t i = 0; i < cache.values.elements(); ++i) {
    absolute.tensor.as<uint16_t>()[i] = cache.values.as<uint16_t>()[i] & 0x7FFF;
  }
  reference::attention(setup.q, cache, setup.batch(), expected);
  reference::attention(setup.q, {cache.keys, absolute}, setup.batch(), magnitudes);
  const double head_dim = static_cast<double>(setup.q.tensor.dim(2));
  const double score = std::sqrt(head_dim) * largest(setup.q) * largest(cache.keys);
  const double of_magnitude =
      std::ldexp(1.0, -8) + std::ldexp(static_cast<double>(longest) / 16 + 2 * score * head_dim / 16 + 8, -22);
  for (int64_t i = 0; i < actual.elements(); ++i) {
    const double a = value_at(actual, i), e = value_at(expected, i), magnitude = value_at(magnitudes, i);
    ASSERT_LE(std::abs(a - e), 1.01 * (std::ldexp(std::abs(e), -7) + of_magnitude * magnitude))
        << what << ": element " << i << " of " << actual.shape().to_string() << " is " << a << ", expected " << e;
  }
}

void expect_matches(const std::string& what, const CacheCase& setup, const Sequences& sequences,
                    int64_t beyond_context = 0) {
  const Owned actual = attend(setup, most(sequences.lengths) + beyond_context, setup.cache());
  expect_attention(what, actual, setup, setup.cache(), most(sequences.lengths));
}

std::string to_string(int64_t heads, int64_t kv_heads, int64_t head_dim) {
  return std::to_string(heads) + " heads of " + std::to_string(head_dim) + " over " + std::to_string(kv_heads);
}

TEST(CudaFastAttention, DecodesForAnyNumberOfHeadsAroundTheBordersOfBlocksChunksAndParts) {
  Random random(1);
  const Sequences sequences = {{1, 2, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 257, 1100},
                               std::vector<int64_t>(14, 1)};
  for (const int64_t head_dim : {64, 128}) {
    for (const int64_t group : {1, 4, 8, 16, 17}) {
      const int64_t kv_heads = group == 4 ? 3 : 1;
      const CacheCase setup(random, group * kv_heads, kv_heads, head_dim, sequences.lengths, sequences.new_tokens);
      expect_matches(to_string(group * kv_heads, kv_heads, head_dim), setup, sequences);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaFastAttention, DecodesInOnePartOrMany) {
  Random random(2);
  for (const int64_t sequence_count : {1, 2, 5, 13}) {
    Sequences sequences = {{1100}, {1}};
    for (int64_t i = 1; i < sequence_count; ++i) {
      sequences.lengths.push_back(1 + random.below(700));
      sequences.new_tokens.push_back(1);
    }
    const CacheCase setup(random, 8, 1, 64, sequences.lengths, sequences.new_tokens);
    expect_matches(std::to_string(sequence_count) + " sequences", setup, sequences);
    if (HasFatalFailure()) return;
  }
}

TEST(CudaFastAttention, PrefillsChunksOfAnyLength) {
  Random random(3);
  const struct {
    int64_t heads, kv_heads, head_dim;
    Sequences sequences;
  } cases[] = {{16, 1, 128, {{40}, {40}}},          // tiles of 8 tokens
               {4, 1, 128, {{300}, {130}}},         // behind a context
               {2, 2, 64, {{129, 64}, {129, 64}}},  // a row a token; warps that see less than their block
               {17, 1, 128, {{70}, {9}}},           // a token's heads in two tiles
               {6, 2, 64, {{500}, {61}}},           //
               {8, 1, 64, {{9}, {9}}}};             // more rows than decode takes, less than a tile
  for (const auto& c : cases) {
    const CacheCase setup(random, c.heads, c.kv_heads, c.head_dim, c.sequences.lengths, c.sequences.new_tokens);
    expect_matches(to_string(c.heads, c.kv_heads, c.head_dim), setup, c.sequences);
    if (HasFatalFailure()) return;
  }
}

// With equal scores every position weighs the same, and values say which element of the result counts it.
TEST(CudaFastAttention, CountsEveryPositionOnce) {
  Random random(10);
  const Sequences sequences = {{1, 16, 129, 300, 1100, 330, 70}, {1, 1, 1, 1, 1, 130, 70}};
  for (const int64_t head_dim : {64, 128}) {
    CacheCase setup(random, 4, 2, head_dim, sequences.lengths, sequences.new_tokens);
    std::fill_n(setup.q.tensor.as<uint16_t>(), setup.q.tensor.elements(), uint16_t{0});
    for (size_t s = 0; s < sequences.lengths.size(); ++s) {
      for (int64_t p = 0; p < sequences.lengths[s]; ++p) {
        const int64_t block = setup.table[static_cast<int64_t>(s) * setup.max_blocks + p / kKvBlockTokens];
        for (int64_t kv_head = 0; kv_head < 2; ++kv_head) {
          const int64_t slot = (block * 2 + kv_head) * kKvBlockTokens + p % kKvBlockTokens;
          for (int64_t d = 0; d < head_dim; ++d) {
            setup.values.tensor.as<uint16_t>()[slot * head_dim + d] = float_to_bf16(p % head_dim == d ? 1.0f : 0.0f);
          }
        }
      }
    }
    const Owned out = attend(setup, most(sequences.lengths), setup.cache());
    for (int64_t i = 0; i < out.tensor.elements(); ++i) {
      const int64_t length = setup.positions[i / (4 * head_dim)] + 1, d = i % head_dim;
      const auto counted = static_cast<float>((length - d + head_dim - 1) / head_dim);
      const float expected = counted / static_cast<float>(length);
      ASSERT_NEAR(value_at(out, i), expected, std::ldexp(1.01 * expected, -8)) << "element " << d << " of " << length;
    }
  }
}

TEST(CudaFastAttention, TakesChunksAndDecodesInOneStep) {
  Random random(4);
  for (const int64_t head_dim : {64, 128}) {
    const Sequences sequences = {{300, 17, 90, 256, 40, 700}, {1, 3, 60, 1, 40, 16}};
    const CacheCase setup(random, 8, 2, head_dim, sequences.lengths, sequences.new_tokens);
    expect_matches(to_string(8, 2, head_dim), setup, sequences);
    if (HasFatalFailure()) return;
  }
}

TEST(CudaFastAttention, FindsTilesAmongManySequences) {
  Random random(5);
  Sequences sequences;
  for (int64_t i = 0; i < 150; ++i) {
    sequences.new_tokens.push_back(i % 7 == 3 ? 33 + random.below(40) : 1 + i % 3);
    sequences.lengths.push_back(sequences.new_tokens.back() + random.below(20));
  }
  const CacheCase setup(random, 2, 1, 64, sequences.lengths, sequences.new_tokens);
  expect_matches("150 sequences", setup, sequences);
}

TEST(CudaFastAttention, GridsServeShorterContextsThanTheyAreMadeFor) {
  Random random(6);
  const Sequences sequences = {{300, 17, 520}, {1, 1, 1}};
  const CacheCase setup(random, 16, 1, 128, sequences.lengths, sequences.new_tokens);
  expect_matches("a grid for more", setup, sequences, 5000);
}

TEST(CudaFastAttention, HoldsAgainstExtremeScores) {
  Random random(7);
  const Sequences sequences = {{200, 130, 90}, {1, 1, 90}};
  CacheCase setup(random, 4, 1, 64, sequences.lengths, sequences.new_tokens);
  const auto fill = [](const Tensor& tensor, const auto& value) {
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      uint16_t& bits = tensor.as<uint16_t>()[i];
      if (bits != 0x7FC0) bits = float_to_bf16(value(bf16_to_float(bits)));
    }
  };
  CacheCase large = setup;
  fill(large.q, [](float value) { return 40 * value; });
  expect_matches("scores of some hundreds", large, sequences);
  CacheCase equal = setup;
  fill(equal.keys, [](float) { return 0.5f; });
  fill(equal.q, [](float) { return 30.0f; });
  expect_matches("equal scores", equal, sequences);
  CacheCase huge = setup;  // far below the range of exponentials, and rising along the context
  fill(huge.q, [](float) { return -1e15f; });
  fill(huge.keys, [](float value) { return std::abs(value) * 1e15f; });
  const Owned out = attend(huge, 200, huge.cache());
  for (int64_t i = 0; i < out.tensor.elements(); ++i) ASSERT_TRUE(std::isfinite(value_at(out, i)));
}

TEST(CudaFastAttention, ANanStaysWithItsToken) {
  Random random(8);
  const Sequences sequences = {{150, 140}, {1, 40}};
  CacheCase setup(random, 8, 1, 64, sequences.lengths, sequences.new_tokens);
  setup.q.tensor.as<uint16_t>()[(7 * 8 + 2) * 64 + 5] = 0x7FC0;  // token 7, head 2
  const Owned out = attend(setup, most(sequences.lengths), setup.cache());
  for (int64_t i = 0; i < out.tensor.elements(); ++i) {
    ASSERT_EQ(std::isnan(value_at(out, i)), i / 64 == 7 * 8 + 2) << i;
  }
}

// A cache of codes with what they stand for, which BF16 holds exactly for these scales.
struct CodedCache {
  CodedCache(const CacheCase& setup, float key_scale, float value_scale)
      : keys(DType::kF8E4M3, setup.keys.tensor.shape()),
        values(DType::kF8E4M3, setup.values.tensor.shape()),
        decoded_keys(coded(setup.keys, key_scale, keys)),
        decoded_values(coded(setup.values, value_scale, values)) {}

  static Owned coded(const Tensor& from, float scale, const Tensor& codes) {
    Owned decoded(DType::kBF16, from.shape());
    for (int64_t i = 0; i < from.elements(); ++i) {
      const uint8_t code = float_to_e4m3(value_at(from, i) / scale);
      codes.as<uint8_t>()[i] = code;
      decoded.tensor.as<uint16_t>()[i] = float_to_bf16(e4m3_to_float(code) * scale);
    }
    return decoded;
  }

  Owned keys, values, decoded_keys, decoded_values;
};

TEST(CudaFastAttention, ReadsACacheOfCodesWithItsScales) {
  Random random(9);
  const float key_scale = 0.375f, value_scale = 0.0625f;
  const struct {
    int64_t heads, kv_heads;
    Sequences sequences;
  } cases[] = {{16, 1, {{1, 15, 33, 128, 129, 257, 1100}, {1, 1, 1, 1, 1, 1, 1}}},
               {17, 1, {{200}, {1}}},
               {8, 2, {{300, 17, 90, 200}, {1, 3, 60, 70}}}};
  for (const int64_t head_dim : {64, 128}) {
    for (const auto& c : cases) {
      const CacheCase setup(random, c.heads, c.kv_heads, head_dim, c.sequences.lengths, c.sequences.new_tokens);
      const CodedCache cache(setup, key_scale, value_scale);
      const Owned actual = attend(setup, most(c.sequences.lengths), {cache.keys, cache.values, key_scale, value_scale});
      expect_attention(to_string(c.heads, c.kv_heads, head_dim), actual, setup,
                       {cache.decoded_keys, cache.decoded_values}, most(c.sequences.lengths));
      if (HasFatalFailure()) return;
    }
  }
}

// ---- Parts of a context

constexpr int64_t kAtOnce = 2 * 132;  // on an H100
constexpr int64_t kResultBytes = 16 * (128 + 2) * 4;

cuda::ContextParts parts_of(int64_t units) { return cuda::ContextParts::of(units, kAtOnce, units * kResultBytes); }

TEST(ContextParts, CoverAContextWithoutAnEmptyOne) {
  for (const int64_t units : {1, 3, 8, 64, 200, 5000}) {
    const cuda::ContextParts parts = parts_of(units);
    int bound_before = 1;
    for (int length = 1; length < 140'000; length += 1 + length / 50) {
      const int positions = parts.positions(length), count = parts.count(length);
      ASSERT_EQ(positions % cuda::ContextParts::kLeastPart, 0);
      ASSERT_LT(static_cast<int64_t>(count - 1) * positions, length);
      ASSERT_GE(static_cast<int64_t>(count) * positions, length);
      ASSERT_LE(count, parts.bound(length));
      ASSERT_GE(parts.bound(length), bound_before) << "a grid for the longest context must do for the others";
      bound_before = parts.bound(length);
    }
  }
}

TEST(ContextParts, FillTheDeviceForFewSequences) {
  EXPECT_EQ(parts_of(1).count(131072), 256);  // at most 264, of a multiple of 128 positions
  EXPECT_EQ(parts_of(8).count(131072), 128);  // of 1,024 positions
  EXPECT_EQ(parts_of(8).count(8192), 32);
  EXPECT_EQ(parts_of(1).count(8192), 64);  // of 128 positions
  EXPECT_EQ(parts_of(1).count(100), 1);
}

TEST(ContextParts, AreLongButNotEndlessForManySequences) {
  EXPECT_EQ(parts_of(256).count(900), 1);
  EXPECT_EQ(parts_of(256).count(20'000), 20);
  EXPECT_EQ(parts_of(100'000).count(131072), 1) << "their results would take too much memory";
}

}  // namespace
}  // namespace octet
