// FakeWorker: a worker without a model. It holds every plan against the contract of step_plan.h and samples tokens that
// are a hash of what its cache says was run before, so that a lost, doubled, moved or shared token or block changes the
// answer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/request.h"
#include "worker/step_plan.h"

namespace octet {

inline uint64_t mix(uint64_t history, uint64_t value) {
  uint64_t x = history * 0x9e3779b97f4a7c15u + value + 1;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// The token that follows `history`; with a mask one of its tokens.
inline int32_t fake_sample(uint64_t history, const SlotSampling& sampling, int32_t vocab_size,
                           std::span<const uint32_t> mask = {}) {
  uint64_t choice = mix(mix(history, sampling.seed), sampling.output_index);
  if (mask.empty()) return static_cast<int32_t>(choice % static_cast<uint64_t>(vocab_size));
  std::vector<int32_t> allowed;
  for (int32_t token = 0; token < vocab_size; ++token) {
    if (mask[token / 32] >> (token % 32) & 1) allowed.push_back(token);
  }
  return allowed.empty() ? -1 : allowed[choice % allowed.size()];
}

// The logprob that a fake model gives `token` after `history`.
inline TokenLogprob fake_logprob(uint64_t history, int32_t token) {
  return {.token = token, .logprob = -static_cast<float>(mix(history, token) % 1000) / 100.0f};
}

struct Outcome {
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::kNone;
};

// What an output must be, alone or in any company, from the rules of request.h alone.
inline Outcome expected_outcome(const Request& request, const WorkerLimits& limits, uint32_t output_index = 0) {
  uint64_t history = 0;
  for (const int32_t token : request.prompt) history = mix(history, token);
  SlotSampling sampling = request.sampling;
  sampling.output_index = output_index;
  const std::unique_ptr<TokenConstraint> constraint = request.constraint ? request.constraint->clone() : nullptr;
  Outcome outcome;
  while (outcome.finish == FinishReason::kNone) {
    std::vector<uint32_t> mask;
    if (constraint != nullptr) {
      mask.resize(static_cast<size_t>(limits.vocab_size + 31) / 32);
      constraint->allow(mask);
    }
    const int32_t token = fake_sample(history, sampling, limits.vocab_size, mask);
    if (constraint != nullptr) constraint->advance(token);
    outcome.tokens.push_back(token);
    history = mix(history, token);
    const auto count = static_cast<int32_t>(outcome.tokens.size());
    const bool is_end = std::count(sampling.end_token_ids.begin(), sampling.end_token_ids.end(), token) > 0;
    const bool asked_length = request.max_tokens.has_value() && count == *request.max_tokens;
    const bool full = count + static_cast<int32_t>(request.prompt.size()) == limits.max_context;
    if (is_end && count > sampling.min_tokens) {
      outcome.finish = FinishReason::kEndToken;
    } else if (asked_length || full) {
      outcome.finish = FinishReason::kLength;
    }
  }
  return outcome;
}

// After token t only tokens of the other parity may come.
class AlternatingConstraint : public TokenConstraint {
 public:
  explicit AlternatingConstraint(int32_t vocab_size) : vocab_size_(vocab_size) {}
  std::unique_ptr<TokenConstraint> clone() const override { return std::make_unique<AlternatingConstraint>(*this); }
  void advance(int32_t token) override { last_ = token; }
  void allow(std::span<uint32_t> words) const override {
    for (int32_t token = (last_ + 1) % 2; token < vocab_size_; token += 2) words[token / 32] |= 1u << (token % 32);
  }

 private:
  int32_t vocab_size_;
  int32_t last_ = 0;
};

class FakeWorker {
 public:
  explicit FakeWorker(const WorkerLimits& limits)
      : limits_(limits),
        slots_(static_cast<size_t>(limits.slots)),
        holders_(static_cast<size_t>(limits.blocks), 0),
        cache_(static_cast<size_t>(limits.blocks) * static_cast<size_t>(limits.block_tokens), kEmpty) {}

  // As Worker::run: a plan that breaks its contract comes back as StepResult::error.
  StepResult run(const StepPlan& plan) {
    StepResult result;
    result.step = plan.step;
    error_.clear();
    expect(plan.step == last_step_ + 1, "steps are numbered one by one");
    last_step_ = plan.step;
    expect(!plan.close.empty() || !plan.run.empty(), "a plan does something");
    expect(plan.token_count() <= limits_.max_step_tokens, "a plan keeps to the token budget");
    for (const int32_t slot : plan.close) close(slot);
    for (const SlotOpen& open : plan.open) this->open(open);
    for (const SlotBlock& more : plan.blocks) append(more);
    for (const BlockCopy& copy : plan.copies) this->copy(copy);
    for (const BlockCopy& copy : plan.copies) {
      const auto touches = [&copy](const BlockCopy& other) { return other.from == copy.to || other.to == copy.to; };
      expect(std::count_if(plan.copies.begin(), plan.copies.end(), touches) == 1, "copies do not meet");
    }
    std::set<int32_t> seen;
    for (const SlotTokens& run : plan.run) {
      expect(seen.insert(run.slot).second, "a slot runs once in a step");
      if (error_.empty()) run_tokens(run, mask_of(plan, run), &result);
    }
    result.error = error_;
    return result;
  }

  int32_t open_slots() const {
    return static_cast<int32_t>(std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.open; }));
  }
  int32_t blocks_held() const {
    return limits_.blocks - static_cast<int32_t>(std::count(holders_.begin(), holders_.end(), 0));
  }
  int64_t tokens_run() const { return tokens_run_; }

