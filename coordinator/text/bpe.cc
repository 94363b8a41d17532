#include "coordinator/text/bpe.h"

#include <algorithm>
#include <functional>
#include <limits>

#include <string_view>

namespace octet {
namespace {

constexpr uint32_t kNoRank = std::numeric_limits<uint32_t>::max();
constexpr uint32_t kNone = std::numeric_limits<uint32_t>::max();

// Up to here looking at every pair again beats keeping a heap.
constexpr size_t kShortWord = 48;

uint64_t pair_key(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

}  // namespace

Vocabulary::Vocabulary(const std::vector<std::optional<std::string>>& by_id) {
  offset_.reserve(by_id.size() + 1);
  offset_.push_back(0);
  for (const std::optional<std::string>& token : by_id) {
    if (token.has_value()) arena_.append(*token);
    offset_.push_back(static_cast<uint32_t>(arena_.size()));
  }
  size_t slots = 16;
  while (slots < 2 * by_id.size()) slots *= 2;
  table_.assign(slots, -1);
}

size_t Vocabulary::slot_of(std::string_view bytes) const {
  const size_t mask = table_.size() - 1;
  size_t slot = std::hash<std::string_view>()(bytes) & mask;
  while (table_[slot] >= 0 && bytes_of(table_[slot]) != bytes) slot = (slot + 1) & mask;
  return slot;
}

bool Vocabulary::index(int32_t id) {
  const size_t slot = slot_of(bytes_of(id));
  if (table_[slot] >= 0) return false;
  table_[slot] = id;
  return true;
}

int32_t Vocabulary::find(std::string_view bytes) const { return table_[slot_of(bytes)]; }

Bpe::Bpe(Vocabulary vocabulary, const std::vector<Merge>& merges, Options options)
    : vocabulary_(std::move(vocabulary)), options_(options) {
  for (int byte = 0; byte < 256; ++byte) {
    const char character = static_cast<char>(byte);
    byte_token_[byte] = vocabulary_.find(std::string_view(&character, 1));
  }
  rank_.reserve(merges.size());
  merged_.reserve(merges.size());
  for (const Merge& merge : merges) {
    rank_[pair_key(merge.left, merge.right)] = static_cast<uint32_t>(merged_.size());
    merged_.push_back(merge.merged);
  }
  whole_.assign(vocabulary_.size(), false);
  Scratch scratch;
  std::vector<int32_t> ids;
  for (int32_t id = 0; id < vocabulary_.size(); ++id) {
    const std::string_view bytes = vocabulary_.bytes_of(id);
    if (vocabulary_.find(bytes) != id) continue;
    ids.clear();
    if (!options_.ignore_merges) encode_by_merges(bytes, scratch, ids);
    whole_[id] = options_.ignore_merges || (ids.size() == 1 && ids[0] == id);
  }
}

void Bpe::encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const {
  const int32_t id = vocabulary_.find(word);
  if (id >= 0 && whole_[id]) {
    ids.push_back(id);
  } else {
    encode_by_merges(word, scratch, ids);
  }
}

void Bpe::encode_by_merges(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const {
  split_into_bytes(word, scratch.ids);
  if (scratch.ids.size() <= kShortWord) {
    merge_short(scratch);
  } else {
    merge_long(scratch);
  }
  ids.insert(ids.end(), scratch.ids.begin(), scratch.ids.end());
}

void Bpe::split_into_bytes(std::string_view word, std::vector<int32_t>& ids) const {
  ids.clear();
  bool after_unknown = false;
  for (const char character : word) {
    const int32_t id = byte_token_[static_cast<uint8_t>(character)];
    if (id >= 0) {
      ids.push_back(id);
    } else if (options_.unknown_token.has_value() && !(after_unknown && options_.fuse_unknown)) {
      ids.push_back(*options_.unknown_token);
    }
    after_unknown = id < 0;
  }
}

uint32_t Bpe::rank_of(int32_t left, int32_t right) const {
  const auto found = rank_.find(pair_key(left, right));
  return found == rank_.end() ? kNoRank : found->second;
}

// The strongest pair, leftmost on ties, again and again.
void Bpe::merge_short(Scratch& scratch) const {
  std::vector<int32_t>& ids = scratch.ids;
  if (ids.size() < 2) return;
  std::vector<uint32_t>& ranks = scratch.ranks;  // ranks[i] of the pair (i, i + 1)
  ranks.resize(ids.size() - 1);
  for (size_t i = 0; i < ranks.size(); ++i) ranks[i] = rank_of(ids[i], ids[i + 1]);
  while (!ranks.empty()) {
    const size_t best = std::min_element(ranks.begin(), ranks.end()) - ranks.begin();
    if (ranks[best] == kNoRank) return;
    ids[best] = merged_[ranks[best]];
    ids.erase(ids.begin() + best + 1);
    ranks.erase(ranks.begin() + best);
    if (best > 0) ranks[best - 1] = rank_of(ids[best - 1], ids[best]);
    if (best < ranks.size()) ranks[best] = rank_of(ids[best], ids[best + 1]);
  }
}

// The same order of merges from a heap over a linked list. A heap entry is stale when its pair has changed since: then
// ranks[position] is no longer the entry's rank.
void Bpe::merge_long(Scratch& scratch) const {
  std::vector<int32_t>& ids = scratch.ids;
  const uint32_t count = static_cast<uint32_t>(ids.size());
  scratch.ranks.assign(count, kNoRank);
  scratch.next.resize(count);
  scratch.previous.resize(count);
  scratch.heap.clear();
  for (uint32_t i = 0; i < count; ++i) {
    scratch.next[i] = i + 1 < count ? i + 1 : kNone;
    scratch.previous[i] = i > 0 ? i - 1 : kNone;
    if (i + 1 == count) break;
    scratch.ranks[i] = rank_of(ids[i], ids[i + 1]);
    if (scratch.ranks[i] != kNoRank) scratch.heap.push_back({scratch.ranks[i], i});
  }
  const auto order = std::greater<Scratch::Entry>();
  std::make_heap(scratch.heap.begin(), scratch.heap.end(), order);

  const auto look_again = [&](uint32_t position) {
    const uint32_t right = scratch.next[position];
    const uint32_t rank = right == kNone ? kNoRank : rank_of(ids[position], ids[right]);
    scratch.ranks[position] = rank;
    if (rank == kNoRank) return;
    scratch.heap.push_back({rank, position});
    std::push_heap(scratch.heap.begin(), scratch.heap.end(), order);
  };
  while (!scratch.heap.empty()) {
    const Scratch::Entry entry = scratch.heap.front();
    std::pop_heap(scratch.heap.begin(), scratch.heap.end(), order);
    scratch.heap.pop_back();
    if (scratch.ranks[entry.position] != entry.rank) continue;
    const uint32_t gone = scratch.next[entry.position];
    const uint32_t after = scratch.next[gone];
    ids[entry.position] = merged_[entry.rank];
    ids[gone] = -1;
    scratch.ranks[gone] = kNoRank;
    scratch.next[entry.position] = after;
    if (after != kNone) scratch.previous[after] = entry.position;
    look_again(entry.position);
    if (scratch.previous[entry.position] != kNone) look_again(scratch.previous[entry.position]);
  }
  ids.erase(std::remove(ids.begin(), ids.end(), -1), ids.end());
}

}  // namespace octet
