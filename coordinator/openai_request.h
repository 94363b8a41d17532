// OpenAI's request bodies, with vLLM's extensions, as GenerateRequests. Wrong types are refused here, wrong values by
// accept_request(); both in OpenAI's names. null is the same as absent.
//
// Read:    both: model (may be absent), n, temperature, top_p, max_tokens, stop, seed, presence_penalty,
//          frequency_penalty, logit_bias; top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids,
//          include_stop_str_in_output, bad_words, allowed_token_ids.
//          chat: messages, tools, tool_choice (none, auto), max_completion_tokens, logprobs, top_logprobs.
//          completions: prompt (text, token ids, or several of one kind), echo, logprobs.
// Refused: what would change the answer and is not there: streams, constrained output, other templates, other media,
// ... Ignored: everything else, as OpenAI's own clients send fields that servers need not know. Where a body does not
// say, the defaults given here count, then the model's generation_config.json; for completions without any max_tokens,
// OpenAI's 16.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/openai_answer.h"
#include "coordinator/served_model.h"
#include "nlohmann/json_fwd.hpp"

namespace octet::v1 {
class GenerateRequest;
}

namespace octet {

constexpr size_t kMaxOpenAiPrompts = 2048;

// Of bodies that do not say.
struct SamplingDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<int32_t> top_k;
  std::optional<int32_t> max_tokens;
};

struct OpenAiRequest {
  std::vector<v1::GenerateRequest> prompts;  // at least one
  bool tools = false;                        // the answer may be tool calls
};

// INVALID_ARGUMENT that names all fields at fault, as bad_request(); NOT_FOUND for another model's name.
absl::StatusOr<OpenAiRequest> read_openai_request(OpenAiEndpoint endpoint, const nlohmann::ordered_json& body,
                                                  const SamplingDefaults& defaults, const ServedModel& model);

// What accept_request() said of prompts[prompt], in OpenAI's names.
absl::Status in_openai_names(const absl::Status& status, OpenAiEndpoint endpoint, size_t prompt, size_t prompts);

}  // namespace octet
