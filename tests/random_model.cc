#include "tests/random_model.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <random>
#include <vector>

#include <nlohmann/json.hpp>

namespace octet {
namespace {

using nlohmann::json;

struct RawTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

class Writer {
 public:
  explicit Writer(const RandomModel& model) : model_(model), random_(model.seed) {}

  std::map<std::string, RawTensor> tensors() {
    const RandomModel& m = model_;
    bf16_matrix("model.embed_tokens.weight", m.vocab_size, m.hidden_size, 1.0);
    for (int64_t i = 0; i < m.num_hidden_layers; ++i) layer(i);
    norm("model.norm.weight");
    if (!m.tie_word_embeddings)
      bf16_matrix("lm_head.weight", m.vocab_size, m.hidden_size, 2.0 / std::sqrt(m.hidden_size));
    return std::move(tensors_);
  }

 private:
  void layer(int64_t i) {
    const RandomModel& m = model_;
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    const int64_t q = m.num_attention_heads * m.head_dim, kv = m.num_key_value_heads * m.head_dim;
    const bool every_linear = m.format == RandomFormat::kDynamicTokens || m.format == RandomFormat::kStaticTensor;
    const bool ffn = every_linear || (m.format == RandomFormat::kFbgemm && i > 0 && i + 1 < m.num_hidden_layers);
    norm(prefix + "input_layernorm.weight");
    norm(prefix + "post_attention_layernorm.weight");
    linear(prefix + "self_attn.q_proj", q, m.hidden_size, every_linear);
    linear(prefix + "self_attn.k_proj", kv, m.hidden_size, every_linear);
    linear(prefix + "self_attn.v_proj", kv, m.hidden_size, every_linear);
    linear(prefix + "self_attn.o_proj", m.hidden_size, q, every_linear);
    for (const char* name : {"self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale"}) {
      if (m.cache_scale > 0) floats(prefix + name, {}, m.cache_scale);
    }
    linear(prefix + "mlp.gate_proj", m.intermediate_size, m.hidden_size, ffn);
    linear(prefix + "mlp.up_proj", m.intermediate_size, m.hidden_size, ffn);
    linear(prefix + "mlp.down_proj", m.hidden_size, m.intermediate_size, ffn);
  }

  void linear(const std::string& name, int64_t out, int64_t in, bool fp8) {
    const double spread = 1.0 / std::sqrt(static_cast<double>(in));
    if (!fp8) return bf16_matrix(name + ".weight", out, in, spread);
    RawTensor& codes = tensors_[name + ".weight"];
    codes = {"F8_E4M3", {out, in}, std::vector<uint8_t>(out * in)};
    // Codes of a normal-looking spread: any finite code is a valid weight.
    std::normal_distribution<double> normal(0.0, 1.0);
    for (uint8_t& code : codes.bytes) {
      const double value = std::min(std::abs(normal(random_)) * 14.0, 50.0);
      code = static_cast<uint8_t>(value) + 0x28;  // exponents from 2^-2 up to 2^4
      if (random_() & 1) code |= 0x80;
    }
    const double scale = spread / 6.0;
    if (model_.format == RandomFormat::kStaticTensor) {
      floats(name + ".weight_scale", {1}, scale);
      floats(name + ".input_scale", {1}, 0.02);
    } else if (model_.format == RandomFormat::kDynamicTokens) {
      bf16_matrix(name + ".weight_scale", out, 1, 0.0, scale);
    } else {
      floats(name + ".weight_scale", {out, 1}, scale);
    }
  }

  void floats(const std::string& name, std::vector<int64_t> shape, double around) {
    int64_t n = 1;
    for (int64_t dim : shape) n *= dim;
    RawTensor& tensor = tensors_[name];
    tensor = {"F32", shape, std::vector<uint8_t>(n * 4)};
    std::uniform_real_distribution<double> spread(0.7, 1.3);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(around * spread(random_)));
      for (int b = 0; b < 4; ++b) tensor.bytes[4 * i + b] = static_cast<uint8_t>(bits >> (8 * b));
    }
  }

  void norm(const std::string& name) {
    RawTensor& tensor = tensors_[name];
    bf16_matrix(name, model_.hidden_size, 1, 0.1, 1.0);
    tensor.shape = {model_.hidden_size};
  }

  void bf16_matrix(const std::string& name, int64_t out, int64_t in, double spread, double around = 0.0) {
    RawTensor& tensor = tensors_[name];
    tensor = {"BF16", {out, in}, std::vector<uint8_t>(out * in * 2)};
    std::normal_distribution<double> normal(around, spread);
    for (int64_t i = 0; i < out * in; ++i) {
      const double value = spread > 0 ? normal(random_) : around;
      const uint32_t bits = std::bit_cast<uint32_t>(static_cast<float>(value));
      tensor.bytes[2 * i] = static_cast<uint8_t>(bits >> 16);  // truncation: any BF16 value will do
      tensor.bytes[2 * i + 1] = static_cast<uint8_t>(bits >> 24);
    }
  }

  const RandomModel& model_;
  std::mt19937_64 random_;
  std::map<std::string, RawTensor> tensors_;
};

