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
    }
    return outputs_;
  }

 private:
  struct State {
    bool open = false;
    bool closed = false;
    int32_t position = 0;
    std::vector<int32_t> blocks;
  };

  bool finished(size_t i) const { return static_cast<int32_t>(outputs_[i].tokens.size()) == requests_[i].max_tokens; }
  bool done() const {
    return std::all_of(states_.begin(), states_.end(), [](const State& state) { return state.closed; });
  }

  StepPlan plan_step(int32_t step) {
    StepPlan plan;
    plan.step = ++sequence_;
    int32_t budget = limits_.max_step_tokens;
    for (size_t i = 0; i < requests_.size(); ++i) {
      State& state = states_[i];
      if (state.closed) continue;
      if (state.open && finished(i)) {
        plan.close.push_back(static_cast<int32_t>(i));
        free_blocks_.insert(free_blocks_.end(), state.blocks.begin(), state.blocks.end());
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
    if (!state.open) {
      plan->open.push_back({.slot = i, .sampling = request.sampling});
      state.open = true;
    }
    const int32_t length = static_cast<int32_t>(request.prompt.size());
    SlotTokens tokens{.slot = i, .position = state.position};
    if (state.position < length) {
      const int32_t count = std::min({request.chunk, length - state.position, budget});
      tokens.tokens.assign(request.prompt.begin() + state.position, request.prompt.begin() + state.position + count);
    } else {
      tokens.from_last_sample = true;
    }
    state.position += tokens.count();
    tokens.sample = state.position >= length;
    grow_blocks(i, plan);
    plan->run.push_back(std::move(tokens));
    return plan->run.back().count();
  }

  void grow_blocks(int32_t i, StepPlan* plan) {
    State& state = states_[i];
    const size_t needed = (state.position + limits_.block_tokens - 1) / limits_.block_tokens;
    for (; state.blocks.size() < needed && !free_blocks_.empty(); free_blocks_.pop_back()) {
      state.blocks.push_back(free_blocks_.back());
      plan->blocks.push_back({.slot = i, .block = free_blocks_.back()});
    }
    EXPECT_EQ(state.blocks.size(), needed) << "the test asks for more cache than there is";
  }

  WorkerGroup& group_;
  const WorkerLimits& limits_;
  const std::vector<DrivenRequest>& requests_;
  std::mt19937_64 random_;
  std::vector<State> states_;
  std::vector<DrivenOutput> outputs_;
  std::vector<int32_t> free_blocks_;
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
  for (size_t i = 0; i < std::min(a.tokens.size(), b.tokens.size()); ++i) {
    if (a.tokens[i] == b.tokens[i]) continue;
    return absl::StrFormat("token %d differs: %d (%.9g) against %d (%.9g)", i, a.tokens[i].chosen.token,
                           a.tokens[i].chosen.logprob, b.tokens[i].chosen.token, b.tokens[i].chosen.logprob);
  }
  return absl::StrFormat("%d tokens against %d", a.tokens.size(), b.tokens.size());
}

}  // namespace octet
