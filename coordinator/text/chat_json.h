// JSON as a chat template's `tojson` prints it: Python's json.dumps(ensure_ascii=False), keys in their order, numbers
// as Python spells them.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

// Prints `json_text` again. indent 0: one line, ", " and ": " between; else one item a line.
// INVALID_ARGUMENT for what is not JSON or an object with a key twice, with `name` in front.
absl::StatusOr<std::string> json_as_python(std::string_view json_text, int indent, std::string_view name);

// A string with quotes. Invalid UTF-8 becomes U+FFFD.
std::string json_string_as_python(std::string_view text);

// The members of an object whose values are all strings, in their order. INVALID_ARGUMENT otherwise.
absl::StatusOr<std::vector<std::pair<std::string, std::string>>> json_string_members(std::string_view json_text,
                                                                                     std::string_view name);

// INVALID_ARGUMENT unless json_text is JSON and an object.
absl::Status check_json_object(std::string_view json_text, std::string_view name);

}  // namespace octet
