// Finds added tokens (special ones and others) in text, leftmost first and the longest at one place.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace octet {

class AddedTokenFinder {
 public:
  struct Found {
    size_t begin = std::string_view::npos;  // npos: none
    size_t bytes = 0;
    int32_t id = -1;
  };

  void add(std::string content, int32_t id) {
    starts_[static_cast<uint8_t>(content[0])] = true;
    const auto place = std::lower_bound(tokens_.begin(), tokens_.end(), std::pair(content, id));
    tokens_.insert(place, {std::move(content), id});
  }

  // The first one at or after `from`.
  Found find(std::string_view text, size_t from) const {
    for (size_t at = from; at < text.size() && !tokens_.empty(); ++at) {
      if (!starts_[static_cast<uint8_t>(text[at])]) continue;
      const Found found = longest_at(text, at);
      if (found.bytes > 0) return found;
    }
    return {};
  }

 private:
  // Narrows the sorted tokens byte by byte to those that agree with the text.
  Found longest_at(std::string_view text, size_t at) const {
    Found best;
    auto low = tokens_.begin();
    auto high = tokens_.end();
    for (size_t depth = 0; at + depth < text.size() && low != high; ++depth) {
      const auto byte_of = [&](const auto& token) -> int {
        return token.first.size() > depth ? static_cast<uint8_t>(token.first[depth]) : -1;
      };
      const int byte = static_cast<uint8_t>(text[at + depth]);
      low = std::partition_point(low, high, [&](const auto& token) { return byte_of(token) < byte; });
      high = std::partition_point(low, high, [&](const auto& token) { return byte_of(token) <= byte; });
      if (low != high && low->first.size() == depth + 1) best = {at, depth + 1, low->second};
    }
    return best;
  }

  std::vector<std::pair<std::string, int32_t>> tokens_;  // sorted by content
  std::array<bool, 256> starts_{};
};

}  // namespace octet
