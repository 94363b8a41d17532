// StepPlan: the contract between coordinator and worker. Plain integers and parameters: what every rank runs in one
// step. Workers keep of a sequence only a numbered slot, which the plan opens, appends to and closes, so a plan carries
// what changed. Includes nothing of ours.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace octet {

// How tokens of a slot are chosen. temperature 0 is greedy. Defaults mean "off".
struct SlotSampling {
  float temperature = 0.0f;
  int32_t top_k = 0;  // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  uint64_t seed = 0;  // random numbers are counter-based: key (seed, output_index, position)
  uint32_t output_index = 0;
  int32_t top_logprobs = 0;  // how many alternatives to report, beside the sampled token's own logprob
  bool operator==(const SlotSampling&) const = default;
};

// A slot begins to hold a sequence. REQUIRES: it was never opened, or closed in an earlier plan or in this one.
struct SlotOpen {
  int32_t slot = 0;
  SlotSampling sampling;
  bool operator==(const SlotOpen&) const = default;
};

// A slot's block table grows by these cache blocks.
struct SlotBlocks {
  int32_t slot = 0;
  std::vector<int32_t> blocks;
  bool operator==(const SlotBlocks&) const = default;
};

// A run of a slot's tokens: `tokens`, or the one token that the slot sampled last when `from_last_sample`.
// Prefill and decode are the same thing: some tokens of a sequence, from a position.
struct SlotTokens {
  int32_t slot = 0;
  int32_t position = 0;         // of the first token
  std::vector<int32_t> tokens;  // empty with from_last_sample
  bool from_last_sample = false;
  bool sample = false;  // choose the next token after the last of these
  int32_t count() const { return from_last_sample ? 1 : static_cast<int32_t>(tokens.size()); }
  bool operator==(const SlotTokens&) const = default;
};

// Order within a step: close, open, blocks, run.
struct StepPlan {
  uint64_t step = 0;
  std::vector<int32_t> close;
  std::vector<SlotOpen> open;
  std::vector<SlotBlocks> blocks;
  std::vector<SlotTokens> run;
  bool stop = false;  // the last plan: workers end after it

  int64_t token_count() const {
    int64_t n = 0;
    for (const SlotTokens& tokens : run) n += tokens.count();
    return n;
  }
  bool operator==(const StepPlan&) const = default;
};

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0.0f;
  bool operator==(const TokenLogprob&) const = default;
};

struct SampledToken {
  int32_t slot = 0;
  TokenLogprob chosen;            // logprob of the raw distribution
  std::vector<TokenLogprob> top;  // SlotSampling::top_logprobs of them, best first
  bool operator==(const SampledToken&) const = default;
};

struct StepResult {
  uint64_t step = 0;
  std::vector<SampledToken> sampled;  // one for each `run` entry with `sample`, in its order
  // A fault of this step (bad plan, NaN in the logits): the step did not count. Empty when all is well.
  std::string error;
};

// What a plan may refer to on a worker.
struct WorkerLimits {
  int32_t slots = 0;
  int32_t blocks = 0;  // KV cache blocks, the minimum over ranks
  int32_t block_tokens = 0;
  int32_t max_step_tokens = 0;  // tokens in one step
  int32_t max_context = 0;      // positions of one sequence
  int32_t vocab_size = 0;
};

}  // namespace octet
