// ModelWeights: this rank's weights, packed for its back end and read-only afterwards. Planning and loading walk the
// same list of tensors, so that the plan's bytes are what loading allocates.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "kernels/ops.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/model/shard_spec.h"
#include "worker/model/weight_formats.h"

namespace octet {

struct LayerWeights {
  Tensor input_layernorm;  // [hidden] F32
  Linear q_proj, k_proj, v_proj;
  Linear o_proj;                               // columns of this rank's query heads
  float key_scale = 1.0f, value_scale = 1.0f;  // of a cache in FP8
  Tensor post_attention_layernorm;             // [hidden] F32
  Linear gate_proj, up_proj;
  Linear down_proj;  // columns of this rank's feed-forward range
};

// Bytes of one rank, by part.
struct WeightBytes {
  int64_t embedding = 0, lm_head = 0, attention = 0, feed_forward = 0;
  int64_t norms = 0;
  int64_t scales = 0;  // of FP8 weights
  int64_t total() const { return embedding + lm_head + attention + feed_forward + norms + scales; }
};

// W8A8 computes with the activation scheme that the checkpoint asks for; W8A16 keeps activations in BF16.
enum class ActivationMode : uint8_t { kBF16, kFP8 };

// Called now and then with the bytes that are there so far, and those that there will be in all.
using ShardProgress = std::function<void(int64_t, int64_t)>;

struct LoadOptions {
  ActivationMode activations = ActivationMode::kBF16;
  DType kv_dtype = DType::kBF16;  // kF8E4M3: the scales of such a cache are read too
  ShardProgress progress;
};

class ModelWeights {
 public:
  static WeightBytes plan(const WeightFormats& formats, const ShardSpec& shard);

  // Reads this rank's part only. Errors name the tensor.
  static absl::StatusOr<ModelWeights> load(Stream& stream, const Checkpoint& checkpoint, const ShardSpec& shard,
                                           const LoadOptions& options);

  // Numbers instead of a checkpoint, in memory laid out as load() does: for measuring a rank whose files, or whose
  // other ranks, are not there. FP8 layers quantise their inputs as `activations` says.
  static ModelWeights random(Stream& stream, const WeightFormats& formats, const ShardSpec& shard,
                             const ActivationScheme& activations, const ShardProgress& progress);

  Tensor embed_tokens;  // [vocabulary rows here, hidden] BF16
  std::vector<LayerWeights> layers;
  Tensor norm;     // [hidden] F32
  Linear lm_head;  // vocabulary rows here

  // All of it, as it lies in memory.
  std::span<const std::byte> memory() const;

 private:
  Buffer memory_;
};

}  // namespace octet
