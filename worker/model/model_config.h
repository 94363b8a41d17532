// ModelConfig: config.json in C++, its own names. Parsing accepts every spelling that Llama checkpoints on the hub use
// and refuses what Octet does not compute, by name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

// rope_scaling / rope_parameters of rope_type "llama3".
struct RopeScaling {
  double factor = 1.0;
  double low_freq_factor = 1.0;
  double high_freq_factor = 4.0;
  int64_t original_max_position_embeddings = 8192;
  bool operator==(const RopeScaling&) const = default;
};

struct ModelConfig {
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_hidden_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t num_key_value_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-5;
  double rope_theta = 10000.0;
  std::optional<RopeScaling> rope_scaling;
  bool tie_word_embeddings = false;
  int32_t bos_token_id = -1;           // -1: none
  std::vector<int32_t> eos_token_ids;  // config.json's, before generation_config.json has its say

  // The model's name for people: "LlamaForCausalLM, 30 layers, hidden 576, ...".
  std::string to_string() const;
};

// Parses config.json's text. Errors name the key, what was expected and what was found.
absl::StatusOr<ModelConfig> parse_model_config(const std::string& json_text);

// What generation_config.json adds; absent fields stay empty.
struct GenerationConfig {
  std::vector<int32_t> eos_token_ids;
  std::optional<bool> do_sample;
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<int32_t> top_k;
  std::optional<float> repetition_penalty;
};
absl::StatusOr<GenerationConfig> parse_generation_config(const std::string& json_text);

// head_dim / 2 inverse frequencies in FP32, llama3 scaling applied: theta^(-2i/d), by Llama 3.1's piecewise rule.
std::vector<float> rope_inverse_frequencies(const ModelConfig& config);

}  // namespace octet
