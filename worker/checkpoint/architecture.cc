#include "worker/checkpoint/architecture.h"

#include "absl/strings/str_cat.h"

namespace octet {

const char* name_of(Part part) {
  switch (part) {
    case Part::kEmbedding:
      return "embed_tokens";
    case Part::kNorm:
      return "norms";
    case Part::kQuery:
      return "q_proj";
    case Part::kKey:
      return "k_proj";
    case Part::kValue:
      return "v_proj";
    case Part::kOutput:
      return "o_proj";
    case Part::kGate:
      return "gate_proj";
    case Part::kUp:
      return "up_proj";
    case Part::kDown:
      return "down_proj";
    case Part::kHead:
      return "lm_head";
  }
  return "?";
}

bool is_feed_forward(Part part) { return part == Part::kGate || part == Part::kUp || part == Part::kDown; }

bool is_block_linear(Part part) {
  return is_feed_forward(part) || part == Part::kQuery || part == Part::kKey || part == Part::kValue ||
         part == Part::kOutput;
}

std::vector<ModelTensor> model_tensors(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size, ffn = config.intermediate_size;
  const int64_t query_rows = config.num_attention_heads * config.head_dim;
  const int64_t kv_rows = config.num_key_value_heads * config.head_dim;
  std::vector<ModelTensor> tensors;
  tensors.push_back({"model.embed_tokens", Part::kEmbedding, -1, {config.vocab_size, hidden}});
  for (int64_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    const auto add = [&](const char* module, Part part, Shape shape) {
      tensors.push_back({absl::StrCat("model.layers.", layer, ".", module), part, layer, shape});
    };
    add("input_layernorm", Part::kNorm, {hidden});
    add("self_attn.q_proj", Part::kQuery, {query_rows, hidden});
    add("self_attn.k_proj", Part::kKey, {kv_rows, hidden});
    add("self_attn.v_proj", Part::kValue, {kv_rows, hidden});
    add("self_attn.o_proj", Part::kOutput, {hidden, query_rows});
    add("post_attention_layernorm", Part::kNorm, {hidden});
    add("mlp.gate_proj", Part::kGate, {ffn, hidden});
    add("mlp.up_proj", Part::kUp, {ffn, hidden});
    add("mlp.down_proj", Part::kDown, {hidden, ffn});
  }
  tensors.push_back({"model.norm", Part::kNorm, -1, {hidden}});
  if (!config.tie_word_embeddings) tensors.push_back({"lm_head", Part::kHead, -1, {config.vocab_size, hidden}});
  return tensors;
}

}  // namespace octet
