#include "coordinator/text/tool_calls.h"

#include <charconv>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/ascii.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/ordered_json.h"
#include "coordinator/text/tokenizer_json.h"
#include "coordinator/text/utf8.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

constexpr std::string_view kPythonTag = "<|python_tag|>";
constexpr std::string_view kCodeInterpreter = "code_interpreter";

// A reply from its front to its end. Whatever does not fit leaves by nullopt: then the reply is plain text.
using Calls = std::optional<std::vector<ChatToolCall>>;

void skip_space(std::string_view& text) {
  while (!text.empty() && absl::ascii_isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
}

// ---- JSON

// How many bytes the object at the front of `text` takes, if it is one: in JSON, brackets outside strings balance.
std::optional<size_t> object_bytes(std::string_view text) {
  size_t depth = 0;
  bool in_string = false;
  for (size_t at = 0; at < text.size(); ++at) {
    const char c = text[at];
    if (in_string) {
      if (c == '\\') {
        ++at;
      } else if (c == '"') {
        in_string = false;
      }
    } else if (c == '"') {
      in_string = true;
    } else if (c == '{') {
      ++depth;
    } else if (c == '}' && --depth == 0) {
      return at + 1;
    }
  }
  return std::nullopt;
}

// Takes the object at the front of `text`.
std::optional<ordered_json> take_object(std::string_view& text) {
  if (!text.starts_with('{')) return std::nullopt;
  const std::optional<size_t> bytes = object_bytes(text);
  if (!bytes.has_value()) return std::nullopt;
  absl::StatusOr<ordered_json> object = read_ordered_json(text.substr(0, *bytes), "tool call");
  if (!object.ok()) return std::nullopt;
  text.remove_prefix(*bytes);
  return *std::move(object);
}

std::optional<ChatToolCall> call_of(const ordered_json& object) {
  const auto name = object.find("name");
  auto arguments = object.find("parameters");
  if (arguments == object.end()) arguments = object.find("arguments");
  if (name == object.end() || !name->is_string() || *name == "") return std::nullopt;
  if (arguments == object.end() || !arguments->is_object()) return std::nullopt;
  if (object.value("type", ordered_json("function")) != "function") return std::nullopt;
  return ChatToolCall{.name = name->get<std::string>(), .arguments = compact_json(*arguments)};
}

Calls parse_json_calls(std::string_view text) {
  std::vector<ChatToolCall> calls;
  do {
    skip_space(text);
    if (!calls.empty() && text.empty()) break;  // a ; at the end
    const std::optional<ordered_json> object = take_object(text);
    std::optional<ChatToolCall> call = object.has_value() ? call_of(*object) : std::nullopt;
    if (!call.has_value()) return std::nullopt;
    calls.push_back(*std::move(call));
    skip_space(text);
  } while (consume_prefix(text, ";"));
  if (!text.empty()) return std::nullopt;
  return calls;
}

// ---- <function=f>{...}</function>

Calls parse_tagged_calls(std::string_view text) {
  std::vector<ChatToolCall> calls;
  while (consume_prefix(text, "<function=")) {
    const size_t end = text.find('>');
    if (end == std::string_view::npos || end == 0) return std::nullopt;
    const std::string name(text.substr(0, end));
    text.remove_prefix(end + 1);
    skip_space(text);
    const std::optional<ordered_json> arguments = take_object(text);
    if (!arguments.has_value()) return std::nullopt;
    skip_space(text);
    if (!consume_prefix(text, "</function>")) return std::nullopt;
    calls.push_back({.name = name, .arguments = compact_json(*arguments)});
    skip_space(text);
  }
  if (!text.empty()) return std::nullopt;
  return calls;
}

// ---- Calls as Python writes them

bool is_name_character(char c) { return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// Reads calls with keyword arguments that are literals.
class PythonReader {
 public:
  explicit PythonReader(std::string_view text) : text_(text) {}

  // [f(...), g(...)] and nothing after it.
  Calls list() {
    std::vector<ChatToolCall> calls;
    if (!consume("[")) return std::nullopt;
    do {
      std::optional<ChatToolCall> one = call();
      if (!one.has_value()) return std::nullopt;
      calls.push_back(*std::move(one));
    } while (consume(","));
    if (!consume("]") || !at_end()) return std::nullopt;
    return calls;
  }

  // f(a=1, b="x")
  std::optional<ChatToolCall> call() {
    const std::string function = name(/*dots=*/true);
    if (function.empty() || !consume("(")) return std::nullopt;
    ordered_json arguments = ordered_json::object();
    while (!consume(")")) {
      if (!arguments.empty() && !consume(",")) return std::nullopt;
      const std::string key = name(/*dots=*/false);
      if (key.empty() || arguments.contains(key) || !consume("=")) return std::nullopt;
      std::optional<ordered_json> argument = value(1);
      if (!argument.has_value()) return std::nullopt;
      arguments[key] = *std::move(argument);
    }
    return ChatToolCall{.name = function, .arguments = compact_json(arguments)};
  }

  bool at_end() {
    skip_space(text_);
    return text_.empty();
  }

 private:
  bool consume(std::string_view what) {
    skip_space(text_);
    return consume_prefix(text_, what);
  }

  std::string name(bool dots) {
    skip_space(text_);
    size_t bytes = 0;
    while (bytes < text_.size() && (is_name_character(text_[bytes]) || (dots && text_[bytes] == '.'))) ++bytes;
    const std::string name(text_.substr(0, bytes));
    if (name.empty() || absl::ascii_isdigit(static_cast<unsigned char>(name.front()))) return "";
    text_.remove_prefix(bytes);
    return name;
  }

  std::optional<ordered_json> value(int depth) {
    if (depth > kMaxJsonDepth) return std::nullopt;
    if (consume("[")) return array(depth);
    if (consume("{")) return object(depth);
    if (text_.starts_with('"') || text_.starts_with('\'')) return string();
    const std::string word = name(/*dots=*/false);
    if (word == "True") return ordered_json(true);
    if (word == "False") return ordered_json(false);
    if (word == "None") return ordered_json(nullptr);
    return word.empty() ? number() : std::nullopt;
  }

  std::optional<ordered_json> array(int depth) {
    ordered_json array = ordered_json::array();
    while (!consume("]")) {
      if (!array.empty() && !consume(",")) return std::nullopt;
      std::optional<ordered_json> item = value(depth + 1);
      if (!item.has_value()) return std::nullopt;
      array.push_back(*std::move(item));
    }
    return array;
  }

  std::optional<ordered_json> object(int depth) {
    ordered_json object = ordered_json::object();
    while (!consume("}")) {
      if (!object.empty() && !consume(",")) return std::nullopt;
      skip_space(text_);
      const std::optional<ordered_json> key = string();
      if (!key.has_value() || object.contains(key->get<std::string>()) || !consume(":")) return std::nullopt;
      std::optional<ordered_json> member = value(depth + 1);
      if (!member.has_value()) return std::nullopt;
      object[key->get<std::string>()] = *std::move(member);
    }
    return object;
  }

  // 12, -1.5e3: Python's and JSON's spelling of these are one.
  std::optional<ordered_json> number() {
    const size_t bytes = std::min(text_.find_first_not_of("+-.0123456789eE"), text_.size());
    absl::StatusOr<ordered_json> number = read_ordered_json(text_.substr(0, bytes), "number");
    if (!number.ok()) return std::nullopt;
    text_.remove_prefix(bytes);
    return *std::move(number);
  }

  // In either kind of quotes, with the escapes that JSON has as well.
  std::optional<ordered_json> string() {
    if (text_.empty() || (text_.front() != '"' && text_.front() != '\'')) return std::nullopt;
    const char quote = text_.front();
    std::string json = "\"";
    size_t at = 1;
    for (; at < text_.size() && text_[at] != quote; ++at) {
      if (text_[at] == '"') {
        json.append("\\\"");
      } else if (text_[at] == '\\' && at + 1 < text_.size()) {
        const char escaped = text_[++at];
        if (escaped != '\'') json.push_back('\\');
        json.push_back(escaped);
      } else {
        json.push_back(text_[at]);
      }
    }
    if (at == text_.size()) return std::nullopt;
    absl::StatusOr<ordered_json> string = read_ordered_json(json + "\"", "string");
    if (!string.ok()) return std::nullopt;
    text_.remove_prefix(at + 1);
    return *std::move(string);
  }

  std::string_view text_;
};

// ---- After <|python_tag|>

Calls parse_builtin_call(std::string_view text) {
  PythonReader reader(text);
  std::optional<ChatToolCall> call = reader.call();
  if (!call.has_value() || !reader.at_end()) return std::nullopt;
  std::string_view name = call->name;
  if (!consume_suffix(name, ".call") || name.empty()) return std::nullopt;
  return {{{.name = std::string(name), .arguments = call->arguments}}};
}

Calls parse_tool_output(std::string_view text) {
  if (text.empty()) return std::nullopt;
  if (text.starts_with('{')) return parse_json_calls(text);
  if (Calls calls = parse_builtin_call(text); calls.has_value()) return calls;
  const ordered_json code = {{"code", text}};
  return {{{.name = std::string(kCodeInterpreter), .arguments = compact_json(code)}}};
}

Calls parse_reply(std::string_view text) {
  if (text.starts_with('{')) return parse_json_calls(text);
  if (text.starts_with('[')) return PythonReader(text).list();
  return parse_tagged_calls(text);
}

}  // namespace

std::vector<ChatToolCall> parse_tool_calls(std::string_view reply, bool python_tag) {
  std::string_view text = trim_as_python(reply);
  if (consume_prefix(text, kPythonTag)) {
    python_tag = true;
    text = trim_as_python(text);
  }
  return (python_tag ? parse_tool_output(text) : parse_reply(text)).value_or(std::vector<ChatToolCall>());
}

}  // namespace octet
