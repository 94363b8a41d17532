// The converter: a GGUF file or an unquantised Hugging Face directory to a Hugging Face directory in BF16 and FP8.
// Streams rows, so that a 405B model needs the memory of a few slabs of rows; the destination appears whole or not at
// all.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "kernels/ops.h"
#include "worker/checkpoint/architecture.h"

namespace octet {

enum class Fp8Recipe : uint8_t {
  kNone,  // all BF16
  kFfn,   // Meta's: gate, up and down of all layers but the first and the last; quant_method fbgemm_fp8
  kAll,   // every linear layer of every block; compressed-tensors, channel weights and dynamic per-token inputs
};
// "none", "ffn" or "all"; nothing for other names.
std::optional<Fp8Recipe> fp8_recipe_named(std::string_view name);
// Whether the recipe stores this tensor of a model of so many layers in FP8.
bool becomes_fp8(const ModelTensor& tensor, Fp8Recipe recipe, int64_t num_hidden_layers);

// How the recipe's FP8 layers have their inputs quantised, where they are.
ActivationScheme activation_scheme(Fp8Recipe recipe);

struct ConvertProgress {
  std::string tensor;      // being written
  int64_t bytes_done = 0;  // of weights and scales in the destination
  int64_t bytes_total = 0;
};

struct ConvertOptions {
  std::string source;       // a GGUF file, or a directory with config.json and safetensors in BF16, F16 or F32
  std::string destination;  // must not exist
  Fp8Recipe recipe = Fp8Recipe::kFfn;
  // Tensors go to one file while they fit, else to shards of at most this size (a larger tensor gets its own).
  int64_t max_shard_bytes = 4'500'000'000;
  // Called from convert() after each slab of rows; may be empty.
  std::function<void(const ConvertProgress&)> progress;
  // Looked at between slabs; a signal handler may set it. CANCELLED then, and nothing is left behind. May be null.
  const std::atomic<bool>* cancelled = nullptr;
};

// FP8 rows: scale = max(amax / 448, 1 / (448 * 512)) over the output row in FP32, code = e4m3(clamp(w * (1 / scale))),
// where w is the source's value (not rounded to BF16 first); scales are F32 [out, 1]. All else is BF16, to nearest
// even.
absl::Status convert(const ConvertOptions& options);

// The rule above for one row. Returns the scale. REQUIRES: the values are finite.
float quantize_row(const float* values, int64_t count, uint8_t* codes);

}  // namespace octet
