// JSON as it was written: members in their order, which is the order in which a chat template prints a tool. Strict, as
// every JSON that Octet reads: valid UTF-8, no key twice in an object, nesting bounded. Never throws.
#pragma once

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace octet {

// INVALID_ARGUMENT, with the byte of a syntax error, and `name` in front. Reading takes time in proportion to the text;
// looking a member up takes time in proportion to the object.
absl::StatusOr<nlohmann::ordered_json> read_ordered_json(std::string_view text, std::string_view name);

// On one line, without spaces. Invalid UTF-8 becomes U+FFFD.
std::string compact_json(const nlohmann::ordered_json& value);

// The same for messages: what is long is only named.
std::string brief_json(const nlohmann::ordered_json& value);

}  // namespace octet
