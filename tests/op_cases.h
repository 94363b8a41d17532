// What tests of ops share: tensors with their memory, random ones, and comparisons.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/fp8.h"
#include "kernels/ops.h"

namespace octet {

// A tensor with its memory.
struct Owned {
  Owned(DType dtype, Shape shape) : buffer(std::max<int64_t>(shape.elements() * size_of(dtype), 1)) {
    tensor = buffer.tensor(dtype, shape);
  }
  Owned(const Owned& other) : Owned(other.tensor.dtype(), other.tensor.shape()) {
    std::memcpy(tensor.data(), other.tensor.data(), tensor.bytes());
  }
  Owned(Owned&&) = default;
  Owned& operator=(Owned&&) = default;
  Buffer buffer;
  Tensor tensor;
  operator const Tensor&() const { return tensor; }
};

// A vector's numbers as a tensor; nothing writes to it.
inline Tensor view_of(const std::vector<int32_t>& numbers) {
  return Tensor(const_cast<int32_t*>(numbers.data()), DType::kI32, {static_cast<int64_t>(numbers.size())});
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  float normal(float deviation = 1.0f) { return static_cast<float>(normal_(engine_)) * deviation; }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }
  uint64_t bits() { return engine_(); }

  Owned f32(Shape shape, float deviation = 1.0f) {
    Owned out(DType::kF32, shape);
    for (int64_t i = 0; i < shape.elements(); ++i) out.tensor.as<float>()[i] = normal(deviation);
    return out;
  }
  Owned bf16(Shape shape, float deviation = 1.0f) {
    Owned out(DType::kBF16, shape);
    for (int64_t i = 0; i < shape.elements(); ++i) out.tensor.as<uint16_t>()[i] = float_to_bf16(normal(deviation));
    return out;
  }
  // Any code but NaN.
  Owned e4m3(Shape shape) {
    Owned out(DType::kF8E4M3, shape);
    for (int64_t i = 0; i < shape.elements(); ++i) {
      const uint8_t code = static_cast<uint8_t>(bits());
      out.tensor.as<uint8_t>()[i] = is_e4m3_nan(code) ? code & 0x80 : code;
    }
    return out;
  }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

inline float value_at(const Tensor& tensor, int64_t i) {
  if (tensor.dtype() == DType::kBF16) return bf16_to_float(tensor.as<uint16_t>()[i]);
  if (tensor.dtype() == DType::kF8E4M3) return e4m3_to_float(tensor.as<uint8_t>()[i]);
  return tensor.as<float>()[i];
}

// Equal bits, except that one NaN is as good as another.
inline void expect_same_bits(const Tensor& a, const Tensor& b, const std::string& what) {
  ASSERT_EQ(a.shape(), b.shape());
  for (int64_t i = 0; i < a.elements(); ++i) {
    const bool same = std::memcmp(static_cast<char*>(a.data()) + i * size_of(a.dtype()),
                                  static_cast<char*>(b.data()) + i * size_of(b.dtype()), size_of(a.dtype())) == 0;
    if (same || (a.dtype() != DType::kI32 && std::isnan(value_at(a, i)) && std::isnan(value_at(b, i)))) continue;
    FAIL() << what << ": element " << i << " of " << a.shape().to_string() << " is " << value_at(a, i) << ", not "
           << value_at(b, i);
  }
}

// |actual - expected| <= relative * |expected| + absolute.
inline void expect_near(const Tensor& actual, const Tensor& expected, double relative, double absolute,
                        const std::string& what) {
  ASSERT_EQ(actual.shape(), expected.shape());
  for (int64_t i = 0; i < actual.elements(); ++i) {
    const double a = value_at(actual, i);
    const double e = value_at(expected, i);
    if (std::isnan(e) && std::isnan(a)) continue;
    ASSERT_LE(std::abs(a - e), relative * std::abs(e) + absolute)
        << what << ": element " << i << " of " << actual.shape().to_string() << " is " << a << ", expected " << e;
  }
}

// A cache of random blocks in random order, filled with NaN until positions are written.
struct CacheCase {
  CacheCase(Random& random, int64_t heads, int64_t kv_heads, int64_t head_dim, std::vector<int64_t> lengths,
            std::vector<int64_t> new_tokens, DType dtype = DType::kBF16)
      : kv_heads(kv_heads),
        max_blocks((*std::ranges::max_element(lengths) + kKvBlockTokens - 1) / kKvBlockTokens + 1),
        blocks(max_blocks * static_cast<int64_t>(lengths.size()) + 3),
        keys(dtype, {blocks, kv_heads, head_dim / 2, kKvBlockTokens, 2}),
        values(dtype, {blocks, kv_heads, kKvBlockTokens, head_dim}),
        q(DType::kBF16, {0, heads, head_dim}) {
    for (const Owned* cached : {&keys, &values}) {
      for (int64_t i = 0; i < cached->tensor.elements(); ++i) put(cached->tensor, i, std::nanf(""));
    }
    for (int64_t b = 0; b < max_blocks * static_cast<int64_t>(lengths.size()); ++b)
      table.push_back(static_cast<int32_t>(b + 2));
    for (size_t i = table.size() - 1; i > 0; --i) std::swap(table[i], table[random.below(static_cast<int64_t>(i) + 1)]);
    for (size_t s = 0; s < lengths.size(); ++s) {
      for (int64_t p = 0; p < lengths[s]; ++p) write(random, static_cast<int64_t>(s), p, head_dim);
      for (int64_t p = lengths[s] - new_tokens[s]; p < lengths[s]; ++p) {
        positions.push_back(static_cast<int32_t>(p));
        sequence_of.push_back(static_cast<int32_t>(s));
      }
      ends.push_back(static_cast<int32_t>(positions.size()));
    }
    q = random.bf16({static_cast<int64_t>(positions.size()), heads, head_dim}, 2.0f);
  }

