// The CUDA module against the CPU back end bit for bit: emulated (see cuda_emulation/cuda_runtime.h), or the one that
// OCTET_CUDA_MODULE names, on a GPU. The CPU's own tests hold it against the reference.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "kernels/calibrate.h"
#include "kernels/cuda/open_module.h"
#include "kernels/graph.h"
#include "kernels/ops.h"
#include "kernels/stopwatch.h"
#include "tests/op_cases.h"
#include "tests/surroundings.h"

namespace octet {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

const cuda::ModuleTable& module() {
  static const cuda::ModuleTable* const kModule = [] {
    const auto opened = cuda::open_module(cuda_module_under_test());
    if (!opened.ok()) ADD_FAILURE() << opened.status();
    return *opened;
  }();
  return *kModule;
}

constexpr Stream::CpuOptions kHost = {.threads = 1, .isa = Isa::kPortable, .spin = false};

// Where an operation runs: takes tensors there.
class Place {
 public:
  explicit Place(Stream& stream) : stream(stream) {}

  Tensor zeros(DType dtype, Shape shape) {
    memory_.push_back(std::make_unique<Buffer>(std::max<int64_t>(shape.elements() * size_of(dtype), 1), stream));
    return memory_.back()->tensor(dtype, shape);
  }
  Tensor put(const Tensor& host) {
    const Tensor there = zeros(host.dtype(), host.shape());
    copy(stream, host, there);
    return there;
  }
  AttentionBatch put(const AttentionBatch& host) {
    return {.positions = put(host.positions),
            .sequence_of = put(host.sequence_of),
            .sequence_ends = put(host.sequence_ends),
            .block_tables = put(host.block_tables),
            .context = host.context};
  }
  Linear pack(const Tensor& raw, const Tensor& scale) {
    const int64_t out = raw.dim(0), in = raw.dim(1);
    const Linear linear = {.out_features = out,
                           .in_features = in,
                           .weight = zeros(raw.dtype(), {packed_bytes(raw.dtype(), out, in) / size_of(raw.dtype())}),
                           .weight_scale = raw.dtype() == DType::kF8E4M3 ? put(scale) : Tensor(),
                           .activations = {}};
    const int64_t first = std::min<int64_t>(kPanelRows, out);  // in two pieces where there are two panels
    pack_rows(stream, raw.rows(0, first), 0, linear);
    if (first < out) pack_rows(stream, raw.rows(first, out), first, linear);
    return linear;
  }

  Stream& stream;

 private:
  std::vector<std::unique_ptr<Buffer>> memory_;
};

using Operation = std::function<std::vector<Tensor>(Place&)>;

std::vector<Owned> results_of(const Operation& operation, Stream& stream) {
  Place place(stream);
  std::vector<Owned> results;
  for (const Tensor& there : operation(place)) {
    results.emplace_back(there.dtype(), there.shape());
    copy(stream, there, results.back());
  }
  return results;
}

// Runs `operation` on both back ends; what it returns must have the same bits.
void expect_same_on_both(const std::string& what, const Operation& operation) {
  Stream cpu({.threads = 1, .isa = best_isa(), .spin = false});
  Stream cuda(module(), 0, Arithmetic::kReproducible, kHost);
  const std::vector<Owned> expected = results_of(operation, cpu), actual = results_of(operation, cuda);
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < actual.size(); ++i) {
    expect_same_bits(actual[i], expected[i], what + ", result " + std::to_string(i));
    if (testing::Test::HasFatalFailure()) return;
  }
}

struct Input {
  Owned values, scales;
  Activations at(Place& place) const {
    return {place.put(values), values.tensor.dtype() == DType::kF8E4M3 ? place.put(scales) : Tensor()};
  }
};

Input random_input(Random& random, DType dtype, int64_t tokens, int64_t in, int64_t groups) {
  return {dtype == DType::kBF16 ? random.bf16({tokens, in}) : random.e4m3({tokens, in}),
          random.f32({tokens, groups}, 0.1f)};
}

Owned random_weight(Random& random, DType dtype, int64_t out, int64_t in) {
  return dtype == DType::kBF16 ? random.bf16({out, in}) : random.e4m3({out, in});
}

