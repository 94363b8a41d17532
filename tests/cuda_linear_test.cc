// Linear layers in fast mode, of 1 to 16 tokens and of more, emulated (see cuda_emulation/cuda_runtime.h) or on the
// module that OCTET_CUDA_MODULE names, against the reference.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "kernels/cuda/skinny_split.h"
#include "kernels/graph.h"
#include "kernels/ops.h"
#include "kernels/reference/reference.h"
#include "tests/op_cases.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

struct Types {
  DType weight, x;
};
constexpr Types kBf16 = {DType::kBF16, DType::kBF16};
constexpr Types kW8A16 = {DType::kF8E4M3, DType::kBF16};
constexpr Types kW8A8 = {DType::kF8E4M3, DType::kF8E4M3};
constexpr Types kBf16ByCodes = {DType::kBF16, DType::kF8E4M3};

std::string name_of(const Types& types) {
  return std::string(octet::name_of(types.weight)) + " by " + octet::name_of(types.x);
}

struct Weight {
  Owned values, scale;
  int64_t rows() const { return values.tensor.dim(0); }
  int64_t columns() const { return values.tensor.dim(1); }
  bool codes() const { return values.tensor.dtype() == DType::kF8E4M3; }
  reference::Linear on_host() const { return {values, codes() ? scale.tensor : Tensor()}; }
};

struct Input {
  Owned values, scales;
  bool codes() const { return values.tensor.dtype() == DType::kF8E4M3; }
  int64_t tokens() const { return values.tensor.dim(0); }
  Activations on_host() const { return {values, codes() ? scales.tensor : Tensor()}; }
};

// Values as layers have them, and their scales.
Weight random_weight(Random& random, DType dtype, int64_t rows, int64_t columns) {
  return {dtype == DType::kBF16 ? random.bf16({rows, columns}) : random.e4m3({rows, columns}),
          random.f32({rows}, 0.01f)};
}
Input random_input(Random& random, DType dtype, int64_t tokens, int64_t columns) {
  return {dtype == DType::kBF16 ? random.bf16({tokens, columns}) : random.e4m3({tokens, columns}),
          random.f32({tokens, 1}, 0.1f)};
}

// Small whole numbers and scales of 1: no order of sums rounds, so that any slip of an index shows.
void make_whole(Random& random, const Tensor& values, const Tensor& scales) {
  for (int64_t i = 0; i < values.elements(); ++i) {
    const auto value = static_cast<float>(random.below(9) - 4);
    if (values.dtype() == DType::kBF16) {
      values.as<uint16_t>()[i] = float_to_bf16(value);
    } else {
      values.as<uint8_t>()[i] = float_to_e4m3(value);
    }
  }
  std::fill_n(scales.as<float>(), scales.elements(), 1.0f);
}

// A GPU in fast mode.
class Gpu {
 public:
  // One op for all the weights; their outputs; of the last time, where it is recorded and done again.
  std::vector<Owned> linear(const Input& x, const std::vector<const Weight*>& weights, int recorded_times = 0) {
    std::vector<Linear> layers;
    std::vector<LinearOutput> outputs;
    for (const Weight* weight : weights) layers.push_back(pack(*weight));
    for (const Linear& layer : layers) {
      outputs.push_back({&layer, put(Owned(DType::kF32, {x.tokens(), layer.out_features}))});
    }
    const Activations input = put(x);
    const auto work = [&] { octet::linear(stream_, input, outputs); };
    work();
    if (recorded_times > 0) {
      for (const LinearOutput& output : outputs) copy(stream_, Owned(DType::kF32, output.out.shape()), output.out);
      const Graph graph(stream_, work);
      for (int i = 0; i < recorded_times; ++i) graph.launch();
    }
    std::vector<Owned> results;
    for (const LinearOutput& output : outputs) results.push_back(fetch(output.out));
    return results;
  }

  // A rank's leaf of a sum over ranks.
  Owned linear_of_rank(const Input& x, const Weight& weight) {
    const Linear layer = pack(weight);
    const Tensor partials = put(Owned(DType::kF32, {1, x.tokens(), weight.rows()}));
    const int64_t end = weight.columns();
    linear_over_slices(stream_, put(x), layer, {.first = 2, .count = 1, .total = 5}, {&end, 1}, partials);
    return fetch(partials.reshaped({x.tokens(), weight.rows()}));
  }

 private:
  static const cuda::ModuleTable& module() {
    static const cuda::ModuleTable* const kModule = [] {
      const auto opened = cuda::open_module(cuda_module_under_test());
      if (!opened.ok()) ADD_FAILURE() << opened.status();
      return *opened;
    }();
    return *kModule;
  }

