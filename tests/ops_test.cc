// The CPU back end against the obvious reference, within tolerances that follow from dtype and length, and against
// itself bit for bit: over instruction families, threads, batch neighbours and slices.
#include "kernels/ops.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <vector>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packed.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/fp8.h"
#include "kernels/reference/reference.h"
#include "tests/op_cases.h"

namespace octet {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr double kBf16Ulp = 1.0 / 256;  // half a unit in the last place, relative: what one rounding to BF16 may lose

std::vector<Isa> families() {
  std::vector<Isa> out;
  for (const Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512}) {
    if (runs_here(isa)) out.push_back(isa);
  }
  return out;
}

struct Machine {
  Isa isa;
  int threads;
};

std::string to_string(const Machine& machine) {
  return std::string(name_of(machine.isa)) + " with " + std::to_string(machine.threads) + " threads";
}

// Every family, with 1 and with several threads (which sleep when idle: tests run beside each other).
std::vector<Machine> machines() {
  std::vector<Machine> out;
  for (const Isa isa : families()) {
    for (const int threads : {1, 2, 3, 4}) out.push_back({isa, threads});
  }
  return out;
}

Stream stream_of(const Machine& machine) { return Stream({machine.threads, machine.isa, false}); }

// Runs `operation` on every family and thread count; the results must have the bits of the first (portable, 1 thread),
// which is returned.
Owned same_everywhere(const std::string& what, const std::function<Owned(Stream&)>& operation) {
  Stream first_stream = stream_of(machines().front());
  Owned first = operation(first_stream);
  for (const Machine& machine : machines()) {
    Stream stream = stream_of(machine);
    const Owned other = operation(stream);
    expect_same_bits(other, first, what + " on " + to_string(machine));
  }
  return first;
}

// ---- Weights

struct Weights {
  Owned raw;
  Owned scale;
  Owned packed;
  Linear linear;
  reference::Linear reference;
};

Weights pack(Stream& stream, Owned raw, Owned scale) {
  const DType dtype = raw.tensor.dtype();
  const int64_t out = raw.tensor.dim(0);
  const int64_t in = raw.tensor.dim(1);
  Weights weights = {
      std::move(raw), std::move(scale), Owned(dtype, {packed_bytes(dtype, out, in) / size_of(dtype)}), {}, {}};
  const bool scaled = dtype == DType::kF8E4M3;
  weights.reference = {weights.raw.tensor, scaled ? weights.scale.tensor : Tensor()};
  weights.linear = {.out_features = out,
                    .in_features = in,
                    .weight = weights.packed.tensor,
                    .weight_scale = weights.reference.weight_scale,
                    .activations = {}};
  pack_rows(stream, weights.raw, 0, weights.linear);
  return weights;
}

Weights random_weights(Random& random, DType dtype, int64_t out, int64_t in) {
  Stream stream({1, Isa::kPortable, false});
  Owned raw = dtype == DType::kBF16 ? random.bf16({out, in}) : random.e4m3({out, in});
  return pack(stream, std::move(raw), random.f32({out}, 0.01f));
}

// An input as values and, for codes, scales.
struct Input {
  Owned values;
  Owned scales;
  Activations activations() const {
    return {values.tensor, values.tensor.dtype() == DType::kF8E4M3 ? scales.tensor : Tensor()};
  }
};

Input random_input(Random& random, DType dtype, int64_t tokens, int64_t in, int64_t groups) {
  return {dtype == DType::kBF16 ? random.bf16({tokens, in}) : random.e4m3({tokens, in}),
          random.f32({tokens, groups}, 0.1f)};
}

// A dot of length n in FP32 against the exact one: every one of n additions rounds a partial sum of at most sum |x w|,
// by 2^-24 of it; the scales round twice more.
void expect_linear_near(const Tensor& actual, const Tensor& expected, const Input& x, const reference::Linear& w,
                        const std::string& what) {
  const int64_t tokens = actual.dim(0);
  const int64_t rows = actual.dim(1);
  const int64_t in = x.values.tensor.dim(1);
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t row = 0; row < rows; ++row) {
      double total = 0;
      for (int64_t k = 0; k < in; ++k) {
        total += std::abs(static_cast<double>(value_at(x.values, token * in + k)) * value_at(w.weight, row * in + k));
      }
      if (!w.weight_scale.empty()) total *= std::abs(value_at(w.weight_scale, row));
      if (x.values.tensor.dtype() == DType::kF8E4M3) total *= std::abs(value_at(x.scales, token));
      const double error = std::abs(value_at(actual, token * rows + row) - value_at(expected, token * rows + row));
      ASSERT_LE(error, total * (static_cast<double>(in) + 3) * std::ldexp(1.0, -24) + 1e-30)
          << what << " token " << token << " row " << row;
    }
  }
}

// ---- The dot rule

