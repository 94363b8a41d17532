// The sampler against transformers' logits processors on real logits: of every parameter, and of several together, the
// same tokens survive with the same probabilities. What the goldens mean: golden/README.md.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "worker/sampler.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr int kResidues = 32;
// Both sides compute weights in float32: an argument of up to 60 is off by 4e-6, hence its exponential by as much.
constexpr double kRelative = 2e-5;

SlotSampling sampling_of(const json& parameters) {
  SlotSampling sampling{.repetition_penalty = parameters.value("repetition_penalty", 1.0f),
                        .presence_penalty = parameters.value("presence_penalty", 0.0f),
                        .frequency_penalty = parameters.value("frequency_penalty", 0.0f),
                        .allowed_token_ids = parameters.value("allowed_token_ids", std::vector<int32_t>()),
                        .bad_words = parameters.value("bad_words", std::vector<std::vector<int32_t>>()),
                        .min_tokens = parameters.value("min_tokens", 0),
                        .end_token_ids = parameters.value("end_token_ids", std::vector<int32_t>()),
                        .temperature = parameters.value("temperature", 0.0f),
                        .top_k = parameters.value("top_k", 0),
                        .top_p = parameters.value("top_p", 1.0f),
                        .min_p = parameters.value("min_p", 0.0f)};
  for (const json& bias : parameters.value("logit_bias", json::array())) {
    sampling.logit_bias.push_back({.token = bias[0], .bias = bias[1]});
  }
  return sampling;
}

class SamplingGolden : public testing::Test {
 protected:
  SamplingGolden() {
    const std::string folder = std::string(OCTET_GOLDEN_DIR) + "/sampling/";
    golden_ = json::parse(std::ifstream(folder + "cases.json"));
    vocab_size_ = golden_["vocab_size"];
    logits_.resize(vocab_size_ * golden_["rows"].size());
    std::ifstream file(folder + "logits.f32", std::ios::binary);
    file.read(reinterpret_cast<char*>(logits_.data()), static_cast<std::streamsize>(logits_.size() * sizeof(float)));
    EXPECT_TRUE(file) << folder;
  }

  void expect_what_transformers_leaves(const json& expected) {
    const json& context = golden_["rows"][expected["row"].get<size_t>()];
    const std::vector<int32_t> prompt = context["prompt"], completion = context["completion"];
    TokenHistory history;
    for (const int32_t token : prompt) history.append(token, false);
    for (const int32_t token : completion) history.append(token, true);
    LogitsRow row{.logits = std::span(logits_).subspan(expected["row"].get<size_t>() * vocab_size_, vocab_size_)};
    const SlotSampling sampling = sampling_of(expected);
    const Choice choice{.row = row,
                        .sampling = sampling,
                        .position = static_cast<int32_t>(prompt.size() + completion.size()),
                        .completion_tokens = static_cast<int32_t>(completion.size()),
                        .history = &history};
    if (expected.contains("greedy")) {
      SampledToken token;
      sampler_.sample(choice, &token);
      EXPECT_EQ(token.chosen.token, expected["greedy"].get<int32_t>());
      return;
    }
    expect_distribution(sampler_.distribution(choice), expected);
  }

  // Every surviving token counts: by its residue in number and in probability, the likeliest also one by one.
  void expect_distribution(const Distribution& got, const json& expected) {
    std::vector<double> probabilities(vocab_size_, 0.0);
    const double total = std::accumulate(got.weights.begin(), got.weights.end(), 0.0);
    std::vector<int> survivors(kResidues, 0);
    std::vector<double> masses(kResidues, 0.0);
    for (size_t i = 0; i < got.weights.size(); ++i) {
      const size_t id = got.ids.empty() ? i : static_cast<size_t>(got.ids[i]);
      probabilities[id] = double{got.weights[i]} / total;
      survivors[id % kResidues] += got.weights[i] > 0.0f;
      masses[id % kResidues] += probabilities[id];
    }
    EXPECT_EQ(survivors, expected["survivors"].get<std::vector<int>>());
    for (int i = 0; i < kResidues; ++i) {
      const double mass = expected["masses"][i];
      EXPECT_NEAR(masses[i], mass, kRelative * mass) << "ids " << i << " modulo " << kResidues;
    }
    for (const json& entry : expected["probabilities"]) {
      const double probability = entry[1];
      EXPECT_NEAR(probabilities[entry[0].get<size_t>()], probability, kRelative * probability) << "token " << entry[0];
    }
  }

  json golden_;
  size_t vocab_size_ = 0;
  std::vector<float> logits_;
  Stream stream_{{.threads = 1, .isa = best_isa(), .spin = false}};
  Sampler sampler_{stream_};
};

TEST_F(SamplingGolden, LeavesWhatTransformersLeaves) {
  ASSERT_GT(golden_["cases"].size(), 100u);
  for (const json& expected : golden_["cases"]) {
    SCOPED_TRACE(expected["name"].get<std::string>());
    expect_what_transformers_leaves(expected);
  }
}

// Each parameter decides something: dropped from a case that has it, the outcome is another one.
TEST_F(SamplingGolden, IsNotBlindToAnyParameter) {
  std::vector<std::string> blind;
  for (const char* parameter : {"repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
                                "allowed_token_ids", "bad_words", "min_tokens", "top_k", "top_p", "min_p"}) {
    bool seen = false;
    for (const json& expected : golden_["cases"]) {
      if (!expected.contains(parameter) || expected.contains("greedy")) continue;
      json without = expected;
      without.erase(parameter);
      const SlotSampling sampling = sampling_of(without);
      const json& context = golden_["rows"][expected["row"].get<size_t>()];
      TokenHistory history;
      for (const int32_t token : context["prompt"]) history.append(token, false);
      for (const int32_t token : context["completion"]) history.append(token, true);
      const LogitsRow row{.logits =
                              std::span(logits_).subspan(expected["row"].get<size_t>() * vocab_size_, vocab_size_)};
      const Distribution got =
          sampler_.distribution({.row = row,
                                 .sampling = sampling,
                                 .completion_tokens = static_cast<int32_t>(context["completion"].size()),
                                 .history = &history});
      const double total = std::accumulate(got.weights.begin(), got.weights.end(), 0.0);
      double best = 0;
      for (const float weight : got.weights) best = std::max(best, double{weight});
      seen |= std::abs(best / total / expected["probabilities"][0][1].get<double>() - 1) > 100 * kRelative;
    }
    if (!seen) blind.push_back(parameter);
  }
  EXPECT_TRUE(blind.empty()) << json(blind).dump();
}

}  // namespace
}  // namespace octet
