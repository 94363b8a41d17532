#include "coordinator/text/chat_format.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/chat_json.h"
#include "coordinator/text/chat_template.h"
#include "coordinator/text/tool_calls.h"
#include "coordinator/text/utf8.h"

namespace octet {
namespace {

using Words = std::set<std::string>;

constexpr std::string_view kSupported =
    "chat formats that Octet knows: Llama 3, Llama 3.1/3.2/3.3, and ChatML without tools. Plain prompts work with this "
    "model";

// The parts of the Llama 3.1 template, shared between recognising it and printing what it prints.
constexpr std::string_view kEnvironment = "Environment: ipython\n";
constexpr std::string_view kToolsPrefix = "Tools: ";
constexpr std::string_view kKnowledgeDate = "Cutting Knowledge Date: December 2023\n";
constexpr std::string_view kTodayPrefix = "Today Date: ";
constexpr std::string_view kSystemTools =
    "You have access to the following functions. To call a function, please respond with JSON for a function call.";
constexpr std::string_view kUserTools1 =
    "Given the following functions, please respond with a JSON for a function call ";
constexpr std::string_view kUserTools2 = "with its proper arguments that best answers the given prompt.\n\n";
constexpr std::string_view kToolAnswer =
    R"(Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.)";
constexpr std::string_view kNoVariables = "Do not use variables.\n\n";
constexpr std::string_view kCallName = "{\"name\": \"";
constexpr std::string_view kCallComma = "\", ";
constexpr std::string_view kCallParameters = "\"parameters\": ";

const Words& llama31_literals() {
  static const Words* const literals = [] {
    auto* words = new Words{"role",
                            "content",
                            "system",
                            "user",
                            "tool",
                            "ipython",
                            "tool_calls",
                            "equalto",
                            "code_interpreter",
                            "%d %b %Y",
                            "",
                            ", ",
                            "\n\n",
                            "}",
                            ")",
                            ".call(",
                            "=\"",
                            "\"",
                            "<|eot_id|>",
                            "<|eom_id|>",
                            "<|python_tag|>",
                            "<|start_header_id|>",
                            "<|end_header_id|>\n\n",
                            "<|start_header_id|>system<|end_header_id|>\n\n",
                            "<|start_header_id|>user<|end_header_id|>\n\n",
                            "<|start_header_id|>assistant<|end_header_id|>\n\n",
                            "<|start_header_id|>ipython<|end_header_id|>\n\n",
                            "Cannot put tools in the first user message when there's no first user message!",
                            "This model only supports single tool-calls at once!"};
    for (const std::string_view text :
         {kEnvironment, kToolsPrefix, kKnowledgeDate, kTodayPrefix, kSystemTools, kUserTools1, kUserTools2, kToolAnswer,
          kNoVariables, kCallName, kCallComma, kCallParameters}) {
      words->emplace(text);
    }
    return words;
  }();
  return *literals;
}

const Words& llama31_words() {
  static const auto* const words = new Words{"add_generation_prompt",
                                             "and",
                                             "arg_name",
                                             "arg_val",
                                             "arguments",
                                             "bos_token",
                                             "builtin_tools",
                                             "content",
                                             "custom_tools",
                                             "date_string",
                                             "defined",
                                             "elif",
                                             "else",
                                             "endfor",
                                             "endif",
                                             "first_user_message",
                                             "for",
                                             "function",
                                             "if",
                                             "in",
                                             "indent",
                                             "is",
                                             "items",
                                             "iterable",
                                             "join",
                                             "last",
                                             "length",
                                             "loop",
                                             "mapping",
                                             "message",
                                             "messages",
                                             "name",
                                             "none",
                                             "not",
                                             "or",
                                             "raise_exception",
                                             "reject",
                                             "role",
                                             "set",
                                             "strftime_now",
                                             "system_message",
                                             "t",
                                             "tojson",
                                             "tool_call",
                                             "tool_calls",
                                             "tools",
                                             "tools_in_user_message",
                                             "trim",
                                             "true"};
  return *words;
}

const Words& llama3_literals() {
  static const auto* const literals = new Words{"",
                                                "role",
                                                "content",
                                                "<|start_header_id|>",
                                                "<|end_header_id|>\n\n",
                                                "<|eot_id|>",
                                                "<|start_header_id|>assistant<|end_header_id|>\n\n"};
  return *literals;
}

const Words& llama3_words() {
  static const auto* const words = new Words{"add_generation_prompt",
                                             "bos_token",
                                             "content",
                                             "defined",
                                             "endfor",
                                             "endif",
                                             "false",
                                             "for",
                                             "if",
                                             "in",
                                             "index0",
                                             "is",
                                             "loop",
                                             "loop_messages",
                                             "message",
                                             "messages",
                                             "not",
                                             "role",
                                             "set",
                                             "trim"};
  return *words;
}

const Words& chatml_literals() {
  static const auto* const literals = new Words{
      "", "role", "content", "system", "\n", "<|im_start|>", "<|im_end|>", "<|im_end|>\n", "<|im_start|>assistant\n"};
  return *literals;
}

const Words& chatml_words() {
  static const auto* const words = new Words{"add_generation_prompt",
                                             "and",
                                             "content",
                                             "defined",
                                             "endfor",
                                             "endif",
                                             "false",
                                             "first",
                                             "for",
                                             "if",
                                             "in",
                                             "is",
                                             "loop",
                                             "message",
                                             "messages",
                                             "not",
                                             "role",
                                             "set"};
  return *words;
}

constexpr std::string_view kChatMlSystem = "<|im_start|>system\n";
constexpr std::string_view kChatMlEnd = "<|im_end|>\n";

// The literal that prints a whole system turn, taken out of `literals`; its text. nullopt when there is none.
std::optional<std::string> take_default_system(Words& literals) {
  for (const std::string& literal : literals) {
    std::string_view text = literal;
    if (!consume_prefix(text, kChatMlSystem) || !consume_suffix(text, kChatMlEnd)) continue;
    if (text.find("<|im_") != std::string_view::npos) continue;
    std::string system(text);
    literals.erase(literal);
    return system;
  }
  return std::nullopt;
}

absl::Status unknown_template(std::string_view why) {
  return absl::FailedPreconditionError(cat(why, "; ", kSupported));
}

absl::Status invalid(std::string_view what) { return absl::InvalidArgumentError(as_absl(what)); }

std::string message_name(size_t index) { return cat("message ", index); }

}  // namespace

// Collects a prompt. Neighbouring text is tokenised as one piece, as a tokeniser that gets the rendered template would.
class ChatFormat::Prompt {
 public:
  explicit Prompt(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void special(int32_t id) {
    flush();
    ids_.push_back(id);
  }
  template <typename... Parts>
  void text(const Parts&... parts) {
    append(text_, parts...);
  }
  std::vector<int32_t> take() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    const std::vector<int32_t> ids = tokenizer_.encode(text_, /*add_special=*/false);
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
  }