// One group of one pair, sixteen random accumulators at a time, through the table's own dot.
TEST(Dots, EveryFlavourFollowsTheScalarRuleOnTwoMillionPairsWithDenormals) {
  std::vector<std::pair<std::string, const cpu::KernelTable*>> tables;
  for (const Isa isa : families()) tables.emplace_back(name_of(isa), &cpu::kernels_for(isa));
#if defined(__x86_64__)
  if (runs_here(Isa::kAvx512)) {
    tables.emplace_back("avx512 bf16", &cpu::avx512_kernels(cpu::Avx512Dots::kBf16));
    tables.emplace_back("avx512 fp32", &cpu::avx512_kernels(cpu::Avx512Dots::kFp32));
  }
#endif
  Random random(1);
  const cpu::FlushDenormals flush;
  int64_t flushed_to_zero = 0;
  for (int round = 0; round < 2'100'000 / cpu::kPanel; ++round) {
    // Exponents: anywhere; products around the accumulator; products and accumulators around the smallest normal
    // number.
    const auto number = [&](int least, int most) {
      return static_cast<uint16_t>((random.bits() & 0x807F) |
                                   static_cast<uint64_t>(least + random.below(most - least + 1)) << 7);
    };
    const int kind = round % 3;
    const auto factor = [&] {
      return kind == 0 ? static_cast<uint16_t>(random.bits()) : kind == 1 ? number(120, 134) : number(0, 70);
    };
    alignas(64) uint16_t weights[2 * cpu::kPanel];
    alignas(64) float acc[cpu::kPanel];
    const uint16_t x[2] = {factor(), factor()};
    for (int row = 0; row < cpu::kPanel; ++row) {
      weights[2 * row] = factor();
      weights[2 * row + 1] = factor();
      const uint32_t low = static_cast<uint32_t>(random.bits() & 0xFFFF);
      acc[row] = std::bit_cast<float>(static_cast<uint32_t>(kind == 2 ? number(0, 12) : factor()) << 16 | low);
      if (std::fpclassify(acc[row]) == FP_SUBNORMAL) acc[row] = 0;  // an accumulator never is
    }
    const uint8_t* const panel = reinterpret_cast<const uint8_t*>(weights);
    for (const auto& [name, table] : tables) {
      alignas(64) float actual[cpu::kPanel];
      std::memcpy(actual, acc, sizeof(acc));
      const uint16_t* const rows[1] = {x};
      alignas(64) float pair[2];
      table->pack_pairs(rows, 1, 1, table->direct_format(1), pair);
      table->dot_bf16({.x = pair,
                       .rows = 1,
                       .panels = 1,
                       .weights = &panel,
                       .next = &panel,
                       .pairs = 1,
                       .acc = actual,
                       .acc_stride = 0,
                       .accumulate = true});
      for (int row = 0; row < cpu::kPanel; ++row) {
        const float xs[2] = {bf16_to_float(x[0]), bf16_to_float(x[1])};
        // The rule from its parts; the flush mode is on, and so are its own flushes.
        volatile float expected = std::fma(xs[1], bf16_to_float(weights[2 * row + 1]), acc[row]);
        expected = std::fma(xs[0], bf16_to_float(weights[2 * row]), expected);
        const float value = expected;
        flushed_to_zero += value == 0 && acc[row] != 0;
        if (std::isnan(value) && std::isnan(actual[row])) continue;
        ASSERT_EQ(std::bit_cast<uint32_t>(actual[row]), std::bit_cast<uint32_t>(value))
            << name << ": x " << xs[0] << " " << xs[1] << " w " << bf16_to_float(weights[2 * row]) << " "
            << bf16_to_float(weights[2 * row + 1]) << " acc " << acc[row] << " gives " << actual[row] << ", not "
            << value;
      }
    }
  }
  EXPECT_GT(flushed_to_zero, 0) << "the cases never reached the flush";
}

TEST(Dots, AWholeLayerHasTheBitsOfTheScalarRule) {
  Random random(2);
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    const int64_t in = 2 * 777;
    const int64_t rows = 70;
    for (const int64_t tokens : {1, 2, 5, 14, 40}) {
      const Weights weights = random_weights(random, dtype, rows, in);
      const Input x = random_input(random, dtype, tokens, in, 1);
      const Owned actual = same_everywhere("linear", [&](Stream& stream) {
        Owned out(DType::kF32, {tokens, rows});
        const LinearOutput output = {&weights.linear, out};
        linear(stream, x.activations(), {&output, 1});
        return out;
      });
      std::vector<float> a(in), b(in);
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t k = 0; k < in; ++k) a[k] = value_at(x.values, token * in + k);
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t k = 0; k < in; ++k) b[k] = value_at(weights.raw, row * in + k);
          float expected = reference::dot_in_pairs(a.data(), b.data(), in);
          if (dtype == DType::kF8E4M3) expected = expected * value_at(weights.scale, row) * value_at(x.scales, token);
          ASSERT_EQ(value_at(actual, token * rows + row), expected) << name_of(dtype) << " " << token << " " << row;
        }
      }
    }
  }
}

// The two AVX-512 flavours beyond one pair: every row count, direct and expanded.
TEST(Dots, BothAvx512FlavoursHaveTheSameBits) {
  if (!runs_here(Isa::kAvx512)) GTEST_SKIP() << "this machine has no AVX-512 with BF16";
#if defined(__x86_64__)
  Random random(3);
  const int64_t pairs = 301;
  const Weights bf16 = random_weights(random, DType::kBF16, 4 * cpu::kPanel, 2 * pairs);
  const Weights fp8 = random_weights(random, DType::kF8E4M3, 4 * cpu::kPanel, 2 * pairs);
  const cpu::KernelTable* const flavours[] = {&cpu::avx512_kernels(cpu::Avx512Dots::kBf16),
                                              &cpu::avx512_kernels(cpu::Avx512Dots::kFp32)};
  const cpu::FlushDenormals flush;
  for (int rows = 1; rows <= 12; ++rows) {
    const Owned x = random.bf16({rows, 2 * pairs});
    const uint16_t* from[12];
    for (int r = 0; r < rows; ++r) from[r] = x.tensor.as<uint16_t>() + r * 2 * pairs;
    for (const Weights* const weights : {&bf16, &fp8}) {
      const bool codes = weights == &fp8;
      const uint8_t* panels[4];
      for (int p = 0; p < 4; ++p) {
        panels[p] = static_cast<const uint8_t*>(weights->packed.tensor.data()) +
                    p * pairs * (codes ? cpu::kFp8Group : cpu::kBf16Group);
      }
      for (int count = 1; count <= 4; ++count) {
        std::vector<Owned> results;
        for (const cpu::KernelTable* const table : flavours) {
          Owned acc(DType::kF32, {4, 12, cpu::kPanel});
          Owned packed(DType::kF32, {pairs, rows, 2});
          table->pack_pairs(from, rows, pairs, table->direct_format(rows), packed.tensor.data());
          (codes ? table->dot_fp8 : table->dot_bf16)({packed.tensor.data(), rows, count, panels, panels, pairs,
                                                      acc.tensor.as<float>(), 12 * cpu::kPanel, false});
          results.push_back(std::move(acc));

          Owned again(DType::kF32, {4, 12, cpu::kPanel});
          table->pack_pairs(from, rows, pairs, table->expanded_format, packed.tensor.data());
          Owned expanded(DType::kU8, {pairs * cpu::kExpandedGroup});
          const auto expand = codes ? table->expand_fp8 : table->expand_bf16;
          for (int p = 0; p < count; ++p) {
            const uint8_t* panel = panels[p];
            if (expand != nullptr) {
              expand(panel, pairs, expanded.tensor.data());
              panel = expanded.tensor.as<uint8_t>();
            }
            table->dot_expanded({packed.tensor.data(), rows, 1, &panel, &panel, pairs,
                                 again.tensor.as<float>() + p * 12 * cpu::kPanel, 0, false});
          }
          results.push_back(std::move(again));
        }
        for (size_t i = 1; i < results.size(); ++i) expect_same_bits(results[i], results[0], "flavour");
      }
    }
  }
#endif
}

