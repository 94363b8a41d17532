// Strict JSON for files that others wrote: valid UTF-8, no key twice in an object, nesting bounded. Never throws.
#pragma once

#include <cstdint>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace octet {

constexpr int kMaxJsonDepth = 64;

// Parses `text`; errors are INVALID_ARGUMENT and begin with `what`, the file's name.
absl::StatusOr<nlohmann::json> parse_json(std::string_view text, const std::string& what);

// The integer that `value` is, written as 8 or as 8.0; nothing for anything else, or beyond int64.
std::optional<int64_t> integer_in(const nlohmann::json& value);

// At most about 60 characters of a value, for messages.
std::string excerpt_of(const nlohmann::json& value);

// A walk over JSON text (nlohmann's SAX interface) that stops at the first fault and says which. Subclasses see values
// through the on_ hooks; the base refuses what parse_json refuses.
class StrictJsonWalk {
 public:
  using number_integer_t = int64_t;
  using number_unsigned_t = uint64_t;
  using number_float_t = double;
  using string_t = std::string;
  using binary_t = nlohmann::json::binary_t;

  virtual ~StrictJsonWalk() = default;

  // Walks all of `text`.
  absl::Status walk(std::string_view text, const std::string& what);

  // nlohmann's interface; false stops the walk.
  bool null() { return on_other("null"); }
  bool boolean(bool value) { return on_other(value ? "true" : "false"); }
  bool number_integer(number_integer_t value);
  bool number_unsigned(number_unsigned_t value) { return on_unsigned(value); }
  bool number_float(number_float_t, const string_t& text) { return on_other(text); }
  bool string(string_t& value) { return on_string(value); }
  bool binary(binary_t&) { return fail("binary values are not JSON"); }
  bool start_object(std::size_t);
  bool key(string_t& name);
  bool end_object();
  bool start_array(std::size_t);
  bool end_array();
  bool parse_error(std::size_t position, const std::string& last_token, const nlohmann::json::exception& error);

 protected:
  // Containers that enclose the value or key at hand.
  int depth() const { return static_cast<int>(keys_.size()); }
  // Notes the fault; always false.
  bool fail(std::string fault);

  virtual bool on_unsigned(uint64_t) { return true; }
  virtual bool on_string(std::string&) { return true; }
  virtual bool on_other(std::string_view) { return true; }  // null, booleans, negative and non-integer numbers
  virtual bool on_key(const std::string&) { return true; }
  virtual bool on_begin(bool /*is_object*/) { return true; }  // depth() counts it already
  virtual bool on_end(bool /*is_object*/) { return true; }    // depth() no longer counts it

 private:
  bool begin(bool is_object);
  bool end(bool is_object);

  std::vector<std::set<std::string, std::less<>>> keys_;  // of every enclosing container
  std::string fault_;
};

}  // namespace octet
