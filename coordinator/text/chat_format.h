// Chat turns to token ids, for the formats that Octet knows: Llama 3, Llama 3.1 and later, ChatML. Which one is the
// checkpoint's own is read off its chat template; no template is ever run. Invariant: text in a message never becomes a
// special token, and for text without such names the ids are those of rendering the template and tokenising the result.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/text/tokenizer.h"

namespace octet {

struct ChatToolCall {
  std::string name = {};
  std::string arguments = {};  // a JSON object
};

struct ChatMessage {
  std::string role = {};  // system, user, assistant; Llama 3.1 and later also tool, which it calls ipython
  std::optional<std::string> content = {};    // may be absent only beside tool_calls, where it is not printed
  std::vector<ChatToolCall> tool_calls = {};  // of an assistant; Llama takes one per message
};

struct ChatRequest {
  std::vector<ChatMessage> messages = {};
  std::vector<std::string> tools = {};          // each a JSON object; printed into the prompt
  bool tools_in_user_message = true;            // false: into the system turn instead of the first user turn
  std::vector<std::string> builtin_tools = {};  // Llama 3.1: brave_search, wolfram_alpha, code_interpreter
  std::string date = {};                        // "26 Jul 2024"; empty: ChatFormat::default_date
  bool add_generation_prompt = true;            // ends with the beginning of the assistant's turn
};

// Today in the words of the templates, "%d %b %Y", local time. For callers of formats whose uses_today() is true.
std::string chat_date_today();

// Immutable; any number of threads may use one at the same time.
class ChatFormat {
 public:
  // FAILED_PRECONDITION, saying what is supported, for a model without a chat template or with one that Octet does not
  // know; such a model still serves plain prompts.
  static absl::StatusOr<ChatFormat> detect(const Tokenizer& tokenizer);

  // The ids of the whole prompt, BOS included where the template has one: encode nothing around it.
  // REQUIRES: the tokenizer is the one given to detect.
  // INVALID_ARGUMENT, naming the message, for what the format has no place for.
  absl::StatusOr<std::vector<int32_t>> render(const Tokenizer& tokenizer, const ChatRequest& request) const;

  // The tool calls that an answer to a request with tools is made of; none when it is plain text, as it always is in
  // formats without tools. `first_token` is the answer's first one: the text has no special tokens.
  std::vector<ChatToolCall> parse_reply(std::string_view reply, std::optional<int32_t> first_token) const;

  std::string_view name() const;  // "llama3", "llama3.1" or "chatml"
  // Ids that end an assistant's turn, beside the checkpoint's eos tokens.
  const std::vector<int32_t>& stop_token_ids() const { return stop_token_ids_; }
  // The date written into the prompt when the request has none; empty for formats without a date.
  const std::string& default_date() const { return default_date_; }
  // The template itself would ask the clock. render never does, so that a prompt is a function of the request: pass
  // chat_date_today() as the date for what the template's author meant.
  bool uses_today() const { return uses_today_; }

 private:
  enum class Kind { kLlama3, kLlama31, kChatMl };
  class Prompt;

  absl::Status recognise(const Tokenizer& tokenizer);
  absl::Status find_llama_tokens(const Tokenizer& tokenizer);
  absl::Status find_chatml_tokens(const Tokenizer& tokenizer);
  absl::Status check(const ChatRequest& request) const;
  absl::Status check_message(const ChatMessage& message, size_t index) const;
  absl::Status render_llama31(const ChatRequest& request, Prompt& prompt) const;
  absl::Status render_tool_call(const ChatRequest& request, const ChatToolCall& call, Prompt& prompt) const;
  void render_llama3(const ChatRequest& request, Prompt& prompt) const;
  void render_chatml(const ChatRequest& request, Prompt& prompt) const;
  void open_llama_turn(std::string_view role, Prompt& prompt) const;

  Kind kind_ = Kind::kChatMl;
  bool builtin_tools_ = false;  // the template knows them
  bool uses_today_ = false;
  std::string default_date_;
  std::optional<std::string> default_system_;  // ChatML: the system turn of a chat that has none
  std::optional<int32_t> bos_;                 // when the template prints it
  int32_t turn_start_ = -1;                    // <|start_header_id|>, <|im_start|>
  int32_t header_end_ = -1;                    // <|end_header_id|>
  int32_t turn_end_ = -1;                      // <|eot_id|>, <|im_end|>
  int32_t message_end_ = -1;                   // <|eom_id|>; only with builtin_tools_
  int32_t python_tag_ = -1;                    // <|python_tag|>; always with builtin_tools_
  std::vector<int32_t> stop_token_ids_;
};

}  // namespace octet
