#include "coordinator/text/chat_json.h"

#include <charconv>
#include <cmath>
#include <set>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/ordered_json.h"
#include "coordinator/text/tokenizer_json.h"
#include "coordinator/text/utf8.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

using nlohmann::json;

// Python's repr(float): the shortest digits that read back as the same number, plain between 1e-4 and 1e16.
std::string float_as_python(double number) {
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), number, std::chars_format::scientific).ptr;
  const std::string scientific(buffer, end);
  const size_t e = scientific.find('e');
  const int exponent = std::stoi(scientific.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return scientific;  // to_chars, like Python, writes at least two exponent digits
  const std::string sign = scientific[0] == '-' ? "-" : "";
  std::string digits;
  for (const char c : scientific.substr(0, e)) {
    if (c >= '0' && c <= '9') digits.push_back(c);
  }
  if (exponent < 0) return cat(sign, "0.", std::string(-exponent - 1, '0'), digits);
  const size_t whole = static_cast<size_t>(exponent) + 1;
  if (digits.size() <= whole) return cat(sign, digits, std::string(whole - digits.size(), '0'), ".0");
  return cat(sign, digits.substr(0, whole), ".", digits.substr(whole));
}

// Writes while it reads: the reader's events are already in the order of the text.
class PythonWriter : public json::json_sax_t {
 public:
  PythonWriter(int indent, std::string_view name) : indent_(indent), name_(name) {}

  absl::Status status() const { return status_; }
  std::string take() { return std::move(out_); }

  bool null() override { return item("null"); }
  bool boolean(bool flag) override { return item(flag ? "true" : "false"); }
  bool number_integer(int64_t number) override { return item(cat(number)); }
  bool number_unsigned(uint64_t number) override { return item(cat(number)); }
  bool number_float(double number, const std::string& digits) override {
    // Whole numbers beyond 64 bits arrive here; Python keeps every digit.
    const bool whole = digits.find_first_of(".eE") == std::string::npos;
    return item(whole ? digits : float_as_python(number));
  }
  bool string(std::string& text) override { return item(json_string_as_python(text)); }
  bool binary(json::binary_t&) override { return fail("binary values are not JSON"); }
  bool start_object(size_t) override { return open('{'); }
  bool start_array(size_t) override { return open('['); }
  bool end_object() override { return close('}'); }
  bool end_array() override { return close(']'); }
  bool key(std::string& key) override {
    if (!levels_.back().keys.insert(key).second) return fail(cat("key '", key, "' appears twice"));
    before_item();
    append(out_, json_string_as_python(key), ": ");
    after_key_ = true;
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail(cat("not valid JSON at byte ", position));
  }

 private:
  struct Level {
    bool empty = true;
    std::set<std::string> keys;
  };

  bool fail(std::string_view what) {
    if (status_.ok()) status_ = absl::InvalidArgumentError(cat(name_, ": ", what));
    return false;
  }
  void new_line() {
    if (indent_ > 0) append(out_, "\n", std::string(levels_.size() * indent_, ' '));
  }
  void before_item() {
    if (after_key_ || levels_.empty()) {
      after_key_ = false;
      return;
    }
    if (!levels_.back().empty) out_.append(indent_ > 0 ? "," : ", ");
    levels_.back().empty = false;
    new_line();
  }
  bool item(std::string_view text) {
    before_item();
    out_.append(text);
    return true;
  }
  bool open(char bracket) {
    before_item();
    out_.push_back(bracket);
    levels_.emplace_back();
    if (levels_.size() > kMaxJsonDepth) return fail(cat("nested deeper than ", kMaxJsonDepth, " levels"));
    return true;
  }
  bool close(char bracket) {
    const bool empty = levels_.back().empty;
    levels_.pop_back();
    if (!empty) new_line();
    out_.push_back(bracket);
    return true;
  }

  int indent_;
  std::string name_;
  std::string out_;
  absl::Status status_;
  std::vector<Level> levels_;
  bool after_key_ = false;
};

absl::StatusOr<nlohmann::ordered_json> read_json_object(std::string_view json_text, std::string_view name) {
  absl::StatusOr<nlohmann::ordered_json> value = read_ordered_json(json_text, name);
  if (value.ok() && !value->is_object()) return absl::InvalidArgumentError(cat(name, ": a JSON object is needed"));
  return value;
}

}  // namespace

std::string json_string_as_python(std::string_view text) {
  const std::string valid = to_valid_utf8(text);
  std::string out = "\"";
  for (const char c : valid) {
    switch (c) {
      case '"':
        out.append("\\\"");
        break;
      case '\\':
        out.append("\\\\");
        break;
      case '\n':
        out.append("\\n");
        break;
      case '\r':
        out.append("\\r");
        break;
      case '\t':
        out.append("\\t");
        break;
      case '\f':
        out.append("\\f");
        break;
      case '\b':
        out.append("\\b");
        break;
      default:
        if (static_cast<unsigned char>(c) < 0x20) {
          absl::StrAppendFormat(&out, "\\u%04x", static_cast<unsigned char>(c));
        } else {
          out.push_back(c);
        }
    }
  }
  out.push_back('"');
  return out;
}

absl::StatusOr<std::string> json_as_python(std::string_view json_text, int indent, std::string_view name) {
  PythonWriter writer(indent, name);
  json::sax_parse(json_text, &writer);
  if (!writer.status().ok()) return writer.status();
  return writer.take();
}

absl::Status check_json_object(std::string_view json_text, std::string_view name) {
  return read_json_object(json_text, name).status();
}

absl::StatusOr<std::vector<std::pair<std::string, std::string>>> json_string_members(std::string_view json_text,
                                                                                     std::string_view name) {
  const absl::StatusOr<nlohmann::ordered_json> object = read_json_object(json_text, name);
  if (!object.ok()) return object.status();
  std::vector<std::pair<std::string, std::string>> members;
  for (const auto& [key, value] : object->items()) {
    if (!value.is_string()) return absl::InvalidArgumentError(cat(name, ": '", key, "' must be a string"));
    members.emplace_back(key, value.get<std::string>());
  }
  return members;
}

}  // namespace octet
