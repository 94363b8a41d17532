#include "coordinator/openai_answer.h"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_format.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/utf8.h"
#include "kernels/check.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.pb.h"

namespace octet {
namespace {

using Json = nlohmann::ordered_json;

// Below all logprobs, for what JSON has no number for: OpenAI's own way to say "very unlikely".
constexpr float kLeastLogprob = -9999.0f;

// The double with the fewest digits that reads back as the same float.
Json number_of(float logprob) {
  char buffer[64];
  const float finite = logprob >= kLeastLogprob ? logprob : kLeastLogprob;  // NaN as well
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, finite).ptr;
  double shortest = finite;
  std::from_chars(buffer, end, shortest);
  return shortest;
}

std::string completion_text_of(std::string_view bytes) {
  if (is_valid_utf8(bytes)) return std::string(bytes);
  std::string text = "bytes:";
  for (const char byte : bytes) absl::StrAppendFormat(&text, "\\x%02x", static_cast<unsigned char>(byte));
  return text;
}

int64_t characters_of(std::string_view text) {
  return std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

}  // namespace

OpenAiAnswer::OpenAiAnswer(const Shape& shape) : shape_(shape), prompts_(shape.prompts) {
  for (Prompt& prompt : prompts_) prompt.outputs.resize(shape.outputs);
}

void OpenAiAnswer::add(size_t prompt_index, const v1::GenerateResponse& message) {
  OCTET_CHECK(prompt_index < prompts_.size() && message.output_index() < shape_.outputs, "an answer to no prompt");
  Prompt& prompt = prompts_[prompt_index];
  Output& output = prompt.outputs[message.output_index()];
  prompt_tokens_ += message.prompt_token_ids_size();
  completion_tokens_ += message.tokens_size();
  output.text.append(message.text());
  output.finish_reason = message.finish_reason();
  if (!output.first_token.has_value() && message.tokens_size() > 0) output.first_token = message.tokens(0).token_id();
  if (!shape_.logprobs) return;
  const auto keep = [](const v1::TokenInfo& info, std::vector<Token>* tokens) {
    Token& token = tokens->emplace_back();
    token.id = info.token_id();
    if (info.has_logprob()) token.logprob = info.logprob();
    for (const v1::TokenLogprob& other : info.top()) token.top.push_back({other.token_id(), other.logprob()});
  };
  for (const v1::TokenInfo& info : message.prompt_tokens()) keep(info, &prompt.tokens);
  for (const v1::TokenInfo& info : message.tokens()) keep(info, &output.tokens);
}

// Writes one answer.
class OpenAiAnswer::Writer {
 public:
  Writer(const OpenAiAnswer& answer, const Names& names, const ServedModel& model)
      : answer_(answer), names_(names), model_(model) {}

  Json body() const {
    Json choices = Json::array();
    for (const Prompt& prompt : answer_.prompts_) {
      for (const Output& output : prompt.outputs) {
        choices.push_back(chat() ? chat_choice(choices.size(), output)
                                 : completion_choice(choices.size(), prompt, output));
      }
    }
    return {{"id", cat(chat() ? "chatcmpl-" : "cmpl-", names_.key)},
            {"object", chat() ? "chat.completion" : "text_completion"},
            {"created", names_.created},
            {"model", model_.name},
            {"system_fingerprint", names_.system_fingerprint},
            {"choices", std::move(choices)},
            {"usage",
             {{"prompt_tokens", answer_.prompt_tokens_},
              {"completion_tokens", answer_.completion_tokens_},
              {"total_tokens", answer_.prompt_tokens_ + answer_.completion_tokens_}}}};
  }

 private:
  bool chat() const { return answer_.shape_.endpoint == OpenAiEndpoint::kChatCompletions; }

  Json chat_choice(size_t index, const Output& output) const {
    const std::vector<ChatToolCall> calls = answer_.shape_.tools && model_.chat.ok()
                                                ? model_.chat->parse_reply(output.text, output.first_token)
                                                : std::vector<ChatToolCall>();
    Json message = {{"role", "assistant"}, {"content", output.text}, {"refusal", nullptr}};
    if (!calls.empty()) {
      message["content"] = nullptr;
      message["tool_calls"] = tool_calls(index, calls);
    }
    const std::string finish = finish_reason(output);
    return {{"index", index},
            {"message", std::move(message)},
            {"logprobs", answer_.shape_.logprobs ? chat_logprobs(output) : Json()},
            {"finish_reason", !calls.empty() && finish == "stop" ? "tool_calls" : finish}};
  }

