#include "launch/generate_print.h"

#include <cmath>
#include <cstdio>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

void print_line(const std::string& text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  if (!text.empty() && text.back() != '\n') std::fputc('\n', stdout);
}

class TextPrinter : public AnswerPrinter {
 public:
  void take(const v1::GenerateResponse& response) override {
    if (response.text().empty()) return;
    std::fwrite(response.text().data(), 1, response.text().size(), stdout);
    std::fflush(stdout);
    last_ = response.text().back();
  }
  void end(bool) override {
    if (last_ != '\n' && last_ != '\0') std::fputc('\n', stdout);
    std::fflush(stdout);
  }

 private:
  char last_ = '\0';
};

// Several outputs come interleaved, so they are shown one after the other when all has come.
class OutputsPrinter : public AnswerPrinter {
 public:
  void take(const v1::GenerateResponse& response) override { texts_[response.output_index()] += response.text(); }
  void end(bool) override {
    for (const auto& [index, text] : texts_) {
      std::printf("--- output %u\n", index);
      print_line(text);
    }
    std::fflush(stdout);
  }

 private:
  std::map<uint32_t, std::string> texts_;
};

// Numbers are written here: nine digits give a float32 back exactly, and JSON has no infinities.
class JsonPrinter : public AnswerPrinter {
 public:
  void take(const v1::GenerateResponse& response) override {
    Output& output = outputs_[response.output_index()];
    prompt_.mutable_prompt_token_ids()->MergeFrom(response.prompt_token_ids());
    prompt_.mutable_prompt_tokens()->MergeFrom(response.prompt_tokens());
    if (response.has_usage()) *prompt_.mutable_usage() = response.usage();
    output.all.MergeFrom(response);  // strings: the last one; lists: all
    output.text += response.text();
  }
  void end(bool whole) override {
    if (!whole) return;
    for (const auto& [index, output] : outputs_) std::printf("%s\n", line(index, output).c_str());
  }

 private:
  struct Output {
    v1::GenerateResponse all;
    std::string text;
  };

  static std::string number(float value) { return std::isfinite(value) ? absl::StrFormat("%.9g", value) : "null"; }

  template <typename List, typename Write>
  static std::string list(const List& items, Write write) {
    std::string text = "[";
    for (const auto& item : items) absl::StrAppend(&text, text.size() == 1 ? "" : ", ", write(item));
    return text + "]";
  }

  static std::string top(const v1::TokenInfo& token) {
    return list(token.top(), [](const v1::TokenLogprob& other) {
      return absl::StrCat("{\"token_id\": ", other.token_id(), ", \"logprob\": ", number(other.logprob()), "}");
    });
  }

  // The logprobs of these tokens, and the alternatives if there are any. What follows nothing has null.
  template <typename Tokens>
  static std::string logprobs(const std::string& prefix, const Tokens& tokens) {
    std::string text = absl::StrCat(", \"", prefix, "logprobs\": ", list(tokens, [](const v1::TokenInfo& token) {
                                      return token.has_logprob() ? number(token.logprob()) : "null";
                                    }));
    bool has_top = false;
    for (const v1::TokenInfo& token : tokens) has_top |= token.top_size() > 0;
    if (has_top) absl::StrAppend(&text, ", \"", prefix, "top_logprobs\": ", list(tokens, top));
    return text;
  }

  std::string line(uint32_t index, const Output& output) const {
    const v1::GenerateResponse& all = output.all;
    const v1::Usage& usage = prompt_.usage();
    std::string line =
        absl::StrCat("{\"output_index\": ", index, ", \"prompt_token_ids\": ",
                     list(prompt_.prompt_token_ids(), [](int32_t id) { return absl::StrCat(id); }), ", \"token_ids\": ",
                     list(all.tokens(), [](const v1::TokenInfo& token) { return absl::StrCat(token.token_id()); }),
                     logprobs("", all.tokens()));
    if (!prompt_.prompt_tokens().empty()) line += logprobs("prompt_", prompt_.prompt_tokens());
    absl::StrAppend(&line, ", \"text\": ", quoted(output.text), ", \"finish_reason\": ", quoted(finish_reason(all)));
    if (all.has_stop_token_id()) absl::StrAppend(&line, ", \"stop_token_id\": ", all.stop_token_id());
    if (all.has_stop_string()) absl::StrAppend(&line, ", \"stop_string\": ", quoted(all.stop_string()));
    absl::StrAppend(&line, ", \"usage\": {\"prompt_tokens\": ", usage.prompt_tokens(),
                    ", \"cached_tokens\": ", usage.cached_tokens(),
                    ", \"completion_tokens\": ", usage.completion_tokens(), ", \"seed\": ", usage.seed(), "}}");
    return line;
  }

  static std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

  static std::string finish_reason(const v1::GenerateResponse& all) {
    switch (all.finish_reason()) {
      case v1::FINISH_REASON_STOP:
        return "stop";
      case v1::FINISH_REASON_LENGTH:
        return "length";
      case v1::FINISH_REASON_CANCELLED:
        return "cancelled";
      default:
        return "";
    }
  }

  v1::GenerateResponse prompt_;  // what belongs to all outputs
  std::map<uint32_t, Output> outputs_;
};

}  // namespace

std::unique_ptr<AnswerPrinter> make_text_printer(bool several_outputs) {
  if (several_outputs) return std::make_unique<OutputsPrinter>();
  return std::make_unique<TextPrinter>();
}

std::unique_ptr<AnswerPrinter> make_json_printer() { return std::make_unique<JsonPrinter>(); }

}  // namespace octet
