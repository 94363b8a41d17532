// BlockPool: who holds which KV cache block. A block is empty, held by one or more sequences, or idle: held by nobody,
// but with contents that may be needed again. The conservation law (empty + idle + held == total) is an assertion.
// Only the engine thread calls these.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

namespace octet {

class BlockPool {
 public:
  // `on_reuse` is called for an idle block whose contents are about to be lost. REQUIRES: blocks > 0.
  BlockPool(int32_t blocks, std::function<void(int32_t block)> on_reuse);

  int32_t total() const { return static_cast<int32_t>(blocks_.size()); }
  int32_t free() const { return static_cast<int32_t>(empty_.size()) + idle_; }  // that take() can give
  int32_t idle() const { return idle_; }
  int32_t references(int32_t block) const { return blocks_[static_cast<size_t>(block)].references; }

  // Appends `count` blocks to *blocks, each with one reference, or nothing (and says false) when fewer are free. Empty
  // ones first, then those that have been idle longest. REQUIRES: count >= 0. A function of the calls so far.
  bool take(int32_t count, std::vector<int32_t>* blocks);
  // One more reference. REQUIRES: the block is held or idle.
  void share(int32_t block);
  // One reference less; the last block first, so that of a sequence's blocks the last ones are lost first.
  // REQUIRES: each is held.
  void give_back(std::span<const int32_t> blocks);
  // Whether the block is to stay idle, not become empty, when nobody holds it any more. REQUIRES: it is held.
  void keep(int32_t block) { blocks_[static_cast<size_t>(block)].keep = true; }

  // Walks everything: for tests.
  void check() const;

 private:
  static constexpr int32_t kNone = -1;
  struct Block {
    int32_t references = 0;
    bool keep = false;
    int32_t older = kNone, newer = kNone;  // neighbours among the idle ones
  };

  Block& at(int32_t block);
  void append_idle(int32_t block);
  void remove_idle(int32_t block);

  std::function<void(int32_t block)> on_reuse_;
  std::vector<Block> blocks_;
  std::vector<int32_t> empty_;  // a stack: the block given back last is taken first, while it is warm
  int32_t oldest_ = kNone, newest_ = kNone;
  int32_t idle_ = 0;
};

}  // namespace octet
