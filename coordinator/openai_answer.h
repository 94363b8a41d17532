// OpenAiAnswer: what the prompts of an OpenAI request were answered with, as the object that OpenAI answers with:
// chat.completion or text_completion. Of a request with several prompts, choice i is output i % n of prompt i / n.
//
// Logprobs have one entry for each token that usage counts, a token that ended the output included; those of a prompt
// come first where it is echoed, its first token with null. A token that is no whole characters is U+FFFD beside its
// bytes in a chat, and "bytes:\xe2\x82" in a completion, which has no other place for them. text_offset counts
// characters of the text. Numbers are the shortest that read back as the same float. How much of a prompt came from the
// cache is not told: it is not a function of the request.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/served_model.h"
#include "nlohmann/json_fwd.hpp"
#include "worker/step_plan.h"

namespace octet::v1 {
class GenerateResponse;
}

namespace octet {

enum class OpenAiEndpoint { kChatCompletions, kCompletions };

// One thread at a time.
class OpenAiAnswer {
 public:
  // What an answer looks like.
  struct Shape {
    OpenAiEndpoint endpoint = OpenAiEndpoint::kChatCompletions;
    size_t prompts = 0;
    size_t outputs = 1;     // of each prompt
    bool tools = false;     // outputs may be tool calls
    bool logprobs = false;  // are told
  };
  struct Names {
    std::string key;  // unique among answers: ids are made of it
    int64_t created = 0;
    std::string system_fingerprint;
  };

  OpenAiAnswer() = default;
  explicit OpenAiAnswer(const Shape& shape);

  // The next message of a prompt, as GenerateOutputs makes them. REQUIRES: prompt < shape.prompts.
  void add(size_t prompt, const v1::GenerateResponse& message);

  // REQUIRES: every output has ended.
  nlohmann::ordered_json body(const Names& names, const ServedModel& model) const;

  // Of the messages so far.
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t completion_tokens() const { return completion_tokens_; }

 private:
  struct Token {
    int32_t id = 0;
    std::optional<float> logprob;
    std::vector<TokenLogprob> top;
  };
  struct Output {
    std::string text;
    std::optional<int32_t> first_token;
    std::vector<Token> tokens;  // with logprobs only
    int finish_reason = 0;      // a v1::FinishReason
  };
  struct Prompt {
    std::vector<Token> tokens;  // with logprobs of the prompt only
    std::vector<Output> outputs;
  };
  class Writer;

  Shape shape_;
  std::vector<Prompt> prompts_;
  int64_t prompt_tokens_ = 0;
  int64_t completion_tokens_ = 0;
};

// How OpenAI tells an error.
struct OpenAiError {
  int http_status = 0;  // 4xx for what the request brought about, else 500
  std::string type;     // "invalid_request_error", "server_error"
  std::string code;     // "invalid_value", ...
};
// REQUIRES: status is not OK.
OpenAiError openai_error_of(const absl::Status& status);

}  // namespace octet
