// Joining pieces of text. Debian's abseil keeps a string_view of its own, so absl::StrCat does not take the standard
// one.
#pragma once

#include <string>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace octet {

inline absl::string_view as_absl(std::string_view text) { return absl::string_view(text.data(), text.size()); }
template <typename Value>
const Value& as_absl(const Value& value) {
  return value;
}

template <typename... Parts>
std::string cat(const Parts&... parts) {
  return absl::StrCat(as_absl(parts)...);
}

template <typename... Parts>
void append(std::string& text, const Parts&... parts) {
  absl::StrAppend(&text, as_absl(parts)...);
}

inline bool consume_prefix(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

inline bool consume_suffix(std::string_view& text, std::string_view suffix) {
  if (!text.ends_with(suffix)) return false;
  text.remove_suffix(suffix.size());
  return true;
}

}  // namespace octet