 private:
  static constexpr uint64_t kEmpty = 0xdead;

  struct Slot {
    bool open = false;
    SlotSampling sampling;
    std::vector<int32_t> blocks;
    std::vector<int32_t> history;
    int32_t next_position = 0;
    std::optional<int32_t> last_sample;
  };

  // Notes the first broken rule.
  void expect(bool holds, const std::string& rule) {
    if (!holds && error_.empty()) error_ = absl::StrCat("broken: ", rule);
  }

  Slot* find(int32_t slot) {
    if (slot >= 0 && slot < limits_.slots) return &slots_[slot];
    expect(false, "slots exist");
    return nullptr;
  }

  void close(int32_t index) {
    Slot* slot = find(index);
    if (slot == nullptr) return;
    expect(slot->open, "only open slots are closed");
    for (const int32_t block : slot->blocks) --holders_[block];
    *slot = Slot{};
  }

  void open(const SlotOpen& open) {
    Slot* slot = find(open.slot);
    if (slot == nullptr) return;
    expect(!slot->open, "only closed slots are opened");
    expect(open.position >= 0 && open.position < limits_.max_context, "a slot opens inside the context");
    const size_t history = open.sampling.reads_history() ? static_cast<size_t>(open.position) : 0;
    expect(open.history.size() == history, "who reads history gets all of it, and nobody else");
    slot->open = true;
    slot->sampling = open.sampling;
    slot->next_position = open.position;
    slot->history = open.history;
  }

  void append(const SlotBlock& more) {
    Slot* slot = find(more.slot);
    if (slot == nullptr) return;
    expect(slot->open, "only open slots get blocks");
    if (more.block < 0 || more.block >= limits_.blocks) return expect(false, "blocks exist");
    expect(std::count(slot->blocks.begin(), slot->blocks.end(), more.block) == 0, "a table names a block once");
    ++holders_[more.block];
    slot->blocks.push_back(more.block);
  }

  void copy(const BlockCopy& copy) {
    const auto exists = [this](int32_t block) { return block >= 0 && block < limits_.blocks; };
    if (!exists(copy.from) || !exists(copy.to)) return expect(false, "copied blocks exist");
    expect(copy.from != copy.to, "a block is copied to another one");
    expect(holders_[copy.to] == 1, "a copy goes to a block of one slot");
    std::copy_n(cache_.begin() + copy.from * limits_.block_tokens, limits_.block_tokens,
                cache_.begin() + copy.to * limits_.block_tokens);
  }

