// TokenHistory: the tokens of a sequence before the next choice, and how often each occurs. Kept token by token, so
// that no step counts a sequence anew; only sequences whose sampling reads it have one.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace octet {

class TokenHistory {
 public:
  void clear() {
    tokens_.clear();
    counts_.clear();
  }

  void append(int32_t token, bool in_completion) {
    tokens_.push_back(token);
    counts_[token] += in_completion ? 1 : 0;
  }

  std::span<const int32_t> tokens() const { return tokens_; }
  // Every different token, in no order, with how often the completion holds it: 0 for tokens of the prompt alone.
  const absl::flat_hash_map<int32_t, int32_t>& completion_counts() const { return counts_; }

 private:
  std::vector<int32_t> tokens_;
  absl::flat_hash_map<int32_t, int32_t> counts_;
};

}  // namespace octet
