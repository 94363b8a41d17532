// Byte-level byte-pair encoding: from the bytes of one pre-token to ids. Immutable once built; any number of threads
// may encode at the same time. Invariant: result depends on the bytes alone and takes O(n log n) for n bytes.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"

namespace octet {

// Tokens by id and, for those that stand for bytes of text, ids by bytes. Ids may have holes: those read as no bytes.
class Vocabulary {
 public:
  // `by_id[i]` is token i; nullopt is a hole.
  explicit Vocabulary(const std::vector<std::optional<std::string>>& by_id);

  int32_t size() const { return static_cast<int32_t>(offset_.size()) - 1; }
  // REQUIRES: 0 <= id < size().
  std::string_view bytes_of(int32_t id) const {
    return std::string_view(arena_).substr(offset_[id], offset_[id + 1] - offset_[id]);
  }

  // Makes find() know token `id`. False when another token with the same bytes is already known.
  bool index(int32_t id);
  // -1 when no indexed token has these bytes.
  int32_t find(std::string_view bytes) const;

 private:
  size_t slot_of(std::string_view bytes) const;

  std::string arena_;
  std::vector<uint32_t> offset_;  // [size + 1]
  std::vector<int32_t> table_;    // open addressing, a power of two, at most half full; -1 is free
};

class Bpe {
 public:
  struct Options {
    bool ignore_merges = false;            // a pre-token that is a token as a whole needs no merges
    std::optional<int32_t> unknown_token;  // for a byte without a token; without one, such bytes vanish
    bool fuse_unknown = false;             // neighbouring unknown bytes are one token
  };
  struct Merge {
    int32_t left;
    int32_t right;
    int32_t merged;
  };
  // Reused between calls so that words cost no allocation. One per thread.
  struct Scratch {
    struct Entry {
      uint32_t rank;
      uint32_t position;
      bool operator>(const Entry& other) const {
        return rank != other.rank ? rank > other.rank : position > other.position;
      }
    };
    std::vector<int32_t> ids;
    std::vector<uint32_t> ranks;
    std::vector<uint32_t> next;
    std::vector<uint32_t> previous;
    std::vector<Entry> heap;
  };

  // `merges` strongest first; of a pair named twice the last counts, as in the reference.
  // REQUIRES: every id in `merges` and `options` is in the vocabulary, and merged's bytes are left's and right's.
  Bpe(Vocabulary vocabulary, const std::vector<Merge>& merges, Options options);

  const Vocabulary& vocabulary() const { return vocabulary_; }

  // Appends the ids of one pre-token. REQUIRES: word.size() < 2^32.
  void encode(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

 private:
  void split_into_bytes(std::string_view word, std::vector<int32_t>& ids) const;
  uint32_t rank_of(int32_t left, int32_t right) const;
  void merge_short(Scratch& scratch) const;
  void merge_long(Scratch& scratch) const;
  void encode_by_merges(std::string_view word, Scratch& scratch, std::vector<int32_t>& ids) const;

  Vocabulary vocabulary_;
  Options options_;
  std::array<int32_t, 256> byte_token_;           // -1: no token for this byte
  absl::flat_hash_map<uint64_t, uint32_t> rank_;  // left << 32 | right -> index into merged_
  std::vector<int32_t> merged_;
  std::vector<bool> whole_;  // [size] token i's bytes, as a pre-token, encode to i alone: no need to merge
};

}  // namespace octet
