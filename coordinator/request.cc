// What a request must be like to be served. The second check of every number that will index memory or steer a loop:
// the services have looked at them too, with their own names for the fields.
#include "coordinator/request.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace octet {
namespace {

// The last token of an output is never run, so it needs no room in the cache.
int32_t blocks_needed(const Request& request, const WorkerLimits& limits) {
  const int64_t positions = static_cast<int64_t>(request.prompt.size()) + max_tokens_of(request, limits) - 1;
  return static_cast<int32_t>((positions + limits.block_tokens - 1) / limits.block_tokens);
}

absl::Status validate_tokens(const std::vector<int32_t>& tokens, const char* what, int32_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(what, " ", i, " is ", tokens[i], ", but the model's token ids are 0 to ", vocab_size - 1));
  }
  return absl::OkStatus();
}

// Comparisons are written so that NaN is refused too.
absl::Status validate_number(const char* name, float value, bool good, const char* remedy) {
  if (good && std::isfinite(value)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, " is ", value, ": give ", remedy));
}

absl::Status validate_penalties(const SlotSampling& sampling, int32_t vocab_size) {
  for (absl::Status status : {
           validate_number("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0.0f,
                           "a positive number, 1 for none"),
           validate_number("presence_penalty", sampling.presence_penalty, true, "a number, 0 for none"),
           validate_number("frequency_penalty", sampling.frequency_penalty, true, "a number, 0 for none"),
           validate_tokens(sampling.allowed_token_ids, "allowed token", vocab_size),
           validate_tokens(sampling.end_token_ids, "end token", vocab_size),
       }) {
    if (!status.ok()) return status;
  }
  for (const TokenBias& bias : sampling.logit_bias) {
    if (absl::Status status = validate_tokens({bias.token}, "biased token", vocab_size); !status.ok()) return status;
    absl::Status status = validate_number("a logit bias", bias.bias, true, "a number");
    if (!status.ok()) return status;
  }
  for (const std::vector<int32_t>& word : sampling.bad_words) {
    if (word.empty()) return absl::InvalidArgumentError("a bad word is empty: give at least one token");
    if (absl::Status status = validate_tokens(word, "bad word's token", vocab_size); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status validate_choice(const SlotSampling& sampling) {
  for (absl::Status status : {
           validate_number("temperature", sampling.temperature, sampling.temperature >= 0.0f,
                           "0 (greedy) or a positive number"),
           validate_number("top_p", sampling.top_p, sampling.top_p > 0.0f && sampling.top_p <= 1.0f,
                           "a number above 0 and up to 1 (off)"),
           validate_number("min_p", sampling.min_p, sampling.min_p >= 0.0f && sampling.min_p <= 1.0f,
                           "a number from 0 (off) to 1"),
       }) {
    if (!status.ok()) return status;
  }
  if (sampling.top_k >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("top_k is ", sampling.top_k, ": give 0 (off) or a positive number"));
}

absl::Status validate_alternatives(int32_t asked, const WorkerLimits& limits) {
  const int32_t most = std::min(kMaxTopLogprobs, limits.vocab_size);
  if (asked >= 0 && asked <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(asked, " alternatives were asked for each token: give a number from 0 to ", most));
}

absl::Status validate_counts(const Request& request) {
  if (request.outputs < 1 || request.outputs > kMaxOutputs) {
    return absl::InvalidArgumentError(
        absl::StrCat(request.outputs, " outputs were asked for: give a number from 1 to ", kMaxOutputs));
  }
  if (request.priority < 0 || request.priority > kLowestPriority) {
    return absl::InvalidArgumentError(
        absl::StrCat("priority is ", request.priority, ": give a class from 0, the most urgent, to ", kLowestPriority));
  }
  return absl::OkStatus();
}

absl::Status validate_lengths(const Request& request, const WorkerLimits& limits) {
  const int32_t min_tokens = request.sampling.min_tokens;
  if (request.max_tokens.has_value() && *request.max_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens is ", *request.max_tokens,
                                                   ": give at least 1, or leave it out for the rest of the context"));
  }
  if (min_tokens < 0) {
    return absl::InvalidArgumentError(absl::StrCat("min_tokens is ", min_tokens, ": give 0 or a positive number"));
  }
  if (request.max_tokens.has_value() && min_tokens > *request.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("min_tokens is ", min_tokens, ", more than max_tokens, which is ",
                                                   *request.max_tokens, ": lower the one or raise the other"));
  }
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  if (prompt_tokens >= limits.max_context) {
    return absl::OutOfRangeError(absl::StrCat("the prompt has ", prompt_tokens, " tokens, but the context holds ",
                                              limits.max_context,
                                              " and one must be left for the answer: shorten the prompt to ",
                                              limits.max_context - 1, " tokens or raise --max-context"));
  }
  if (min_tokens > limits.max_context - prompt_tokens) {
    return absl::OutOfRangeError(
        absl::StrCat("min_tokens is ", min_tokens, ", but the context of ", limits.max_context, " tokens has room for ",
                     limits.max_context - prompt_tokens,
                     " after the prompt: lower min_tokens, shorten the prompt or raise --max-context"));
  }
  return absl::OkStatus();
}

absl::Status validate_blocks(const Request& request, const WorkerLimits& limits) {
  const int32_t needed = blocks_needed(request, limits);
  if (needed <= limits.blocks) return absl::OkStatus();
  const int64_t most_tokens =
      static_cast<int64_t>(limits.blocks) * limits.block_tokens + 1 - static_cast<int64_t>(request.prompt.size());
  const std::string remedy = most_tokens < 1                  ? "shorten the prompt"
                             : request.max_tokens.has_value() ? absl::StrCat("lower max_tokens to ", most_tokens)
                                                              : absl::StrCat("give max_tokens, up to ", most_tokens);
  return absl::OutOfRangeError(absl::StrCat(needed, " blocks of ", limits.block_tokens,
                                            " tokens needed for a prompt of ", request.prompt.size(),
                                            " and max_tokens ", max_tokens_of(request, limits), ", ", limits.blocks,
                                            " exist: ", remedy, " or raise --kv-memory"));
}

}  // namespace

int32_t max_tokens_of(const Request& request, const WorkerLimits& limits) {
  const int32_t rest_of_context = limits.max_context - static_cast<int32_t>(request.prompt.size());
  return std::min(request.max_tokens.value_or(rest_of_context), rest_of_context);
}

absl::Status validate_request(const Request& request, const WorkerLimits& limits) {
  if (request.prompt.empty()) {
    return absl::InvalidArgumentError("the prompt is empty: give at least one token");
  }
  // Lengths first: a prompt that is far too long is refused before its tokens are read.
  if (absl::Status status = validate_lengths(request, limits); !status.ok()) return status;
  if (absl::Status status = validate_counts(request); !status.ok()) return status;
  for (absl::Status status :
       {validate_tokens(request.prompt, "prompt token", limits.vocab_size),
        validate_penalties(request.sampling, limits.vocab_size), validate_choice(request.sampling),
        validate_alternatives(request.sampling.top_logprobs, limits),
        validate_alternatives(request.prompt_logprobs.value_or(0), limits)}) {
    if (!status.ok()) return status;
  }
  return validate_blocks(request, limits);
}

}  // namespace octet
