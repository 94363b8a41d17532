// PrefixIndex: which KV cache block holds which full block of which prefix. What a block holds depends on everything
// before it, so a prefix is a chain: the key of a block is a keyed 128-bit hash of the key before it and of its tokens.
// The chain begins with the request's cache salt. A hit must also hold the very tokens and hang at the very parent, so
// that a collision is a miss and never somebody else's values. Only the engine thread calls these.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"

namespace octet {

using PrefixKey = std::array<uint64_t, 2>;
// Random for each server, so that nobody can make keys collide on purpose. 16 bytes: SipHash-2-4.
using PrefixSecret = std::array<unsigned char, 16>;

// A point in the tree of prefixes, at a block boundary.
struct PrefixPoint {
  PrefixKey key = {};
  uint64_t node = 0;  // of the entry that ends here; never reused. 0: a root
};

class PrefixIndex {
 public:
  using Hash = PrefixKey (*)(const PrefixSecret& secret, std::span<const unsigned char> bytes);
  static PrefixKey sip_hash(const PrefixSecret& secret, std::span<const unsigned char> bytes);

  // For `blocks` blocks of `block_tokens` tokens each. Another hash than sip_hash is for tests of collisions.
  PrefixIndex(int32_t blocks, int32_t block_tokens, const PrefixSecret& secret, Hash hash = sip_hash);

  // Where prefixes with this salt begin.
  PrefixPoint root(std::string_view salt) const;

  // The block that holds `tokens` after *point, which moves behind them; -1 if there is none.
  // REQUIRES, here and below: tokens are block_tokens long.
  int32_t find(std::span<const int32_t> tokens, PrefixPoint* point) const;

  // `block` holds `tokens` after *point, which moves behind them. Returns the block that is found from now on: another
  // one if that holds the same already. Entries in the way that hold something else make room: keys may collide, and a
  // block may hang at a parent that was lost meanwhile, this one too.
  int32_t add(std::span<const int32_t> tokens, int32_t block, PrefixPoint* point);

  // `block` will be written anew.
  void remove(int32_t block);

  int32_t size() const { return static_cast<int32_t>(block_of_.size()); }

 private:
  struct Entry {
    PrefixKey key = {};
    uint64_t parent = 0;
    uint64_t node = 0;  // 0: the block is not in the index
  };

  PrefixKey key_after(const PrefixPoint& point, std::span<const int32_t> tokens) const;
  std::span<const int32_t> tokens_of(int32_t block) const;
  bool holds(int32_t block, const PrefixPoint& point, std::span<const int32_t> tokens) const;

  const int32_t block_tokens_;
  const PrefixSecret secret_;
  const Hash hash_;
  absl::flat_hash_map<PrefixKey, int32_t> block_of_;
  std::vector<Entry> entries_;   // [blocks]
  std::vector<int32_t> tokens_;  // [blocks, block_tokens]
  uint64_t next_node_ = 1;
};

}  // namespace octet
