#include "worker/checkpoint/weight_source.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <optional>
#include <set>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "kernels/fp8.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/file.h"
#include "worker/checkpoint/gguf.h"
#include "worker/checkpoint/gguf_tokenizer.h"
#include "worker/checkpoint/half.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

// ---- GGUF

// The decimal that a person wrote for a float: 1e-05, where widening gives 9.999999747378752e-06.
double shortest_decimal(double widened) {
  char text[64];
  const std::to_chars_result end = std::to_chars(text, text + sizeof(text), static_cast<float>(widened));
  double value = widened;
  std::from_chars(text, end.ptr, value);
  return value;
}

class GgufSource : public WeightSource {
 public:
  explicit GgufSource(GgufFile gguf) : gguf_(std::move(gguf)) {}

  absl::Status load() {
    if (absl::Status status = check_kind(); !status.ok()) return status;
    if (absl::Status status = read_config(); !status.ok()) return status;
    absl::StatusOr<ModelConfig> parsed = parse_model_config(config_json_.dump());
    if (!parsed.ok()) return absl::InvalidArgumentError(absl::StrCat(gguf_.path(), ", as ", parsed.status().message()));
    config_ = *std::move(parsed);
    if (absl::Status status = check_tensors(); !status.ok()) return status;
    absl::StatusOr<TokenizerFiles> tokenizer = tokenizer_files(gguf_);
    if (!tokenizer.ok()) return tokenizer.status();
    tokenizer_ = *std::move(tokenizer);
    return absl::OkStatus();
  }

  absl::Status read_rows(const ModelTensor& tensor, int64_t begin, int64_t end, float* dst) const override {
    const GgufTensor& stored = *gguf_.find(name_of(tensor));
    if (tensor.part != Part::kQuery && tensor.part != Part::kKey) return gguf_.read_f32(stored, begin, end, dst);
    return read_interleaved(stored, begin, end, dst);
  }