  Json tool_calls(size_t choice, const std::vector<ChatToolCall>& calls) const {
    Json list = Json::array();
    for (const ChatToolCall& call : calls) {
      list.push_back({{"id", cat("call_", names_.key, "_", choice, "_", list.size())},
                      {"type", "function"},
                      {"function", {{"name", call.name}, {"arguments", call.arguments}}}});
    }
    return list;
  }

  Json completion_choice(size_t index, const Prompt& prompt, const Output& output) const {
    return {{"index", index},
            {"text", output.text},
            {"logprobs", answer_.shape_.logprobs ? completion_logprobs(prompt, output) : Json()},
            {"finish_reason", finish_reason(output)}};
  }

  static std::string finish_reason(const Output& output) {
    OCTET_CHECK(output.finish_reason != v1::FINISH_REASON_UNSPECIFIED, "an answer before its end");
    return output.finish_reason == v1::FINISH_REASON_LENGTH ? "length" : "stop";
  }

  Json chat_token(int32_t id, float logprob) const {
    const std::string_view bytes = model_.tokenizer.bytes_of(id);
    Json values = Json::array();
    for (const char byte : bytes) values.push_back(static_cast<unsigned char>(byte));
    return {{"token", to_valid_utf8(bytes)}, {"logprob", number_of(logprob)}, {"bytes", std::move(values)}};
  }

  Json chat_logprobs(const Output& output) const {
    Json content = Json::array();
    for (const Token& token : output.tokens) {
      Json top = Json::array();
      for (const TokenLogprob& other : token.top) top.push_back(chat_token(other.token, other.logprob));
      Json entry = chat_token(token.id, token.logprob.value_or(kLeastLogprob));
      entry["top_logprobs"] = std::move(top);
      content.push_back(std::move(entry));
    }
    return {{"content", std::move(content)}, {"refusal", nullptr}};
  }

  Json completion_logprobs(const Prompt& prompt, const Output& output) const {
    Json texts = Json::array(), logprobs = Json::array(), tops = Json::array(), offsets = Json::array();
    const int64_t characters = characters_of(output.text);
    int64_t offset = 0;
    Utf8Stream stream;
    const auto add = [&](const Token& token) {
      const std::string_view bytes = model_.tokenizer.bytes_of(token.id);
      texts.push_back(completion_text_of(bytes));
      logprobs.push_back(token.logprob.has_value() ? number_of(*token.logprob) : Json());
      tops.push_back(token.logprob.has_value() ? completion_top(token) : Json());
      offsets.push_back(std::min(offset, characters));
      if (!model_.tokenizer.is_special(token.id)) offset += characters_of(stream.push(bytes));
    };
    std::ranges::for_each(prompt.tokens, add);
    std::ranges::for_each(output.tokens, add);
    return {{"tokens", std::move(texts)},
            {"token_logprobs", std::move(logprobs)},
            {"top_logprobs", std::move(tops)},
            {"text_offset", std::move(offsets)}};
  }

  // The best tokens, and the chosen one where it is not among them.
  Json completion_top(const Token& token) const {
    Json top = Json::object();
    for (const TokenLogprob& other : token.top) {
      top.emplace(completion_text_of(model_.tokenizer.bytes_of(other.token)), number_of(other.logprob));
    }
    top.emplace(completion_text_of(model_.tokenizer.bytes_of(token.id)), number_of(*token.logprob));
    return top;
  }

  const OpenAiAnswer& answer_;
  const Names& names_;
  const ServedModel& model_;
};

Json OpenAiAnswer::body(const Names& names, const ServedModel& model) const {
  return Writer(*this, names, model).body();
}

OpenAiError openai_error_of(const absl::Status& status) {
  constexpr char kOfTheRequest[] = "invalid_request_error";
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
      return {400, kOfTheRequest, "invalid_value"};
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnimplemented:
      return {400, kOfTheRequest, "unsupported_value"};
    case absl::StatusCode::kOutOfRange:
      return {400, kOfTheRequest, "context_length_exceeded"};
    case absl::StatusCode::kNotFound:
      return {404, kOfTheRequest, "model_not_found"};
    default:
      return {500, "server_error", absl::AsciiStrToLower(absl::StatusCodeToString(status.code()))};
  }
}

}  // namespace octet
