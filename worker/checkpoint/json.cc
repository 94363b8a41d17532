#include "worker/checkpoint/json.h"

#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace octet {

absl::Status StrictJsonWalk::walk(std::string_view text, const std::string& what) {
  keys_.clear();
  fault_.clear();
  if (nlohmann::json::sax_parse(text, this)) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", fault_.empty() ? "not valid JSON" : fault_));
}

bool StrictJsonWalk::fail(std::string fault) {
  if (fault_.empty()) fault_ = std::move(fault);
  return false;
}

bool StrictJsonWalk::number_integer(number_integer_t value) { return on_other(std::to_string(value)); }

bool StrictJsonWalk::begin(bool is_object) {
  if (depth() >= kMaxJsonDepth) return fail(absl::StrCat("nested deeper than ", kMaxJsonDepth, " levels"));
  keys_.emplace_back();
  return on_begin(is_object);
}

bool StrictJsonWalk::end(bool is_object) {
  keys_.pop_back();
  return on_end(is_object);
}

bool StrictJsonWalk::start_object(std::size_t) { return begin(true); }
bool StrictJsonWalk::end_object() { return end(true); }
bool StrictJsonWalk::start_array(std::size_t) { return begin(false); }
bool StrictJsonWalk::end_array() { return end(false); }

bool StrictJsonWalk::key(string_t& name) {
  if (!keys_.back().insert(name).second) return fail(absl::StrCat("key \"", name.substr(0, 200), "\" appears twice"));
  return on_key(name);
}

bool StrictJsonWalk::parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) {
  return fail(absl::StrCat("not valid JSON at byte ", position));
}

absl::StatusOr<nlohmann::json> parse_json(std::string_view text, const std::string& what) {
  StrictJsonWalk check;
  if (absl::Status status = check.walk(text, what); !status.ok()) return status;
  return nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
}

std::optional<int64_t> integer_in(const nlohmann::json& value) {
  if (value.is_number_unsigned()) {
    const uint64_t number = value.get<uint64_t>();
    if (number > static_cast<uint64_t>(INT64_MAX)) return std::nullopt;
    return static_cast<int64_t>(number);
  }
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  if (!(std::abs(number) <= 9007199254740992.0) || number != std::floor(number)) return std::nullopt;
  return static_cast<int64_t>(number);
}

std::string excerpt_of(const nlohmann::json& value) {
  std::string text = value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > 60) text = text.substr(0, 57) + "...";
  return text;
}

}  // namespace octet
