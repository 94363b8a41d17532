// UTF-8 as Octet reads and repairs it: well-formed as the Unicode Standard says (no overlongs, no surrogates), and
// every maximal ill-formed part becomes one U+FFFD, as in Python's and Rust's lossy decoding.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace octet {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

// What stands at the front of some bytes.
struct Utf8Step {
  enum Kind {
    kCharacter,   // a whole character
    kIllFormed,   // bytes that can never become one: replace these
    kIncomplete,  // the beginning of a character that ends with the bytes: more may come
  };
  Kind kind;
  size_t bytes;  // how many bytes it takes, at least 1
};

// REQUIRES: bytes is not empty.
Utf8Step utf8_step(std::string_view bytes);

// REQUIRES: `bytes` starts with a whole character, as utf8_step says.
char32_t utf8_code_point(std::string_view bytes);

bool is_valid_utf8(std::string_view bytes);
std::string to_valid_utf8(std::string_view bytes);

// Without the white space at both ends that Python's str.strip() removes, which is what a chat template's `trim` calls.
std::string_view trim_as_python(std::string_view text);

// Turns a stream of byte chunks into text. What push returns is always whole characters; at most 3 bytes are held back.
class Utf8Stream {
 public:
  std::string push(std::string_view bytes);
  // The stream has ended: a held beginning of a character becomes U+FFFD.
  std::string flush();

 private:
  std::string held_;
};

}  // namespace octet