TEST(CudaLinear, HasTheCpusBitsOverOddSizes) {
  Random random(1);
  const struct {
    int64_t tokens, in, out;
  } cases[] = {{1, 2, 1},   {1, 64, 32},   {1, 3000, 33}, {2, 130, 95}, {3, 576, 100}, {7, 66, 65},
               {8, 62, 64}, {9, 1026, 31}, {17, 190, 34}, {40, 34, 7},  {70, 18, 40}};
  for (const auto& [tokens, in, out] : cases) {
    for (const DType weight_type : {DType::kBF16, DType::kF8E4M3}) {
      for (const DType x_type : {DType::kBF16, DType::kF8E4M3}) {
        const Owned raw = random_weight(random, weight_type, out, in), scale = random.f32({out}, 0.01f);
        const Input x = random_input(random, x_type, tokens, in, 1);
        expect_same_on_both(Shape({tokens, in, out}).to_string(), [&](Place& place) {
          const Linear weight = place.pack(raw, scale), again = place.pack(raw, scale);
          const LinearOutput outputs[] = {{&weight, place.zeros(DType::kF32, {tokens, out})},
                                          {&again, place.zeros(DType::kF32, {tokens, out})}};
          linear(place.stream, x.at(place), outputs);
          return std::vector<Tensor>{outputs[0].out, outputs[1].out};
        });
      }
    }
  }
}

TEST(CudaLinear, FlushesDenormalsAsTheCpuDoes) {
  Random random(2);
  Owned x = random.bf16({5, 130}), raw = random.bf16({33, 130});
  for (Owned* const tensor : {&x, &raw}) {  // exponents whose products are around the smallest normal number
    for (int64_t i = 0; i < tensor->tensor.elements(); ++i) {
      tensor->tensor.as<uint16_t>()[i] =
          static_cast<uint16_t>((random.bits() & 0x807F) | static_cast<uint64_t>(random.below(130)) << 7);
    }
  }
  const Owned none = random.f32({33});
  expect_same_on_both("denormals", [&](Place& place) {
    const Linear weight = place.pack(raw, none);
    const LinearOutput output = {&weight, place.zeros(DType::kF32, {5, 33})};
    linear(place.stream, {place.put(x), {}}, {&output, 1});
    return std::vector<Tensor>{output.out};
  });
}

TEST(CudaLinearOverSlices, HasTheCpusBitsForEveryRun) {
  Random random(3);
  for (const int total : {1, 2, 3, 5, 8}) {
    for (int first = 0; first < total; ++first) {
      for (int count = 1; first + count <= total; ++count) {
        const DType x_type = (first + count) % 2 == 0 ? DType::kBF16 : DType::kF8E4M3;
        const DType weight_type = count % 2 == 0 ? DType::kBF16 : DType::kF8E4M3;
        std::vector<int64_t> ends;
        for (int i = 0; i < count; ++i) ends.push_back((ends.empty() ? 0 : ends.back()) + 2 * (1 + random.below(40)));
        const int64_t tokens = 1 + random.below(10), out = 35, in = ends.back();
        const SliceRun run = {first, count, total};
        const Owned raw = random_weight(random, weight_type, out, in), scale = random.f32({out}, 0.01f);
        const Input x = random_input(random, x_type, tokens, in, count);
        expect_same_on_both("slices", [&](Place& place) {
          const Linear weight = place.pack(raw, scale);
          const int64_t nodes = static_cast<int64_t>(maximal_subtrees(run).size());
          const Tensor partials = place.zeros(DType::kF32, {nodes, tokens, out});
          linear_over_slices(place.stream, x.at(place), weight, run, ends, partials);
          return std::vector<Tensor>{partials};
        });
      }
    }
  }
}

TEST(CudaSums, HaveTheCpusBits) {
  Random random(4);
  for (const int total : {1, 2, 3, 7, 8}) {
    std::vector<SliceNode> leaves;
    std::vector<Owned> pieces;
    for (int i = 0; i < total; ++i) {
      leaves.push_back({0, i});
      pieces.push_back(random.f32({3, 171}));
    }
    const std::vector<int> program = sum_program(leaves, root_of(total), total);
    const Owned residual = random.bf16({3, 171});
    expect_same_on_both("sum of " + std::to_string(total), [&](Place& place) {
      std::vector<Tensor> there;
      for (const Owned& piece : pieces) there.push_back(place.put(piece));
      const Tensor stream = place.put(residual), sum = place.zeros(DType::kF32, {3, 171});
      add_tree_sum(place.stream, there, program, stream);
      tree_sum(place.stream, there, program, sum);
      return std::vector<Tensor>{stream, sum};
    });
  }
}