  const Tokenizer& tokenizer_;
  std::string text_;
  std::vector<int32_t> ids_;
};

std::string chat_date_today() { return absl::FormatTime("%d %b %Y", absl::Now(), absl::LocalTimeZone()); }

absl::StatusOr<ChatFormat> ChatFormat::detect(const Tokenizer& tokenizer) {
  if (tokenizer.chat_template().empty()) return unknown_template("this model has no chat template");
  ChatFormat format;
  const absl::Status status = format.recognise(tokenizer);
  if (!status.ok()) return status;
  return format;
}

absl::Status ChatFormat::recognise(const Tokenizer& tokenizer) {
  TemplateContents contents = read_template(tokenizer.chat_template());
  const auto prints = [&](std::string_view literal) { return contents.literals.contains(std::string(literal)); };
  const auto says = [&](const char* word) { return contents.words.contains(word); };
  std::string unknown;
  bool complete = true;
  if (prints("<|start_header_id|>") && says("date_string")) {
    kind_ = Kind::kLlama31;
    unknown = first_unknown(contents, llama31_words(), llama31_literals());
    complete = prints(kKnowledgeDate) && prints(kTodayPrefix) && prints(kUserTools1) && prints("<|eot_id|>") &&
               says("trim") && says("tojson");
    builtin_tools_ = says("builtin_tools");
    uses_today_ = says("strftime_now");
    default_date_ = contents.date;
    complete = complete && !default_date_.empty();
  } else if (prints("<|start_header_id|>")) {
    kind_ = Kind::kLlama3;
    unknown = first_unknown(contents, llama3_words(), llama3_literals());
    complete = prints("<|end_header_id|>\n\n") && prints("<|eot_id|>") && says("trim") && says("add_generation_prompt");
  } else if (prints("<|im_start|>")) {
    kind_ = Kind::kChatMl;
    default_system_ = take_default_system(contents.literals);
    unknown = first_unknown(contents, chatml_words(), chatml_literals());
    complete = prints("<|im_start|>assistant\n") && (prints("<|im_end|>") || prints(kChatMlEnd)) && prints("\n");
  } else {
    return unknown_template("this model's chat template is of an unknown kind");
  }
  if (!unknown.empty()) {
    return unknown_template(cat("this model's chat template looks like ", name(), " but also has ", unknown));
  }
  if (!complete)
    return unknown_template(cat("this model's chat template looks like ", name(), " but lacks parts of it"));
  if (kind_ == Kind::kChatMl) return find_chatml_tokens(tokenizer);
  if (says("bos_token")) {
    bos_ = tokenizer.bos_token_id();
    if (!bos_.has_value())
      return unknown_template("this model's chat template begins with a BOS token, which the tokenizer lacks");
  }
  return find_llama_tokens(tokenizer);
}

namespace {

// Looks up special tokens by name into places; the first missing one is an error.
absl::Status find_tokens(const Tokenizer& tokenizer, const std::vector<std::pair<std::string_view, int32_t*>>& wanted) {
  for (const auto& [name, place] : wanted) {
    const std::optional<int32_t> id = tokenizer.special_id(name);
    if (!id.has_value()) {
      return unknown_template(
          cat("this model's chat template needs the special token ", name, ", which tokenizer.json does not have"));
    }
    *place = *id;
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ChatFormat::find_llama_tokens(const Tokenizer& tokenizer) {
  absl::Status status = find_tokens(
      tokenizer,
      {{"<|start_header_id|>", &turn_start_}, {"<|end_header_id|>", &header_end_}, {"<|eot_id|>", &turn_end_}});
  if (!status.ok()) return status;
  stop_token_ids_ = {turn_end_};
  // Models answer with it whether their template knows the built-in tools or not.
  python_tag_ = tokenizer.special_id("<|python_tag|>").value_or(-1);
  // Llama 3.0's names for these ids are other ones: then the built-in tools are refused, and the rest works.
  if (builtin_tools_) {
    builtin_tools_ = python_tag_ >= 0 && find_tokens(tokenizer, {{"<|eom_id|>", &message_end_}}).ok();
  }
  for (const char* name : {"<|eom_id|>", "<|end_of_text|>"}) {
    if (const std::optional<int32_t> id = tokenizer.special_id(name)) stop_token_ids_.push_back(*id);
  }
  return absl::OkStatus();
}

absl::Status ChatFormat::find_chatml_tokens(const Tokenizer& tokenizer) {
  const absl::Status status = find_tokens(tokenizer, {{"<|im_start|>", &turn_start_}, {"<|im_end|>", &turn_end_}});
  stop_token_ids_ = {turn_end_};
  return status;
}

std::string_view ChatFormat::name() const {
  switch (kind_) {
    case Kind::kLlama3:
      return "llama3";
    case Kind::kLlama31:
      return "llama3.1";
    case Kind::kChatMl:
      return "chatml";
  }
  return "";
}

absl::Status ChatFormat::check_message(const ChatMessage& message, size_t index) const {
  const bool llama31 = kind_ == Kind::kLlama31;
  const bool known = message.role == "system" || message.role == "user" || message.role == "assistant" ||
                     (llama31 && (message.role == "tool" || message.role == "ipython"));
  if (!known) {
    return invalid(cat(message_name(index), " has role '", message.role,
                       "'; this model's chat format knows system, user, assistant",
                       llama31 ? ", tool and ipython" : ""));
  }
  if (!message.tool_calls.empty()) {
    if (!llama31)
      return invalid(cat(message_name(index), " has tool calls, which this model's chat format has no place for"));
    if (message.role != "assistant")
      return invalid(cat(message_name(index), " has tool calls but role '", message.role, "', not assistant"));
    if (message.tool_calls.size() > 1) {
      return invalid(cat(message_name(index), " has ", message.tool_calls.size(),
                         " tool calls; this model's chat format takes one per message"));
    }
    const ChatToolCall& call = message.tool_calls[0];
    if (call.name.empty()) return invalid(cat(message_name(index), " has a tool call without a name"));
    return check_json_object(call.arguments, cat(message_name(index), ", arguments of tool call '", call.name, "'"));
  }
  if (!message.content.has_value()) return invalid(cat(message_name(index), " has no content"));
  return absl::OkStatus();
}

absl::Status ChatFormat::check(const ChatRequest& request) const {
  if (request.messages.empty()) return invalid("a chat needs at least one message");
  for (size_t i = 0; i < request.messages.size(); ++i) {
    if (const absl::Status status = check_message(request.messages[i], i); !status.ok()) return status;
  }
  if (kind_ != Kind::kLlama31 && !request.tools.empty()) {
    return invalid("this model's chat format has no place for tools");
  }
  if (!builtin_tools_ && !request.builtin_tools.empty()) {
    return invalid("this model's chat format has no built-in tools");
  }
  for (size_t i = 0; i < request.tools.size(); ++i) {
    if (const absl::Status status = check_json_object(request.tools[i], cat("tool ", i)); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int32_t>> ChatFormat::render(const Tokenizer& tokenizer, const ChatRequest& request) const {
  if (const absl::Status status = check(request); !status.ok()) return status;
  Prompt prompt(tokenizer);
  if (bos_.has_value()) prompt.special(*bos_);
  if (kind_ == Kind::kLlama31) {
    if (const absl::Status status = render_llama31(request, prompt); !status.ok()) return status;
  } else if (kind_ == Kind::kLlama3) {
    render_llama3(request, prompt);
  } else {
    render_chatml(request, prompt);
  }
  return prompt.take();
}

void ChatFormat::open_llama_turn(std::string_view role, Prompt& prompt) const {
  prompt.special(turn_start_);
  prompt.text(role);
  prompt.special(header_end_);
  prompt.text("\n\n");
}

namespace {

absl::StatusOr<std::string> print_tools(const std::vector<std::string>& tools) {
  std::string text;
  for (size_t i = 0; i < tools.size(); ++i) {
    const absl::StatusOr<std::string> tool = json_as_python(tools[i], /*indent=*/4, cat("tool ", i));
    if (!tool.ok()) return tool.status();
    append(text, *tool, "\n\n");
  }
  return text;
}

}  // namespace

absl::Status ChatFormat::render_llama31(const ChatRequest& request, Prompt& prompt) const {
  const absl::StatusOr<std::string> tools = print_tools(request.tools);
  if (!tools.ok()) return tools.status();
  size_t next = 0;
  std::string_view system;
  if (request.messages[0].role == "system") {
    system = trim_as_python(*request.messages[0].content);
    next = 1;
  }

  open_llama_turn("system", prompt);
  if (!request.builtin_tools.empty() || !request.tools.empty()) prompt.text(kEnvironment);
  if (!request.builtin_tools.empty()) {
    std::vector<std::string> listed = request.builtin_tools;
    std::erase(listed, "code_interpreter");  // the environment line alone turns it on
    prompt.text(kToolsPrefix, absl::StrJoin(listed, ", "), "\n\n");
  }
  prompt.text(kKnowledgeDate, kTodayPrefix, request.date.empty() ? default_date_ : request.date, "\n\n");
  if (!request.tools.empty() && !request.tools_in_user_message) {
    prompt.text(kSystemTools, kToolAnswer, kNoVariables, *tools);
  }
  prompt.text(system);
  prompt.special(turn_end_);

  if (!request.tools.empty() && request.tools_in_user_message) {
    if (next == request.messages.size() || request.messages[next].role != "user") {
      return invalid(
          "tools go into the first user message, so the first message after the system's must be the user's; or "
          "set tools_in_user_message to false");
    }
    open_llama_turn("user", prompt);
    prompt.text(kUserTools1, kUserTools2, kToolAnswer, kNoVariables, *tools,
                trim_as_python(*request.messages[next].content));
    prompt.special(turn_end_);
    ++next;
  }
  for (; next < request.messages.size(); ++next) {
    const ChatMessage& message = request.messages[next];
    if (!message.tool_calls.empty()) {
      if (const absl::Status status = render_tool_call(request, message.tool_calls[0], prompt); !status.ok())
        return status;
    } else if (message.role == "tool" || message.role == "ipython") {
      // The template prints anything iterable as JSON, and to Jinja a string is: so in quotes, and not trimmed.
      open_llama_turn("ipython", prompt);
      prompt.text(json_string_as_python(*message.content));
      prompt.special(turn_end_);
    } else {
      open_llama_turn(message.role, prompt);
      prompt.text(trim_as_python(*message.content));
      prompt.special(turn_end_);
    }
  }
  if (request.add_generation_prompt) open_llama_turn("assistant", prompt);
  return absl::OkStatus();
}

absl::Status ChatFormat::render_tool_call(const ChatRequest& request, const ChatToolCall& call, Prompt& prompt) const {
  const std::string name = cat("arguments of tool call '", call.name, "'");
  const auto& builtin = request.builtin_tools;
  open_llama_turn("assistant", prompt);
  if (std::find(builtin.begin(), builtin.end(), call.name) != builtin.end()) {
    const auto arguments = json_string_members(call.arguments, name);
    if (!arguments.ok()) return arguments.status();
    prompt.special(python_tag_);
    prompt.text(call.name, ".call(");
    std::string_view comma;
    for (const auto& [key, value] : *arguments) {
      prompt.text(comma, key, "=\"", value, "\"");
      comma = ", ";
    }
    prompt.text(")");
  } else {
    const absl::StatusOr<std::string> arguments = json_as_python(call.arguments, /*indent=*/0, name);
    if (!arguments.ok()) return arguments.status();
    prompt.text(kCallName, call.name, kCallComma, kCallParameters, *arguments, "}");
  }
  prompt.special(builtin.empty() ? turn_end_ : message_end_);
  return absl::OkStatus();
}

void ChatFormat::render_llama3(const ChatRequest& request, Prompt& prompt) const {
  for (const ChatMessage& message : request.messages) {
    open_llama_turn(message.role, prompt);
    prompt.text(trim_as_python(*message.content));
    prompt.special(turn_end_);
  }
  if (request.add_generation_prompt) open_llama_turn("assistant", prompt);
}

void ChatFormat::render_chatml(const ChatRequest& request, Prompt& prompt) const {
  const auto turn = [&](std::string_view role, std::string_view content) {
    prompt.special(turn_start_);
    prompt.text(role, "\n", content);
    prompt.special(turn_end_);
    prompt.text("\n");
  };
  if (default_system_.has_value() && request.messages[0].role != "system") turn("system", *default_system_);
  for (const ChatMessage& message : request.messages) turn(message.role, *message.content);
  if (request.add_generation_prompt) {
    prompt.special(turn_start_);
    prompt.text("assistant\n");
  }
}

std::vector<ChatToolCall> ChatFormat::parse_reply(std::string_view reply, std::optional<int32_t> first_token) const {
  if (kind_ != Kind::kLlama31) return {};
  return parse_tool_calls(reply, /*python_tag=*/first_token.has_value() && *first_token == python_tag_);
}

}  // namespace octet