// ---- Linear

struct LinearCase {
  int64_t tokens, in, out;
};

TEST(Linear, MatchesTheReferenceOverOddSizes) {
  Random random(4);
  const LinearCase cases[] = {{1, 2, 1},    {1, 64, 32},  {1, 3000, 33}, {2, 130, 95},   {3, 576, 200},  {4, 1026, 31},
                              {5, 66, 65},  {6, 258, 64}, {7, 1024, 40}, {8, 34, 129},   {11, 200, 7},   {12, 512, 161},
                              {13, 90, 34}, {24, 62, 50}, {25, 2050, 3}, {36, 1100, 45}, {40, 3000, 70}, {520, 18, 40}};
  for (const auto& [tokens, in, out] : cases) {
    for (const DType weight_type : {DType::kBF16, DType::kF8E4M3}) {
      for (const DType x_type : {DType::kBF16, DType::kF8E4M3}) {
        const Weights weights = random_weights(random, weight_type, out, in);
        const Input x = random_input(random, x_type, tokens, in, 1);
        const std::string what =
            std::string(name_of(x_type)) + " x " + name_of(weight_type) + " " + Shape({tokens, in, out}).to_string();
        const Owned actual = same_everywhere(what, [&](Stream& stream) {
          Owned result(DType::kF32, {tokens, out});
          const LinearOutput output = {&weights.linear, result};
          linear(stream, x.activations(), {&output, 1});
          return result;
        });
        Owned expected(DType::kF32, {tokens, out});
        reference::linear(x.activations(), weights.reference, expected);
        expect_linear_near(actual, expected, x, weights.reference, what);
      }
    }
  }
}

TEST(Linear, TakesEveryE4m3CodeToItsValue) {
  // One code per row, against inputs 1 and 0: the output is the code's value.
  Stream stream({1, best_isa(), false});
  Owned raw(DType::kF8E4M3, {254, 2});
  Owned ones(DType::kF32, {254});
  std::vector<uint8_t> codes;
  for (int code = 0; code < 256; ++code) {
    if (!is_e4m3_nan(static_cast<uint8_t>(code))) codes.push_back(static_cast<uint8_t>(code));
  }
  for (int64_t odd = 0; odd < 2; ++odd) {
    for (size_t i = 0; i < 254; ++i) {
      raw.tensor.as<uint8_t>()[2 * i + odd] = codes[i];
      raw.tensor.as<uint8_t>()[2 * i + 1 - odd] = 0x38;
      ones.tensor.as<float>()[i] = 1;
    }
    const Weights weights = pack(stream, Owned(raw), Owned(ones));
    for (const int64_t tokens : {1, 7, 30}) {
      Owned x(DType::kBF16, {tokens, 2});
      for (int64_t t = 0; t < tokens; ++t) x.tensor.as<uint16_t>()[2 * t + odd] = float_to_bf16(1.0f);
      const Owned out = same_everywhere("codes", [&](Stream& any) {
        Owned result(DType::kF32, {tokens, 254});
        const LinearOutput output = {&weights.linear, result};
        linear(any, {x.tensor, {}}, {&output, 1});
        return result;
      });
      for (int64_t i = 0; i < tokens * 254; ++i) ASSERT_EQ(value_at(out, i), e4m3_to_float(codes[i % 254]));
    }
  }
}

TEST(Linear, ARowNeverDependsOnItsNeighboursOrItsPlace) {
  Random random(5);
  const int64_t in = 1600;
  const int64_t rows = 100;
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    const Weights weights = random_weights(random, dtype, rows, in);
    const Owned x = random.bf16({1, in});
    for (const Machine& machine : machines()) {
      Stream stream = stream_of(machine);
      const auto run = [&](const Tensor& input) {
        Owned out(DType::kF32, {input.dim(0), rows});
        const LinearOutput output = {&weights.linear, out};
        linear(stream, {input, {}}, {&output, 1});
        return out;
      };
      const Owned alone = run(x);
      for (const int64_t tokens : {2, 3, 4, 5, 6, 9, 12, 13, 25, 38}) {
        Owned batch = random.bf16({tokens, in}, 3.0f);
        // Neighbours may be anything, NaN too.
        for (int64_t k = 0; k < in; ++k) batch.tensor.as<uint16_t>()[(tokens - 1) * in + k] = 0x7FC0;
        const int64_t at = random.below(tokens - 1);
        std::memcpy(batch.tensor.as<uint16_t>() + at * in, x.tensor.data(), in * 2);
        const Owned together = run(batch);
        expect_same_bits(together.tensor.rows(at, at + 1), alone,
                         to_string(machine) + " row " + std::to_string(at) + " of " + std::to_string(tokens));
      }
    }
  }
}

TEST(Linear, SeveralOutputsInOnePassEqualSeparatePasses) {
  Random random(6);
  const int64_t in = 576;
  for (const int64_t tokens : {1, 17}) {
    const Weights a = random_weights(random, DType::kBF16, 192, in);
    const Weights b = random_weights(random, DType::kF8E4M3, 65, in);
    const Weights c = random_weights(random, DType::kBF16, 10, in);
    const Owned x = random.bf16({tokens, in});
    for (const Machine& machine : machines()) {
      Stream stream = stream_of(machine);
      std::vector<Owned> together;
      std::vector<LinearOutput> outputs;
      for (const Weights* const w : {&a, &b, &c})
        together.emplace_back(DType::kF32, Shape{tokens, w->linear.out_features});
      int i = 0;
      for (const Weights* const w : {&a, &b, &c}) outputs.push_back({&w->linear, together[i++]});
      linear(stream, {x.tensor, {}}, outputs);
      i = 0;
      for (const Weights* const w : {&a, &b, &c}) {
        Owned separate(DType::kF32, {tokens, w->linear.out_features});
        const LinearOutput output = {&w->linear, separate};
        linear(stream, {x.tensor, {}}, {&output, 1});
        expect_same_bits(together[i++], separate, to_string(machine));
      }
    }
  }
}

