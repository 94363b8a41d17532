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
  // Bytes of one block of kKvBlockTokens positions on this rank, all layers. dtype: kBF16 or kF8E4M3.
  static int64_t block_bytes(const ModelConfig& config, const ShardSpec& shard, DType dtype);

  // Blocks beyond those that sequences have.
  static int32_t padding_blocks(Device device) { return device == Device::kCuda ? 1 : 0; }

  // Where `stream`, which outlives it, computes.
  KvCache(const Stream& stream, const ModelConfig& config, const ShardSpec& shard, DType dtype, int32_t blocks);

  int32_t blocks() const { return blocks_; }
  // A block beyond those, for the tokens that pad a recorded step. REQUIRES: the stream computes on a CUDA device.
  int32_t padding_block() const { return blocks_; }
  // With the scales of its codes; a cache in BF16 has none.
  KvLayer layer(int64_t index, float key_scale = 1.0f, float value_scale = 1.0f) const;

 private:
  DType dtype_;
  Shape keys_shape_, values_shape_;
  int64_t layer_bytes_;
  int32_t blocks_;
  Device device_;
  Buffer memory_;
};

}  // namespace octet