  std::span<const uint32_t> mask_of(const StepPlan& plan, const SlotTokens& run) {
    for (const SlotMask& mask : plan.masks) {
      if (mask.slot != run.slot) continue;
      expect(run.sample, "only who samples has a mask");
      expect(mask.words.size() == static_cast<size_t>(limits_.vocab_size + 31) / 32, "a mask is of the vocabulary");
      return mask.words;
    }
    return {};
  }

  uint64_t& cached(const Slot& slot, int32_t position) {
    const int32_t block = slot.blocks[position / limits_.block_tokens];
    return cache_[block * limits_.block_tokens + position % limits_.block_tokens];
  }

  void run_tokens(const SlotTokens& run, std::span<const uint32_t> mask, StepResult* result) {
    Slot* slot = find(run.slot);
    if (slot == nullptr) return;
    const int32_t end = run.position + run.count();
    expect(slot->open, "only open slots run");
    expect(run.position == slot->next_position, "positions have no gap and no overlap");
    expect(run.count() > 0, "a run has tokens");
    expect(run.from_last_sample == slot->last_sample.has_value(), "what was sampled is what runs next");
    expect(!run.from_last_sample || run.tokens.empty(), "a run has either tokens or the last sample");
    expect(end <= limits_.max_context, "positions are inside the context");
    expect(end <= static_cast<int32_t>(slot->blocks.size()) * limits_.block_tokens, "blocks cover the positions");
    expect(static_cast<int32_t>(slot->blocks.size() - 1) * limits_.block_tokens < end,
           "no block comes before its time");
    if (!error_.empty()) return;
    check_history(*slot);
    const std::vector<int32_t> tokens = run.from_last_sample ? std::vector<int32_t>{*slot->last_sample} : run.tokens;
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int32_t token = tokens[i];
      expect(token >= 0 && token < limits_.vocab_size, "tokens are in the vocabulary");
      const uint64_t before = slot->next_position == 0 ? 0 : cached(*slot, slot->next_position - 1);
      const uint64_t history = mix(before, token);
      expect(holders_[slot->blocks[slot->next_position / limits_.block_tokens]] == 1,
             "a block that is written is one slot's alone");
      cached(*slot, slot->next_position++) = history;
      slot->history.push_back(token);
      const int32_t follows = i + 1 < tokens.size() ? tokens[i + 1] : run.next_token;
      if (run.score && follows >= 0) result->scored.push_back(answer(run.slot, history, follows, run.score_top));
    }
    tokens_run_ += static_cast<int64_t>(tokens.size());
    slot->last_sample.reset();
    if (!run.sample) return;
    const uint64_t history = cached(*slot, slot->next_position - 1);
    const int32_t token = fake_sample(history, slot->sampling, limits_.vocab_size, mask);
    expect(token >= 0, "a mask leaves something");
    slot->last_sample = token;
    result->sampled.push_back(answer(run.slot, history, token, slot->sampling.top_logprobs));
  }

  static SampledToken answer(int32_t slot, uint64_t history, int32_t token, int32_t top) {
    SampledToken sampled;
    sampled.slot = slot;
    sampled.chosen = fake_logprob(history, token);
    sampled.top.assign(static_cast<size_t>(top), sampled.chosen);
    return sampled;
  }

  // What a slot that reads history was told is what its blocks hold.
  void check_history(const Slot& slot) {
    if (!slot.sampling.reads_history() || slot.next_position == 0) return;
    uint64_t history = 0;
    for (const int32_t token : slot.history) history = mix(history, token);
    expect(static_cast<int32_t>(slot.history.size()) == slot.next_position &&
               history == cached(slot, slot.next_position - 1),
           "the history is that of the blocks");
  }

  const WorkerLimits limits_;
  std::vector<Slot> slots_;
  std::vector<int32_t> holders_;  // [blocks] open slots that have it in their table
  std::vector<uint64_t> cache_;   // [blocks, block_tokens] hash of the history up to and with this position
  uint64_t last_step_ = 0;
  int64_t tokens_run_ = 0;
  std::string error_;
};

}  // namespace octet
