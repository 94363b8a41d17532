#include "worker/kv_cache.h"

namespace octet {

int64_t KvCache::block_bytes(const ModelConfig& config, const ShardSpec& shard, DType dtype) {
  const int64_t keys_and_values = 2;
  return config.num_hidden_layers * keys_and_values * shard.kv_heads() * config.head_dim * kKvBlockTokens *
         size_of(dtype);
}

KvCache::KvCache(const Stream& stream, const ModelConfig& config, const ShardSpec& shard, DType dtype, int32_t blocks)
    : dtype_(dtype),
      keys_shape_({blocks + padding_blocks(stream.device()), shard.kv_heads(), config.head_dim / 2, kKvBlockTokens, 2}),
      values_shape_({blocks + padding_blocks(stream.device()), shard.kv_heads(), kKvBlockTokens, config.head_dim}),
      layer_bytes_((keys_shape_.elements() + values_shape_.elements()) * size_of(dtype)),
      blocks_(blocks),
      device_(stream.device()),
      memory_(config.num_hidden_layers * layer_bytes_, stream) {}

KvLayer KvCache::layer(int64_t index, float key_scale, float value_scale) const {
  char* keys = static_cast<char*>(memory_.data()) + index * layer_bytes_;
  char* values = keys + keys_shape_.elements() * size_of(dtype_);
  KvLayer layer = {.keys = Tensor(keys, dtype_, keys_shape_, device_),
                   .values = Tensor(values, dtype_, values_shape_, device_)};
  if (dtype_ == DType::kF8E4M3) {
    layer.key_scale = key_scale;
    layer.value_scale = value_scale;
  }
  return layer;
}

}  // namespace octet