TEST(CudaQuantize, HasTheCpusBits) {
  Random random(5);
  for (const int64_t n : {2, 16, 250, 2064}) {
    Owned x = random.bf16({5, n}, 3.0f);
    for (int64_t i = 0; i < n; ++i) {
      x.tensor.as<uint16_t>()[n + i] = 0;                                              // a row of zeros
      x.tensor.as<uint16_t>()[2 * n + i] = static_cast<uint16_t>(random.below(0x90));  // denormals, and little more
    }
    x.tensor.as<uint16_t>()[3 * n] = 0x7F80;  // infinity
    for (const ActivationScheme& scheme :
         {ActivationScheme{.kind = ActivationScheme::Kind::kDynamicPerToken},
          ActivationScheme{.kind = ActivationScheme::Kind::kDynamicPerToken, .upper_bound = 2.5f},
          ActivationScheme{.kind = ActivationScheme::Kind::kStatic, .scale = 0.013f}}) {
      for (const std::vector<int64_t>& ends : {std::vector<int64_t>{n}, std::vector<int64_t>{1, n / 2 + 1, n}}) {
        if (ends.size() > 1 && n < 16) continue;
        expect_same_on_both("quantize " + std::to_string(n), [&](Place& place) {
          const Activations out = {place.zeros(DType::kF8E4M3, {5, n}),
                                   place.zeros(DType::kF32, {5, static_cast<int64_t>(ends.size())})};
          quantize(place.stream, place.put(x), scheme, ends, out);
          return std::vector<Tensor>{out.values, out.scales};
        });
      }
    }
    x.tensor.as<uint16_t>()[n / 2] = 0x7FC0;
    expect_same_on_both("a NaN in a row", [&](Place& place) {
      const int64_t whole[] = {n};
      const Activations out = {place.zeros(DType::kF8E4M3, {5, n}), place.zeros(DType::kF32, {5, 1})};
      quantize(place.stream, place.put(x), {.kind = ActivationScheme::Kind::kDynamicPerToken}, whole, out);
      return std::vector<Tensor>{out.scales};  // the codes of such a row mean nothing
    });
  }
}

TEST(CudaRmsNorm, HasTheCpusBits) {
  Random random(6);
  for (const int64_t n : {1, 2, 15, 16, 17, 576, 2047, 2048, 2049, 5003}) {
    const Owned x = random.bf16({3, n}), weight = random.f32({n});
    expect_same_on_both("rms_norm " + std::to_string(n), [&](Place& place) {
      const Tensor out = place.zeros(DType::kBF16, {3, n});
      rms_norm(place.stream, place.put(x), place.put(weight), 1e-5f, out);
      return std::vector<Tensor>{out};
    });
  }
}

TEST(CudaSiluMul, HasTheCpusBitsOverTheWholeRange) {
  Random random(7);
  Owned gate = random.f32({3, 1001}, 10.0f), up = random.f32({3, 1001});
  const float special[] = {0.0f, -0.0f, kInf, -kInf, kNan, 88.7f, -88.7f, 104.5f, -104.5f, 1e-40f, -1e-40f};
  std::copy(std::begin(special), std::end(special), gate.tensor.as<float>());
  for (int i = 0; i < 1001; ++i) gate.tensor.as<float>()[2002 + i] = -110.0f + 0.22f * static_cast<float>(i);
  expect_same_on_both("silu_mul", [&](Place& place) {
    const Tensor out = place.zeros(DType::kBF16, {3, 1001});
    silu_mul(place.stream, place.put(gate), place.put(up), out);
    return std::vector<Tensor>{out};
  });
}

const ActivationScheme kSchemes[] = {{.kind = ActivationScheme::Kind::kNone},
                                     {.kind = ActivationScheme::Kind::kDynamicPerToken},
                                     {.kind = ActivationScheme::Kind::kDynamicPerToken, .upper_bound = 0.7f},
                                     {.kind = ActivationScheme::Kind::kStatic, .scale = 0.013f}};

// Room for x quantised so, or x itself.
Activations room_for(Place& place, const Tensor& x, const ActivationScheme& scheme, int64_t groups) {
  if (scheme.kind == ActivationScheme::Kind::kNone) return {x, {}};
  return {place.zeros(DType::kF8E4M3, x.shape()), place.zeros(DType::kF32, {x.dim(0), groups})};
}

