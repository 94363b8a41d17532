// Linear layers of more than 16 tokens in fast mode, emulated (see cuda_emulation/cuda_runtime.h), against the obvious
// reference: by our own tiles, and by a cuBLASLt of plain loops that refuses as the real one does.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/module.h"
#include "kernels/graph.h"
#include "kernels/ops.h"
#include "kernels/reference/reference.h"
#include "tests/cuda_emulation/fake_blas_lt.h"
#include "tests/op_cases.h"

extern "C" const octet::cuda::ModuleTable* octet_cuda_module();

namespace octet {
namespace {

constexpr int64_t kFewTokens = 16;  // that go elsewhere

struct Types {
  DType x, weight;
};
constexpr Types kW8A8 = {DType::kF8E4M3, DType::kF8E4M3};
constexpr Types kW8A16 = {DType::kBF16, DType::kF8E4M3};
constexpr Types kBf16 = {DType::kBF16, DType::kBF16};
constexpr Types kAllTypes[] = {kW8A8, kW8A16, kBf16};

std::string name_of(const Types& types) {
  return std::string(octet::name_of(types.x)) + " x " + octet::name_of(types.weight);
}

// A layer's weights and input on the host.
struct Case {
  Owned x, x_scales, weight, weight_scales;

  bool codes() const { return x.tensor.dtype() == DType::kF8E4M3; }
  Activations input() const { return {x.tensor, codes() ? x_scales.tensor : Tensor()}; }
  reference::Linear layer() const {
    return {weight.tensor, weight.tensor.dtype() == DType::kF8E4M3 ? weight_scales.tensor : Tensor()};
  }
  int64_t tokens() const { return x.tensor.dim(0); }
  int64_t outputs() const { return weight.tensor.dim(0); }
  int64_t columns() const { return x.tensor.dim(1); }

  Owned expected() const {
    Owned out(DType::kF32, {tokens(), outputs()});
    reference::linear(input(), layer(), out);
    return out;
  }
};

Owned random_values(Random& random, DType dtype, Shape shape) {
  return dtype == DType::kBF16 ? random.bf16(shape) : random.e4m3(shape);
}

Case random_case(Random& random, const Types& types, int64_t tokens, int64_t outputs, int64_t columns) {
  return {random_values(random, types.x, {tokens, columns}), random.f32({tokens, 1}, 0.1f),
          random_values(random, types.weight, {outputs, columns}), random.f32({outputs}, 0.01f)};
}

// Small whole numbers and scales that are powers of two: no order of sums rounds, so any slip of an index shows.
Case whole_case(Random& random, const Types& types, int64_t tokens, int64_t outputs, int64_t columns) {
  Case c = random_case(random, types, tokens, outputs, columns);
  for (const Tensor& tensor : {c.x.tensor, c.weight.tensor}) {
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      const auto value = static_cast<float>(random.below(9) - 4);
      if (tensor.dtype() == DType::kBF16) {
        tensor.as<uint16_t>()[i] = float_to_bf16(value);
      } else {
        tensor.as<uint8_t>()[i] = float_to_e4m3(value);
      }
    }
  }
  for (const Tensor& tensor : {c.x_scales.tensor, c.weight_scales.tensor}) {
    for (int64_t i = 0; i < tensor.elements(); ++i) {
      tensor.as<float>()[i] = std::ldexp(1.0f, static_cast<int>(random.below(7)) - 3);
    }
  }
  return c;
}

// A stream of the emulated GPU and what lies on it.
class Gpu {
 public:
  explicit Gpu(Arithmetic arithmetic = Arithmetic::kFast) : stream_(*octet_cuda_module(), 0, arithmetic, kHost) {}

  // `recorded`: what is returned comes from a recording of the op.
  Owned linear(const Case& c, bool recorded = false) {
    const Linear weight = pack(c);
    const LinearOutput output = {&weight, zeros(DType::kF32, {c.tokens(), c.outputs()})};
    const Activations x = {put(c.x), c.codes() ? put(c.x_scales) : Tensor()};
    const auto work = [&] { octet::linear(stream_, x, {&output, 1}); };
    work();
    if (recorded) {
      const Graph graph(stream_, work);
      copy(stream_, Owned(DType::kF32, output.out.shape()), output.out);
      graph.launch();
    }
    return fetch(output.out);
  }

