// Checkpoint: a Hugging Face model directory as it lies on disk (config.json, safetensors in one file or in shards).
// Knows files and tensors, nothing of ranks. Opening reads headers only; tensors are read in parts on demand.
// Invariant: every TensorInfo lies inside its file, and its bytes equal shape times dtype.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "worker/model/model_config.h"

namespace octet {

struct TensorInfo {
  std::string name;
  DType dtype;
  Shape shape;
  int file = 0;        // index into Checkpoint's files
  int64_t offset = 0;  // of the first byte in that file
  int64_t bytes() const { return shape.elements() * size_of(dtype); }
};

// How one linear layer is stored and how the recipe wants its input.
struct LinearFormat {
  const TensorInfo* weight = nullptr;        // [out, in]
  const TensorInfo* weight_scale = nullptr;  // [], [1], [out] or [out, 1]; null for unquantised weights
  const TensorInfo* input_scale = nullptr;   // [] or [1]; only for static activation scales
  ActivationScheme activations;              // its static `scale` is already read from input_scale
};

class Checkpoint {
 public:
  // Reads config.json, generation_config.json, the index and every safetensors header, and checks them against each
  // other and against the architecture: missing or extra tensors, wrong shapes, unknown quantisation are errors here.
  static absl::StatusOr<Checkpoint> open(const std::string& directory);

  Checkpoint(Checkpoint&&) noexcept;
  Checkpoint& operator=(Checkpoint&&) noexcept;
  ~Checkpoint();

  const std::string& directory() const;
  const ModelConfig& config() const;
  const GenerationConfig& generation_config() const;

  // Null when absent.
  const TensorInfo* find(std::string_view name) const;
  const std::map<std::string, TensorInfo, std::less<>>& tensors() const;

  // `module` is a full path without ".weight": "model.layers.3.mlp.gate_proj". "lm_head" of a tied model is its
  // embedding. NOT_FOUND for what is no linear layer.
  absl::StatusOr<LinearFormat> linear_format(const std::string& module) const;

  // Copies rows [row_begin, row_end) x columns [col_begin, col_end) of a matrix (or a range of a vector: columns 0..1)
  // to dst, dense, in the file's dtype. Reads in large sequential requests and, for a strided range, keeps what it
  // wants. Thread safe. DATA_LOSS, naming file and tensor, when the file ends early, e4m3 values hold NaN codes (0x7F,
  // 0xFF), or scales are not numbers from 0. REQUIRES: the range lies inside the tensor.
  absl::Status read(const TensorInfo& tensor, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                    void* dst) const;
  // A whole tensor as FP32 (scales, norms; F32, BF16 or F16 in the file).
  absl::StatusOr<std::vector<float>> read_f32(const TensorInfo& tensor) const;

  // What the checkpoint's files say, as a 64-bit digest of config.json, all tensor headers, file sizes and a sample of
  // each file's data: ranks compare it at start so that no two serve different models.
  uint64_t digest() const;
  // "fbgemm_fp8", "compressed-tensors", "modelopt", "fp8" (one scale per tensor) or "none".
  const std::string& quant_method() const;
  // Remarks for the log: ignore lists that disagree with dtypes, F16/F32 weights that will be rounded to BF16, ...
  const std::vector<std::string>& warnings() const;

 private:
  struct Impl;
  explicit Checkpoint(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