TEST(Linear, PacksInPiecesAsInOneGo) {
  Random random(7);
  Stream stream({2, best_isa(), false});
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    const Weights whole = random_weights(random, dtype, 110, 34);
    Owned packed(dtype, {packed_bytes(dtype, 110, 34) / size_of(dtype)});
    std::memset(packed.tensor.data(), 0x55, packed.tensor.bytes());
    Linear pieces = whole.linear;
    pieces.weight = packed;
    pack_rows(stream, whole.raw.tensor.rows(64, 110), 64, pieces);
    pack_rows(stream, whole.raw.tensor.rows(0, 64), 0, pieces);
    EXPECT_EQ(std::memcmp(packed.tensor.data(), whole.packed.tensor.data(), packed.tensor.bytes()), 0);
  }
}

// ---- Sums over slices

std::vector<int64_t> column_ends(int64_t n, const SliceRun& run) {
  const auto bound = [&](int64_t s) { return s * n / run.total / 2 * 2; };
  std::vector<int64_t> ends;
  for (int i = 1; i <= run.count; ++i) ends.push_back(bound(run.first + i) - bound(run.first));
  return ends;
}

TEST(LinearOverSlices, MatchesTheReferenceForEveryRun) {
  Random random(8);
  const int64_t n = 430;
  const int64_t rows = 70;
  for (const int total : {1, 3, 8}) {
    for (int first = 0; first < total; ++first) {
      for (int count = 1; first + count <= total; ++count) {
        if (total == 8 && (first + count) % 3 == 1) continue;  // enough of them
        const SliceRun run = {first, count, total};
        const std::vector<int64_t> ends = column_ends(n, run);
        const int64_t nodes = static_cast<int64_t>(maximal_subtrees(run).size());
        for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
          const int64_t tokens = count % 2 == 1 ? 1 + first : 20;
          const Weights weights = random_weights(random, dtype, rows, ends.back());
          const Input x = random_input(random, dtype, tokens, ends.back(), count);
          const Owned actual = same_everywhere("slices", [&](Stream& stream) {
            Owned partials(DType::kF32, {nodes, tokens, rows});
            linear_over_slices(stream, x.activations(), weights.linear, run, ends, partials);
            return partials;
          });
          Owned expected(DType::kF32, {nodes, tokens, rows});
          reference::linear_over_slices(x.activations(), weights.reference, run, ends, expected);
          // As a dot of the whole length; terms reach 448 * 448 * 0.03 * 0.3 in FP8, 20 in BF16.
          const double largest = dtype == DType::kBF16 ? 20.0 : 448.0 * 448.0 * 0.01;
          expect_near(actual, expected, 0, largest * static_cast<double>(n) * std::ldexp(1.0, -20), "slices");
        }
      }
    }
  }
}

TEST(LinearOverSlices, AnyCutIntoRanksGivesTheSameResidual) {
  Random random(9);
  const int64_t n = 560;
  const int64_t rows = 45;
  for (const int total : {3, 8}) {
    for (const int64_t tokens : {1, 6, 29}) {
      const Owned raw = random.e4m3({rows, n});
      const Owned scale = random.f32({rows}, 0.01f);
      const Owned values = random.bf16({tokens, n});
      const Owned residual = random.bf16({tokens, rows});
      std::vector<Owned> results;
      for (int ranks = 1; ranks <= total; ++ranks) {
        const Machine machine = machines()[ranks % machines().size()];
        Stream stream = stream_of(machine);
        std::vector<SliceNode> nodes;
        std::vector<Owned> memory;
        std::vector<Tensor> pieces;
        int first = 0;
        for (int rank = 0; rank < ranks; ++rank) {
          const SliceRun run = {first, total / ranks + (rank < total % ranks), total};
          first += run.count;
          const std::vector<int64_t> ends = column_ends(n, run);
          const int64_t begin = static_cast<int64_t>(run.first) * n / total / 2 * 2;
          Owned my_raw(DType::kF8E4M3, {rows, ends.back()});
          Owned my_x(DType::kBF16, {tokens, ends.back()});
          for (int64_t r = 0; r < rows; ++r) {
            std::memcpy(my_raw.tensor.as<uint8_t>() + r * ends.back(), raw.tensor.as<uint8_t>() + r * n + begin,
                        ends.back());
          }
          for (int64_t t = 0; t < tokens; ++t) {
            std::memcpy(my_x.tensor.as<uint16_t>() + t * ends.back(), values.tensor.as<uint16_t>() + t * n + begin,
                        2 * ends.back());
          }
          const Weights weights = pack(stream, std::move(my_raw), Owned(scale));
          const auto mine = maximal_subtrees(run);
          memory.emplace_back(DType::kF32, Shape{static_cast<int64_t>(mine.size()), tokens, rows});
          linear_over_slices(stream, {my_x.tensor, {}}, weights.linear, run, ends, memory.back());
          for (size_t i = 0; i < mine.size(); ++i) {
            nodes.push_back(mine[i]);
            pieces.push_back(memory.back().tensor.rows(i, i + 1).reshaped({tokens, rows}));
          }
        }
        Owned out(residual);
        add_tree_sum(stream, pieces, sum_program(nodes, root_of(total), total), out);
        results.push_back(std::move(out));
        expect_same_bits(results.back(), results.front(), std::to_string(ranks) + " ranks of " + std::to_string(total));
      }
    }
  }
}

