// KvCache: this rank's cache blocks, all layers of it. Allocated once; blocks are handed out by the scheduler's
// numbers.
#pragma once

#include <cstdint>

#include "kernels/memory.h"
#include "kernels/ops.h"
#include "worker/model/shard_spec.h"

namespace octet {

class KvCache {
 public:
  // Bytes of one block of kKvBlockTokens positions on this rank, all layers.
  static int64_t block_bytes(const ModelConfig& config, const ShardSpec& shard);

  // Blocks beyond those that sequences have.
  static int32_t padding_blocks(Device device) { return device == Device::kCuda ? 1 : 0; }

  // Where `stream`, which outlives it, computes.
  KvCache(const Stream& stream, const ModelConfig& config, const ShardSpec& shard, int32_t blocks);

  int32_t blocks() const { return blocks_; }
  // A block beyond those, for the tokens that pad a recorded step. REQUIRES: the stream computes on a CUDA device.
  int32_t padding_block() const { return blocks_; }
  KvLayer layer(int64_t index) const;

 private:
  Shape keys_shape_, values_shape_;
  int64_t layer_bytes_;
  int32_t blocks_;
  Device device_;
  Buffer memory_;
};

}  // namespace octet
