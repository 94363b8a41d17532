#include "tests/plan_driver.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"

namespace octet {
namespace {

class Driver {
 public:
  Driver(WorkerGroup& group, const WorkerLimits& limits, const std::vector<DrivenRequest>& requests, uint64_t seed)
      : group_(group),
        limits_(limits),
        requests_(requests),
        random_(seed),
        states_(requests.size()),
        outputs_(requests.size()) {
    free_blocks_.resize(limits.blocks);
    std::iota(free_blocks_.begin(), free_blocks_.end(), 0);
    std::shuffle(free_blocks_.begin(), free_blocks_.end(), random_);
    users_.resize(limits.blocks, 0);
    for (size_t i = 0; i < requests.size(); ++i) states_[i].known = requests[i].prompt;
  }

  std::vector<DrivenOutput> run() {
    EXPECT_LE(requests_.size(), static_cast<size_t>(limits_.slots));
    for (int32_t step = 0; !done() && !testing::Test::HasFailure(); ++step) {
      const StepPlan plan = plan_step(step);
      const absl::StatusOr<StepResult> result = group_.run(plan);
      EXPECT_TRUE(result.ok()) << result.status();
      if (!result.ok()) break;
      EXPECT_EQ(result->error, "");
      for (SampledToken token : result->sampled) {
        outputs_[token.slot].tokens.push_back(token);
        outputs_[token.slot].tokens.back().slot = 0;
      }
      for (SampledToken token : result->scored) {
        outputs_[token.slot].scored.push_back(token);
        outputs_[token.slot].scored.back().slot = 0;
      }
    }
    return outputs_;
  }

 private:
  struct State {
    bool open = false;
    bool closed = false;
    bool preempted = false;
    std::vector<int32_t> known;  // tokens to run before the sampled ones
    int32_t position = 0;
    int32_t in_cache = 0;  // positions that earlier steps have run
    std::vector<int32_t> blocks;
  };

  bool finished(size_t i) const { return static_cast<int32_t>(outputs_[i].tokens.size()) == requests_[i].max_tokens; }
  bool done() const {
    return std::all_of(states_.begin(), states_.end(), [](const State& state) { return state.closed; });
  }

  StepPlan plan_step(int32_t step) {
    StepPlan plan;
    plan.step = ++sequence_;
    for (State& state : states_) state.in_cache = state.position;
    int32_t budget = limits_.max_step_tokens;
    for (size_t i = 0; i < requests_.size(); ++i) {
      State& state = states_[i];
      if (state.closed) continue;
      if (state.open && finished(i)) {
        plan.close.push_back(static_cast<int32_t>(i));
        release(0, &state);
        state.closed = true;
        continue;
      }
      if (step >= requests_[i].arrival_step && budget > 0) budget -= add(static_cast<int32_t>(i), budget, &plan);
    }
    return plan;
  }

  int32_t add(int32_t i, int32_t budget, StepPlan* plan) {
    const DrivenRequest& request = requests_[i];
    State& state = states_[i];
    if (!state.open && !open(i, plan)) return 0;
    if (!state.preempted && request.preempted_after == static_cast<int32_t>(outputs_[i].tokens.size())) {
      preempt(i, plan);
    }
    const auto length = static_cast<int32_t>(state.known.size());
    SlotTokens tokens{.slot = i, .position = state.position};
    if (state.position < length) {
      const int32_t count = std::min({request.chunk, length - state.position, budget});
      tokens.tokens.assign(state.known.begin() + state.position, state.known.begin() + state.position + count);
    } else {
      tokens.from_last_sample = true;
    }
    state.position += tokens.count();
    tokens.sample = state.position >= length;
    if (request.score_top && !tokens.from_last_sample && !state.preempted) {
      tokens.score = true;
      tokens.score_top = *request.score_top;
      if (state.position < length) tokens.next_token = state.known[state.position];
    }
    grow_blocks(i, plan);
    if (tokens.sample && request.mask) {
      SlotMask mask{.slot = i, .words = request.mask(static_cast<int32_t>(outputs_[i].tokens.size()))};
      if (!mask.words.empty()) plan->masks.push_back(std::move(mask));
    }
    plan->run.push_back(std::move(tokens));
    return plan->run.back().count();
  }

  // False while what it shares is not in the cache yet.
  bool open(int32_t i, StepPlan* plan) {
    const DrivenRequest& request = requests_[i];
    State& state = states_[i];
    if (request.shares_with) {
      const State& other = states_[*request.shares_with];
      const std::vector<int32_t>& prompt = requests_[*request.shares_with].prompt;
      const bool there = !other.closed && !other.preempted;
      EXPECT_TRUE(there) << "request " << *request.shares_with << " gave up its blocks too early to share them";
      if (!there || other.in_cache < static_cast<int32_t>(prompt.size())) return false;
      const auto [mine, others] = std::ranges::mismatch(request.prompt, prompt);
      // At least one token runs: the one whose logits are sampled from.
      const auto length = static_cast<int32_t>(request.prompt.size());
      state.position = std::min(static_cast<int32_t>(mine - request.prompt.begin()), length - 1);
      for (int32_t b = 0; b < state.position / limits_.block_tokens; ++b) append(i, other.blocks[b], plan);
      if (state.position % limits_.block_tokens != 0) {
        plan->copies.push_back({.from = other.blocks[state.blocks.size()], .to = free_blocks_.back()});
        grow_blocks(i, plan);
      }
    }
    plan->open.push_back(opening(i));
    state.open = true;
    return true;
  }

