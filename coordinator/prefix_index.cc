#include "coordinator/prefix_index.h"

#include <sodium/crypto_shorthash_siphash24.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "kernels/check.h"

namespace octet {

static_assert(sizeof(PrefixKey) == crypto_shorthash_siphashx24_BYTES);
static_assert(sizeof(PrefixSecret) == crypto_shorthash_siphashx24_KEYBYTES);

PrefixKey PrefixIndex::sip_hash(const PrefixSecret& secret, std::span<const unsigned char> bytes) {
  PrefixKey key;
  crypto_shorthash_siphashx24(reinterpret_cast<unsigned char*>(key.data()), bytes.data(), bytes.size(), secret.data());
  return key;
}

PrefixIndex::PrefixIndex(int32_t blocks, int32_t block_tokens, const PrefixSecret& secret, Hash hash)
    : block_tokens_(block_tokens), secret_(secret), hash_(hash) {
  OCTET_CHECK(blocks > 0 && block_tokens > 0, "an index of no blocks");
  entries_.resize(static_cast<size_t>(blocks));
  tokens_.resize(static_cast<size_t>(blocks) * static_cast<size_t>(block_tokens));
  block_of_.reserve(2 * static_cast<size_t>(blocks));  // so that entering and removing seldom moves the table
}

PrefixPoint PrefixIndex::root(std::string_view salt) const {
  // Of another form than what key_after() hashes: a salt cannot imitate a prefix.
  const std::string bytes = "salt:" + std::string(salt);
  return {.key = hash_(secret_, {reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size()})};
}

PrefixKey PrefixIndex::key_after(const PrefixPoint& point, std::span<const int32_t> tokens) const {
  OCTET_CHECK(static_cast<int32_t>(tokens.size()) == block_tokens_, "a prefix grows by whole blocks");
  // Short blocks fit here; the hash is taken in links of this size, so that nothing is allocated.
  constexpr size_t kLinkTokens = 64;
  unsigned char bytes[1 + sizeof(PrefixKey) + kLinkTokens * sizeof(int32_t)];
  PrefixKey key = point.key;
  for (size_t done = 0; done < tokens.size();) {
    const size_t count = std::min(kLinkTokens, tokens.size() - done);
    bytes[0] = 0xff;  // no salt begins so
    std::memcpy(bytes + 1, key.data(), sizeof key);
    std::memcpy(bytes + 1 + sizeof key, tokens.data() + done, count * sizeof(int32_t));
    key = hash_(secret_, {bytes, 1 + sizeof key + count * sizeof(int32_t)});
    done += count;
  }
  return key;
}

std::span<const int32_t> PrefixIndex::tokens_of(int32_t block) const {
  return {tokens_.data() + static_cast<size_t>(block) * static_cast<size_t>(block_tokens_),
          static_cast<size_t>(block_tokens_)};
}

bool PrefixIndex::holds(int32_t block, const PrefixPoint& point, std::span<const int32_t> tokens) const {
  return entries_[block].parent == point.node && std::ranges::equal(tokens_of(block), tokens);
}

int32_t PrefixIndex::find(std::span<const int32_t> tokens, PrefixPoint* point) const {
  const PrefixKey key = key_after(*point, tokens);
  const auto found = block_of_.find(key);
  if (found == block_of_.end() || !holds(found->second, *point, tokens)) return -1;
  *point = {.key = key, .node = entries_[found->second].node};
  return found->second;
}

int32_t PrefixIndex::add(std::span<const int32_t> tokens, int32_t block, PrefixPoint* point) {
  const PrefixKey key = key_after(*point, tokens);
  const auto present = block_of_.find(key);
  if (present != block_of_.end() && holds(present->second, *point, tokens)) {
    *point = {.key = key, .node = entries_[present->second].node};
    return present->second;
  }
  if (present != block_of_.end()) remove(present->second);
  remove(block);
  block_of_.emplace(key, block);
  entries_[block] = {.key = key, .parent = point->node, .node = next_node_++};
  std::ranges::copy(tokens, tokens_.begin() + static_cast<int64_t>(block) * block_tokens_);
  *point = {.key = key, .node = entries_[block].node};
  return block;
}

void PrefixIndex::remove(int32_t block) {
  Entry& entry = entries_[block];
  if (entry.node == 0) return;
  block_of_.erase(entry.key);
  entry = {};
}

}  // namespace octet
