// From logits to tokens: filters against slow definitions, seeded draws against their distribution.
#include "worker/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <new>
#include <numeric>
#include <random>

#include "kernels/cpu/thread_pool.h"

namespace {
std::atomic<int64_t> allocated_bytes{0};  // in all, whatever was freed since
}

// All forms that the library uses, for sanitizers look whether they match. Not inlined: the compiler would see free()
// meet what new made.
[[gnu::noinline]] void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  allocated_bytes += static_cast<int64_t>(bytes);
  return std::malloc(bytes);
}
[[gnu::noinline]] void* operator new(size_t bytes) {
  void* memory = operator new(bytes, std::nothrow);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace octet {
namespace {

struct Row {
  explicit Row(std::vector<float> values) : logits(std::move(values)) {
    double sum = 0;
    for (float value : logits) sum += std::exp(double{value});
    row = {.logits = logits, .log_sum_exp = static_cast<float>(std::log(sum))};
  }
  std::vector<float> logits;
  LogitsRow row;
};

Row random_row(int n, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits(n);
  for (float& value : logits) value = normal(random);
  return Row(std::move(logits));
}

Stream& stream() {
  static Stream stream({.threads = 1, .isa = best_isa(), .spin = false});
  return stream;
}

SampledToken sample(const Choice& choice) {
  SampledToken token;
  Sampler(stream()).sample(choice, &token);
  return token;
}

SampledToken sample(const Row& row, const SlotSampling& sampling, int32_t position = 7) {
  return sample({.row = row.row, .sampling = sampling, .position = position});
}

// Every token's probability.
std::vector<double> probabilities(const Choice& choice, Sampler& sampler) {
  const Distribution from = sampler.distribution(choice);
  std::vector<double> all(choice.row.logits.size(), 0.0);
  const double total = std::accumulate(from.weights.begin(), from.weights.end(), 0.0);
  for (size_t i = 0; i < from.weights.size(); ++i) all[from.ids.empty() ? i : from.ids[i]] = from.weights[i] / total;
  return all;
}

std::vector<double> probabilities(const Choice& choice) {
  Sampler sampler(stream());
  return probabilities(choice, sampler);
}

std::vector<int32_t> survivors(const Choice& choice) {
  std::vector<int32_t> ids;
  const std::vector<double> all = probabilities(choice);
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i] > 0.0) ids.push_back(static_cast<int32_t>(i));
  }
  return ids;
}

TokenHistory history_of(const std::vector<int32_t>& prompt, const std::vector<int32_t>& completion) {
  TokenHistory history;
  for (const int32_t token : prompt) history.append(token, false);
  for (const int32_t token : completion) history.append(token, true);
  return history;
}

// The kept distribution by the definition: temperature, top_k, top_p, min_p over a full sort.
std::vector<double> expected_distribution(const Row& row, const SlotSampling& s) {
  const int n = static_cast<int>(row.logits.size());
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row.logits[a] > row.logits[b]; });
  if (s.top_k > 0 && s.top_k < n) order.resize(s.top_k);
  std::vector<double> p;
  for (int id : order) p.push_back(std::exp((double{row.logits[id]} - row.logits[order[0]]) / s.temperature));
  const double total = std::accumulate(p.begin(), p.end(), 0.0);
  size_t kept = 0;
  for (double sum = 0; kept < p.size() && (kept == 0 || sum < s.top_p * total); ++kept) sum += p[kept];
  while (kept > 1 && p[kept - 1] < s.min_p) --kept;
  std::vector<double> distribution(n, 0.0);
  const double kept_total = std::accumulate(p.begin(), p.begin() + kept, 0.0);
  for (size_t i = 0; i < kept; ++i) distribution[order[i]] = p[i] / kept_total;
  return distribution;
}

TEST(Sampler, RandomNumbersAreThePublishedPhiloxOnes) {
  // Random123's known answer for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
  EXPECT_EQ(uniform_at(0, 0, 0), static_cast<double>(0x6627e8d5e169c58dULL >> 11) * 0x1.0p-53);
}

TEST(Sampler, GreedyTakesTheSmallestIdAmongTheBest) { EXPECT_EQ(sample(Row({0, 3, 1, 3}), {}).chosen.token, 1); }

