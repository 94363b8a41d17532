// BlockPool: a stack of empty blocks and a linked list of idle ones, oldest first. Invariant: a block without
// references is in exactly one of the two, according to `keep`.
#include "coordinator/block_pool.h"

#include <numeric>
#include <utility>

#include "kernels/check.h"

namespace octet {

BlockPool::BlockPool(int32_t blocks, std::function<void(int32_t block)> on_reuse) : on_reuse_(std::move(on_reuse)) {
  OCTET_CHECK(blocks > 0, "a block pool has at least one block");
  blocks_.resize(static_cast<size_t>(blocks));
  empty_.resize(static_cast<size_t>(blocks));
  std::iota(empty_.rbegin(), empty_.rend(), 0);
}

bool BlockPool::take(int32_t count, std::vector<int32_t>* blocks) {
  OCTET_CHECK(count >= 0, "a negative number of blocks was asked for");
  if (count > free()) return false;
  for (int32_t i = 0; i < count; ++i) {
    int32_t block = oldest_;
    if (empty_.empty()) {
      remove_idle(block);
      on_reuse_(block);
    } else {
      block = empty_.back();
      empty_.pop_back();
    }
    OCTET_CHECK(at(block).references == 0, "a block was free and held");
    blocks_[block] = {.references = 1};
    blocks->push_back(block);
  }
  return true;
}

void BlockPool::share(int32_t block) {
  if (at(block).references == 0) {
    OCTET_CHECK(at(block).keep, "an empty block was shared");
    remove_idle(block);
  }
  ++blocks_[block].references;
}

void BlockPool::give_back(std::span<const int32_t> blocks) {
  for (size_t i = blocks.size(); i-- > 0;) {
    Block& block = at(blocks[i]);
    OCTET_CHECK(block.references > 0, "a block was given back that nobody held");
    if (--block.references > 0) continue;
    if (block.keep) {
      append_idle(blocks[i]);
    } else {
      empty_.push_back(blocks[i]);
    }
  }
}

BlockPool::Block& BlockPool::at(int32_t block) {
  OCTET_CHECK(block >= 0 && block < total(), "a block that does not exist");
  return blocks_[static_cast<size_t>(block)];
}

void BlockPool::append_idle(int32_t block) {
  blocks_[block].older = newest_;
  blocks_[block].newer = kNone;
  (newest_ == kNone ? oldest_ : blocks_[newest_].newer) = block;
  newest_ = block;
  ++idle_;
}

void BlockPool::remove_idle(int32_t block) {
  const Block& leaving = at(block);
  (leaving.older == kNone ? oldest_ : blocks_[leaving.older].newer) = leaving.newer;
  (leaving.newer == kNone ? newest_ : blocks_[leaving.newer].older) = leaving.older;
  --idle_;
}

void BlockPool::check() const {
  int32_t idle = 0, held = 0, last = kNone;
  for (int32_t block = oldest_; block != kNone; block = blocks_[block].newer) {
    OCTET_CHECK(blocks_[block].references == 0 && blocks_[block].keep, "a block that is not idle is among the idle");
    OCTET_CHECK(blocks_[block].older == last, "the list of idle blocks is torn");
    last = block;
    ++idle;
  }
  for (const Block& block : blocks_) held += block.references > 0;
  for (const int32_t block : empty_) OCTET_CHECK(blocks_[block].references == 0, "a block is empty and held");
  OCTET_CHECK(last == newest_ && idle == idle_, "idle blocks were miscounted");
  OCTET_CHECK(static_cast<int32_t>(empty_.size()) + idle + held == total(), "blocks are not conserved");
}

}  // namespace octet
