// WeightFormats: a model as planning sees it: its config, and which of its linear layers rest in FP8. From a
// checkpoint's headers, or from a recipe where there are no files yet.
#pragma once

#include <functional>
#include <set>
#include <string>
#include <string_view>

#include "kernels/tensor.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/converter.h"
#include "worker/model/model_config.h"

namespace octet {

struct WeightFormats {
  ModelConfig config;
  // Modules, like "model.layers.3.mlp.gate_proj", that are F8_E4M3 with an F32 scale for each row. Others are BF16.
  std::set<std::string, std::less<>> fp8;

  DType resident_dtype(std::string_view module) const { return fp8.contains(module) ? DType::kF8E4M3 : DType::kBF16; }
};

WeightFormats weight_formats(const Checkpoint& checkpoint);
// As convert() would write the model.
WeightFormats weight_formats(const ModelConfig& config, Fp8Recipe recipe);

}  // namespace octet
