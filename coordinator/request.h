// Request and TokenEvent: what goes into the scheduler and what comes out, as plain data. Text lives further up.
#pragma once

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "worker/step_plan.h"

namespace octet {

using RequestId = uint64_t;

// Alternatives that a request may ask for beside each token.
constexpr int32_t kMaxTopLogprobs = 20;
// Outputs that a request may ask for.
constexpr int32_t kMaxOutputs = 64;
// Priority classes are 0, the most urgent, to this one.
constexpr int32_t kLowestPriority = 9;
constexpr int32_t kDefaultPriority = 4;
// A request that has waited this long ranks with those of the class above that arrive now.
constexpr int64_t kAgingMs = 30'000;
constexpr int64_t kNoDeadline = std::numeric_limits<int64_t>::max();

// What an output may say next, token by token: constrained output. Pure; one for each output, made from the request's.
class TokenConstraint {
 public:
  virtual ~TokenConstraint() = default;
  virtual std::unique_ptr<TokenConstraint> clone() const = 0;
  // The output has grown by this token.
  virtual void advance(int32_t token) = 0;
  // Sets bit (token % 32) of words[token / 32] for every token that may come next, at least one. words is zeroed.
  virtual void allow(std::span<uint32_t> words) const = 0;
};

struct Request {
  RequestId id = 0;                        // given by the engine, never reused
  std::vector<int32_t> prompt;             // at least one token id, all inside the vocabulary
  SlotSampling sampling;                   // of each output, but for its output_index; seed already chosen
  int32_t outputs = 1;                     // how many completions of the prompt; output i has output_index i
  std::optional<int32_t> max_tokens;       // of each output; default, and at most: the rest of the context
  std::optional<int32_t> prompt_logprobs;  // alternatives beside each prompt token's own logprob; absent: none at all
  int32_t priority = kDefaultPriority;
  int64_t deadline_ms = kNoDeadline;  // on the clock of Scheduler::plan()
  std::string cache_salt;             // only requests with an equal one share cached blocks
  std::shared_ptr<const TokenConstraint> constraint;
};

// Whether such a request can be served at all, however long it waits. INVALID_ARGUMENT (ids outside the vocabulary,
// empty prompt, numbers out of range) or OUT_OF_RANGE (longer than the context, more blocks than exist), with the
// numbers and the remedy. A function of its arguments: any thread may call it.
absl::Status validate_request(const Request& request, const WorkerLimits& limits);

// Tokens that each output may have: what was asked for, or what the context leaves. REQUIRES: a valid request.
int32_t max_tokens_of(const Request& request, const WorkerLimits& limits);

enum class FinishReason : uint8_t {
  kNone,
  kEndToken,  // the event's token is the end token that was met
  kLength,    // max_tokens, or the context is full
  kCancelled,
  kDeadline,
  kError,
  kStopped,  // whoever reads the output has seen its end: a stop string
};

// One token of one output, or its end, or logprobs of the prompt. Exactly one event with a finish reason per output,
// its last; it may carry a token.
struct TokenEvent {
  RequestId request = 0;
  uint32_t output_index = 0;
  std::optional<TokenLogprob> token;  // absent in a terminal event without a token, and beside prompt logprobs
  std::vector<TokenLogprob> top;
  // Logprobs of the next prompt tokens, in order; the first one is of the prompt's second token. With output 0, before
  // its first token.
  std::vector<SampledToken> prompt_logprobs;
  FinishReason finish = FinishReason::kNone;
  int32_t prompt_tokens = 0;      // usage, set in the terminal event
  int32_t cached_tokens = 0;      // of them, found in the prefix cache when the output was first admitted
  int32_t completion_tokens = 0;  // tokens of this output that were reported, the end token included
  std::string error;              // with kError
};

}  // namespace octet
