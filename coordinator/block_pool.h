// BlockPool: which KV cache blocks are free and which are held. The conservation law (free + held == total, no block in
// two hands) is an assertion. Only the engine thread calls these.
#pragma once

#include <cstdint>
#include <vector>

namespace octet {

class BlockPool {
 public:
  explicit BlockPool(int32_t blocks);

  int32_t total() const { return static_cast<int32_t>(held_.size()); }
  int32_t free() const { return static_cast<int32_t>(free_.size()); }

  // Appends `count` blocks to *blocks, or nothing when fewer are free.
  bool take(int32_t count, std::vector<int32_t>* blocks);
  // REQUIRES: each is held.
  void give_back(const std::vector<int32_t>& blocks);

 private:
  std::vector<int32_t> free_;
  std::vector<uint8_t> held_;
};

}  // namespace octet