  Tensor room(DType dtype, Shape shape) {
    memory_.push_back(std::make_unique<Buffer>(shape.elements() * size_of(dtype), stream_));
    return memory_.back()->tensor(dtype, shape);
  }
  Tensor put(const Tensor& host) {
    const Tensor there = room(host.dtype(), host.shape());
    copy(stream_, host, there);
    return there;
  }
  Activations put(const Input& x) { return {put(x.values), x.codes() ? put(x.scales) : Tensor()}; }
  Linear pack(const Weight& weight) {
    const DType dtype = weight.values.tensor.dtype();
    const int64_t bytes = packed_bytes(dtype, weight.rows(), weight.columns());
    const Linear layer = {.out_features = weight.rows(),
                          .in_features = weight.columns(),
                          .weight = room(dtype, {bytes / size_of(dtype)}),
                          .weight_scale = weight.codes() ? put(weight.scale) : Tensor(),
                          .activations = {}};
    pack_rows(stream_, weight.values, 0, layer);
    return layer;
  }
  Owned fetch(const Tensor& there) {
    Owned host(there.dtype(), there.shape());
    copy(stream_, there, host);
    return host;
  }

  Stream stream_{module(), 0, Arithmetic::kFast, {.threads = 1, .isa = Isa::kPortable, .spin = false}};
  std::vector<std::unique_ptr<Buffer>> memory_;
};

Owned reference_of(const Input& x, const Weight& weight) {
  Owned out(DType::kF32, {x.tokens(), weight.rows()});
  reference::linear(x.on_host(), weight.on_host(), out);
  return out;
}

// How far a sum may be from the exact one. Products of two BF16 or e4m3 values are exact in FP32. Each of the K terms
// joins the sum by at most one addition of a tensor core, and parts of sums are joined by fewer additions than there
// are terms; each is off by at most 2^-23 of the sum of magnitudes so far (tensor cores cut instead of rounding). Two
// products with scales and the reference's own rounding to FP32 add 2^-24 each. of_addition: that 2^-23, or more.
double tolerance(const Input& x, const Weight& weight, int64_t token, int64_t row, double of_addition) {
  const int64_t columns = weight.columns();
  double magnitudes = 0;
  for (int64_t k = 0; k < columns; ++k) {
    magnitudes += std::abs(static_cast<double>(value_at(x.values, token * columns + k)) *
                           value_at(weight.values, row * columns + k));
  }
  if (weight.codes()) magnitudes *= std::abs(weight.scale.tensor.as<float>()[row]);
  if (x.codes()) magnitudes *= std::abs(x.scales.tensor.as<float>()[token]);
  return magnitudes * (static_cast<double>(2 * columns) * of_addition + 3 * 0x1p-24);
}

// Outputs that are further from the expected ones than their tolerance.
int64_t outliers(const Tensor& actual, const Tensor& expected, const Input& x, const Weight& weight,
                 double of_addition = 0x1p-23) {
  int64_t count = 0;
  for (int64_t token = 0; token < x.tokens(); ++token) {
    for (int64_t row = 0; row < weight.rows(); ++row) {
      const int64_t at = token * weight.rows() + row;
      const double difference = std::abs(double{value_at(actual, at)} - value_at(expected, at));
      if (!(difference <= tolerance(x, weight, token, row, of_addition))) ++count;
    }
  }
  return count;
}

TEST(CudaFastLinear, IsExactForWholeNumbersOverAllTokensAndTypes) {
  Random random(1);
  Gpu gpu;
  // Steps that are not full, tiles that are not; one tile for all blocks, and several for each.
  const struct { int64_t rows, columns; } shapes[] = {{1, 16}, {33, 400}, {100, 1056}, {257, 144}};
  for (const Types& types : {kBf16, kW8A16, kW8A8}) {
    for (int64_t tokens = 1; tokens <= 16; ++tokens) {
      const auto& [rows, columns] = shapes[tokens % 4];
      const Weight weight = random_weight(random, types.weight, rows, columns);
      const Input x = random_input(random, types.x, tokens, columns);
      make_whole(random, weight.values, weight.scale);
      make_whole(random, x.values, x.scales);
      const Owned expected = reference_of(x, weight);
      const std::string what = name_of(types) + ", " + Shape({tokens, rows, columns}).to_string();
      expect_same_bits(gpu.linear(x, {&weight})[0], expected, what);
      expect_same_bits(gpu.linear_of_rank(x, weight), expected, what + ", of a rank");
      if (HasFatalFailure()) return;
    }
  }
}

TEST(CudaFastLinear, IsNearTheReferenceOverOddSizes) {
  Random random(2);
  Gpu gpu;
  const struct {
    int64_t tokens, rows, columns;
  } shapes[] = {{1, 17, 4096}, {2, 95, 272}, {3, 64, 1024}, {5, 31, 48}, {8, 160, 528}, {13, 40, 2000}, {16, 70, 640}};
  for (const Types& types : {kBf16, kW8A16, kW8A8}) {
    for (const auto& [tokens, rows, columns] : shapes) {
      const Weight weight = random_weight(random, types.weight, rows, columns);
      const Input x = random_input(random, types.x, tokens, columns);
      EXPECT_EQ(outliers(gpu.linear(x, {&weight})[0], reference_of(x, weight), x, weight), 0)
          << name_of(types) << ", " << Shape({tokens, rows, columns}).to_string();
    }
  }
}

