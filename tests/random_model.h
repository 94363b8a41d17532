// Random Llama-shaped checkpoints for tests: a whole Hugging Face directory written by code that shares nothing with
// Octet's own writer. The same seed gives the same bytes.
#pragma once

#include <cstdint>
#include <string>

namespace octet {

enum class RandomFormat : uint8_t {
  kBF16,
  kFbgemm,         // Meta's recipe: row-wise e4m3 feed forward in all but the first and last layer, upper bound 1200
  kDynamicTokens,  // compressed-tensors: every block linear, BF16 channel scales, dynamic per-token activations
  kStaticTensor,   // compressed-tensors: every block linear, one scale per tensor, static activations
};

struct RandomModel {
  RandomFormat format = RandomFormat::kFbgemm;
  uint64_t seed = 1;
  int64_t hidden_size = 128;
  int64_t intermediate_size = 352;  // 8 slices of 44
  int64_t num_hidden_layers = 4;
  int64_t num_attention_heads = 16;
  int64_t num_key_value_heads = 8;
  int64_t head_dim = 16;
  int64_t vocab_size = 544;
  int64_t max_position_embeddings = 4096;
  bool tie_word_embeddings = false;
  float cache_scale = 0;  // of keys and values of a cache in FP8, as ModelOpt writes it; 0: none is written
};

// Writes config.json, generation_config.json, model.safetensors, tokenizer.json (bytes, then added tokens) into a new
// directory below the test's temporary folder and returns its path.
std::string write_random_model(const RandomModel& model);

}  // namespace octet