json quantization_config(RandomFormat format) {
  if (format == RandomFormat::kFbgemm) {
    return {{"quant_method", "fbgemm_fp8"}, {"activation_scale_ub", 1200.0}, {"modules_to_not_convert", json::array()}};
  }
  const bool tensor = format == RandomFormat::kStaticTensor;
  const json weights = {{"num_bits", 8},
                        {"type", "float"},
                        {"symmetric", true},
                        {"dynamic", false},
                        {"strategy", tensor ? "tensor" : "channel"}};
  const json inputs = {{"num_bits", 8},
                       {"type", "float"},
                       {"symmetric", true},
                       {"dynamic", !tensor},
                       {"strategy", tensor ? "tensor" : "token"}};
  return {
      {"quant_method", "compressed-tensors"},
      {"format", "float-quantized"},
      {"ignore", {"lm_head"}},
      {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", weights}, {"input_activations", inputs}}}}}};
}

json config_json(const RandomModel& m) {
  json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"hidden_size", m.hidden_size},
                 {"intermediate_size", m.intermediate_size},
                 {"num_hidden_layers", m.num_hidden_layers},
                 {"num_attention_heads", m.num_attention_heads},
                 {"num_key_value_heads", m.num_key_value_heads},
                 {"head_dim", m.head_dim},
                 {"vocab_size", m.vocab_size},
                 {"max_position_embeddings", m.max_position_embeddings},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 500000.0},
                 {"rope_scaling",
                  {{"rope_type", "llama3"},
                   {"factor", 8.0},
                   {"low_freq_factor", 1.0},
                   {"high_freq_factor", 4.0},
                   {"original_max_position_embeddings", 512}}},
                 {"tie_word_embeddings", m.tie_word_embeddings},
                 {"hidden_act", "silu"},
                 {"attention_bias", false},
                 {"mlp_bias", false},
                 {"torch_dtype", "bfloat16"},
                 {"bos_token_id", m.vocab_size - 2},
                 {"eos_token_id", m.vocab_size - 1}};
  if (m.format != RandomFormat::kBF16) config["quantization_config"] = quantization_config(m.format);
  return config;
}

// GPT-2's map from bytes to printable code points, as UTF-8.
std::string printable(int byte) {
  static const std::vector<int> map = [] {
    std::vector<int> code_points(256);
    int next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool plain = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || (b >= 0xAE && b <= 0xFF);
      code_points[b] = plain ? b : next++;
    }
    return code_points;
  }();
  const int code_point = map[byte];
  if (code_point < 0x80) return std::string(1, static_cast<char>(code_point));
  return {static_cast<char>(0xC0 | code_point >> 6), static_cast<char>(0x80 | (code_point & 0x3F))};
}

// Bytes are ids 0..255; the rest are added tokens, the last two special.
json tokenizer_json(const RandomModel& m) {
  json vocab = json::object();
  for (int byte = 0; byte < 256; ++byte) vocab[printable(byte)] = byte;
  json added = json::array();
  for (int64_t id = 256; id < m.vocab_size; ++id) {
    const bool special = id >= m.vocab_size - 2;
    added.push_back({{"id", id},
                     {"content", "<|extra_" + std::to_string(id) + "|>"},
                     {"single_word", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"normalized", false},
                     {"special", special}});
  }
  return {{"version", "1.0"},
          {"truncation", nullptr},
          {"padding", nullptr},
          {"added_tokens", added},
          {"normalizer", nullptr},
          {"pre_tokenizer",
           {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}}},
          {"post_processor", nullptr},
          {"decoder", {{"type", "ByteLevel"}, {"add_prefix_space", true}, {"trim_offsets", true}, {"use_regex", true}}},
          {"model",
           {{"type", "BPE"},
            {"dropout", nullptr},
            {"unk_token", nullptr},
            {"fuse_unk", false},
            {"byte_fallback", false},
            {"ignore_merges", false},
            {"vocab", vocab},
            {"merges", json::array()}}}};
}

void write_safetensors(const std::string& path, const std::map<std::string, RawTensor>& tensors) {
  json header = json::object();
  uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + tensor.bytes.size()}}};
    offset += tensor.bytes.size();
  }
  const std::string text = header.dump();
  std::ofstream file(path, std::ios::binary);
  const uint64_t size = text.size();
  for (int b = 0; b < 8; ++b) file.put(static_cast<char>(size >> (8 * b)));
  file << text;
  for (const auto& [name, tensor] : tensors) {
    file.write(reinterpret_cast<const char*>(tensor.bytes.data()), static_cast<std::streamsize>(tensor.bytes.size()));
  }
}

}  // namespace

std::string write_random_model(const RandomModel& model) {
  static std::atomic<int> counter{0};
  const std::string directory =
      testing::TempDir() + "octet_random_model_" + std::to_string(::getpid()) + "_" + std::to_string(counter++);
  std::filesystem::create_directories(directory);
  std::ofstream(directory + "/config.json") << config_json(model).dump(2);
  std::ofstream(directory + "/generation_config.json") << json{{"do_sample", false}}.dump();
  std::ofstream(directory + "/tokenizer.json") << tokenizer_json(model).dump();
  write_safetensors(directory + "/model.safetensors", Writer(model).tensors());
  return directory;
}

}  // namespace octet