// By a library where it has the types, else by our tiles. Products of codes are joined 32 at a time on tensor cores
// that may keep as few as 13 bits of a sum.
TEST(CudaFastLinear, OfManyTokensIsNearTheReference) {
  Random random(8);
  Gpu gpu;
  const struct { int64_t tokens, rows, columns; } shapes[] = {{17, 64, 256}, {40, 95, 272}, {130, 160, 512}};
  for (const Types& types : {kBf16, kW8A16, kW8A8}) {
    const double of_addition = types.x == DType::kF8E4M3 ? 0x1p-13 / 32 : 0x1p-23;
    for (const auto& [tokens, rows, columns] : shapes) {
      const Weight weight = random_weight(random, types.weight, rows, columns);
      const Input x = random_input(random, types.x, tokens, columns);
      EXPECT_EQ(outliers(gpu.linear(x, {&weight})[0], reference_of(x, weight), x, weight, of_addition), 0)
          << name_of(types) << ", " << Shape({tokens, rows, columns}).to_string();
    }
  }
}

TEST(CudaFastLinear, ToleratesNoMissingProduct) {
  Random random(3);
  Gpu gpu;
  const Weight weight = random_weight(random, DType::kBF16, 40, 528);
  Input x = random_input(random, DType::kBF16, 5, 528);
  const Owned actual = gpu.linear(x, {&weight})[0];
  x.values.tensor.as<uint16_t>()[2 * 528 + 500] = float_to_bf16(1.0f);
  const Owned with = gpu.linear(x, {&weight})[0];
  x.values.tensor.as<uint16_t>()[2 * 528 + 500] = 0;
  EXPECT_EQ(outliers(gpu.linear(x, {&weight})[0], reference_of(x, weight), x, weight), 0);
  EXPECT_GT(outliers(with, reference_of(x, weight), x, weight), 36) << "of one token's 40 outputs";
}

// What has rows that are not whole pieces of 16 bytes, and what no checkpoint has.
TEST(CudaFastLinear, TakesWhatCannotBeStreamed) {
  Random random(4);
  Gpu gpu;
  const struct {
    Types types;
    int64_t columns;
  } cases[] = {{kBf16, 130}, {kBf16, 2}, {kW8A16, 40}, {kW8A8, 1000}, {kBf16ByCodes, 64}};
  for (const auto& [types, columns] : cases) {
    const Weight weight = random_weight(random, types.weight, 35, columns);
    const Input x = random_input(random, types.x, 3, columns);
    EXPECT_EQ(outliers(gpu.linear(x, {&weight})[0], reference_of(x, weight), x, weight), 0)
        << name_of(types) << " " << columns;
    EXPECT_EQ(outliers(gpu.linear_of_rank(x, weight), reference_of(x, weight), x, weight), 0) << name_of(types);
  }
}

TEST(CudaFastLinear, TakesSeveralMatricesOfAnyTypesAtOnce) {
  Random random(5);
  Gpu gpu;
  const Input x = random_input(random, DType::kBF16, 4, 304);
  std::vector<Weight> weights;
  for (const int64_t rows : {33, 1, 200, 16, 65, 32, 7}) {
    weights.push_back(random_weight(random, weights.size() == 5 ? DType::kBF16 : DType::kF8E4M3, rows, 304));
  }
  std::vector<const Weight*> all;
  for (const Weight& weight : weights) all.push_back(&weight);
  const std::vector<Owned> outputs = gpu.linear(x, all);
  for (size_t i = 0; i < weights.size(); ++i) {
    EXPECT_EQ(outliers(outputs[i], reference_of(x, weights[i]), x, weights[i]), 0) << i;
  }
}

// Shapes that cut tiles elsewhere in between: whoever found a number in a mailbox took it away.
TEST(CudaFastLinear, HasTheSameBitsAgain) {
  Random random(6);
  Gpu gpu;
  const Weight narrow = random_weight(random, DType::kF8E4M3, 10, 8192),
               wide = random_weight(random, DType::kF8E4M3, 900, 512);
  std::vector<Owned> before;
  for (int round = 0; round < 2; ++round) {
    Random again(7);
    for (const int64_t tokens : {1, 16, 3, 7}) {
      const Input x = random_input(again, DType::kF8E4M3, tokens, 8192),
                  y = random_input(again, DType::kBF16, tokens, 512);
      std::vector<Owned> results = gpu.linear(x, {&narrow});
      results.push_back(std::move(gpu.linear(y, {&wide})[0]));
      EXPECT_EQ(outliers(results[0], reference_of(x, narrow), x, narrow), 0);
      if (round == 0) {
        for (Owned& result : results) before.push_back(std::move(result));
        continue;
      }
      for (Owned& result : results) {
        expect_same_bits(result, before.front(), "again");
        before.erase(before.begin());
      }
    }
  }
}

