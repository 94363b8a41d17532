// PlanDriver: runs requests on a WorkerGroup by writing plans itself, so that a test decides who shares a step with
// whom, how a prompt is cut, and which cache blocks are used. Independent of the scheduler.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "coordinator/worker_group.h"

namespace octet {

struct DrivenRequest {
  std::vector<int32_t> prompt;
  int32_t max_tokens = 8;
  SlotSampling sampling;
  int32_t chunk = 1 << 20;           // prompt tokens in one step at most
  int32_t arrival_step = 0;          // first step in which it may run
  std::optional<int32_t> score_top;  // score the prompt, with so many alternatives
  // An earlier request, still open, whose prompt is in the cache: what both prompts begin with is not run again. Whole
  // blocks are shared, the rest of it is copied.
  std::optional<int32_t> shares_with;
  // Closed after so many output tokens and opened again at once, over some of its own blocks: a preemption.
  std::optional<int32_t> preempted_after;
  // The mask of output token i; none where it is empty.
  std::function<std::vector<uint32_t>(int32_t i)> mask;
};

struct DrivenOutput {
  std::vector<SampledToken> tokens;  // `slot` is always 0 here, so that outputs compare
  std::vector<SampledToken> scored;  // prompt tokens from the second on, if asked for
  bool operator==(const DrivenOutput&) const = default;
};

// Runs all requests to their ends, as many as fit a step together, in blocks chosen at random from `seed`.
// A failing group or a step error ends the test with a failure.
std::vector<DrivenOutput> drive(WorkerGroup& group, const WorkerLimits& limits,
                                const std::vector<DrivenRequest>& requests, uint64_t seed = 1);

// The distribution of the token after each of these many first tokens of `sequence`, with `top_logprobs` best ids; the
// sequence's own tokens are fed whatever was sampled. REQUIRES: prefixes ascend and are at most the sequence's length.
std::vector<SampledToken> teacher_forced(WorkerGroup& group, const WorkerLimits& limits,
                                         const std::vector<int32_t>& sequence, const std::vector<int32_t>& prefixes,
                                         int32_t top_logprobs);

// "3 tokens, first difference at 1: 17 (-1.25) against 18 (-1.26)" or "".
std::string difference(const DrivenOutput& a, const DrivenOutput& b);

}  // namespace octet