  // A rank's leaf of a sum over ranks.
  Owned linear_of_rank(const Case& c) {
    const Linear weight = pack(c);
    const Tensor partials = zeros(DType::kF32, {1, c.tokens(), c.outputs()});
    const int64_t end = c.columns();
    linear_over_slices(stream_, {put(c.x), c.codes() ? put(c.x_scales) : Tensor()}, weight, {1, 1, 3}, {&end, 1},
                       partials);
    return fetch(Tensor(partials.data(), DType::kF32, {c.tokens(), c.outputs()}, Device::kCuda));
  }

 private:
  static constexpr Stream::CpuOptions kHost = {.threads = 1, .isa = Isa::kPortable, .spin = false};

  Tensor zeros(DType dtype, Shape shape) {
    memory_.push_back(std::make_unique<Buffer>(shape.elements() * size_of(dtype), stream_));
    return memory_.back()->tensor(dtype, shape);
  }
  Tensor put(const Tensor& host) {
    const Tensor there = zeros(host.dtype(), host.shape());
    copy(stream_, host, there);
    return there;
  }
  Owned fetch(const Tensor& there) {
    Owned host(there.dtype(), there.shape());
    copy(stream_, there, host);
    return host;
  }
  Linear pack(const Case& c) {
    const DType dtype = c.weight.tensor.dtype();
    const int64_t bytes = packed_bytes(dtype, c.outputs(), c.columns());
    const Linear linear = {.out_features = c.outputs(),
                           .in_features = c.columns(),
                           .weight = zeros(dtype, {bytes / size_of(dtype)}),
                           .weight_scale = dtype == DType::kF8E4M3 ? put(c.weight_scales) : Tensor(),
                           .activations = {}};
    pack_rows(stream_, c.weight, 0, linear);
    return linear;
  }

  Stream stream_;
  std::vector<std::unique_ptr<Buffer>> memory_;
};

std::string describe(const Case& c) {
  return name_of(Types{c.x.tensor.dtype(), c.weight.tensor.dtype()}) + " " +
         Shape({c.tokens(), c.outputs(), c.columns()}).to_string();
}

void expect_exact(const Owned& actual, const Case& c) { expect_same_bits(actual, c.expected(), describe(c)); }

// The greatest error in units of what it may be. A tensor core adds products of more bits than it keeps: each of K
// additions may cut off 2^-23 of a partial sum, which is at most sum |x w|; the scales round twice more.
double worst_error(const Owned& actual, const Case& c) {
  const Owned expected = c.expected();
  double worst = 0;
  for (int64_t token = 0; token < c.tokens(); ++token) {
    for (int64_t output = 0; output < c.outputs(); ++output) {
      double total = 0;
      for (int64_t k = 0; k < c.columns(); ++k) {
        total += std::abs(static_cast<double>(value_at(c.x, token * c.columns() + k)) *
                          value_at(c.weight, output * c.columns() + k));
      }
      if (!c.layer().weight_scale.empty()) total *= std::abs(value_at(c.weight_scales, output));
      if (c.codes()) total *= std::abs(value_at(c.x_scales, token));
      const int64_t at = token * c.outputs() + output;
      const double may_be = total * static_cast<double>(c.columns() + 2) * std::ldexp(1.0, -23);
      worst = std::max(worst, std::abs(value_at(actual, at) - value_at(expected, at)) / may_be);
    }
  }
  return worst;
}

class CudaGemm : public testing::Test {
 protected:
  CudaGemm() { fake_blas_lt() = {}; }
};

// ---- Our own tiles

TEST_F(CudaGemm, SumsWholeNumbersExactlyOverOddSizes) {
  Random random(1);
  const struct {
    int64_t tokens, outputs, columns;
  } cases[] = {{17, 1, 2},    {17, 128, 64},  {31, 33, 62},    {32, 129, 66},  {33, 40, 130}, {64, 7, 190},
               {65, 130, 64}, {100, 34, 258}, {128, 128, 192}, {129, 96, 128}, {260, 3, 34}};
  Gpu gpu;
  for (const auto& [tokens, outputs, columns] : cases) {
    for (const Types& types : kAllTypes) {
      const Case c = whole_case(random, types, tokens, outputs, columns);
      expect_exact(gpu.linear(c), c);
    }
  }
}

TEST_F(CudaGemm, SharesOutLongRowsAndAddsTheirPartsInOrder) {
  Random random(2);
  Gpu gpu;
  for (const Types& types : kAllTypes) {
    const Case exact = whole_case(random, types, 20, 67, 64 * 33 + 16);
    expect_exact(gpu.linear(exact), exact);
    const Case rounded = random_case(random, types, 20, 67, 64 * 33 + 16);
    expect_same_bits(gpu.linear(rounded), gpu.linear(rounded), "another run");
  }
}

TEST_F(CudaGemm, CanBeRecordedAndDoneAgain) {
  Random random(9);
  Gpu gpu;
  for (const Types& types : kAllTypes) {
    const Case c = whole_case(random, types, 20, 67, 64 * 33 + 16);
    expect_exact(gpu.linear(c, true), c);
  }
}

TEST_F(CudaGemm, RunsManyTilesOfTokensSideBySide) {
  Random random(3);
  const Case c = whole_case(random, kW8A16, 128 * 17 + 5, 150, 16);
  Gpu gpu;
  expect_exact(gpu.linear(c), c);
}

TEST_F(CudaGemm, KeepsWithinTheErrorOfItsAdditions) {
  Random random(4);
  Gpu gpu;
  for (const Types& types : kAllTypes) {
    for (const int64_t columns : {50, 256, 2080}) {
      Case c = random_case(random, types, 33, 40, columns);
      const Owned actual = gpu.linear(c);
      EXPECT_LE(worst_error(actual, c), 1) << describe(c);
      // Another last weight: 448, or a BF16 of some 40.
      static_cast<uint8_t*>(c.weight.tensor.data())[c.weight.tensor.bytes() - 1] =
          types.weight == DType::kBF16 ? 0x42 : 0x7E;
      EXPECT_GT(worst_error(actual, c), 1) << describe(c) << ": a wrong weight went unseen";
    }
  }
}

TEST_F(CudaGemm, DecodesEveryCode) {
  Random random(5);
  Case c = whole_case(random, kW8A16, 32, 256, 2);
  for (int64_t output = 0; output < 256; ++output) {
    const auto code = static_cast<uint8_t>(output);
    c.weight.tensor.as<uint8_t>()[2 * output] = is_e4m3_nan(code) ? 0 : code;
    c.weight.tensor.as<uint8_t>()[2 * output + 1] = 0;
  }
  Gpu gpu;
  expect_exact(gpu.linear(c), c);
}

TEST_F(CudaGemm, KeepsANanInItsRow) {
  Random random(6);
  for (const Types& types : kAllTypes) {
    Case c = whole_case(random, types, 40, 50, 128);
    if (c.codes()) {
      c.x_scales.tensor.as<float>()[21] = std::numeric_limits<float>::quiet_NaN();
    } else {
      c.x.tensor.as<uint16_t>()[21 * 128 + 77] = 0x7FC0;
    }
    Gpu gpu;
    expect_exact(gpu.linear(c), c);
  }
}

TEST_F(CudaGemm, MakesARanksLeafOfTheSumOverRanks) {
  Random random(7);
  Gpu gpu;
  for (const Types& types : kAllTypes) {
    const Case c = whole_case(random, types, 18, 64, 320);
    expect_exact(gpu.linear_of_rank(c), c);
  }
}

// ---- cuBLASLt

class CudaBlasLt : public CudaGemm {
 protected:
  CudaBlasLt() { fake.present = true; }

