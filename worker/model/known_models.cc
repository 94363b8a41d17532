#include "worker/model/known_models.h"

namespace octet {
namespace {

struct KnownModel {
  std::string_view name;
  int64_t hidden_size, intermediate_size, num_hidden_layers, num_attention_heads;
};

// What differs within the family.
constexpr KnownModel kLlama31[] = {
    {"llama-3.1-8b", 4096, 14336, 32, 32},
    {"llama-3.1-70b", 8192, 28672, 80, 64},
    {"llama-3.1-405b", 16384, 53248, 126, 128},
};

}  // namespace

std::vector<std::string> known_models() {
  std::vector<std::string> names;
  for (const KnownModel& model : kLlama31) names.emplace_back(model.name);
  return names;
}

std::optional<ModelConfig> known_model_config(std::string_view name) {
  for (const KnownModel& model : kLlama31) {
    if (model.name != name) continue;
    return ModelConfig{.vocab_size = 128256,
                       .hidden_size = model.hidden_size,
                       .intermediate_size = model.intermediate_size,
                       .num_hidden_layers = model.num_hidden_layers,
                       .num_attention_heads = model.num_attention_heads,
                       .num_key_value_heads = 8,
                       .head_dim = 128,
                       .max_position_embeddings = 131072,
                       .rms_norm_eps = 1e-5,
                       .rope_theta = 500000.0,
                       .rope_scaling = RopeScaling{.factor = 8.0}};
  }
  return std::nullopt;
}

}  // namespace octet
