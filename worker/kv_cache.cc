#include "worker/kv_cache.h"

namespace octet {

int64_t KvCache::block_bytes(const ModelConfig& config, const ShardSpec& shard) {
  const int64_t keys_and_values = 2;
  return config.num_hidden_layers * keys_and_values * shard.kv_heads() * config.head_dim * kKvBlockTokens *
         size_of(DType::kBF16);
}

KvCache::KvCache(const Stream& stream, const ModelConfig& config, const ShardSpec& shard, int32_t blocks)
    : keys_shape_({blocks + padding_blocks(stream.device()), shard.kv_heads(), config.head_dim / 2, kKvBlockTokens, 2}),
      values_shape_({blocks + padding_blocks(stream.device()), shard.kv_heads(), kKvBlockTokens, config.head_dim}),
      layer_bytes_((keys_shape_.elements() + values_shape_.elements()) * size_of(DType::kBF16)),
      blocks_(blocks),
      device_(stream.device()),
      memory_(config.num_hidden_layers * layer_bytes_, stream) {}

KvLayer KvCache::layer(int64_t index) const {
  char* keys = static_cast<char*>(memory_.data()) + index * layer_bytes_;
  char* values = keys + keys_shape_.elements() * size_of(DType::kBF16);
  return {.keys = Tensor(keys, DType::kBF16, keys_shape_, device_),
          .values = Tensor(values, DType::kBF16, values_shape_, device_)};
}

}  // namespace octet
