// FakeWorker: a worker without a model. It holds every plan against the contract of step_plan.h and samples tokens that
// are a hash of what its cache says was run before, so that a lost, doubled, moved or shared token or block changes the
// answer.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <set>
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

inline int32_t fake_sample(uint64_t history, uint64_t seed, int32_t vocab_size) {
  return static_cast<int32_t>(mix(history, seed) % static_cast<uint64_t>(vocab_size));
}

struct Outcome {
  std::vector<int32_t> tokens;
  FinishReason finish = FinishReason::kNone;
};

// What a request's answer must be, alone or in any company, from the rules of request.h alone.
inline Outcome expected_outcome(const Request& request, const WorkerLimits& limits) {
  uint64_t history = 0;
  for (const int32_t token : request.prompt) history = mix(history, token);
  Outcome outcome;
  while (outcome.finish == FinishReason::kNone) {
    const int32_t token = fake_sample(history, request.sampling.seed, limits.vocab_size);
    outcome.tokens.push_back(token);
    history = mix(history, token);
    const auto count = static_cast<int32_t>(outcome.tokens.size());
    const bool is_end = std::count(request.sampling.end_token_ids.begin(), request.sampling.end_token_ids.end(), token) > 0;
    const bool asked_length = request.max_tokens.has_value() && count == *request.max_tokens;
    const bool full = count + static_cast<int32_t>(request.prompt.size()) == limits.max_context;
    if (is_end && count > request.sampling.min_tokens) {
      outcome.finish = FinishReason::kEndToken;
    } else if (asked_length || full) {
      outcome.finish = FinishReason::kLength;
    }
  }
  return outcome;
}

class FakeWorker {
 public:
  explicit FakeWorker(const WorkerLimits& limits)
      : limits_(limits),
        slots_(static_cast<size_t>(limits.slots)),
        block_owner_(static_cast<size_t>(limits.blocks), kNobody),
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
    std::set<int32_t> seen;
    for (const SlotTokens& run : plan.run) {
      expect(seen.insert(run.slot).second, "a slot runs once in a step");
      if (error_.empty()) run_tokens(run, &result);
    }
    result.error = error_;
    return result;
  }

  int32_t open_slots() const {
    return static_cast<int32_t>(std::count_if(slots_.begin(), slots_.end(), [](const Slot& s) { return s.open; }));
  }
  int32_t blocks_held() const {
    return limits_.blocks - static_cast<int32_t>(std::count(block_owner_.begin(), block_owner_.end(), kNobody));
  }

 private:
  static constexpr int32_t kNobody = -1;
  static constexpr uint64_t kEmpty = 0xdead;

  struct Slot {
    bool open = false;
    SlotSampling sampling;
    std::vector<int32_t> blocks;
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
    for (const int32_t block : slot->blocks) {
      block_owner_[block] = kNobody;
      std::fill_n(cache_.begin() + block * limits_.block_tokens, limits_.block_tokens, kEmpty);
    }
    *slot = Slot{};
  }

  void open(const SlotOpen& open) {
    Slot* slot = find(open.slot);
    if (slot == nullptr) return;
    expect(!slot->open, "only closed slots are opened");
    slot->open = true;
    slot->sampling = open.sampling;
  }

  void append(const SlotBlock& more) {
    Slot* slot = find(more.slot);
    if (slot == nullptr) return;
    expect(slot->open, "only open slots get blocks");
    if (more.block < 0 || more.block >= limits_.blocks) return expect(false, "blocks exist");
    expect(block_owner_[more.block] == kNobody, "a block belongs to one slot");
    block_owner_[more.block] = more.slot;
    slot->blocks.push_back(more.block);
  }

  uint64_t& cached(const Slot& slot, int32_t position) {
    const int32_t block = slot.blocks[position / limits_.block_tokens];
    return cache_[block * limits_.block_tokens + position % limits_.block_tokens];
  }

  void run_tokens(const SlotTokens& run, StepResult* result) {
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
    const std::vector<int32_t> tokens = run.from_last_sample ? std::vector<int32_t>{*slot->last_sample} : run.tokens;
    for (const int32_t token : tokens) {
      expect(token >= 0 && token < limits_.vocab_size, "tokens are in the vocabulary");
      const uint64_t before = slot->next_position == 0 ? 0 : cached(*slot, slot->next_position - 1);
      cached(*slot, slot->next_position++) = mix(before, token);
    }
    slot->last_sample.reset();
    if (!run.sample) return;
    const uint64_t history = cached(*slot, slot->next_position - 1);
    slot->last_sample = fake_sample(history, slot->sampling.seed, limits_.vocab_size);
    SampledToken sampled;
    sampled.slot = run.slot;
    sampled.chosen = {.token = *slot->last_sample, .logprob = -static_cast<float>(history % 1000) / 100.0f};
    sampled.top.assign(static_cast<size_t>(slot->sampling.top_logprobs), sampled.chosen);
    result->sampled.push_back(std::move(sampled));
  }

  const WorkerLimits limits_;
  std::vector<Slot> slots_;
  std::vector<int32_t> block_owner_;
  std::vector<uint64_t> cache_;  // [blocks, block_tokens] hash of the history up to and with this position
  uint64_t last_step_ = 0;
  std::string error_;
};

}  // namespace octet