  // Gives up its slot and some of its blocks, and goes on from the others.
  void preempt(int32_t i, StepPlan* plan) {
    State& state = states_[i];
    state.preempted = true;
    plan->close.push_back(i);
    for (const SampledToken& token : outputs_[i].tokens) state.known.push_back(token.chosen.token);
    const int32_t whole = state.position / limits_.block_tokens;
    const auto kept = random_() % 2 == 0 ? whole : static_cast<int32_t>(random_() % (whole + 1));
    release(kept, &state);
    state.position = kept * limits_.block_tokens;
    plan->open.push_back(opening(i));
    for (const int32_t block : state.blocks) plan->blocks.push_back({.slot = i, .block = block});
  }

  SlotOpen opening(int32_t i) const {
    const State& state = states_[i];
    SlotOpen open{.slot = i,
                  .sampling = requests_[i].sampling,
                  .prompt_tokens = static_cast<int32_t>(requests_[i].prompt.size()),
                  .position = state.position};
    if (open.sampling.reads_history()) open.history.assign(state.known.begin(), state.known.begin() + state.position);
    return open;
  }

  void append(int32_t i, int32_t block, StepPlan* plan) {
    ++users_[block];
    states_[i].blocks.push_back(block);
    plan->blocks.push_back({.slot = i, .block = block});
  }

  void grow_blocks(int32_t i, StepPlan* plan) {
    State& state = states_[i];
    const size_t needed = (state.position + limits_.block_tokens - 1) / limits_.block_tokens;
    while (state.blocks.size() < needed && !free_blocks_.empty()) {
      append(i, free_blocks_.back(), plan);
      free_blocks_.pop_back();
    }
    EXPECT_EQ(state.blocks.size(), needed) << "the test asks for more cache than there is";
  }

  // All blocks but the first `kept`; those that nobody else uses are free again.
  void release(size_t kept, State* state) {
    for (size_t b = kept; b < state->blocks.size(); ++b) {
      if (--users_[state->blocks[b]] == 0) free_blocks_.push_back(state->blocks[b]);
    }
    state->blocks.resize(kept);
  }

  WorkerGroup& group_;
  const WorkerLimits& limits_;
  const std::vector<DrivenRequest>& requests_;
  std::mt19937_64 random_;
  std::vector<State> states_;
  std::vector<DrivenOutput> outputs_;
  std::vector<int32_t> free_blocks_;
  std::vector<int32_t> users_;  // of each block
  uint64_t sequence_ = 0;
};

}  // namespace

std::vector<DrivenOutput> drive(WorkerGroup& group, const WorkerLimits& limits,
                                const std::vector<DrivenRequest>& requests, uint64_t seed) {
  return Driver(group, limits, requests, seed).run();
}

std::vector<SampledToken> teacher_forced(WorkerGroup& group, const WorkerLimits& limits,
                                         const std::vector<int32_t>& sequence, const std::vector<int32_t>& prefixes,
                                         int32_t top_logprobs) {
  std::vector<SampledToken> result;
  int32_t position = 0;
  for (int32_t prefix : prefixes) {
    while (position < prefix) {
      const int32_t count = std::min(prefix - position, limits.max_step_tokens);
      StepPlan plan;
      if (position == 0) {
        plan.open = {{.slot = 0, .sampling = {.top_logprobs = top_logprobs}}};
        const auto blocks = (sequence.size() + limits.block_tokens - 1) / limits.block_tokens;
        for (size_t block = 0; block < blocks; ++block) plan.blocks.push_back({.block = static_cast<int32_t>(block)});
      }
      SlotTokens run{.slot = 0, .position = position};
      run.tokens.assign(sequence.begin() + position, sequence.begin() + position + count);
      position += count;
      run.sample = position == prefix;
      plan.run = {run};
      const absl::StatusOr<StepResult> step = group.run(plan);
      EXPECT_TRUE(step.ok() && step->error.empty()) << (step.ok() ? step->error : step.status().ToString());
      if (!step.ok() || !step->error.empty()) return result;
      result.insert(result.end(), step->sampled.begin(), step->sampled.end());
    }
  }
  StepPlan close;
  close.close = {0};
  EXPECT_TRUE(group.run(close).ok());
  return result;
}

std::string difference(const DrivenOutput& a, const DrivenOutput& b) {
  if (a == b) return "";
  auto compared = [](const char* what, const std::vector<SampledToken>& a, const std::vector<SampledToken>& b) {
    for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
      if (a[i] == b[i]) continue;
      return absl::StrFormat("%s token %d differs: %d (%.9g) against %d (%.9g)", what, i, a[i].chosen.token,
                             a[i].chosen.logprob, b[i].chosen.token, b[i].chosen.logprob);
    }
    return absl::StrFormat("%d %s tokens against %d", a.size(), what, b.size());
  };
  return a.tokens != b.tokens ? compared("output", a.tokens, b.tokens) : compared("scored", a.scored, b.scored);
}

}  // namespace octet
