// Request and TokenEvent: what goes into the scheduler and what comes out, as plain data. Text lives further up.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "worker/step_plan.h"

namespace octet {

using RequestId = uint64_t;

struct Request {
  RequestId id = 0;                       // given by the engine, never reused
  std::vector<int32_t> prompt;            // at least one token id, all inside the vocabulary
  SlotSampling sampling;                  // seed already chosen
  std::optional<int32_t> max_tokens;      // default: the rest of the context
  int32_t min_tokens = 0;                 // end tokens are not honoured before this many
  std::vector<int32_t> end_token_ids;     // EOS (unless ignored) and the request's stop token ids
};

enum class FinishReason : uint8_t { kNone, kEndToken, kLength, kCancelled, kError };

// One token of one output, or its end. Exactly one event with a finish reason per output; it may carry a token too.
struct TokenEvent {
  RequestId request = 0;
  uint32_t output_index = 0;
  std::optional<TokenLogprob> token;      // absent in a terminal event without a token (cancel, error)
  std::vector<TokenLogprob> top;
  FinishReason finish = FinishReason::kNone;
  int32_t prompt_tokens = 0;              // usage, set in the terminal event
  int32_t completion_tokens = 0;
  std::string error;                      // with kError
};

}  // namespace octet