  void write(Random& random, int64_t sequence, int64_t position, int64_t head_dim) {
    const int64_t block = table[sequence * max_blocks + position / kKvBlockTokens];
    const int64_t slot = position % kKvBlockTokens;
    for (int64_t head = 0; head < kv_heads; ++head) {
      for (int64_t d = 0; d < head_dim; ++d) {
        const int64_t at = block * kv_heads + head;
        put(keys.tensor, ((at * head_dim / 2 + d / 2) * kKvBlockTokens + slot) * 2 + d % 2, random.normal());
        put(values.tensor, (at * kKvBlockTokens + slot) * head_dim + d, random.normal());
      }
    }
  }

  static void put(const Tensor& to, int64_t i, float value) {
    if (to.dtype() == DType::kBF16) {
      to.as<uint16_t>()[i] = float_to_bf16(value);
    } else {
      to.as<uint8_t>()[i] = float_to_e4m3(value);
    }
  }

  KvLayer cache() const { return layer_of(keys, values); }
  // Codes have scales that are no powers of two.
  static KvLayer layer_of(const Tensor& keys, const Tensor& values) {
    const bool codes = keys.dtype() == DType::kF8E4M3;
    return {.keys = keys, .values = values, .key_scale = codes ? 0.7f : 1.0f, .value_scale = codes ? 1.3f : 1.0f};
  }
  AttentionBatch batch() const { return batch_of(positions, sequence_of, ends); }
  // Other tokens over the same sequences.
  AttentionBatch batch_of(const std::vector<int32_t>& positions, const std::vector<int32_t>& sequence_of,
                          const std::vector<int32_t>& ends) const {
    return {.positions = view_of(positions),
            .sequence_of = view_of(sequence_of),
            .sequence_ends = view_of(ends),
            .block_tables = view_of(table).reshaped({static_cast<int64_t>(table.size()) / max_blocks, max_blocks}),
            .context = *std::ranges::max_element(positions) + 1};
  }

  int64_t kv_heads, max_blocks, blocks;
  Owned keys, values;
  Owned q;
  std::vector<int32_t> positions, sequence_of, ends, table;
};

}  // namespace octet
