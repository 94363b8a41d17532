// The plan on the wire: everything a plan can say survives the trip, and nothing hostile survives decode.
#include "worker/step_wire.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <string>

#include "octet/internal/v1/worker.pb.h"

namespace octet {
namespace {

namespace wire_v1 = internal::v1;

class PlanMaker {
 public:
  explicit PlanMaker(uint64_t seed) : random_(seed) {}

  StepPlan plan() {
    StepPlan plan;
    plan.step = random_();
    plan.stop = coin();
    plan.close = indices(4);
    plan.open.resize(below(4));
    for (SlotOpen& open : plan.open) {
      open = {.slot = index(), .sampling = sampling(), .prompt_tokens = index(), .position = index()};
      if (!open.sampling.reads_history()) continue;
      open.history = indices(300);
      open.position = static_cast<int32_t>(open.history.size());
    }
    plan.blocks.resize(below(4));
    for (SlotBlock& more : plan.blocks) more = {.slot = index(), .block = index()};
    plan.copies.resize(below(4));
    for (BlockCopy& copy : plan.copies) {
      copy = {.from = index(), .to = index()};
      if (copy.to == copy.from) copy.to ^= 1;
    }
    plan.masks.resize(below(3));
    for (SlotMask& mask : plan.masks) {
      mask = {.slot = index(), .words = std::vector<uint32_t>(1 + below(40))};
      for (uint32_t& word : mask.words) word = coin() ? 0 : static_cast<uint32_t>(random_());
      mask.words.back() |= 1;
    }
    plan.run.resize(below(4));
    for (SlotTokens& run : plan.run) {
      run = {.slot = index(),
             .position = below(1 << 20),
             .tokens = indices(300),
             .from_last_sample = false,
             .sample = coin(),
             .score = coin(),
             .score_top = below(21),
             .next_token = coin() ? -1 : index()};
      run.from_last_sample = run.tokens.empty();
    }
    return plan;
  }

  StepResult result() {
    StepResult result;
    result.step = random_();
    result.sampled = tokens();
    result.scored = tokens();
    return result;
  }

  int32_t below(int32_t bound) { return static_cast<int32_t>(random_() % static_cast<uint64_t>(bound)); }