std::vector<Tensor> parts_of(const Activations& x) {
  return x.scales.empty() ? std::vector<Tensor>{x.values} : std::vector<Tensor>{x.values, x.scales};
}

Operation norm_and_quantize(const Owned& x, const Owned& weight, const ActivationScheme& scheme) {
  return [&](Place& place) {
    const Tensor normed = place.zeros(DType::kBF16, x.tensor.shape());
    const NormedInput next = {.weight = place.put(weight),
                              .eps = 1e-5f,
                              .scheme = scheme,
                              .normed = normed,
                              .out = room_for(place, normed, scheme, 1)};
    rms_norm_and_quantize(place.stream, place.put(x), next);
    return parts_of(next.out);
  };
}

TEST(CudaNormAndQuantize, HasTheCpusBits) {
  Random random(15);
  for (const int64_t n : {2, 576, 2049}) {
    const Owned x = random.bf16({3, n}), weight = random.f32({n});
    for (const ActivationScheme& scheme : kSchemes) {
      expect_same_on_both("norm and quantize " + std::to_string(n), norm_and_quantize(x, weight, scheme));
    }
  }
}

// The sum of n squares has another order in fast arithmetic: its relative error is at most n 2^-24, that of the factor
// half of it, so a value differs by one step of BF16 at most, and a code then by one of e4m3, where it was near a
// border.
TEST(CudaNormAndQuantize, IsNearTheReproducibleResultInFastArithmetic) {
  Random random(16);
  for (const int64_t n : {8, 576, 8200, 32768}) {
    const Owned x = random.bf16({3, n}), weight = random.f32({n});
    for (const ActivationScheme& scheme : kSchemes) {
      Stream slow(module(), 0, Arithmetic::kReproducible, kHost), fast(module(), 0, Arithmetic::kFast, kHost);
      const Operation operation = norm_and_quantize(x, weight, scheme);
      const std::vector<Owned> expected = results_of(operation, slow), actual = results_of(operation, fast);
      const bool codes = scheme.kind != ActivationScheme::Kind::kNone;
      int64_t different = 0;
      for (int64_t i = 0; i < 3 * n; ++i) {
        const int difference = codes ? actual[0].tensor.as<uint8_t>()[i] - expected[0].tensor.as<uint8_t>()[i]
                                     : actual[0].tensor.as<uint16_t>()[i] - expected[0].tensor.as<uint16_t>()[i];
        ASSERT_LE(std::abs(difference), 1) << n << ", element " << i;
        different += difference != 0;
      }
      EXPECT_LE(different, 3 * n / 20) << n;
      for (int64_t i = 0; codes && i < 3; ++i) {
        const float scale = expected[1].tensor.as<float>()[i];
        EXPECT_NEAR(actual[1].tensor.as<float>()[i], scale, scale / 128) << n;
      }
    }
  }
}

TEST(CudaSiluAndQuantize, HasTheCpusBitsInBothArithmetics) {
  Random random(17);
  Owned gate = random.f32({3, 1002}, 10.0f), up = random.f32({3, 1002});
  up.tensor.as<float>()[5] = kInf;
  for (const ActivationScheme& scheme : kSchemes) {
    for (const std::vector<int64_t>& ends : {std::vector<int64_t>{1002}, std::vector<int64_t>{2, 500, 1002}}) {
      const Operation operation = [&](Place& place) {
        const Tensor gated = place.zeros(DType::kBF16, {3, 1002});
        const Activations out = room_for(place, gated, scheme, static_cast<int64_t>(ends.size()));
        silu_mul_and_quantize(place.stream, place.put(gate), place.put(up), scheme, ends, gated, out);
        return parts_of(out);
      };
      expect_same_on_both("silu and quantize", operation);
      Stream cpu({.threads = 1, .isa = best_isa(), .spin = false});
      Stream fast(module(), 0, Arithmetic::kFast, kHost);
      const std::vector<Owned> expected = results_of(operation, cpu), actual = results_of(operation, fast);
      for (size_t i = 0; i < expected.size(); ++i) expect_same_bits(actual[i], expected[i], "in fast arithmetic");
    }
  }
}