TEST(Sampler, DenormalsAreZeroOnWhateverThread) {
  const Row row({-1.0f, 0.0f, 1e-40f});
  EXPECT_EQ(sample(row, {}).chosen.token, 1);
  const cpu::FlushDenormals flush;  // as on the threads of a pool
  EXPECT_EQ(sample(row, {}).chosen.token, 1);
}

TEST(Sampler, ReportsLogprobsOfTheRawDistribution) {
  const Row row = random_row(300, 1);
  const SampledToken token = sample(row, {.temperature = 0.5f, .top_k = 3, .seed = 9, .top_logprobs = 5});
  EXPECT_FLOAT_EQ(token.chosen.logprob, row.logits[token.chosen.token] - row.row.log_sum_exp);
  ASSERT_EQ(token.top.size(), 5u);
  for (int i = 1; i < 5; ++i) EXPECT_GE(token.top[i - 1].logprob, token.top[i].logprob);
  EXPECT_EQ(token.top[0].token, sample(row, {}).chosen.token);
}

TEST(Sampler, TheSameKeyGivesTheSameTokenAndOtherKeysOthers) {
  const Row row = random_row(1000, 2);
  const SlotSampling sampling{.temperature = 2.0f, .seed = 5};
  EXPECT_EQ(sample(row, sampling).chosen, sample(row, sampling).chosen);
  int differ = 0;
  for (int position = 0; position < 20; ++position) {
    SlotSampling other_output = sampling;
    other_output.output_index = 1;
    differ += sample(row, sampling, position).chosen.token != sample(row, other_output, position).chosen.token;
  }
  EXPECT_GT(differ, 15);
}

TEST(Sampler, ReportsATokenThatIsKnownAsItWouldReportASampledOne) {
  const Row row = random_row(5000, 8);
  const SampledToken sampled = sample(row, {.temperature = 1.0f, .seed = 4, .top_logprobs = 20});
  SampledToken scored;
  Sampler(stream()).score(row.row, sampled.chosen.token, 20, &scored);
  EXPECT_EQ(scored, sampled);
}

TEST(Sampler, AlternativesAreTheBestOfAllTiesToTheSmallerId) {
  std::vector<float> logits(3000, 0.0f);
  for (size_t i = 0; i < logits.size(); ++i) logits[i] = static_cast<float>(i % 7);
  const Row row(logits);
  const SampledToken token = sample(row, {.top_logprobs = 20});
  ASSERT_EQ(token.top.size(), 20u);
  for (int32_t i = 0; i < 20; ++i) EXPECT_EQ(token.top[i].token, 6 + 7 * i);
  EXPECT_EQ(sample(Row({1, 2, 3}), {.top_logprobs = 20}).top.size(), 3u) << "no more than there are";
}

// Only this program's own allocations are counted.
TEST(Sampler, AllocatesNothingOnceItHasReserved) {
  constexpr int kVocabSize = 3000;
  Sampler sampler(stream());
  const int64_t before = allocated_bytes;
  sampler.reserve(kVocabSize);
  EXPECT_EQ(allocated_bytes - before, Sampler::bytes(kVocabSize));
  std::mt19937_64 random(5);
  for (int round = 0; round < 100; ++round) {
    Row row = random_row(kVocabSize, random());
    if (round % 3 == 0) std::fill(row.logits.begin(), row.logits.end(), 1.0f);  // all are ties
    SlotSampling sampling{.temperature = 1.0f, .min_p = round % 2 == 0 ? 0.0f : 1e-6f};
    sampling.top_k = round % 5 == 0 ? 0 : 40 * round;
    sampling.top_p = round % 4 == 0 ? 1.0f : 0.9999f;
    sampling.logit_bias = {{.token = 7, .bias = 1.0f}};
    const Choice choice{.row = row.row, .sampling = sampling};
    const int64_t reserved = allocated_bytes;
    sampler.distribution(choice);
    EXPECT_EQ(allocated_bytes, reserved) << round;
  }
}

// ---- Filters against their definition over a full sort, on many rows, with ties

