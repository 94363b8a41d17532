// tokenizer.json as it lies in a file, read in one pass: the two big parts (vocabulary and merges) go straight into
// compact lists, everything else into a small JSON value. Checks syntax, sizes and depth, not meaning.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace octet {

inline constexpr int64_t kMaxTokenizerFileBytes = int64_t{256} << 20;
inline constexpr int32_t kMaxVocabularySize = 1 << 22;
inline constexpr int kMaxJsonDepth = 64;

// A part of TokenizerJson::text.
struct TextSpan {
  uint32_t offset = 0;
  uint32_t bytes = 0;
};

struct TokenizerJson {
  struct VocabularyEntry {
    TextSpan token;  // in the spelling of the byte-level alphabet
    int32_t id = 0;  // 0 <= id < kMaxVocabularySize
  };
  struct Merge {
    TextSpan left;
    TextSpan right;
  };

  std::string text;                         // every token and merge, one after the other
  std::vector<VocabularyEntry> vocabulary;  // model.vocab, in the file's order
  std::vector<Merge> merges;                // model.merges, strongest first
  nlohmann::json rest;                      // the file without those two

  std::string_view view(TextSpan span) const { return std::string_view(text).substr(span.offset, span.bytes); }
};

// INVALID_ARGUMENT, with the byte where it happened, for anything that is not such a file.
absl::StatusOr<TokenizerJson> read_tokenizer_json(std::string_view json);

// Any other small JSON file with the same limits. `name` is for messages.
absl::StatusOr<nlohmann::json> read_small_json(std::string_view json, std::string_view name);

}  // namespace octet