TEST(CudaCopies, HaveTheCpusBits) {
  Random random(8);
  const Owned table = random.bf16({11, 301});
  const std::vector<int32_t> rows = {10, 0, 3, 3, 7};
  expect_same_on_both("copy_rows", [&](Place& place) {
    const Tensor out = place.zeros(DType::kBF16, {5, 301});
    copy_rows(place.stream, place.put(table), place.put(view_of(rows)), out);
    return std::vector<Tensor>{out};
  });
  const Owned keys = random.bf16({6, 3, 17, kKvBlockTokens, 2}), values = random.bf16({6, 3, kKvBlockTokens, 34});
  const std::vector<int32_t> from = {1, 5, 2, 3}, to = {3, 2, 0, 4};  // block 2 is written, then read; so is block 3
  expect_same_on_both("copy_blocks", [&](Place& place) {
    const KvLayer cache = {.keys = place.put(keys), .values = place.put(values)};
    copy_blocks(place.stream, from, to, cache);
    return std::vector<Tensor>{cache.keys, cache.values};
  });
}

TEST(CudaJoinColumns, PutsThePartsOfRowsSideBySide) {
  Random random(18);
  const Owned parts = random.f32({4 * 301});
  for (const std::vector<int64_t>& ends : {std::vector<int64_t>{301}, {1, 100, 300, 301}}) {
    expect_same_on_both("join_columns", [&](Place& place) {
      const Tensor out = place.zeros(DType::kF32, {4, 301});
      join_columns(place.stream, place.put(parts), ends, out);
      return std::vector<Tensor>{out};
    });
  }
}

TEST(CudaSoftmaxParts, HaveTheCpusBits) {
  Random random(9);
  for (const int64_t n : {3, 16, 100, 2050, 4999}) {
    Owned logits = random.f32({3, n}, 6.0f);
    logits.tensor.as<float>()[n + 1] = -kInf;
    logits.tensor.as<float>()[2 * n + 1] = kNan;
    const std::vector<int64_t> ends = {n / 3, n / 2 + 1, n};
    expect_same_on_both("softmax_parts", [&](Place& place) {
      const Tensor parts = place.zeros(DType::kF32, {3, 3, 2});
      softmax_parts(place.stream, place.put(logits), ends, parts);
      return std::vector<Tensor>{parts};
    });
  }
}

class CudaCache : public testing::TestWithParam<DType> {};
INSTANTIATE_TEST_SUITE_P(BothTypes, CudaCache, testing::Values(DType::kBF16, DType::kF8E4M3),
                         [](const auto& parameter) { return std::string(name_of(parameter.param)); });

TEST_P(CudaCache, IsWrittenWithTheCpusBitsAtTheTokensPositionsOnly) {
  Random random(10);
  for (const int64_t head_dim : {2, 34, 64, 128}) {
    const CacheCase setup(random, 4, 2, head_dim, {20, 37}, {3, 37}, GetParam());
    const int64_t tokens = static_cast<int64_t>(setup.positions.size());
    const Owned q = random.f32({tokens, 4, head_dim}), k = random.f32({tokens, 2, head_dim}),
                v = random.f32({tokens, 2, head_dim}), inv_freq = random.f32({head_dim / 2});
    expect_same_on_both("rope", [&](Place& place) {
      const Tensor angles = place.zeros(DType::kF32, {tokens, head_dim / 2, 2});
      const Tensor q_out = place.zeros(DType::kBF16, {tokens, 4, head_dim});
      const KvLayer cache = CacheCase::layer_of(place.put(setup.keys), place.put(setup.values));
      const AttentionBatch batch = place.put(setup.batch());
      rope_angles(place.stream, batch.positions, place.put(inv_freq), angles);
      rope_and_cache(place.stream, place.put(q), place.put(k), place.put(v), angles, batch, q_out, cache);
      return std::vector<Tensor>{angles, q_out, cache.keys, cache.values};
    });
  }
}

void expect_same_attention(const std::string& what, const CacheCase& setup) {
  expect_same_on_both(what, [&](Place& place) {
    const Tensor out = place.zeros(DType::kBF16, setup.q.tensor.shape());
    const KvLayer cache = CacheCase::layer_of(place.put(setup.keys), place.put(setup.values));
    attention(place.stream, place.put(setup.q), cache, place.put(setup.batch()), out);
    return std::vector<Tensor>{out};
  });
}

