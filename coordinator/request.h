// Request and TokenEvent: what goes into the scheduler and what comes out, as plain data. Text lives further up.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "worker/step_plan.h"

namespace octet {

using RequestId = uint64_t;

// Alternatives that a request may ask for beside each token.
constexpr int32_t kMaxTopLogprobs = 20;

struct Request {
  RequestId id = 0;                   // given by the engine, never reused
  std::vector<int32_t> prompt;        // at least one token id, all inside the vocabulary
  SlotSampling sampling;              // seed already chosen
  std::optional<int32_t> max_tokens;  // default, and at most: the rest of the context
  // The first min_tokens tokens do not end the output, whatever they are: the first end token that counts is token
  // number min_tokens + 1. An end token among the first ones is reported and run like any other (the sampler does not
  // mask it).
  int32_t min_tokens = 0;
  std::vector<int32_t> end_token_ids;  // EOS (unless ignored) and the request's stop token ids
};

enum class FinishReason : uint8_t {
  kNone,
  kEndToken,  // the event's token is the end token that was met
  kLength,    // max_tokens, or the context is full
  kCancelled,
  kError,
};

// One token of one output, or its end. Exactly one event with a finish reason per output, its last; it may carry a
// token.
struct TokenEvent {
  RequestId request = 0;
  uint32_t output_index = 0;
  std::optional<TokenLogprob> token;  // absent in a terminal event without a token (cancel, error)
  std::vector<TokenLogprob> top;
  FinishReason finish = FinishReason::kNone;
  int32_t prompt_tokens = 0;      // usage, set in the terminal event
  int32_t completion_tokens = 0;  // tokens of this output that were reported, the end token included
  std::string error;              // with kError
};

}  // namespace octet
