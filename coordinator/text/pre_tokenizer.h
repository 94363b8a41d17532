// Cuts text into the pre-tokens inside which byte-pair merges happen, as tokenizer.json's "pre_tokenizer" says.
// Immutable once built; any number of threads may split at the same time. Invariant: the pieces, in order, are the
// text.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace octet {

// A compiled pattern with the meaning it has in the reference (Oniguruma): `\s` is Unicode White_Space. Escapes and
// groups that mean something else in PCRE2 are refused.
class Regex {
 public:
  static absl::StatusOr<Regex> compile(std::string_view pattern);
  // The code behind it, a pcre2_code*: PCRE2's header stays in the .cc file.
  const void* code() const { return code_.get(); }

 private:
  std::shared_ptr<const void> code_;
};

// `\s` and `\S` written out as the White_Space characters; everything else unchanged.
// INVALID_ARGUMENT for what would mean something else in PCRE2, naming it.
absl::StatusOr<std::string> rewrite_pattern(std::string_view pattern);

class PreTokenizer {
 public:
  // `config` is the value of "pre_tokenizer". Accepted: ByteLevel, Digits and Split by a regex (behaviour Isolated),
  // alone or in a Sequence that ends with ByteLevel. UNIMPLEMENTED for others, by name.
  static absl::StatusOr<PreTokenizer> from_json(const nlohmann::json& config);

  // Memory that matching needs, reused between calls. One per thread.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

   private:
    friend class PreTokenizer;
    struct Memory;
    std::unique_ptr<Memory> memory_;
  };

  // Calls `piece` for every pre-token, left to right. REQUIRES: text is valid UTF-8.
  // A piece whose matching goes over its limits (which only a pattern with runaway backtracking does) is not cut
  // further, so that every text has an encoding and no text can hang or crash.
  void split(std::string_view text, Scratch& scratch, absl::FunctionRef<void(std::string_view)> piece) const;

 private:
  void split_from(size_t step, std::string_view text, Scratch& scratch,
                  absl::FunctionRef<void(std::string_view)> piece) const;
  absl::Status add_step(const nlohmann::json& config);
  absl::Status add_pattern(std::string_view pattern);

  std::vector<Regex> steps_;  // each cuts the pieces of the one before at its matches
};

}  // namespace octet