TEST(LinearOverSlices, ANaiveOrderOfTheSumWouldBeNoticed) {
  // The control: 1e8 + 1 + ... loses ones that the tree keeps.
  const int total = 8;
  std::vector<SliceNode> nodes;
  std::vector<Owned> memory;
  std::vector<Tensor> pieces;
  for (int i = 0; i < total; ++i) {
    nodes.push_back({0, i});
    memory.emplace_back(DType::kF32, Shape{1, 1});
    memory.back().tensor.as<float>()[0] = i == 0 ? 33554432.0f : i == 4 ? -33554432.0f : 1.0f;
    pieces.push_back(memory.back());
  }
  Stream stream({1, best_isa(), false});
  Owned tree(DType::kBF16, {1, 1});
  add_tree_sum(stream, pieces, sum_program(nodes, root_of(total), total), tree);
  Owned chain(DType::kBF16, {1, 1});
  std::vector<int> left_to_right = {0};
  for (int i = 1; i < total; ++i) left_to_right.insert(left_to_right.end(), {i, kAdd});
  add_tree_sum(stream, pieces, left_to_right, chain);
  EXPECT_NE(value_at(tree, 0), value_at(chain, 0));
}

TEST(AddTreeSum, RoundsOnceToBf16) {
  Random random(10);
  for (const int64_t n : {1, 15, 16, 63, 64, 65, 700, 9001}) {
    for (const int64_t pieces : {1, 2, 5}) {
      std::vector<Owned> memory;
      std::vector<Tensor> tensors;
      std::vector<int> program;
      for (int64_t i = 0; i < pieces; ++i) {
        memory.push_back(random.f32({2, n}));
        tensors.push_back(memory.back());
        program.push_back(static_cast<int>(i));
        if (i > 0) program.push_back(kAdd);
      }
      const Owned residual = random.bf16({2, n});
      const Owned actual = same_everywhere("add_tree_sum", [&](Stream& stream) {
        Owned out(residual);
        add_tree_sum(stream, tensors, program, out);
        return out;
      });
      Owned expected(residual);
      reference::add_tree_sum(tensors, expected);
      // Both round once; a tie that FP32 sees differently from double moves one BF16 step.
      expect_near(actual, expected, 2 * kBf16Ulp, 1e-6, "add_tree_sum");
      if (pieces > 1) continue;
      for (int64_t i = 0; i < 2 * n; ++i) {
        ASSERT_EQ(actual.tensor.as<uint16_t>()[i], float_to_bf16(value_at(residual, i) + value_at(memory[0], i)));
      }
    }
  }
}

TEST(TreeSum, APartOfTheTreeThatIsSummedApartLeavesTheBitsAlone) {
  Random random(17);
  for (const int64_t n : {1, 63, 64, 65, 9001}) {
    std::vector<Owned> memory;
    std::vector<Tensor> pieces;
    std::vector<SliceNode> nodes;
    for (int i = 0; i < 5; ++i) {
      memory.push_back(random.f32({1, n}));
      // Some of these and of their sums are denormal: flushed in both ways, or in neither.
      for (int64_t j = 0; j < n; j += 3) memory.back().tensor.as<float>()[j] *= 0x1p-126f;
      pieces.push_back(memory.back());
      nodes.push_back({0, i});
    }
    const Owned residual(DType::kBF16, {1, n});
    const Owned whole = same_everywhere("add_tree_sum", [&](Stream& stream) {
      Owned out(residual);
      add_tree_sum(stream, pieces, sum_program(nodes, root_of(5), 5), out);
      return out;
    });
    const Owned apart = same_everywhere("tree_sum", [&](Stream& stream) {
      const Owned left(DType::kF32, {1, n});
      tree_sum(stream, pieces, std::vector<int>{0, 1, kAdd, 2, 3, kAdd, kAdd}, left);
      const std::vector<Tensor> both = {pieces[4], left};
      Owned out(residual);
      add_tree_sum(stream, both, sum_program(std::vector<SliceNode>{{0, 4}, {2, 0}}, root_of(5), 5), out);
      return out;
    });
    expect_same_bits(apart, whole, std::to_string(n));
  }
}

// ---- Rows

TEST(Quantize, MatchesTheReferenceToTheBit) {
  Random random(11);
  for (const int64_t n : {2, 16, 30, 64, 431 * 2, 1536}) {
    for (const float deviation : {1e-30f, 1e-4f, 1.0f, 1000.0f}) {
      Owned x = random.bf16({5, n}, deviation);
      for (int64_t i = 0; i < n; ++i) x.tensor.as<uint16_t>()[i] = 0;  // an empty row
      x.tensor.as<uint16_t>()[4 * n + n - 1] = 0x7FC0;                 // NaN in the last group of the last row
      x.tensor.as<uint16_t>()[3 * n] = float_to_bf16(5000.0f);
      x.tensor.as<uint16_t>()[3 * n + 1] = 0xFF80;  // -inf
      const std::vector<int64_t> one = {n};
      const std::vector<int64_t> many = {n / 4 / 2 * 2 > 0 ? n / 4 / 2 * 2 : n, n};
      for (const auto& ends : {one, many.front() == n ? one : many}) {
        const int64_t groups = static_cast<int64_t>(ends.size());
        const ActivationScheme schemes[] = {{ActivationScheme::Kind::kDynamicPerToken, 1200.0f, 1.0f},
                                            {ActivationScheme::Kind::kDynamicPerToken, kInf, 1.0f},
                                            {ActivationScheme::Kind::kStatic, kInf, 0.037f}};
        for (const ActivationScheme& scheme : schemes) {
          Owned expected_codes(DType::kF8E4M3, {5, n});
          Owned expected_scales(DType::kF32, {5, groups});
          reference::quantize(x, scheme, ends, {expected_codes.tensor, expected_scales.tensor});
          for (const Machine& machine : machines()) {
            Stream stream = stream_of(machine);
            Owned codes(DType::kF8E4M3, {5, n});
            Owned scales(DType::kF32, {5, groups});
            quantize(stream, x, scheme, ends, {codes.tensor, scales.tensor});
            expect_same_bits(codes, expected_codes, to_string(machine));
            expect_same_bits(scales, expected_scales, to_string(machine));
            EXPECT_TRUE(std::isnan(value_at(scales, 5 * groups - 1)));
          }
        }
      }
    }
  }
}

