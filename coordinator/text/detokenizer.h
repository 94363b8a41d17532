// From generated tokens to text that may be shown: whole characters only, and nothing of a stop string.
// One of each per sequence; not thread safe.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "coordinator/text/tokenizer.h"
#include "coordinator/text/utf8.h"

namespace octet {

// Text of tokens as they come. What the pushes and the flush return, one after the other, is Tokenizer::decode of all.
class Detokenizer {
 public:
  explicit Detokenizer(Tokenizer tokenizer, bool skip_special = true)
      : tokenizer_(std::move(tokenizer)), skip_special_(skip_special) {}

  // The text that this token completed: valid UTF-8, possibly empty. Up to 3 bytes of a character wait for the next
  // token.
  std::string push(int32_t id);
  // The sequence has ended: an unfinished character comes out as U+FFFD.
  std::string flush() { return stream_.flush(); }

 private:
  Tokenizer tokenizer_;
  bool skip_special_;
  Utf8Stream stream_;
};

// Watches text for stop strings. The match is the one that ends first, and the longest of those that end together, so
// it does not depend on how the text was cut into pushes. Holds back only what may still become part of a stop string:
// at most (longest stop string - 1) bytes.
class StopMatcher {
 public:
  // Empty strings in `stops` never match. `include_stop`: text ends with the stop string instead of before it.
  explicit StopMatcher(std::vector<std::string> stops, bool include_stop = false);

  // Text that may be shown now; whole characters if the pushes and the stop strings are. Empty once stopped.
  std::string push(std::string_view text);
  // The sequence has ended without a stop string: what was held back.
  std::string flush();

  // Index into `stops` of the string that matched.
  std::optional<int32_t> matched() const { return matched_; }

 private:
  struct Stop {
    std::string text;
    std::vector<uint32_t> fallback;  // Knuth-Morris-Pratt: [i] longest proper border of text[0, i)
    uint32_t progress = 0;           // how much of text the stream ends with now
  };
  static uint32_t advance(const Stop& stop, char byte);

  std::vector<Stop> stops_;
  bool include_stop_;
  std::string held_;
  std::optional<int32_t> matched_;
};

}  // namespace octet
