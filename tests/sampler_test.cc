// From logits to tokens: filters against slow definitions, seeded draws against their distribution.
#include "worker/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

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

SampledToken sample(const Row& row, const SlotSampling& sampling, int32_t position = 7) {
  SampledToken token;
  Sampler().sample(row.row, sampling, position, &token);
  return token;
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

class SamplerDistribution : public testing::TestWithParam<SlotSampling> {};

TEST_P(SamplerDistribution, FollowsTheDefinition) {
  const Row row = random_row(600, 3);
  const std::vector<double> expected = expected_distribution(row, GetParam());
  constexpr int kDraws = 20000;
  std::vector<int> counts(row.logits.size(), 0);
  for (int i = 0; i < kDraws; ++i) ++counts[sample(row, GetParam(), i).chosen.token];
  // Chi-square over tokens expected at least five times, the others pooled.
  double chi2 = 0, pooled_expected = 0, pooled = 0;
  int cells = 0;
  for (size_t id = 0; id < counts.size(); ++id) {
    if (expected[id] == 0.0) {
      EXPECT_EQ(counts[id], 0) << "token " << id << " was filtered out";
      continue;
    }
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
  // Mean cells - 1, standard deviation sqrt(2 (cells - 1)): five of them are beyond chance, and draws are seeded.
  EXPECT_LT(chi2, cells - 1 + 5 * std::sqrt(2.0 * std::max(cells - 1, 1)));
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

}  // namespace
}  // namespace octet
