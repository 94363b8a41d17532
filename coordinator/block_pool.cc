// BlockPool: a stack of free blocks, and a flag per block that makes giving back twice a failed assertion.
#include "coordinator/block_pool.h"

#include <numeric>

#include "kernels/check.h"

namespace octet {

BlockPool::BlockPool(int32_t blocks) {
  OCTET_CHECK(blocks > 0, "a block pool has at least one block");
  held_.resize(static_cast<size_t>(blocks));
  free_.resize(static_cast<size_t>(blocks));
  std::iota(free_.rbegin(), free_.rend(), 0);
}

bool BlockPool::take(int32_t count, std::vector<int32_t>* blocks) {
  OCTET_CHECK(count >= 0, "a negative number of blocks was asked for");
  if (count > free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    const int32_t block = free_.back();
    free_.pop_back();
    OCTET_CHECK(held_[block] == 0, "a block was free and held");
    held_[block] = 1;
    blocks->push_back(block);
  }
  return true;
}

void BlockPool::give_back(const std::vector<int32_t>& blocks) {
  for (const int32_t block : blocks) {
    OCTET_CHECK(block >= 0 && block < total(), "a block that does not exist was given back");
    OCTET_CHECK(held_[block] == 1, "a block was given back that nobody held");
    held_[block] = 0;
    free_.push_back(block);
  }
}

}  // namespace octet