TEST(Sampler, FiltersKeepWhatTheirDefinitionKeeps) {
  std::mt19937_64 random(21);
  Sampler used_again(stream());
  for (int round = 0; round < 400; ++round) {
    const int n = 1 + static_cast<int>(random() % 3000);
    Row row = random_row(n, random());
    if (round % 3 == 0) {
      for (float& logit : row.logits) logit = std::round(logit);  // ties
    }
    SlotSampling sampling{.temperature = 0.2f + static_cast<float>(random() % 40) / 10.0f};
    if (random() % 2 == 0) sampling.top_k = 1 + static_cast<int32_t>(random() % 200);
    if (random() % 2 == 0) sampling.top_p = static_cast<float>(1 + random() % 1000) / 1000.0f;
    if (random() % 3 == 0) sampling.min_p = static_cast<float>(random() % 300) / 1000.0f;
    const std::vector<double> expected = expected_distribution(row, sampling);
    const std::vector<double> got = probabilities({.row = row.row, .sampling = sampling}, used_again);
    // A token at the edge of top_p or min_p may fall on either side of a rounding; it would be one token.
    int differing = 0;
    double largest = 0;
    for (int i = 0; i < n; ++i) {
      differing += (expected[i] > 0) != (got[i] > 0);
      if (expected[i] > 0 && got[i] > 0) largest = std::max(largest, std::abs(got[i] / expected[i] - 1));
    }
    EXPECT_LE(differing, round % 3 == 0 ? 0 : 1) << "round " << round;
    if (differing == 0) {
      EXPECT_LT(largest, 2e-5) << "round " << round;
    }
  }
}

TEST(Sampler, FiltersKeepTheSmallerIdsAmongEquals) {
  const Row row(std::vector<float>(1000, 0.5f));
  const std::vector<int32_t> first_ten = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  const SlotSampling top_k{.temperature = 1.0f, .top_k = 10}, top_p{.temperature = 1.0f, .top_p = 0.0095f};
  EXPECT_EQ(survivors({.row = row.row, .sampling = top_k}), first_ten);
  EXPECT_EQ(survivors({.row = row.row, .sampling = top_p}), first_ten);
}

TEST(Sampler, FiltersAlwaysLeaveTheBest) {
  const Row row = random_row(2000, 12);
  const std::vector<int32_t> best = {sample(row, {}).chosen.token};
  for (const SlotSampling& sampling : {SlotSampling{.temperature = 1.0f, .top_k = 1},
                                       {.temperature = 1.0f, .top_p = 1e-30f},
                                       {.temperature = 1.0f, .min_p = 1.0f},
                                       {.temperature = 1e-40f}}) {
    EXPECT_EQ(survivors({.row = row.row, .sampling = sampling}), best);
  }
}

// ---- Penalties, bias, masks

TEST(Sampler, RepetitionPenaltyWeakensPromptAndCompletionAndTheOthersTheCompletionOnly) {
  const Row row({2.0f, -2.0f, 1.0f, 0.5f});
  const TokenHistory history = history_of({0, 1}, {2, 2, 2});
  auto logits_after = [&](const SlotSampling& sampling) {
    std::vector<double> logits = probabilities({.row = row.row, .sampling = sampling, .history = &history});
    for (double& value : logits) value = std::log(value);
    for (double& value : logits) value -= logits[3] - 0.5;
    return logits;
  };
  const auto repetition = logits_after({.repetition_penalty = 2.0f, .temperature = 1.0f});
  EXPECT_NEAR(repetition[0], 1.0, 1e-5);
  EXPECT_NEAR(repetition[1], -4.0, 1e-5);
  EXPECT_NEAR(repetition[2], 0.5, 1e-5);
  const auto presence = logits_after({.presence_penalty = 0.5f, .temperature = 1.0f});
  EXPECT_NEAR(presence[0], 2.0, 1e-5);
  EXPECT_NEAR(presence[2], 0.5, 1e-5);
  const auto frequency = logits_after({.frequency_penalty = 0.5f, .temperature = 1.0f});
  EXPECT_NEAR(frequency[1], -2.0, 1e-5);
  EXPECT_NEAR(frequency[2], -0.5, 1e-5);
}

TEST(Sampler, GreedySeesPenaltiesBiasAndMasksAndReportsRawLogprobs) {
  const Row row({3.0f, 2.5f, 2.0f, 1.0f});
  const TokenHistory history = history_of({}, {0});
  const SlotSampling penalty{.presence_penalty = 1.0f};
  const SampledToken penalised = sample({.row = row.row, .sampling = penalty, .history = &history});
  EXPECT_EQ(penalised.chosen.token, 1);
  EXPECT_EQ(penalised.chosen.logprob, 2.5f - row.row.log_sum_exp);
  EXPECT_EQ(sample(row, {.logit_bias = {{.token = 3, .bias = 5.0f}}}).chosen.token, 3);
  EXPECT_EQ(sample(row, {.allowed_token_ids = {2, 3}}).chosen.token, 2);
  const std::vector<uint32_t> words = {0b1000};
  const SlotSampling greedy;
  EXPECT_EQ(sample({.row = row.row, .sampling = greedy, .mask = words}).chosen.token, 3);
}