 private:
  bool coin() { return (random_() & 1) != 0; }
  int32_t index() { return coin() ? below(200'000) : below(std::numeric_limits<int32_t>::max()); }
  float real() { return static_cast<float>(random_()) / 1e19f; }
  std::vector<int32_t> indices(int32_t bound) {
    std::vector<int32_t> indices(below(bound));
    for (int32_t& i : indices) i = index();
    return indices;
  }
  std::vector<SampledToken> tokens() {
    std::vector<SampledToken> tokens(1 + below(4));
    for (SampledToken& token : tokens) {
      token = {.slot = index(), .chosen = {index(), -real()}, .top = {}};
      token.top.resize(below(4));
      for (TokenLogprob& other : token.top) other = {index(), -real()};
    }
    return tokens;
  }
  std::vector<std::vector<int32_t>> words() {
    std::vector<std::vector<int32_t>> words(below(3));
    for (std::vector<int32_t>& word : words) {
      word = indices(4);
      word.push_back(index());
    }
    return words;
  }
  std::vector<TokenBias> biases() {
    std::vector<TokenBias> biases(below(4));
    for (TokenBias& bias : biases) bias = {.token = index(), .bias = real() - real()};
    return biases;
  }
  SlotSampling sampling() {
    return {.repetition_penalty = coin() ? 1.0f : 1e-3f + real(),
            .presence_penalty = coin() ? 0.0f : real() - real(),
            .frequency_penalty = coin() ? 0.0f : real() - real(),
            .logit_bias = biases(),
            .allowed_token_ids = indices(4),
            .bad_words = words(),
            .min_tokens = index(),
            .end_token_ids = indices(4),
            .temperature = real(),
            .top_k = index(),
            .top_p = 1.0f - real() / 4,
            .min_p = real() / 4,
            .seed = random_(),
            .output_index = static_cast<uint32_t>(random_()),
            .top_logprobs = below(21)};
  }

  std::mt19937_64 random_;
};

TEST(StepWire, CarriesEveryPlanUnchanged) {
  PlanMaker maker(1);
  wire_v1::Plan wire;  // used again, as the worker group may
  for (int i = 0; i < 2000; ++i) {
    const StepPlan plan = maker.plan();
    encode(plan, &wire);
    wire_v1::Plan received;
    ASSERT_TRUE(received.ParseFromString(wire.SerializeAsString()));
    absl::StatusOr<StepPlan> decoded = decode(received);
    ASSERT_TRUE(decoded.ok()) << decoded.status();
    ASSERT_EQ(*decoded, plan);
  }
}

// Whatever bytes arrive, decode answers with a plan that keeps its own rules or with a sentence.
TEST(StepWire, SurvivesMutatedBytes) {
  PlanMaker maker(2);
  int accepted = 0, refused = 0, unparsable = 0;
  for (int i = 0; i < 20'000; ++i) {
    wire_v1::Plan wire;
    encode(maker.plan(), &wire);
    std::string bytes = wire.SerializeAsString();
    for (int flips = 1 + maker.below(3); flips > 0 && !bytes.empty(); --flips) {
      bytes[maker.below(static_cast<int32_t>(bytes.size()))] = static_cast<char>(maker.below(256));
    }
    wire_v1::Plan received;
    if (!received.ParseFromString(bytes)) {
      ++unparsable;
      continue;
    }
    absl::StatusOr<StepPlan> decoded = decode(received);
    if (!decoded.ok()) {
      EXPECT_EQ(decoded.status().code(), absl::StatusCode::kInvalidArgument);
      ++refused;
      continue;
    }
    ++accepted;
    for (const SlotTokens& run : decoded->run) {
      ASSERT_GE(run.slot, 0);
      ASSERT_GE(run.count(), 1);
      ASSERT_GE(int64_t{run.position} + run.count(), 1);
      ASSERT_LE(int64_t{run.position} + run.count(), std::numeric_limits<int32_t>::max());
    }
  }
  EXPECT_GT(accepted, 0);
  EXPECT_GT(refused, 0);
  EXPECT_GT(unparsable, 0);
}

struct Hostile {
  const char* names;
  void (*spoil)(wire_v1::Plan*);
};

TEST(StepWire, RefusesWhatAPlanMustNotSayAndNamesIt) {
  const Hostile cases[] = {
      {"close", [](wire_v1::Plan* plan) { plan->add_close(-1); }},
      {"open.slot", [](wire_v1::Plan* plan) { plan->mutable_open(0)->set_slot(-2); }},
      {"sampling.temperature",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_temperature(std::nanf("")); }},
      {"sampling.temperature",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_temperature(HUGE_VALF); }},
      {"sampling.top_p", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_top_p(0); }},
      {"sampling.top_p",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_top_p(std::nanf("")); }},
      {"sampling.min_p", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_min_p(1.5f); }},
      {"sampling.top_k", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_top_k(-1); }},
      {"sampling.top_logprobs",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_top_logprobs(-1); }},
      {"sampling.repetition_penalty",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_repetition_penalty(0); }},
      {"sampling.repetition_penalty",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_repetition_penalty(HUGE_VALF); }},
      {"sampling.presence_penalty",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_presence_penalty(std::nanf("")); }},
      {"sampling.frequency_penalty",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_frequency_penalty(-HUGE_VALF); }},
      {"sampling.biases", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->add_biases(1.0f); }},
      {"sampling.biases",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_biases(0, HUGE_VALF); }},
      {"sampling.bias_tokens",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_bias_tokens(0, -3); }},
      {"sampling.allowed_token_ids",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->add_allowed_token_ids(-1); }},
      {"sampling.bad_words", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->add_bad_words(); }},
      {"sampling.bad_words",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->mutable_bad_words(0)->set_tokens(0, -1); }},
      {"sampling.min_tokens",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->set_min_tokens(-1); }},
      {"sampling.end_token_ids",
       [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->add_end_token_ids(-1); }},
      {"open.prompt_tokens", [](wire_v1::Plan* plan) { plan->mutable_open(0)->set_prompt_tokens(-1); }},
      {"open.position", [](wire_v1::Plan* plan) { plan->mutable_open(0)->set_position(-1); }},
      {"open.history", [](wire_v1::Plan* plan) { plan->mutable_open(0)->add_history(1); }},
      {"open.history", [](wire_v1::Plan* plan) { plan->mutable_open(0)->clear_history(); }},
      {"open.history", [](wire_v1::Plan* plan) { plan->mutable_open(0)->set_history(0, -1); }},
      {"open.history", [](wire_v1::Plan* plan) { plan->mutable_open(0)->mutable_sampling()->clear_bad_words(); }},
      {"copies_to", [](wire_v1::Plan* plan) { plan->add_copies_from(1); }},
      {"copies_to", [](wire_v1::Plan* plan) { plan->set_copies_to(0, plan->copies_from(0)); }},
      {"copies_to", [](wire_v1::Plan* plan) { plan->set_copies_to(0, -1); }},
      {"copies_from", [](wire_v1::Plan* plan) { plan->set_copies_from(0, -1); }},
      {"masks.slot", [](wire_v1::Plan* plan) { plan->mutable_masks(0)->set_slot(-1); }},
      {"masks.words", [](wire_v1::Plan* plan) { plan->mutable_masks(0)->set_words(0, 0); }},
      {"masks.words", [](wire_v1::Plan* plan) { plan->mutable_masks(0)->clear_words(); }},
      {"run.score_top", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_score_top(-1); }},
      {"run.next_token", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_next_token(-2); }},
      {"block_slots", [](wire_v1::Plan* plan) { plan->set_block_slots(0, -1); }},
      {"blocks", [](wire_v1::Plan* plan) { plan->set_blocks(0, -7); }},
      {"blocks", [](wire_v1::Plan* plan) { plan->add_blocks(3); }},
      {"run.slot", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_slot(-1); }},
      {"run.position", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_position(-1); }},
      {"run.position",
       [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_position(std::numeric_limits<int32_t>::max()); }},
      {"run.tokens", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_tokens(1, -1); }},
      {"run.tokens", [](wire_v1::Plan* plan) { plan->mutable_run(0)->clear_tokens(); }},
      {"run.tokens", [](wire_v1::Plan* plan) { plan->mutable_run(0)->set_from_last_sample(true); }},
  };
  StepPlan good{.step = 7,
                .close = {1},
                .open = {{.slot = 1,
                          .sampling = {.logit_bias = {{.token = 3, .bias = 0.5f}}, .bad_words = {{8}}},
                          .prompt_tokens = 4,
                          .position = 2,
                          .history = {5, 6}}},
                .blocks = {{.slot = 1, .block = 4}, {.slot = 1, .block = 5}},
                .copies = {{.from = 2, .to = 4}},
                .masks = {{.slot = 1, .words = {1}}},
                .run = {{.slot = 1, .position = 0, .tokens = {10, 11}, .from_last_sample = false, .sample = true}},
                .stop = false};
  for (const Hostile& hostile : cases) {
    wire_v1::Plan wire;
    encode(good, &wire);
    ASSERT_TRUE(decode(wire).ok());
    hostile.spoil(&wire);
    absl::StatusOr<StepPlan> decoded = decode(wire);
    ASSERT_FALSE(decoded.ok()) << hostile.names << " " << wire.ShortDebugString();
    EXPECT_NE(std::string(decoded.status().message()).find(hostile.names), std::string::npos) << decoded.status();
  }
}

TEST(SampledDigest, ChangesWithEveryPartOfAResult) {
  PlanMaker maker(3);
  for (int i = 0; i < 500; ++i) {
    const StepResult result = maker.result();
    const uint64_t digest = sampled_digest(result);
    EXPECT_EQ(sampled_digest(StepResult(result)), digest);
    StepResult other = result;
    other.sampled[0].slot ^= 1;
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.sampled.back().chosen.token ^= 1 << 10;
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.sampled[0].chosen.logprob = std::nextafter(other.sampled[0].chosen.logprob, -100.0f);
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.sampled[0].top.push_back({1, -1.0f});
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.sampled.pop_back();
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.scored.back().chosen.logprob = std::nextafter(other.scored.back().chosen.logprob, -100.0f);
    EXPECT_NE(sampled_digest(other), digest);
    other = result;
    other.scored.insert(other.scored.begin(), other.sampled.back());
    other.sampled.pop_back();
    EXPECT_NE(sampled_digest(other), digest) << "what was scored is not what was sampled";
    other = result;
    other.timings = {{.run_seconds = 1.0, .collective_seconds = 0.5}};
    EXPECT_EQ(sampled_digest(other), digest) << "time is each rank's own";
  }
}

}  // namespace
}  // namespace octet
