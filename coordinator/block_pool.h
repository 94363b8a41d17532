// BlockPool: which KV cache blocks are free and which are held. The conservation law (free + held == total, no block in
// two hands) is an assertion. Only the engine thread calls these.
#pragma once

#include <cstdint>
#include <vector>

namespace octet {

class BlockPool {
 public:
  // REQUIRES: blocks > 0.
  explicit BlockPool(int32_t blocks);

  int32_t total() const { return static_cast<int32_t>(held_.size()); }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }

  // Appends `count` blocks to *blocks, or nothing (and says false) when fewer are free. REQUIRES: count >= 0.
  // Which blocks is a function of the calls so far: the same calls take the same blocks.
  bool take(int32_t count, std::vector<int32_t>* blocks);
  // REQUIRES: each is held.
  void give_back(const std::vector<int32_t>& blocks);

 private:
  std::vector<int32_t> free_;  // a stack: the block given back last is taken first, while it is warm
  std::vector<uint8_t> held_;
};

}  // namespace octet