TEST(Sampler, BadWordsAreNotCompletedAcrossPromptAndCompletion) {
  const Row row({1, 2, 3, 4, 5});
  const SlotSampling sampling{.bad_words = {{1, 2, 4}, {3}}};
  const TokenHistory matches = history_of({0, 1}, {2}), other = history_of({1, 0}, {2}), shorter = history_of({2}, {});
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &matches}).chosen.token, 2);
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &other}).chosen.token, 4);
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &shorter}).chosen.token, 4);
}

TEST(Sampler, EndTokensWaitForMinTokens) {
  const Row row({1, 2, 3});
  const SlotSampling sampling{.min_tokens = 2, .end_token_ids = {2}};
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .completion_tokens = 1}).chosen.token, 1);
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .completion_tokens = 2}).chosen.token, 2);
}

TEST(Sampler, BadWordsThenMinTokensGiveWayWhereNothingIsLeft) {
  const Row row({1, 2, 3, 4});
  const TokenHistory history = history_of({0}, {});
  SlotSampling sampling{.allowed_token_ids = {1, 2}, .bad_words = {{1}}, .min_tokens = 5, .end_token_ids = {2}};
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &history}).chosen.token, 1) << "min_tokens holds";
  sampling.end_token_ids = {1, 2};
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &history}).chosen.token, 2) << "allowed holds";
  const std::vector<uint32_t> words = {0b0010};
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &history, .mask = words}).chosen.token, 1);
  const std::vector<uint32_t> disjoint = {0b1001};
  EXPECT_EQ(sample({.row = row.row, .sampling = sampling, .history = &history, .mask = disjoint}).chosen.token, 3)
      << "the step's mask has the last word";
}

TEST(Sampler, MasksIgnoreBitsBeyondTheVocabulary) {
  const Row row = random_row(70, 6);
  const SlotSampling sampling{.temperature = 1.0f};
  const std::vector<uint32_t> words = {0, 1u << 5, 0xffffffc1u};
  EXPECT_EQ(survivors({.row = row.row, .sampling = sampling, .mask = words}), (std::vector<int32_t>{37, 64}));
}

TEST(Sampler, OverflowAndNanNeverMakeTheChoiceUndefined) {
  constexpr float kMax = std::numeric_limits<float>::max(), kInf = std::numeric_limits<float>::infinity();
  const Row row({1.0f, 3.0e38f, -3.0e38f, 2.0f});
  const LogitsRow finite{.logits = row.logits, .log_sum_exp = 3.0e38f};
  const TokenHistory history = history_of({0, 1, 2, 3}, {0, 1, 2, 3});
  for (const float bias : {kMax, -kMax, kInf, -kInf, std::nanf("")}) {
    for (const float penalty : {0.0f, 1e-38f, 1.0f, kMax, kInf, std::nanf("")}) {
      for (const float temperature : {0.0f, 1e-45f, 1.0f, kMax}) {
        const SlotSampling sampling{.repetition_penalty = penalty,
                                    .presence_penalty = bias,
                                    .frequency_penalty = penalty,
                                    .logit_bias = {{1, bias}, {2, bias}, {3, -bias}},
                                    .temperature = temperature,
                                    .top_p = 0.9f,
                                    .min_p = 0.1f};
        const Choice choice{.row = finite, .sampling = sampling, .history = &history};
        double total = 0;
        for (const double p : probabilities(choice)) total += p;
        EXPECT_NEAR(total, 1.0, 1e-6) << bias << " " << penalty << " " << temperature;
        EXPECT_GT(probabilities(choice)[sample(choice).chosen.token], 0.0);
      }
    }
  }
}

// ---- Draws

