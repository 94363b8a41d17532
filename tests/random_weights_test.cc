// Shards of random numbers: laid out as the ones that are loaded, and fit to compute with.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels/fp8.h"
#include "kernels/random_values.h"
#include "tests/random_model.h"
#include "worker/model/known_models.h"
#include "worker/model/weights.h"

namespace octet {
namespace {

const std::byte* end_of(const Tensor& tensor) { return static_cast<const std::byte*>(tensor.data()) + tensor.bytes(); }

// Where each tensor of a shard lies, and how large it is.
std::vector<std::pair<int64_t, std::string>> layout_of(const ModelWeights& weights) {
  std::vector<std::pair<int64_t, std::string>> layout;
  const auto add = [&](const Tensor& tensor) {
    const std::byte* const begin = static_cast<const std::byte*>(tensor.data());
    layout.emplace_back(tensor.empty() ? -1 : begin - weights.memory().data(),
                        name_of(tensor.dtype()) + tensor.shape().to_string());
    EXPECT_TRUE(tensor.empty() || end_of(tensor) <= weights.memory().data() + weights.memory().size());
  };
  const auto add_linear = [&](const Linear& linear) {
    add(linear.weight);
    add(linear.weight_scale);
    layout.emplace_back(linear.out_features, std::to_string(linear.in_features));
  };
  add(weights.embed_tokens);
  for (const LayerWeights& layer : weights.layers) {
    add(layer.input_layernorm);
    add(layer.post_attention_layernorm);
    for (const Linear* linear : {&layer.q_proj, &layer.k_proj, &layer.v_proj, &layer.o_proj, &layer.gate_proj,
                                 &layer.up_proj, &layer.down_proj}) {
      add_linear(*linear);
    }
  }
  add(weights.norm);
  add_linear(weights.lm_head);
  return layout;
}

class RandomWeights : public testing::TestWithParam<RandomFormat> {
 protected:
  Stream stream_{{.threads = 1, .isa = best_isa(), .spin = false}};
};

TEST_P(RandomWeights, LieWhereLoadedOnesDo) {
  const auto checkpoint = Checkpoint::open(write_random_model({.format = GetParam()}));
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  const WeightFormats formats = weight_formats(*checkpoint);
  for (const int ranks : {1, 3, 8}) {
    const ShardSpec shard = *ShardSpec::make(formats.config, ranks - 1, ranks);
    const auto loaded = ModelWeights::load(stream_, *checkpoint, shard, {});
    ASSERT_TRUE(loaded.ok()) << loaded.status();
    int64_t reported = 0;
    const ModelWeights random = ModelWeights::random(stream_, formats, shard, {}, [&](int64_t done, int64_t total) {
      EXPECT_LE(reported, done);
      EXPECT_LE(done, total);
      reported = done;
    });
    EXPECT_EQ(std::ssize(random.memory()), ModelWeights::plan(formats, shard).total());
    EXPECT_EQ(layout_of(random), layout_of(*loaded)) << ranks << " ranks";
    EXPECT_GT(reported, 0);
  }
}

INSTANTIATE_TEST_SUITE_P(EveryFormat, RandomWeights,
                         testing::Values(RandomFormat::kBF16, RandomFormat::kFbgemm, RandomFormat::kDynamicTokens));

TEST(RandomValuesTest, AreSpreadAsTheySayAndDifferFromRowToRow) {
  RandomValues values(7, 1 << 16);
  const int64_t rows = 64, columns = 512;
  const Tensor bf16 = values.next(DType::kBF16, {rows, columns});
  const Tensor fp8 = values.next(DType::kF8E4M3, {rows, columns});
  double squares = 0, code_squares = 0;
  std::set<std::string> distinct;
  for (int64_t i = 0; i < rows * columns; ++i) {
    const float value = bf16_to_float(bf16.as<uint16_t>()[i]);
    ASSERT_FALSE(is_e4m3_nan(fp8.as<uint8_t>()[i]));
    const float code = e4m3_to_float(fp8.as<uint8_t>()[i]);
    squares += value * value;
    code_squares += code * code;
  }
  const double count = static_cast<double>(rows * columns);
  EXPECT_NEAR(std::sqrt(squares / count), RandomValues::kDeviation, 0.02 * RandomValues::kDeviation);
  EXPECT_NEAR(std::sqrt(code_squares / count), RandomValues::kCodeDeviation, 0.02 * RandomValues::kCodeDeviation);
  for (int64_t row = 0; row < rows; ++row) {
    distinct.emplace(reinterpret_cast<const char*>(bf16.as<uint16_t>() + row * columns), 2 * columns);
  }
  EXPECT_EQ(std::ssize(distinct), rows);
}

TEST(RandomValuesTest, AreTheSameForTheSameSeed) {
  RandomValues one(3, 4096), same(3, 4096), other(4, 4096);
  const auto bytes = [](RandomValues& values) {
    const Tensor tensor = values.next(DType::kBF16, {1000});
    return std::string(static_cast<const char*>(tensor.data()), static_cast<size_t>(tensor.bytes()));
  };
  const std::string first = bytes(one);
  EXPECT_EQ(first, bytes(same));
  EXPECT_NE(first, bytes(other));
  EXPECT_NE(first, bytes(one)) << "another window at each call";
}

}  // namespace
}  // namespace octet