TEST(Quantize, ANanRowBecomesANanResult) {
  Random random(12);
  Stream stream({1, best_isa(), false});
  const Weights weights = random_weights(random, DType::kF8E4M3, 40, 64);
  Owned x = random.bf16({3, 64});
  x.tensor.as<uint16_t>()[64 + 7] = 0x7FC0;
  Owned codes(DType::kF8E4M3, {3, 64});
  Owned scales(DType::kF32, {3, 1});
  const std::vector<int64_t> ends = {64};
  quantize(stream, x, {ActivationScheme::Kind::kDynamicPerToken, 1200.0f, 1.0f}, ends, {codes.tensor, scales.tensor});
  Owned out(DType::kF32, {3, 40});
  const LinearOutput output = {&weights.linear, out};
  linear(stream, {codes.tensor, scales.tensor}, {&output, 1});
  for (int64_t i = 0; i < 3 * 40; ++i) EXPECT_EQ(std::isnan(value_at(out, i)), i / 40 == 1);
}

TEST(RmsNorm, MatchesTheReference) {
  Random random(13);
  for (const int64_t n : {1, 2, 15, 16, 17, 576, 1001, 4096}) {
    for (const float deviation : {1e-3f, 1.0f, 300.0f}) {
      const Owned x = random.bf16({7, n}, deviation);
      const Owned weight = random.f32({n});
      const Owned actual = same_everywhere("rms_norm", [&](Stream& stream) {
        Owned out(DType::kBF16, {7, n});
        rms_norm(stream, x, weight, 1e-5f, out);
        return out;
      });
      Owned expected(DType::kBF16, {7, n});
      reference::rms_norm(x, weight, 1e-5f, expected);
      // A few FP32 roundings, then one to BF16 that may fall on the other side of a tie.
      expect_near(actual, expected, 2 * kBf16Ulp, 1e-30, "rms_norm");
    }
  }
}

TEST(SiluMul, MatchesTheReferenceOverTheWholeRange) {
  Random random(14);
  for (const int64_t n : {1, 16, 31, 1536, 5000}) {
    Owned gate = random.f32({3, n}, 8.0f);
    const Owned up = random.f32({3, n});
    gate.tensor.as<float>()[0] = -200.0f;
    gate.tensor.as<float>()[n] = 200.0f;
    gate.tensor.as<float>()[2 * n] = -87.5f;
    const Owned actual = same_everywhere("silu_mul", [&](Stream& stream) {
      Owned out(DType::kBF16, {3, n});
      silu_mul(stream, gate, up, out);
      return out;
    });
    Owned expected(DType::kBF16, {3, n});
    reference::silu_mul(gate, up, expected);
    // exp is good to 2 ulp of FP32: invisible beside the rounding to BF16, except where it flushes (below e^-87).
    expect_near(actual, expected, 2 * kBf16Ulp, 1e-36, "silu_mul");
  }
}

TEST(Exp, IsWithinTwoUlpAndHasTheSameBitsEverywhere) {
  std::vector<float> xs;
  for (float x = -90.0f; x < 90.0f; x += 0.0007f) xs.push_back(x);
  xs.insert(xs.end(),
            {0.0f, -0.0f, kInf, -kInf, kNan, 1e-30f, -1e-30f, 88.72f, 88.73f, -87.33f, -87.34f, 1e30f, -1e30f});
  const cpu::FlushDenormals flush;
  double worst = 0;
  std::vector<float> first;
  for (const Isa isa : families()) {
    std::vector<float> ys(xs.size());
    cpu::kernels_for(isa).exp(xs.data(), static_cast<int64_t>(xs.size()), ys.data());
    if (first.empty()) first = ys;
    for (size_t i = 0; i < xs.size(); ++i) {
      const bool both_nan = std::isnan(ys[i]) && std::isnan(first[i]);
      ASSERT_TRUE(both_nan || std::bit_cast<uint32_t>(ys[i]) == std::bit_cast<uint32_t>(first[i]))
          << name_of(isa) << ": exp(" << xs[i] << ") = " << ys[i];
      const double exact = std::exp(static_cast<double>(xs[i]));
      if (std::isnan(xs[i])) {
        ASSERT_TRUE(std::isnan(ys[i]));
      } else if (exact > std::numeric_limits<float>::max()) {
        // The last half step below the largest number may round either way.
        ASSERT_GE(ys[i], 3.4e38f) << xs[i];
      } else if (exact < std::numeric_limits<float>::min()) {
        ASSERT_LE(ys[i], 1.2e-38f) << xs[i];
      } else {
        const double ulp = std::ldexp(1.0, std::ilogb(exact) - 23);
        worst = std::max(worst, std::abs(ys[i] - exact) / ulp);
      }
    }
  }
  EXPECT_LE(worst, 2.0);
}

TEST(JoinColumns, PutsThePartsOfRowsSideBySide) {
  Owned parts(DType::kF32, {6});
  std::iota(parts.tensor.as<float>(), parts.tensor.as<float>() + 6, 0.0f);
  const Owned out = same_everywhere("join_columns", [&](Stream& stream) {
    Owned joined(DType::kF32, {2, 3});
    const int64_t ends[] = {1, 3};
    join_columns(stream, parts, ends, joined);
    return joined;
  });
  const std::vector<float> expected = {0, 2, 3, 1, 4, 5};
  for (int64_t i = 0; i < 6; ++i) EXPECT_EQ(value_at(out, i), expected[static_cast<size_t>(i)]);
}

TEST(CopyRows, CopiesRows) {
  Random random(15);
  const Owned table = random.bf16({50, 33});
  const std::vector<int32_t> ids = {3, 3, 49, 0};
  const Owned out = same_everywhere("copy_rows", [&](Stream& stream) {
    Owned copied(DType::kBF16, {4, 33});
    copy_rows(stream, table, view_of(ids), copied);
    return copied;
  });
  for (size_t i = 0; i < ids.size(); ++i) {
    expect_same_bits(out.tensor.rows(i, i + 1), table.tensor.rows(ids[i], ids[i] + 1), "row");
  }
}