// Chi-square of 100,000 draws over positions, seeds and outputs against `expected`, in standard deviations from its
// mean; tokens expected fewer than five times are pooled.
double chi_square_deviation(const Row& row, SlotSampling sampling, const std::vector<double>& expected) {
  constexpr int kDraws = 100'000;
  std::vector<int> counts(row.logits.size(), 0);
  Sampler sampler(stream());
  SampledToken token;
  for (int i = 0; i < kDraws; ++i) {
    if (i % 1000 == 0) ++sampling.seed;
    sampling.output_index = static_cast<uint32_t>(i % 4);
    sampler.sample({.row = row.row, .sampling = sampling, .position = i / 4}, &token);
    ++counts[token.chosen.token];
  }
  double chi2 = 0, pooled_expected = 0, pooled = 0;
  int cells = 0;
  for (size_t id = 0; id < counts.size(); ++id) {
    if (expected[id] == 0.0 && counts[id] > 0) return std::numeric_limits<double>::infinity();
    const double e = expected[id] * kDraws;
    if (e < 5) {
      pooled_expected += e;
      pooled += counts[id];
      continue;
    }
    chi2 += (counts[id] - e) * (counts[id] - e) / e;
    ++cells;
  }
  if (pooled_expected > 0) {
    chi2 += (pooled - pooled_expected) * (pooled - pooled_expected) / pooled_expected;
    ++cells;
  }
  return (chi2 - (cells - 1)) / std::sqrt(2.0 * std::max(cells - 1, 1));
}

class SamplerDistribution : public testing::TestWithParam<SlotSampling> {};

// Draws are seeded, so a test that passes once passes always: five standard deviations are beyond chance.
TEST_P(SamplerDistribution, FollowsTheDefinition) {
  const Row row = random_row(200, 3);
  EXPECT_LT(chi_square_deviation(row, GetParam(), expected_distribution(row, GetParam())), 5.0);
}

INSTANTIATE_TEST_SUITE_P(
    Parameters, SamplerDistribution,
    testing::Values(SlotSampling{.temperature = 1.0f, .seed = 1},
                    SlotSampling{.temperature = 0.7f, .top_k = 20, .seed = 2},
                    SlotSampling{.temperature = 1.0f, .top_p = 0.9f, .seed = 3},
                    SlotSampling{.temperature = 5.0f, .top_p = 0.95f, .seed = 4},
                    SlotSampling{.temperature = 1.0f, .min_p = 0.05f, .seed = 5},
                    SlotSampling{.temperature = 1.3f, .top_k = 100, .top_p = 0.8f, .min_p = 0.02f, .seed = 6},
                    SlotSampling{.temperature = 1.0f, .top_k = 100000, .seed = 7}));

TEST(SamplerDistribution, AWrongDistributionIsCaught) {
  const Row row = random_row(200, 3);
  const SlotSampling sampling{.temperature = 1.0f, .seed = 1};
  SlotSampling warmer = sampling, narrower = sampling;
  warmer.temperature = 1.05f;
  narrower.top_p = 0.99f;
  EXPECT_GT(chi_square_deviation(row, sampling, expected_distribution(row, warmer)), 5.0);
  EXPECT_GT(chi_square_deviation(row, sampling, expected_distribution(row, narrower)), 5.0);
}

TEST(Sampler, DrawsAreTheSameInEveryInstructionFamily) {
  Stream plain({.threads = 1, .isa = Isa::kPortable});
  Sampler portable(plain);
  std::mt19937_64 random(31);
  for (int i = 0; i < 200; ++i) {
    const Row row = random_row(1 + static_cast<int>(random() % 4000), random());
    const SlotSampling sampling{.temperature = 1.2f, .top_p = i % 2 == 0 ? 0.9f : 1.0f, .seed = random()};
    const Choice choice{.row = row.row, .sampling = sampling, .position = i};
    SampledToken expected;
    portable.sample(choice, &expected);
    for (const Isa isa : {Isa::kAvx2, Isa::kAvx512}) {
      if (!runs_here(isa)) continue;
      Stream fast({.threads = 1, .isa = isa});
      Sampler sampler(fast);
      SampledToken token;
      sampler.sample(choice, &token);
      EXPECT_EQ(token, expected);
      const Distribution left = sampler.distribution(choice), right = portable.distribution(choice);
      EXPECT_TRUE(std::equal(left.weights.begin(), left.weights.end(), right.weights.begin(), right.weights.end()));
    }
  }
}

}  // namespace
}  // namespace octet
