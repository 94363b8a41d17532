#include "worker/step_wire.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "octet/internal/v1/worker.pb.h"

namespace octet {
namespace {

namespace wire_v1 = internal::v1;

absl::Status refused(absl::string_view field, absl::string_view expected, absl::string_view found) {
  return absl::InvalidArgumentError(absl::StrCat("plan: ", field, " must be ", expected, ", found ", found));
}

absl::Status check_index(absl::string_view field, int32_t value) {
  return value >= 0 ? absl::OkStatus() : refused(field, "0 or more", absl::StrCat(value));
}

template <typename Repeated>
absl::Status copy_indices(absl::string_view field, const Repeated& from, std::vector<int32_t>* to) {
  to->assign(from.begin(), from.end());
  for (int32_t value : *to) {
    if (value < 0) return check_index(field, value);
  }
  return absl::OkStatus();
}

absl::Status check_finite(absl::string_view field, float value) {
  return std::isfinite(value) ? absl::OkStatus() : refused(field, "finite", absl::StrCat(value));
}

absl::Status check_as_many(absl::string_view field, int count, absl::string_view as, int expected) {
  if (count == expected) return absl::OkStatus();
  return refused(field, absl::StrCat("as many as ", as, ", ", expected), absl::StrCat(count));
}

// Comparisons are written so that NaN fails them.
absl::Status check_numbers(const wire_v1::Sampling& from) {
  if (!(from.temperature() >= 0.0f) || std::isinf(from.temperature())) {
    return refused("sampling.temperature", "finite and 0 or more", absl::StrCat(from.temperature()));
  }
  if (!(from.top_p() > 0.0f && from.top_p() <= 1.0f)) {
    return refused("sampling.top_p", "in (0, 1]", absl::StrCat(from.top_p()));
  }
  if (!(from.min_p() >= 0.0f && from.min_p() <= 1.0f)) {
    return refused("sampling.min_p", "in [0, 1]", absl::StrCat(from.min_p()));
  }
  if (!(from.repetition_penalty() > 0.0f) || std::isinf(from.repetition_penalty())) {
    return refused("sampling.repetition_penalty", "finite and above 0", absl::StrCat(from.repetition_penalty()));
  }
  absl::Status status = check_finite("sampling.presence_penalty", from.presence_penalty());
  status.Update(check_finite("sampling.frequency_penalty", from.frequency_penalty()));
  status.Update(check_index("sampling.min_tokens", from.min_tokens()));
  status.Update(check_index("sampling.top_k", from.top_k()));
  status.Update(check_index("sampling.top_logprobs", from.top_logprobs()));
  return status;
}

absl::Status decode_sampling(const wire_v1::Sampling& from, SlotSampling* to) {
  if (absl::Status status = check_numbers(from); !status.ok()) return status;
  *to = {.repetition_penalty = from.repetition_penalty(),
         .presence_penalty = from.presence_penalty(),
         .frequency_penalty = from.frequency_penalty(),
         .min_tokens = from.min_tokens(),
         .temperature = from.temperature(),
         .top_k = from.top_k(),
         .top_p = from.top_p(),
         .min_p = from.min_p(),
         .seed = from.seed(),
         .output_index = from.output_index(),
         .top_logprobs = from.top_logprobs()};
  absl::Status status = check_as_many("sampling.biases", from.biases_size(), "bias_tokens", from.bias_tokens_size());
  if (!status.ok()) return status;
  for (int i = 0; i < from.biases_size(); ++i) {
    to->logit_bias.push_back({.token = from.bias_tokens(i), .bias = from.biases(i)});
    status.Update(check_index("sampling.bias_tokens", from.bias_tokens(i)));
    status.Update(check_finite("sampling.biases", from.biases(i)));
  }
  status.Update(copy_indices("sampling.allowed_token_ids", from.allowed_token_ids(), &to->allowed_token_ids));
  for (const wire_v1::TokenRun& word : from.bad_words()) {
    status.Update(copy_indices("sampling.bad_words", word.tokens(), &to->bad_words.emplace_back()));
    if (word.tokens().empty()) status.Update(refused("sampling.bad_words", "runs of at least one token", "none"));
  }
  status.Update(copy_indices("sampling.end_token_ids", from.end_token_ids(), &to->end_token_ids));
  return status;
}

absl::Status decode_open(const wire_v1::Open& from, SlotOpen* to) {
  if (absl::Status status = decode_sampling(from.sampling(), &to->sampling); !status.ok()) return status;
  to->slot = from.slot();
  to->prompt_tokens = from.prompt_tokens();
  to->position = from.position();
  absl::Status status = check_index("open.slot", to->slot);
  status.Update(check_index("open.prompt_tokens", to->prompt_tokens));
  status.Update(check_index("open.position", to->position));
  status.Update(copy_indices("open.history", from.history(), &to->history));
  if (!status.ok()) return status;
  const int expected = to->sampling.reads_history() ? to->position : 0;
  if (from.history_size() != expected) {
    return refused("open.history", absl::StrCat(expected, " tokens"), absl::StrCat(from.history_size()));
  }
  return absl::OkStatus();
}

absl::Status decode_mask(const wire_v1::Mask& from, SlotMask* to) {
  to->slot = from.slot();
  to->words.assign(from.words().begin(), from.words().end());
  if (std::all_of(to->words.begin(), to->words.end(), [](uint32_t word) { return word == 0; })) {
    return refused("masks.words", "such that a bit is set", absl::StrCat(to->words.size(), " words without any"));
  }
  return check_index("masks.slot", to->slot);
}

absl::Status decode_run(const wire_v1::Run& from, SlotTokens* to) {
  if (absl::Status status = check_index("run.slot", from.slot()); !status.ok()) return status;
  if (absl::Status status = check_index("run.position", from.position()); !status.ok()) return status;
  if (absl::Status status = copy_indices("run.tokens", from.tokens(), &to->tokens); !status.ok()) return status;
  if (from.from_last_sample() != to->tokens.empty()) {
    return refused("run.tokens", from.from_last_sample() ? "empty with from_last_sample" : "at least one token",
                   absl::StrCat(to->tokens.size(), " tokens"));
  }
  to->slot = from.slot();
  to->position = from.position();
  to->from_last_sample = from.from_last_sample();
  to->sample = from.sample();
  to->score = from.score();
  to->score_top = from.score_top();
  to->next_token = from.next_token();
  if (absl::Status status = check_index("run.score_top", to->score_top); !status.ok()) return status;
  if (to->next_token < -1) return refused("run.next_token", "-1 or more", absl::StrCat(to->next_token));
  if (to->position > std::numeric_limits<int32_t>::max() - to->count()) {
    return refused("run.position", "such that the last position fits 31 bits",
                   absl::StrCat(to->position, " and ", to->count(), " tokens"));
  }
  return absl::OkStatus();
}

class Digest {
 public:
  // FNV-1a over 32-bit words, with a final mix so that short inputs differ in all bits.
  void add(uint32_t word) { state_ = (state_ ^ word) * 0x100000001b3ull; }
  void add(const std::vector<SampledToken>& tokens) {
    add(static_cast<uint32_t>(tokens.size()));
    for (const SampledToken& token : tokens) {
      add(static_cast<uint32_t>(token.slot));
      add(token.chosen);
      add(static_cast<uint32_t>(token.top.size()));
      for (const TokenLogprob& other : token.top) add(other);
    }
  }
  uint64_t value() const {
    uint64_t x = state_;
    x = (x ^ (x >> 33)) * 0xff51afd7ed558ccdull;
    x = (x ^ (x >> 33)) * 0xc4ceb9fe1a85ec53ull;
    return x ^ (x >> 33);
  }

