// StepPlan: the contract between coordinator and worker. Plain integers and parameters: what every rank runs in one
// step. Workers keep of a sequence only a numbered slot, which the plan opens, appends to and closes, so a plan carries
// what changed. Includes nothing of ours.
//
// Plans run one after the other, in the order of their numbers. The next one may be sent while one runs: it names a
// token that is not known yet by its slot, and may take blocks that an earlier plan still writes, because it runs later.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace octet {

struct TokenBias {
  int32_t token = 0;
  float bias = 0.0f;
  bool operator==(const TokenBias&) const = default;
};

// How the tokens of a slot are chosen, in the order of application. temperature 0 is greedy. Defaults mean "off".
struct SlotSampling {
  // Of every token that the prompt or the completion holds, the logit is divided by this if positive, else multiplied.
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;   // taken from the logit of every token that the completion holds
  float frequency_penalty = 0.0f;  // the same, times how often it does
  std::vector<TokenBias> logit_bias;
  std::vector<int32_t> allowed_token_ids;       // nothing else is chosen; empty: anything may be
  std::vector<std::vector<int32_t>> bad_words;  // runs of tokens that are never completed
  // End tokens are not chosen before the completion has min_tokens tokens.
  int32_t min_tokens = 0;
  std::vector<int32_t> end_token_ids;
  float temperature = 0.0f;
  int32_t top_k = 0;  // 0: all
  float top_p = 1.0f;
  float min_p = 0.0f;
  uint64_t seed = 0;  // random numbers are counter-based: key (seed, output_index, position)
  uint32_t output_index = 0;
  int32_t top_logprobs = 0;  // how many alternatives to report, beside the sampled token's own logprob

  // Whether a choice depends on the tokens before it, beyond the logits.
  bool reads_history() const {
    return repetition_penalty != 1.0f || presence_penalty != 0.0f || frequency_penalty != 0.0f || !bad_words.empty();
  }
  bool operator==(const SlotSampling&) const = default;
};

// A slot begins to hold a sequence. REQUIRES: it was never opened, or closed in an earlier plan or in this one.
struct SlotOpen {
  int32_t slot = 0;
  SlotSampling sampling;
  int32_t prompt_tokens = 0;     // tokens at positions from here on are the completion's
  int32_t position = 0;          // of the first token that will run: the slot's first blocks hold what comes before it
  std::vector<int32_t> history;  // the tokens before `position`, if sampling.reads_history(); else empty
  bool operator==(const SlotOpen&) const = default;
};

// A slot's block table grows by a cache block. Blocks may be in the tables of several slots; a block that a slot will
// write is in no other open slot's.
struct SlotBlock {
  int32_t slot = 0;
  int32_t block = 0;
  bool operator==(const SlotBlock&) const = default;
};

// All layers' keys and values of block `from` are copied to block `to`, another one, before anything runs. No copy of a
// plan reads or writes what another one writes.
struct BlockCopy {
  int32_t from = 0;
  int32_t to = 0;
  bool operator==(const BlockCopy&) const = default;
};

// What the slot may sample in this step: bit (token % 32) of word token / 32 is set for tokens that may be chosen.
// Where allowed_token_ids allows none of them, this alone decides.
struct SlotMask {
  int32_t slot = 0;
  std::vector<uint32_t> words;  // [(vocab_size + 31) / 32], at least one bit inside the vocabulary set
  bool operator==(const SlotMask&) const = default;
};

// A run of a slot's tokens: `tokens`, or the one token that the slot sampled last when `from_last_sample`.
// Prefill and decode are the same thing: some tokens of a sequence, from a position.
struct SlotTokens {
  int32_t slot = 0;
  int32_t position = 0;         // of the first token
  std::vector<int32_t> tokens;  // empty with from_last_sample
  bool from_last_sample = false;
  bool sample = false;  // choose the next token after the last of these
  // Report, for each of these tokens, the logprob of the token that follows it: prompt logprobs.
  bool score = false;
  int32_t score_top = 0;    // and of so many alternatives
  int32_t next_token = -1;  // with score: what follows the last of `tokens`; -1: nothing is known to
  int32_t count() const { return from_last_sample ? 1 : static_cast<int32_t>(tokens.size()); }
  // How many tokens this run scores.
  int32_t scores() const { return score ? count() - (next_token < 0 ? 1 : 0) : 0; }
  bool operator==(const SlotTokens&) const = default;
};

// Order within a step: close, open, blocks, copies, run.
struct StepPlan {
  uint64_t step = 0;
  std::vector<int32_t> close;
  std::vector<SlotOpen> open;
  std::vector<SlotBlock> blocks;
  std::vector<BlockCopy> copies;
  std::vector<SlotMask> masks;  // of slots that sample in this step
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
  std::vector<TokenLogprob> top;  // the alternatives that were asked for, best first
  bool operator==(const SampledToken&) const = default;
};

// What a step cost one rank.
struct StepTiming {
  double run_seconds = 0.0;
  double collective_seconds = 0.0;  // of them, inside collectives: waiting for other ranks included
};

struct StepResult {
  uint64_t step = 0;
  std::vector<SampledToken> sampled;  // one for each `run` entry with `sample`, in its order
  std::vector<SampledToken> scored;   // SlotTokens::scores() for each `run` entry, in its order: what really follows
  // A fault of this step (bad plan, NaN in the logits): the step did not count. Empty when all is well.
  std::string error;
  std::vector<StepTiming> timings;  // by rank; a worker gives its own
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
