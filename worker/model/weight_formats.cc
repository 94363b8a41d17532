#include "worker/model/weight_formats.h"

#include "worker/checkpoint/architecture.h"

namespace octet {

WeightFormats weight_formats(const Checkpoint& checkpoint) {
  WeightFormats formats{.config = checkpoint.config()};
  for (const ModelTensor& tensor : model_tensors(formats.config)) {
    if (checkpoint.find(tensor.name())->dtype == DType::kF8E4M3) formats.fp8.insert(tensor.module);
  }
  return formats;
}

WeightFormats weight_formats(const ModelConfig& config, Fp8Recipe recipe) {
  WeightFormats formats{.config = config};
  for (const ModelTensor& tensor : model_tensors(config)) {
    if (becomes_fp8(tensor, recipe, config.num_hidden_layers)) formats.fp8.insert(tensor.module);
  }
  return formats;
}

}  // namespace octet