TEST(CopyBlocks, CopiesKeysAndValuesOneAfterTheOther) {
  Random random(17);
  for (const int64_t head_dim : {2, 64}) {
    const Owned keys = random.bf16({6, 3, head_dim / 2, kKvBlockTokens, 2});
    const Owned values = random.bf16({6, 3, kKvBlockTokens, head_dim});
    const std::vector<int32_t> from = {5, 0, 3}, to = {2, 3, 0};  // block 3 is written, then read
    const std::vector<int64_t> held = {0, 1, 5, 0, 4, 5};         // what each block holds afterwards
    for (const int threads : {1, 3}) {
      Stream stream({.threads = threads, .isa = Isa::kPortable, .spin = false});
      const Owned new_keys(keys), new_values(values);
      copy_blocks(stream, from, to, {.keys = new_keys, .values = new_values});
      for (int64_t block = 0; block < 6; ++block) {
        const int64_t source = held[block];
        expect_same_bits(new_keys.tensor.rows(block, block + 1), keys.tensor.rows(source, source + 1), "keys");
        expect_same_bits(new_values.tensor.rows(block, block + 1), values.tensor.rows(source, source + 1), "values");
      }
    }
  }
}

TEST(SoftmaxWeights, AreExponentialsOfScaledDifferences) {
  Random random(18);
  const Owned logits = random.f32({9001}, 8.0f);
  float* const x = logits.tensor.as<float>();
  x[4000] = -kInf;
  x[17] = -std::numeric_limits<float>::max();
  const float max = *std::max_element(x, x + 9001);
  for (const float scale : {1.0f, 0.125f, 3.0f, std::numeric_limits<float>::min()}) {
    const Owned actual = same_everywhere("softmax_weights", [&](Stream& stream) {
      Owned weights(DType::kF32, {9001});
      softmax_weights(stream, {x, 9001}, max, scale, {weights.tensor.as<float>(), 9001});
      return weights;
    });
    const float* const weights = actual.tensor.as<float>();
    for (int i = 0; i < 9001; ++i) {
      const double argument = (double{x[i]} - max) * scale;
      // The argument's own rounding counts as much as it is large.
      const double expected = std::exp(argument), relative = 3e-7 + 2e-7 * std::abs(argument);
      if (expected < 1e-37) {
        ASSERT_LE(weights[i], 1.2e-37) << i;
      } else {
        ASSERT_NEAR(weights[i], expected, relative * expected) << i;
      }
    }
    EXPECT_EQ(weights[4000], 0.0f);
    EXPECT_EQ(*std::max_element(weights, weights + 9001), 1.0f);
  }
}

TEST(SoftmaxParts, MatchesTheReference) {
  Random random(16);
  for (const int64_t n : {3, 16, 100, 4999}) {
    const Owned logits = random.f32({4, n}, 6.0f);
    const std::vector<int64_t> ends = {n / 3, n / 2 + 1, n};
    const Owned actual = same_everywhere("softmax_parts", [&](Stream& stream) {
      Owned parts(DType::kF32, {4, 3, 2});
      softmax_parts(stream, logits, ends, parts);
      return parts;
    });
    Owned expected(DType::kF32, {4, 3, 2});
    reference::softmax_parts(logits, ends, expected);
    // n terms, each of 2 ulp, added in FP32 in runs of n / 16.
    expect_near(actual, expected, (4 + static_cast<double>(n) / 16) * std::ldexp(1.0, -23), 0, "softmax_parts");
  }
}

// ---- Attention

TEST(Attention, MatchesTheReferenceAndNeverSeesUnwrittenPositions) {
  Random random(17);
  const struct {
    int64_t heads, kv_heads, head_dim;
    std::vector<int64_t> lengths, new_tokens;
  } cases[] = {{1, 1, 2, {1}, {1}},     {9, 3, 64, {300, 17, 256}, {1, 5, 1}},
               {8, 1, 128, {40}, {40}}, {4, 2, 80, {257, 3}, {9, 3}},
               {16, 1, 34, {530}, {2}}, {2, 2, 256, {20}, {13}},
               {3, 3, 64, {1100}, {1}}, {13, 1, 18, {100}, {3}}};
  for (const DType dtype : {DType::kBF16, DType::kF8E4M3}) {
    for (const auto& c : cases) {
      const CacheCase setup(random, c.heads, c.kv_heads, c.head_dim, c.lengths, c.new_tokens, dtype);
      const Owned actual = same_everywhere("attention", [&](Stream& stream) {
        Owned out(DType::kBF16, setup.q.tensor.shape());
        attention(stream, setup.q, setup.cache(), setup.batch(), out);
        return out;
      });
      for (int64_t i = 0; i < actual.tensor.elements(); ++i) ASSERT_FALSE(std::isnan(value_at(actual, i)));
      Owned expected(DType::kBF16, setup.q.tensor.shape());
      reference::attention(setup.q, setup.cache(), setup.batch(), expected);
      // Values are averages of normal numbers: FP32 scores of head_dim terms are off by some 1e-5, probabilities too;
      // then one rounding to BF16, perhaps across a tie.
      expect_near(actual, expected, 2 * kBf16Ulp, 2e-4, std::string("attention over ") + name_of(dtype));
    }
  }
}

TEST(Attention, ATokenNeverDependsOnItsChunkOrItsBatch) {
  Random random(18);
  const int64_t heads = 6, kv_heads = 2, head_dim = 64;
  const CacheCase setup(random, heads, kv_heads, head_dim, {700, 90}, {700, 90});
  for (const Machine& machine : machines()) {
    if (machine.isa == Isa::kPortable && machine.threads > 1) continue;  // slow, and compared elsewhere
    Stream stream = stream_of(machine);
    Owned whole(DType::kBF16, setup.q.tensor.shape());
    attention(stream, setup.q, setup.cache(), setup.batch(), whole);
    // Cut the first sequence's prompt in pieces of many sizes, each beside some of the second sequence or not.
    for (int64_t first = 0, size = 1; first < 700; first += size, size = size * 2 + 1) {
      const int64_t end = std::min<int64_t>(first + size, 700);
      std::vector<int64_t> tokens;
      for (int64_t t = first; t < end; ++t) tokens.push_back(t);
      for (int64_t t = 0; t < size % 7; ++t) tokens.push_back(700 + t * 11);
      Owned q(DType::kBF16, {static_cast<int64_t>(tokens.size()), heads, head_dim});
      Owned out(q);
      std::vector<int32_t> positions, sequence_of;
      for (size_t i = 0; i < tokens.size(); ++i) {
        std::memcpy(q.tensor.rows(i, i + 1).data(), setup.q.tensor.rows(tokens[i], tokens[i] + 1).data(),
                    heads * head_dim * 2);
        positions.push_back(setup.positions[tokens[i]]);
        sequence_of.push_back(setup.sequence_of[tokens[i]]);
      }
      std::vector<int32_t> ends = {static_cast<int32_t>(end - first)};
      if (ends.front() < static_cast<int32_t>(tokens.size())) ends.push_back(static_cast<int32_t>(tokens.size()));
      attention(stream, q, setup.cache(), setup.batch_of(positions, sequence_of, ends), out);
      for (size_t i = 0; i < tokens.size(); ++i) {
        expect_same_bits(out.tensor.rows(i, i + 1), whole.tensor.rows(tokens[i], tokens[i] + 1),
                         to_string(machine) + " token " + std::to_string(tokens[i]));
      }
    }
  }
}