 private:
  void add(const TokenLogprob& token) {
    add(static_cast<uint32_t>(token.token));
    add(std::bit_cast<uint32_t>(token.logprob));
  }
  uint64_t state_ = 0xcbf29ce484222325ull;
};

void encode_sampling(const SlotSampling& from, wire_v1::Sampling* to) {
  to->set_repetition_penalty(from.repetition_penalty);
  to->set_presence_penalty(from.presence_penalty);
  to->set_frequency_penalty(from.frequency_penalty);
  for (const TokenBias& bias : from.logit_bias) {
    to->add_bias_tokens(bias.token);
    to->add_biases(bias.bias);
  }
  to->mutable_allowed_token_ids()->Add(from.allowed_token_ids.begin(), from.allowed_token_ids.end());
  for (const std::vector<int32_t>& word : from.bad_words) {
    to->add_bad_words()->mutable_tokens()->Add(word.begin(), word.end());
  }
  to->set_min_tokens(from.min_tokens);
  to->mutable_end_token_ids()->Add(from.end_token_ids.begin(), from.end_token_ids.end());
  to->set_temperature(from.temperature);
  to->set_top_k(from.top_k);
  to->set_top_p(from.top_p);
  to->set_min_p(from.min_p);
  to->set_seed(from.seed);
  to->set_output_index(from.output_index);
  to->set_top_logprobs(from.top_logprobs);
}

}  // namespace

void encode(const StepPlan& plan, wire_v1::Plan* wire) {
  wire->Clear();
  wire->set_step(plan.step);
  wire->set_stop(plan.stop);
  wire->mutable_close()->Add(plan.close.begin(), plan.close.end());
  for (const SlotOpen& open : plan.open) {
    wire_v1::Open* to = wire->add_open();
    to->set_slot(open.slot);
    encode_sampling(open.sampling, to->mutable_sampling());
    to->set_prompt_tokens(open.prompt_tokens);
    to->set_position(open.position);
    to->mutable_history()->Add(open.history.begin(), open.history.end());
  }
  for (const SlotBlock& more : plan.blocks) {
    wire->add_block_slots(more.slot);
    wire->add_blocks(more.block);
  }
  for (const BlockCopy& copy : plan.copies) {
    wire->add_copies_from(copy.from);
    wire->add_copies_to(copy.to);
  }
  for (const SlotMask& mask : plan.masks) {
    wire_v1::Mask* to = wire->add_masks();
    to->set_slot(mask.slot);
    to->mutable_words()->Add(mask.words.begin(), mask.words.end());
  }
  for (const SlotTokens& tokens : plan.run) {
    wire_v1::Run* to = wire->add_run();
    to->set_slot(tokens.slot);
    to->set_position(tokens.position);
    to->mutable_tokens()->Add(tokens.tokens.begin(), tokens.tokens.end());
    to->set_from_last_sample(tokens.from_last_sample);
    to->set_sample(tokens.sample);
    to->set_score(tokens.score);
    to->set_score_top(tokens.score_top);
    to->set_next_token(tokens.next_token);
  }
}

absl::StatusOr<StepPlan> decode(const wire_v1::Plan& wire) {
  StepPlan plan;
  plan.step = wire.step();
  plan.stop = wire.stop();
  if (absl::Status status = copy_indices("close", wire.close(), &plan.close); !status.ok()) return status;
  plan.open.resize(wire.open_size());
  for (int i = 0; i < wire.open_size(); ++i) {
    if (absl::Status status = decode_open(wire.open(i), &plan.open[i]); !status.ok()) return status;
  }
  absl::Status status = check_as_many("blocks", wire.blocks_size(), "block_slots", wire.block_slots_size());
  if (!status.ok()) return status;
  plan.blocks.resize(wire.blocks_size());
  for (int i = 0; i < wire.blocks_size(); ++i) {
    plan.blocks[i] = {.slot = wire.block_slots(i), .block = wire.blocks(i)};
    if (absl::Status status = check_index("block_slots", wire.block_slots(i)); !status.ok()) return status;
    if (absl::Status status = check_index("blocks", wire.blocks(i)); !status.ok()) return status;
  }
  status = check_as_many("copies_to", wire.copies_to_size(), "copies_from", wire.copies_from_size());
  if (!status.ok()) return status;
  plan.copies.resize(wire.copies_to_size());
  for (int i = 0; i < wire.copies_to_size(); ++i) {
    plan.copies[i] = {.from = wire.copies_from(i), .to = wire.copies_to(i)};
    if (absl::Status status = check_index("copies_from", wire.copies_from(i)); !status.ok()) return status;
    if (absl::Status status = check_index("copies_to", wire.copies_to(i)); !status.ok()) return status;
    if (wire.copies_from(i) == wire.copies_to(i)) {
      return refused("copies_to", "another block than copies_from", absl::StrCat(wire.copies_to(i)));
    }
  }
  plan.masks.resize(wire.masks_size());
  for (int i = 0; i < wire.masks_size(); ++i) {
    if (absl::Status status = decode_mask(wire.masks(i), &plan.masks[i]); !status.ok()) return status;
  }
  plan.run.resize(wire.run_size());
  for (int i = 0; i < wire.run_size(); ++i) {
    if (absl::Status status = decode_run(wire.run(i), &plan.run[i]); !status.ok()) return status;
  }
  return plan;
}

uint64_t sampled_digest(const StepResult& result) {
  Digest digest;
  digest.add(result.sampled);
  digest.add(result.scored);
  return digest.value();
}

}  // namespace octet