  Random random{8};
  FakeBlasLt& fake = fake_blas_lt();
};

using Calls = std::vector<FakeBlasLt::Call>;

TEST_F(CudaBlasLt, TakesRowScaledFp8AndBf16) {
  const Case codes = whole_case(random, kW8A8, 20, 48, 64), bf16 = whole_case(random, kBf16, 20, 36, 40);
  {
    Gpu gpu;
    expect_exact(gpu.linear(codes), codes);
    expect_exact(gpu.linear_of_rank(bf16), bf16);
    EXPECT_EQ(fake.handles, 1);
  }
  EXPECT_EQ(fake.multiplied, (Calls{{CUDA_R_8F_E4M3, true, 48, 20, 64}, {CUDA_R_16BF, false, 36, 20, 40}}));
  EXPECT_EQ(fake.handles, 0);
  EXPECT_EQ(fake.objects, 0);
}

TEST_F(CudaBlasLt, IsAskedOncePerShapeAndNumberOfTokensAlike) {
  Gpu gpu;
  for (const int64_t tokens : {17, 32, 20, 33, 48, 130, 144, 145}) {
    const Case c = whole_case(random, kBf16, tokens, 16, 16);
    expect_exact(gpu.linear(c), c);
  }
  const Case wider = whole_case(random, kBf16, 20, 24, 16);
  expect_exact(gpu.linear(wider), wider);
  const auto bf16 = [](int64_t m, int64_t n) { return FakeBlasLt::Call{CUDA_R_16BF, false, m, n, 16}; };
  EXPECT_EQ(fake.chosen, (Calls{bf16(16, 32), bf16(16, 48), bf16(16, 144), bf16(16, 160), bf16(24, 32)}));
  EXPECT_EQ(fake.multiplied.size(), 9u);
}

TEST_F(CudaBlasLt, IsNotAskedForWhatItNeverTakes) {
  Gpu gpu;
  for (const Case& c : {whole_case(random, kW8A16, 20, 32, 32),  // types of two kinds
                        whole_case(random, kW8A8, 20, 24, 32),   // outputs no multiple of 16
                        whole_case(random, kW8A8, 20, 32, 24),   // columns neither
                        whole_case(random, kBf16, 20, 32, 12),   // rows not aligned
                        whole_case(random, kBf16, 20, 33, 32),   // rows of results not aligned
                        whole_case(random, kBf16, kFewTokens, 32, 32)}) {
    EXPECT_LE(worst_error(gpu.linear(c), c), 0) << describe(c);
  }
  EXPECT_EQ(fake.chosen, Calls{});
}

TEST_F(CudaBlasLt, LeavesScalesOfRowsToUsWhereItKnowsNone) {
  const Case c = whole_case(random, kW8A8, 20, 48, 64);
  const Calls unscaled = {{CUDA_R_8F_E4M3, false, 48, 20, 64}, {CUDA_R_8F_E4M3, false, 48, 20, 64}};
  fake.knows_row_scales = false;
  {
    Gpu gpu;
    expect_exact(gpu.linear(c), c);
    expect_exact(gpu.linear(c), c);
  }
  EXPECT_EQ(fake.multiplied, unscaled);
  fake.multiplied.clear();
  fake.chosen.clear();
  fake.knows_row_scales = true;
  fake.choose = [](const auto& call) { return call.row_scales ? CUBLAS_STATUS_NOT_SUPPORTED : CUBLAS_STATUS_SUCCESS; };
  Gpu gpu;
  expect_exact(gpu.linear(c), c);
  expect_exact(gpu.linear(c), c);
  EXPECT_EQ(fake.multiplied, unscaled);
  EXPECT_EQ(fake.chosen, (Calls{{CUDA_R_8F_E4M3, true, 48, 32, 64}, {CUDA_R_8F_E4M3, false, 48, 32, 64}}));
}

TEST_F(CudaBlasLt, IsDoneWithoutWhereItRefuses) {
  const Case codes = whole_case(random, kW8A8, 20, 48, 64), bf16 = whole_case(random, kBf16, 20, 40, 64);
  const auto expect_tiles = [&](size_t questions) {
    fake.chosen.clear();
    Gpu gpu;
    for (int i = 0; i < 2; ++i) {
      expect_exact(gpu.linear(codes), codes);
      expect_exact(gpu.linear(bf16), bf16);
    }
    EXPECT_EQ(fake.multiplied, Calls{});
    EXPECT_EQ(fake.chosen.size(), questions) << "an answer was forgotten";
  };
  for (const cublasStatus_t refusal :
       {CUBLAS_STATUS_NOT_SUPPORTED, CUBLAS_STATUS_INVALID_VALUE, CUBLAS_STATUS_ARCH_MISMATCH}) {
    fake.choose = [&](const auto&) { return refusal; };
    expect_tiles(3);  // FP8 with scales and without, BF16
  }
  fake.choose = FakeBlasLt().choose;
  fake.finds_none = true;
  expect_tiles(3);
  fake.finds_none = false;
  fake.multiply = [](const auto&) { return CUBLAS_STATUS_NOT_SUPPORTED; };  // what it chose for more tokens
  expect_tiles(3);
  fake.create = CUBLAS_STATUS_NOT_INITIALIZED;
  expect_tiles(0);
  EXPECT_EQ(fake.objects, 0);
}

TEST_F(CudaBlasLt, IsNotOpenedForReproducibleArithmetic) {
  const Case c = whole_case(random, kBf16, 20, 32, 32);
  Gpu gpu(Arithmetic::kReproducible);
  EXPECT_EQ(fake.handles, 0);
  expect_exact(gpu.linear(c), c);
  EXPECT_EQ(fake.chosen, Calls{});
}

TEST_F(CudaBlasLt, EndsTheProcessWhereTheDeviceFails) {
  const Case c = whole_case(random, kBf16, 20, 32, 32);
  fake.multiply = [](const auto&) { return CUBLAS_STATUS_EXECUTION_FAILED; };
  EXPECT_DEATH(Gpu().linear(c), "cuBLASLt, multiplying: status 13");
}

}  // namespace
}  // namespace octet