TEST(CudaFastLinear, HasTheSameBitsFromARecording) {
  Random random(8);
  Gpu gpu;
  const Weight weight = random_weight(random, DType::kF8E4M3, 40, 4096);
  const Input x = random_input(random, DType::kF8E4M3, 2, 4096);
  expect_same_bits(gpu.linear(x, {&weight}, 2)[0], gpu.linear(x, {&weight})[0], "recorded");
}

// ---- How the work is shared out

struct Layer {
  const char* name;
  int64_t rows, columns;
  DType dtype;
};

// What one of 8, 4, 2 and 1 ranks of Llama 3.1 has, q, k and v and gate and up each as one.
std::vector<Layer> layers() {
  std::vector<Layer> all;
  const struct {
    const char* name;
    int64_t hidden, heads, feed_forward;
  } models[] = {{"8B", 4096, 32, 14336}, {"70B", 8192, 64, 28672}, {"405B", 16384, 128, 53248}};
  for (const auto& model : models) {
    for (const int64_t ranks : {1, 2, 4, 8}) {
      for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
        all.push_back({model.name, (model.heads + 16) * 128 / ranks, model.hidden, dtype});
        all.push_back({model.name, model.hidden, model.heads * 128 / ranks, dtype});
        all.push_back({model.name, 2 * model.feed_forward / ranks, model.hidden, dtype});
        all.push_back({model.name, model.hidden, model.feed_forward / ranks, dtype});
      }
      all.push_back({model.name, 128256 / ranks, model.hidden, DType::kBF16});
    }
  }
  return all;
}

// What a range reads of a matrix: steps at the ends of rows and of the matrix are not full.
int64_t bytes_of(const Layer& layer, const cuda::SkinnyShape& shape, const cuda::SkinnySplit& split, int range) {
  const int64_t row_bytes = layer.columns * size_of(layer.dtype);
  int64_t bytes = 0;
  for (int64_t step = split.begin(range); step < split.begin(range + 1); ++step) {
    const int64_t first_row = step / split.tile_steps * shape.rows(),
                  first = step % split.tile_steps * shape.step_bytes();
    bytes += std::min(shape.rows(), layer.rows - first_row) * std::min(shape.step_bytes(), row_bytes - first);
  }
  return bytes;
}

TEST(SkinnySplit, GivesEveryMultiprocessorOneRangeAsLongAsTheOthers) {
  for (const int64_t processors : {108, 132}) {  // A100, H100
    for (const Layer& layer : layers()) {
      const int64_t row_bytes = layer.columns * size_of(layer.dtype);
      for (const int64_t tokens : {1, 3, 8, 16}) {
        const cuda::SkinnyShape& shape = cuda::kSkinnyShapes[cuda::skinny_shape(tokens, row_bytes)];
        const int64_t tiles = (layer.rows + shape.rows() - 1) / shape.rows();
        const cuda::SkinnySplit split = cuda::skinny_split(shape, tiles, row_bytes, processors);
        ASSERT_EQ(split.begin(0), 0);
        ASSERT_EQ(split.begin(split.ranges), tiles * split.tile_steps);
        ASSERT_EQ(split.ranges, std::min(processors, tiles * split.tile_steps));
        int64_t total = 0, most = 0;
        for (int range = 0; range < split.ranges; ++range) {
          const int64_t bytes = bytes_of(layer, shape, split, range);
          total += bytes;
          most = std::max(most, bytes);
        }
        ASSERT_EQ(total, layer.rows * row_bytes);
        EXPECT_LE(most - total / processors, cuda::kSkinnyStepBytes * 5 / 4)
            << layer.name << " [" << layer.rows << ", " << layer.columns << "], tokens " << tokens;
      }
    }
  }
}

// By Little's law 3.35 TB/s are 25 KB on their way to each of 132 multiprocessors, if a load takes a microsecond.
TEST(SkinnySplit, KeepsEnoughBytesOnTheirWay) {
  for (const cuda::SkinnyShape& shape : cuda::kSkinnyShapes) {
    for (const int64_t ratio : {1, 2}) {
      EXPECT_GE((shape.stages(ratio) - 1) * cuda::kSkinnyStepBytes, 40 << 10);
      EXPECT_LE(shape.stage_bytes(ratio), cuda::kSkinnyStepBytes * 3 / 2) << "x is not small beside the weights";
    }
  }
}

}  // namespace
}  // namespace octet