TEST_P(CudaCache, IsAttendedToWithTheCpusBitsOverOddSizesAndMixedBatches) {
  Random random(11);
  const struct {
    int64_t heads, kv_heads, head_dim;
    std::vector<int64_t> lengths, new_tokens;
  } cases[] = {{1, 1, 2, {1}, {1}},     {9, 3, 64, {300, 17, 256}, {1, 5, 1}},
               {8, 1, 128, {40}, {40}}, {4, 2, 80, {257, 3}, {9, 3}},
               {16, 1, 34, {530}, {2}}, {2, 2, 256, {20}, {13}},
               {3, 3, 64, {1100}, {1}}, {13, 1, 18, {100}, {3}},
               {17, 1, 128, {513}, {1}}};
  for (const auto& c : cases) {
    expect_same_attention(Shape({c.heads, c.kv_heads, c.head_dim}).to_string(),
                          CacheCase(random, c.heads, c.kv_heads, c.head_dim, c.lengths, c.new_tokens, GetParam()));
  }
}

TEST_P(CudaCache, IsWalkedInOneBlockByManyTokensWithTheSameBits) {
  Random random(12);
  expect_same_attention("prefill", CacheCase(random, 4, 2, 32, {600, 300}, {260, 3}, GetParam()));
}

TEST(CudaAttention, IsNearTheReproducibleResultInFastArithmeticAlsoWhenRecorded) {
  Random random(18);
  for (const int64_t head_dim : {64, 80, 128}) {  // 80: there are no fast kernels for it
    const CacheCase setup(random, 4, 2, head_dim, {300, 40}, {1, 40});
    std::vector<Owned> results;
    for (const Arithmetic arithmetic : {Arithmetic::kReproducible, Arithmetic::kFast}) {
      Stream stream(module(), 0, arithmetic, kHost);
      Place place(stream);
      const Tensor q = place.put(setup.q), out = place.zeros(DType::kBF16, setup.q.tensor.shape());
      const KvLayer cache = {.keys = place.put(setup.keys), .values = place.put(setup.values)};
      const AttentionBatch batch = place.put(setup.batch());
      const auto attend = [&] { attention(stream, q, cache, batch, out); };
      const auto read = [&] {
        results.emplace_back(DType::kBF16, out.shape());
        copy(stream, out, results.back());
      };
      attend();
      read();
      const Graph graph(stream, attend);
      copy(stream, setup.q, out);
      graph.launch();
      read();
    }
    expect_same_bits(results[1], results[0], "reproducible, recorded");
    expect_same_bits(results[3], results[2], "fast, recorded");
    // Values are averages of normal numbers, weighed by probabilities of 8 bits.
    expect_near(results[2], results[0], std::ldexp(1.0, -7), std::ldexp(3.0, -8), "fast");
  }
}

TEST(CudaQueue, TakesArgumentsOfAnySize) {
  Random random(13);
  const Owned blocks = random.bf16({2, 1, 1, kKvBlockTokens, 2});
  // The first fill more than half of the queue's memory for arguments, the last are several times as large.
  for (const size_t count : {size_t{60'000}, size_t{100'000}, size_t{60'000}, size_t{400'000}, size_t{10}}) {
    const std::vector<int32_t> from(count, 0), to(count, 1);
    expect_same_on_both(std::to_string(count) + " copies", [&](Place& place) {
      const KvLayer cache = {.keys = place.put(blocks),
                             .values = place.put(blocks.tensor.reshaped({2, 1, kKvBlockTokens, 2}))};
      for (int i = 0; i < 3; ++i) copy_blocks(place.stream, from, to, cache);
      return std::vector<Tensor>{cache.keys, cache.values};
    });
  }
}

TEST(CudaQueue, CopiesRowsIntoTheFrontOfLongerOnes) {
  Random random(17);
  const Owned rows = random.f32({3, 5});
  expect_same_on_both("rows", [&](Place& place) {
    const Tensor longer = place.zeros(DType::kF32, {3, 9});
    queue_copy(place.stream, place.put(rows), longer);
    return std::vector<Tensor>{longer};
  });
}

TEST(CudaQueue, CopiesFromAndToPageLockedMemory) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Place place(stream);
  const Buffer locked = Buffer::page_locked(64, stream);
  const Tensor host = locked.tensor(DType::kI32, {16});
  EXPECT_EQ(host.device(), Device::kCpu);
  std::iota(host.as<int32_t>(), host.as<int32_t>() + 16, 1);
  const Tensor there = place.zeros(DType::kI32, {16});
  queue_copy(stream, host, there);
  stream.synchronize();
  std::fill_n(host.as<int32_t>(), 16, 0);
  queue_copy(stream, there, host);
  stream.synchronize();
  for (int i = 0; i < 16; ++i) EXPECT_EQ(host.as<int32_t>()[i], i + 1);
}

