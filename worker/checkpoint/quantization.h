// What a checkpoint's config says about FP8: quantization_config (or compression_config) in config.json, and ModelOpt's
// hf_quant_config.json. Which tensors really are FP8 is decided by their dtypes; the config says how inputs are
// quantised.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "nlohmann/json.hpp"

namespace octet {

struct Quantization {
  std::string method = "none";  // quant_method
  // Of every quantised layer. For kStatic the scale is each layer's own input_scale tensor.
  ActivationScheme activations;
  // Modules that the config says are not quantised, each a full path, a path prefix or a shell pattern.
  std::vector<std::string> ignored;
  // False where the list has entries that only its own tool can read: then it is no evidence.
  bool ignored_is_complete = true;
  // Scales for an FP8 KV cache are promised.
  bool has_kv_cache_scheme = false;

  // Whether the ignore list names `module`.
  bool ignores(const std::string& module) const;
};

// `config` is config.json; `hf_quant_config` is that file's object, or null when there is none. Refuses by name what is
// not computed, saying what is.
absl::StatusOr<Quantization> parse_quantization(const nlohmann::json& config, const nlohmann::json& hf_quant_config);

}  // namespace octet