  absl::Status write_companions(const std::string& directory) const override {
    ordered_json generation = ordered_json::object();
    for (const char* key : {"bos_token_id", "eos_token_id", "pad_token_id"}) {
      if (config_json_.contains(key)) generation[key] = config_json_[key];
    }
    const std::string generation_text = generation.dump(2) + "\n";
    const std::pair<const char*, const std::string*> files[] = {
        {"tokenizer.json", &tokenizer_.tokenizer_json},
        {"tokenizer_config.json", &tokenizer_.tokenizer_config_json},
        {"generation_config.json", &generation_text}};
    for (const auto& [name, text] : files) {
      if (absl::Status status = write_text_file(directory + "/" + name, *text); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

 private:
  absl::Status unsupported(const std::string& what) const {
    return absl::UnimplementedError(absl::StrCat(gguf_.path(), ": ", what));
  }

  // The first failure of these stays in status_.
  std::optional<int64_t> integer(const std::string& key) { return value<int64_t>(key); }
  int64_t required(const std::string& key) {
    const std::optional<int64_t> found = integer(key);
    if (!found && status_.ok()) {
      status_ = absl::InvalidArgumentError(absl::StrCat(gguf_.path(), " has no metadata key ", key));
    }
    return found.value_or(0);
  }
  template <typename T>
  std::optional<T> value(const std::string& key) {
    absl::StatusOr<std::optional<T>> found = gguf_.get<T>(key);
    if (found.ok()) return *found;
    status_.Update(found.status());
    return std::nullopt;
  }

  absl::Status check_kind() {
    const std::string architecture = value<std::string>("general.architecture").value_or("nothing");
    if (architecture != "llama") {
      return unsupported(absl::StrCat("general.architecture is ", architecture.substr(0, 40), "; supported: llama"));
    }
    if (integer("split.count").value_or(1) > 1) {
      return unsupported("it is one part of a split model; join the parts first (gguf-split --merge)");
    }
    if (integer("llama.expert_count").value_or(0) > 0)
      return unsupported("it is a mixture of experts; supported: dense Llama");
    const std::string scaling = value<std::string>("llama.rope.scaling.type").value_or("none");
    if (scaling != "none")
      return unsupported(absl::StrCat("llama.rope.scaling.type is ", scaling.substr(0, 40), "; supported: none"));
    return status_;
  }

  absl::Status read_config() {
    const int64_t hidden = required("llama.embedding_length"), heads = required("llama.attention.head_count");
    const int64_t head_dim = integer("llama.attention.key_length").value_or(heads > 0 ? hidden / heads : 0);
    const GgufTensor* embedding = gguf_.find("token_embd.weight");
    if (embedding == nullptr)
      return absl::InvalidArgumentError(absl::StrCat(gguf_.path(), " has no tensor token_embd.weight"));
    for (const char* key : {"llama.rope.dimension_count", "llama.attention.value_length"}) {
      if (integer(key).value_or(head_dim) != head_dim)
        return unsupported(absl::StrCat(key, " differs from the head size, ", head_dim));
    }
    config_json_ = {
        {"architectures", {"LlamaForCausalLM"}},
        {"model_type", "llama"},
        {"attention_bias", false},
        {"mlp_bias", false},
        {"hidden_act", "silu"},
        {"hidden_size", hidden},
        {"intermediate_size", required("llama.feed_forward_length")},
        {"num_hidden_layers", required("llama.block_count")},
        {"num_attention_heads", heads},
        {"num_key_value_heads", integer("llama.attention.head_count_kv").value_or(heads)},
        {"head_dim", head_dim},
        {"vocab_size", embedding->shape[0]},
        {"max_position_embeddings", required("llama.context_length")},
        {"rms_norm_eps", shortest_decimal(value<double>("llama.attention.layer_norm_rms_epsilon").value_or(1e-5))},
        {"rope_theta", shortest_decimal(value<double>("llama.rope.freq_base").value_or(10000.0))},
        {"tie_word_embeddings", gguf_.find("output.weight") == nullptr},
        {"torch_dtype", "bfloat16"}};
    read_token_ids();
    if (!status_.ok()) return status_;
    return read_rope_factors(head_dim);
  }

  // Llama 3 Instruct ends turns with three tokens; GGUF names them one by one.
  void read_token_ids() {
    if (const auto bos = integer("tokenizer.ggml.bos_token_id")) config_json_["bos_token_id"] = *bos;
    if (const auto pad = integer("tokenizer.ggml.padding_token_id")) config_json_["pad_token_id"] = *pad;
    std::set<int64_t> ends;
    for (const char* name : {"eos", "eot", "eom"}) {
      if (const auto id = integer(absl::StrCat("tokenizer.ggml.", name, "_token_id"))) ends.insert(*id);
    }
    const auto tokens = value<std::vector<std::string>>("tokenizer.ggml.tokens");
    const auto eos = integer("tokenizer.ggml.eos_token_id");
    if (tokens && eos && *eos >= 0 && *eos < static_cast<int64_t>(tokens->size()) && (*tokens)[*eos] == "<|eot_id|>") {
      for (size_t id = 0; id < tokens->size(); ++id) {
        if ((*tokens)[id] == "<|end_of_text|>" || (*tokens)[id] == "<|eom_id|>") ends.insert(static_cast<int64_t>(id));
      }
    }
    if (ends.size() == 1) config_json_["eos_token_id"] = *ends.begin();
    if (ends.size() > 1) config_json_["eos_token_id"] = ends;
  }

  // Llama 3.1's scaling is stored as what each frequency is divided by. Its parameters are those of every Llama 3.x but
  // for the factor; the divisors must be the ones that they yield.
  absl::Status read_rope_factors(int64_t head_dim) {
    const GgufTensor* divisors = gguf_.find("rope_freqs.weight");
    if (divisors == nullptr) return absl::OkStatus();
    if (divisors->shape != std::vector<int64_t>{head_dim / 2})
      return unsupported("rope_freqs.weight has an unexpected shape");
    std::vector<float> stored(static_cast<size_t>(head_dim / 2));
    if (absl::Status status = gguf_.read_f32(*divisors, 0, head_dim / 2, stored.data()); !status.ok()) return status;
    ModelConfig plain;
    plain.head_dim = head_dim;
    plain.rope_theta = config_json_["rope_theta"].get<double>();
    ModelConfig scaled = plain;
    const double factor = *std::max_element(stored.begin(), stored.end());
    scaled.rope_scaling = RopeScaling{
        .factor = factor, .low_freq_factor = 1, .high_freq_factor = 4, .original_max_position_embeddings = 8192};
    const std::vector<float> before = rope_inverse_frequencies(plain), after = rope_inverse_frequencies(scaled);
    for (size_t i = 0; i < stored.size(); ++i) {
      if (!(std::abs(before[i] / after[i] / stored[i] - 1) < 1e-3)) {
        return unsupported(absl::StrCat("rope_freqs.weight is not Llama 3.1's scaling (frequency ", i,
                                        " is divided by ", stored[i], ")"));
      }
    }
    config_json_["rope_scaling"] = {{"factor", factor},
                                    {"low_freq_factor", 1.0},
                                    {"high_freq_factor", 4.0},
                                    {"original_max_position_embeddings", 8192},
                                    {"rope_type", "llama3"}};
    return absl::OkStatus();
  }

  static std::string name_of(const ModelTensor& tensor) {
    if (tensor.part == Part::kEmbedding) return "token_embd.weight";
    if (tensor.part == Part::kHead) return "output.weight";
    if (tensor.layer < 0) return "output_norm.weight";
    const bool first_norm = tensor.module.ends_with("input_layernorm");
    const char* part = first_norm ? "attn_norm" : "ffn_norm";
    switch (tensor.part) {
      case Part::kQuery:
        part = "attn_q";
        break;
      case Part::kKey:
        part = "attn_k";
        break;
      case Part::kValue:
        part = "attn_v";
        break;
      case Part::kOutput:
        part = "attn_output";
        break;
      case Part::kGate:
        part = "ffn_gate";
        break;
      case Part::kUp:
        part = "ffn_up";
        break;
      case Part::kDown:
        part = "ffn_down";
        break;
      default:
        break;
    }
    return absl::StrCat("blk.", tensor.layer, ".", part, ".weight");
  }

  absl::Status check_tensors() const {
    std::set<std::string> known = {"rope_freqs.weight"};
    for (const ModelTensor& tensor : model_tensors(config_)) {
      const std::string name = name_of(tensor);
      known.insert(name);
      const GgufTensor* stored = gguf_.find(name);
      if (stored == nullptr) return absl::InvalidArgumentError(absl::StrCat(gguf_.path(), " has no tensor ", name));
      if (Shape(stored->shape) != tensor.shape) {
        return absl::InvalidArgumentError(absl::StrCat(gguf_.path(), ": tensor ", name, " has shape ",
                                                       Shape(stored->shape).to_string(), ", but its metadata ask for ",
                                                       tensor.shape.to_string()));
      }
      // Reading nothing still says whether the type can be read: better now than hours into a conversion.
      if (absl::Status status = gguf_.read_f32(*stored, 0, 0, nullptr); !status.ok()) return status;
    }
    for (const auto& [name, tensor] : gguf_.tensors()) {
      if (!known.contains(name))
        return unsupported(
            absl::StrCat("it holds the tensor ", name.substr(0, 100), ", which a plain Llama does not have"));
    }
    return absl::OkStatus();
  }

  // GGUF keeps the rows of a head as pairs (0, d/2), (1, d/2 + 1), ..; Hugging Face keeps the halves together.
  absl::Status read_interleaved(const GgufTensor& stored, int64_t begin, int64_t end, float* dst) const {
    const int64_t head_dim = config_.head_dim, columns = stored.shape[1];
    OCTET_CHECK(begin % head_dim == 0 && end % head_dim == 0, "q and k rows are read by whole heads");
    std::vector<float> head(static_cast<size_t>(head_dim * columns));
    for (int64_t row = begin; row < end; row += head_dim) {
      if (absl::Status status = gguf_.read_f32(stored, row, row + head_dim, head.data()); !status.ok()) return status;
      for (int64_t i = 0; i < head_dim; ++i) {
        const int64_t pair = i % (head_dim / 2), half = i / (head_dim / 2);
        std::memcpy(dst + (row - begin + i) * columns, head.data() + (2 * pair + half) * columns,
                    static_cast<size_t>(columns) * sizeof(float));
      }
    }
    return absl::OkStatus();
  }

  GgufFile gguf_;
  TokenizerFiles tokenizer_;
  absl::Status status_;
};

// ---- Hugging Face

// What travels with a model: its tokenizer, settings, licence and card.
bool is_companion(const std::string& name) {
  if (name == "config.json" || name == "hf_quant_config.json" || name.ends_with(".index.json")) return false;
  for (const char* suffix : {".json", ".jinja", ".txt", ".model", ".md"}) {
    if (name.ends_with(suffix)) return true;
  }
  return name.starts_with("LICENSE") || name.starts_with("NOTICE") || name.starts_with("Notice");
}

class HuggingFaceSource : public WeightSource {
 public:
  explicit HuggingFaceSource(Checkpoint checkpoint) : checkpoint_(std::move(checkpoint)) {}

  absl::Status load() {
    config_ = checkpoint_.config();
    const auto refuse = [&](const std::string& fault) {
      return absl::InvalidArgumentError(absl::StrCat(
          checkpoint_.directory(), " ", fault, ": it can be served as it is; to quantise anew, convert the original"));
    };
    if (checkpoint_.quant_method() != "none")
      return refuse("is already quantised (" + checkpoint_.quant_method() + ")");
    for (const ModelTensor& tensor : model_tensors(config_)) {
      if (checkpoint_.find(tensor.name())->dtype == DType::kF8E4M3)
        return refuse("already holds FP8 (" + tensor.name() + ")");
    }
    absl::StatusOr<std::string> text = read_text_file(checkpoint_.directory() + "/config.json", int64_t{16} << 20);
    if (!text.ok()) return text.status();
    config_json_ = ordered_json::parse(*text, nullptr, /*allow_exceptions=*/false);
    if (!config_json_.is_object())
      return absl::AbortedError(checkpoint_.directory() + "/config.json changed meanwhile");
    config_json_[config_json_.contains("dtype") ? "dtype" : "torch_dtype"] = "bfloat16";
    return absl::OkStatus();
  }

  absl::Status read_rows(const ModelTensor& tensor, int64_t begin, int64_t end, float* dst) const override {
    const TensorInfo& stored = *checkpoint_.find(tensor.name());
    const int64_t columns = stored.shape.rank() == 1 ? 1 : stored.shape[1];
    if (stored.dtype == DType::kF32) return checkpoint_.read(stored, begin, end, 0, columns, dst);
    std::vector<uint16_t> raw(static_cast<size_t>((end - begin) * columns));
    if (absl::Status status = checkpoint_.read(stored, begin, end, 0, columns, raw.data()); !status.ok()) return status;
    const bool bf16 = stored.dtype == DType::kBF16;
    for (size_t i = 0; i < raw.size(); ++i) dst[i] = bf16 ? bf16_to_float(raw[i]) : f16_to_float(raw[i]);
    return absl::OkStatus();
  }

  absl::Status write_companions(const std::string& directory) const override {
    std::error_code error;
    std::filesystem::directory_iterator files(checkpoint_.directory(), error);
    if (error)
      return absl::UnavailableError(absl::StrCat("cannot list ", checkpoint_.directory(), ": ", error.message()));
    for (const std::filesystem::directory_entry& file : files) {
      const std::string name = file.path().filename().string();
      if (!is_companion(name) || !file.is_regular_file(error)) continue;
      absl::StatusOr<std::string> text = read_text_file(file.path().string(), int64_t{256} << 20);
      if (!text.ok()) return text.status();
      if (absl::Status status = write_text_file(directory + "/" + name, *text); !status.ok()) return status;
    }
    return absl::OkStatus();
  }

 private:
  Checkpoint checkpoint_;
};

template <typename Source>
absl::StatusOr<std::unique_ptr<WeightSource>> loaded(std::unique_ptr<Source> source) {
  if (absl::Status status = source->load(); !status.ok()) return status;
  return source;
}

}  // namespace

absl::StatusOr<std::unique_ptr<WeightSource>> WeightSource::open(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(path);
    if (!checkpoint.ok()) return checkpoint.status();
    return loaded(std::make_unique<HuggingFaceSource>(*std::move(checkpoint)));
  }
  absl::StatusOr<GgufFile> gguf = GgufFile::open(path);
  if (!gguf.ok()) return gguf.status();
  return loaded(std::make_unique<GgufSource>(*std::move(gguf)));
}

}  // namespace octet