// Doubles the values of `numbers` by a kernel that adds them to themselves.
void double_all(Stream& stream, const Tensor& numbers, const Tensor& sums) {
  const Tensor both[] = {numbers, numbers};
  const std::vector<int> program = {0, 1, kAdd};
  tree_sum(stream, both, program, sums);
  queue_copy(stream, sums, numbers);
}

TEST(CudaGraph, DoesWhatWasRecordedWithWhatLiesThereNow) {
  Random random(15);
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Place place(stream);
  Owned host = random.f32({2, 5});
  const Tensor numbers = place.put(host), sums = place.zeros(DType::kF32, {2, 5});
  double_all(stream, numbers, sums);
  const Graph graph(stream, [&] { double_all(stream, numbers, sums); });
  Owned before(DType::kF32, {2, 5}), after(DType::kF32, {2, 5});
  copy(stream, numbers, before);
  for (int64_t i = 0; i < 10; ++i) ASSERT_EQ(value_at(before, i), 2 * value_at(host, i)) << "recording does nothing";
  graph.launch();
  graph.launch();
  copy(stream, numbers, after);
  for (int64_t i = 0; i < 10; ++i) ASSERT_EQ(value_at(after, i), 8 * value_at(host, i));
}

TEST(CudaGraphDeathTest, RefusesToRecordWhatBelongsToOneStep) {
  Random random(16);
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Place place(stream);
  const Owned host = random.f32({2, 5});
  const Tensor numbers = place.put(host), sums = place.zeros(DType::kF32, {2, 5});
  EXPECT_DEATH(Graph(stream, [&] { double_all(stream, numbers, sums); }), "a constant was to be copied");
  EXPECT_DEATH(Graph(stream, [&] { copy(stream, host, numbers); }), "the queue was to be waited for");
}

TEST(CudaBuffers, AreZeroedAndRefusedBeyondTheDevicesMemory) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Place place(stream);
  const Tensor there = place.zeros(DType::kF32, {1001});
  EXPECT_EQ(there.device(), Device::kCuda);
  Owned host(DType::kF32, {1001});
  std::fill_n(host.tensor.as<float>(), 1001, 1.0f);
  copy(stream, there, host);
  for (int i = 0; i < 1001; ++i) ASSERT_EQ(host.tensor.as<float>()[i], 0.0f);
  EXPECT_THROW(Buffer(int64_t{1} << 40, stream), std::bad_alloc);
}

#if !defined(__SANITIZE_ADDRESS__)
TEST(CudaEmulationDeathTest, KeepsTheHostFromDeviceMemory) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Place place(stream);
  const Tensor there = place.zeros(DType::kF32, {10});
  EXPECT_DEATH(static_cast<volatile float*>(there.data())[0] = 1.0f, "");
}
#endif

TEST(CudaOpsDeathTest, RefuseATensorOfTheOtherMemory) {
  Random random(14);
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  const Owned x = random.bf16({2, 8}), weight = random.f32({8});
  EXPECT_DEATH(rms_norm(stream, x, weight, 1e-5f, x), "x lies on the CPU, the stream computes on the CUDA device");
}

TEST(CudaCalibration, ReadsMemoryOfAnySize) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  for (const int64_t bytes : {16, 8192, 3 * 65536 + 48}) {
    const Buffer buffer(bytes, stream);
    EXPECT_GT(read_bytes_per_second(stream, buffer.tensor(DType::kU8, {bytes})), 0.0) << bytes;
  }
}

TEST(CudaStopwatch, TellsTheTimeBetweenMarks) {
  Stream stream(module(), 0, Arithmetic::kReproducible, kHost);
  Stopwatch stopwatch(stream);
  EXPECT_TRUE(stopwatch.take().empty());
  for (int round = 0; round < 2; ++round) {
    for (int mark = 0; mark < 3; ++mark) stopwatch.mark();
    const std::vector<double> seconds = stopwatch.take();
    ASSERT_EQ(seconds.size(), 2u);
    for (const double interval : seconds) EXPECT_GE(interval, 0.0);
  }
}

}  // namespace
}  // namespace octet