class RopeAndCache : public testing::TestWithParam<DType> {};

TEST_P(RopeAndCache, MatchesTheReferenceAndWritesOnlyItsPositions) {
  Random random(19);
  for (const int64_t head_dim : {2, 34, 64, 128}) {
    const CacheCase setup(random, 4, 2, head_dim, {20, 37}, {3, 37}, GetParam());
    const int64_t tokens = static_cast<int64_t>(setup.positions.size());
    const Owned q = random.f32({tokens, 4, head_dim});
    const Owned k = random.f32({tokens, 2, head_dim});
    const Owned v = random.f32({tokens, 2, head_dim});
    Owned inv_freq(DType::kF32, {head_dim / 2});
    for (int64_t j = 0; j < head_dim / 2; ++j) {
      inv_freq.tensor.as<float>()[j] =
          static_cast<float>(std::pow(500000.0, -2.0 * static_cast<double>(j) / static_cast<double>(head_dim)));
    }
    std::vector<Owned> results;
    const auto run = [&](const auto& rotate) {
      Owned keys(setup.keys), values(setup.values), q_out(DType::kBF16, q.tensor.shape());
      rotate(CacheCase::layer_of(keys, values), q_out.tensor);
      std::vector<Owned> out;
      out.push_back(std::move(keys));
      out.push_back(std::move(values));
      out.push_back(std::move(q_out));
      return out;
    };
    Owned angles(DType::kF32, {tokens, head_dim / 2, 2});
    reference::rope_angles(setup.batch().positions, inv_freq, angles);
    const auto expected = run([&](const KvLayer& cache, const Tensor& q_out) {
      reference::rope_and_cache(q, k, v, angles, setup.batch(), q_out, cache);
    });
    std::vector<Owned> first;
    for (const Machine& machine : machines()) {
      Stream stream = stream_of(machine);
      Owned my_angles(DType::kF32, {tokens, head_dim / 2, 2});
      rope_angles(stream, setup.batch().positions, inv_freq, my_angles);
      expect_same_bits(my_angles, angles, "angles");
      auto actual = run([&](const KvLayer& cache, const Tensor& q_out) {
        rope_and_cache(stream, q, k, v, my_angles, setup.batch(), q_out, cache);
      });
      for (int i = 0; i < 3; ++i) {
        // Rotations are two FP32 products of numbers up to 5, then one rounding, and one more to codes, perhaps across
        // a tie: a step of e4m3, 2^-9 at least. Unwritten cache stays NaN on both sides.
        const bool codes = actual[i].tensor.dtype() == DType::kF8E4M3;
        expect_near(actual[i], expected[i], codes ? 0.125 : 2 * kBf16Ulp, codes ? 0.002 : 2e-6, to_string(machine));
        if (!first.empty()) expect_same_bits(actual[i], first[i], to_string(machine));
      }
      if (first.empty()) first = std::move(actual);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(BothCaches, RopeAndCache, testing::Values(DType::kBF16, DType::kF8E4M3),
                         [](const auto& parameter) { return std::string(name_of(parameter.param)); });

TEST(RopeAngles, ReducesFarAnglesFully) {
  Stream stream({1, best_isa(), false});
  Owned inv_freq(DType::kF32, {1});
  inv_freq.tensor.as<float>()[0] = 1.0f;
  Owned out(DType::kF32, {1, 1, 2});
  const std::vector<int32_t> positions = {131071};
  rope_angles(stream, view_of(positions), inv_freq, out);
  EXPECT_FLOAT_EQ(value_at(out, 0), static_cast<float>(std::cos(131071.0)));
  EXPECT_FLOAT_EQ(value_at(out, 1), static_cast<float>(std::sin(131071.0)));
}

// ---- The door

TEST(OpsDeathTest, NamesTheTensorAndBothShapes) {
  Random random(20);
  Stream stream({1, Isa::kPortable, false});
  const Weights weights = random_weights(random, DType::kBF16, 40, 64);
  const Owned x = random.bf16({3, 62});
  Owned out(DType::kF32, {3, 40});
  const LinearOutput output = {&weights.linear, out};
  EXPECT_DEATH(linear(stream, {x.tensor, {}}, {&output, 1}), "x is BF16 \\[3, 62\\], expected BF16 \\[3, 64\\]");
}

TEST(Buffers, AreZeroedAlignedAndMovable) {
  for (const int64_t bytes : {1, 64, 5000, 3 << 20}) {
    Buffer buffer(bytes);
    const char* const data = static_cast<const char*>(buffer.data());
    EXPECT_EQ(reinterpret_cast<uintptr_t>(data) % 64, 0u);
    EXPECT_TRUE(std::all_of(data, data + bytes, [](char c) { return c == 0; }));
    Buffer moved = std::move(buffer);
    EXPECT_EQ(moved.data(), data);
    EXPECT_EQ(buffer.data(), nullptr);
    EXPECT_EQ(moved.bytes(), bytes);
  }
  EXPECT_THROW(Buffer(int64_t{1} << 60), std::bad_alloc);
}

}  // namespace
}  // namespace octet
