// Small checkpoints for tests, written byte by byte so that they can also be wrong. Data are deterministic.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace octet::testing {

using json = nlohmann::ordered_json;

// A directory that disappears with the object.
class TempDirectory {
 public:
  TempDirectory() {
    std::string pattern = (std::filesystem::temp_directory_path() / "octet_test_XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TempDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDirectory(const TempDirectory&) = delete;
  TempDirectory& operator=(const TempDirectory&) = delete;
  std::string path(const std::string& name = "") const { return name.empty() ? path_ : path_ + "/" + name; }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

template <typename T>
std::string bytes_of(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

struct RawTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string data;
};

// Eight bytes of length, the header as it is given, the data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  std::string out(8, '\0');
  const uint64_t size = header.size();
  std::memcpy(out.data(), &size, 8);
  return out + header + data;
}

inline std::string safetensors_bytes(const std::map<std::string, RawTensor>& tensors) {
  json header = json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.data.size()}}};
    data += tensor.data;
  }
  return safetensors_bytes(header.dump(), data);
}

// A two-layer Llama whose tensors tests change before they write it.
struct TinyModel {
  json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"vocab_size", 10},
                 {"hidden_size", 8},
                 {"intermediate_size", 12},
                 {"num_hidden_layers", 2},
                 {"num_attention_heads", 2},
                 {"num_key_value_heads", 1},
                 {"max_position_embeddings", 64},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0},
                 {"bos_token_id", 1},
                 {"eos_token_id", 2}};
  std::map<std::string, RawTensor> tensors;

  explicit TinyModel(int layers = 2) {
    config["num_hidden_layers"] = layers;
    add_bf16("model.embed_tokens.weight", {10, 8});
    for (int i = 0; i < layers; ++i) {
      const std::string layer = "model.layers." + std::to_string(i) + ".";
      add_bf16(layer + "input_layernorm.weight", {8});
      add_bf16(layer + "self_attn.q_proj.weight", {8, 8});
      add_bf16(layer + "self_attn.k_proj.weight", {4, 8});
      add_bf16(layer + "self_attn.v_proj.weight", {4, 8});
      add_bf16(layer + "self_attn.o_proj.weight", {8, 8});
      add_bf16(layer + "post_attention_layernorm.weight", {8});
      add_bf16(layer + "mlp.gate_proj.weight", {12, 8});
      add_bf16(layer + "mlp.up_proj.weight", {12, 8});
      add_bf16(layer + "mlp.down_proj.weight", {8, 12});
    }
    add_bf16("model.norm.weight", {8});
    add_bf16("lm_head.weight", {10, 8});
  }

  // BF16 values between 0.5 and 2 in magnitude, different in every tensor.
  void add_bf16(const std::string& name, std::vector<int64_t> shape) {
    int64_t count = 1;
    for (const int64_t dim : shape) count *= dim;
    std::vector<uint16_t> values;
    uint32_t state = static_cast<uint32_t>(std::hash<std::string>()(name));
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525 + 1013904223;
      values.push_back(static_cast<uint16_t>(0x3F00 | ((state >> 16) & 0x80FF)));
    }
    tensors[name] = {"BF16", std::move(shape), bytes_of(values)};
  }

  // Makes a weight FP8 with a scale of the given shape beside it.
  void make_fp8(const std::string& module, std::vector<int64_t> scale_shape,
                const std::string& suffix = "weight_scale") {
    RawTensor& weight = tensors.at(module + ".weight");
    std::string codes;
    for (int64_t i = 0; i < weight.shape[0] * weight.shape[1]; ++i) codes.push_back(static_cast<char>((i * 7) % 0x7F));
    weight.dtype = "F8_E4M3";
    weight.data = codes;
    int64_t count = 1;
    for (const int64_t dim : scale_shape) count *= dim;
    std::vector<float> scales;
    for (int64_t i = 0; i < count; ++i) scales.push_back(0.5f + static_cast<float>(i));
    tensors[module + "." + suffix] = {"F32", std::move(scale_shape), bytes_of(scales)};
  }

  void write(const std::string& directory) const {
    write_file(directory + "/config.json", config.dump(2));
    write_file(directory + "/model.safetensors", safetensors_bytes(tensors));
  }
};

// Succeeds when `status` failed and its message holds every word; a test of bad input says so what the user reads.
inline ::testing::AssertionResult refuses(const auto& status, const std::vector<std::string>& words) {
  if (status.ok()) return ::testing::AssertionFailure() << "was accepted";
  for (const std::string& word : words) {
    if (std::string(status.message()).find(word) == std::string::npos) {
      return ::testing::AssertionFailure() << "the message lacks \"" << word << "\": " << status.message();
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace octet::testing
