#include "worker/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <string_view>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "worker/checkpoint/json.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr int64_t kMaxWidth = int64_t{1} << 22;      // hidden, feed-forward, vocabulary: 30 times the largest Llama
constexpr int64_t kMaxPositions = int64_t{1} << 24;  // FP32 counts positions exactly up to here

// Reads an object's keys; the first fault is kept and every later read yields a default.
class Reader {
 public:
  Reader(const json& object, std::string file) : object_(object), file_(std::move(file)) {}

  const absl::Status& status() const { return status_; }
  bool has(const std::string& key) const { return object_.contains(key) && !object_[key].is_null(); }
  const json& at(const std::string& key) const { return object_[key]; }

  void refuse(const std::string& key, absl::string_view expected) {
    if (!status_.ok()) return;
    const std::string found = object_.contains(key) ? excerpt_of(object_[key]) : "nothing";
    status_ = absl::InvalidArgumentError(absl::StrCat(file_, ": ", key, ": expected ", expected, ", found ", found));
  }

  int64_t integer(const std::string& key, int64_t least, int64_t most, std::optional<int64_t> absent = std::nullopt) {
    if (!has(key) && absent) return *absent;
    const std::optional<int64_t> value = has(key) ? integer_in(object_[key]) : std::nullopt;
    if (value && *value >= least && *value <= most) return *value;
    refuse(key, absl::StrCat("an integer from ", least, " to ", most));
    return absent.value_or(least);
  }

  // A number in (0, most].
  double positive(const std::string& key, double most, std::optional<double> absent = std::nullopt) {
    if (!has(key) && absent) return *absent;
    if (has(key) && object_[key].is_number()) {
      const double value = object_[key].get<double>();
      if (value > 0 && value <= most) return value;
    }
    refuse(key, absl::StrCat("a number above 0 and at most ", most));
    return absent.value_or(most);
  }

  bool boolean(const std::string& key, bool absent) {
    if (!has(key)) return absent;
    if (object_[key].is_boolean()) return object_[key].get<bool>();
    refuse(key, "true or false");
    return absent;
  }

  std::string string(const std::string& key, std::string_view absent) {
    if (!has(key)) return std::string(absent);
    if (object_[key].is_string()) return object_[key].get<std::string>();
    refuse(key, "a string");
    return std::string(absent);
  }

  // An int, a list of ints, or null; every id in [0, vocab_size).
  std::vector<int32_t> token_ids(const std::string& key, int64_t vocab_size) {
    if (!has(key)) return {};
    const json list = object_[key].is_array() ? object_[key] : json::array({object_[key]});
    std::vector<int32_t> ids;
    for (const json& item : list) {
      const std::optional<int64_t> id = integer_in(item);
      if (!id || *id < 0 || *id >= vocab_size) {
        refuse(key, absl::StrCat("a token id, or a list of them, from 0 to ", vocab_size - 1));
        return {};
      }
      if (std::find(ids.begin(), ids.end(), *id) == ids.end()) ids.push_back(static_cast<int32_t>(*id));
    }
    return ids;
  }

 private:
  const json& object_;
  std::string file_;
  absl::Status status_;
};

absl::StatusOr<json> parse_object(const std::string& text, const std::string& file) {
  absl::StatusOr<json> object = parse_json(text, file);
  if (object.ok() && !object->is_object()) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": expected an object, found ", excerpt_of(*object)));
  }
  return object;
}

// Refuses models that are not plain Llama, by the name of what they have.
void check_architecture(Reader& reader) {
  constexpr absl::string_view kSupported = "a Llama model (architectures [\"LlamaForCausalLM\"], model_type \"llama\")";
  if (reader.has("architectures")) {
    const json& names = reader.at("architectures");
    if (!names.is_array() || names.size() != 1 || names[0] != "LlamaForCausalLM")
      reader.refuse("architectures", kSupported);
  }
  if (!reader.has("architectures") || reader.has("model_type")) {
    if (reader.string("model_type", "") != "llama") reader.refuse("model_type", kSupported);
  }
  if (reader.boolean("attention_bias", false)) reader.refuse("attention_bias", "false: Octet computes no biases");
  if (reader.boolean("mlp_bias", false)) reader.refuse("mlp_bias", "false: Octet computes no biases");
  if (reader.string("hidden_act", "silu") != "silu") reader.refuse("hidden_act", "\"silu\"");
  if (reader.positive("partial_rotary_factor", 1.0, 1.0) != 1.0) reader.refuse("partial_rotary_factor", "1");
}

void read_sizes(Reader& reader, ModelConfig& config) {
  config.vocab_size = reader.integer("vocab_size", 2, kMaxWidth);
  config.hidden_size = reader.integer("hidden_size", 2, kMaxWidth);
  config.intermediate_size = reader.integer("intermediate_size", 2, kMaxWidth);
  config.num_hidden_layers = reader.integer("num_hidden_layers", 1, 4096);
  config.num_attention_heads = reader.integer("num_attention_heads", 1, 4096);
  config.num_key_value_heads = reader.integer("num_key_value_heads", 1, 4096, config.num_attention_heads);
  config.max_position_embeddings = reader.integer("max_position_embeddings", 1, kMaxPositions);
  if (config.hidden_size % 2 != 0) reader.refuse("hidden_size", "an even number");
  if (config.intermediate_size % 2 != 0) reader.refuse("intermediate_size", "an even number");
  if (config.num_attention_heads % config.num_key_value_heads != 0) {
    reader.refuse("num_key_value_heads",
                  absl::StrCat("a divisor of num_attention_heads, which is ", config.num_attention_heads));
  }
  if (!reader.has("head_dim") && config.hidden_size % config.num_attention_heads != 0) {
    reader.refuse("num_attention_heads",
                  absl::StrCat("a divisor of hidden_size, which is ", config.hidden_size, ", or a head_dim"));
  }
  config.head_dim = reader.integer("head_dim", 2, 256, config.hidden_size / config.num_attention_heads);
  if (config.head_dim % 2 != 0 || config.head_dim < 2 || config.head_dim > 256) {
    reader.refuse("head_dim", absl::StrCat("an even number from 2 to 256 (hidden_size / num_attention_heads is ",
                                           config.head_dim, ")"));
  }
}

// `rope` is rope_scaling or rope_parameters. Nothing for type "default".
absl::StatusOr<std::optional<RopeScaling>> parse_rope(const json& rope, const std::string& key) {
  if (!rope.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: ", key, ": expected an object or null, found ", excerpt_of(rope)));
  }
  Reader reader(rope, absl::StrCat("config.json: ", key));
  const std::string type_key = reader.has("rope_type") ? "rope_type" : "type";  // the older spelling
  const std::string type = reader.string(type_key, "default");
  if (type == "default") return std::optional<RopeScaling>();
  if (type != "llama3") reader.refuse(type_key, "\"default\" or \"llama3\": other scalings are not computed");
  RopeScaling scaling;
  scaling.factor = reader.positive("factor", 1e6);
  scaling.low_freq_factor = reader.positive("low_freq_factor", 1e6);
  scaling.high_freq_factor = reader.positive("high_freq_factor", 1e6);
  scaling.original_max_position_embeddings = reader.integer("original_max_position_embeddings", 1, kMaxPositions);
  if (scaling.factor < 1) reader.refuse("factor", "a number of at least 1");
  if (scaling.high_freq_factor <= scaling.low_freq_factor) {
    reader.refuse("high_freq_factor", absl::StrCat("more than low_freq_factor, which is ", scaling.low_freq_factor));
  }
  if (!reader.status().ok()) return reader.status();
  return std::optional<RopeScaling>(scaling);
}

// rope_theta and rope_scaling at the top (Transformers 4), or both inside rope_parameters (5).
absl::Status read_rope(Reader& reader, ModelConfig& config) {
  config.rope_theta = reader.positive("rope_theta", 1e12, 10000.0);
  for (const std::string key : {"rope_scaling", "rope_parameters"}) {
    if (!reader.has(key)) continue;
    absl::StatusOr<std::optional<RopeScaling>> scaling = parse_rope(reader.at(key), key);
    if (!scaling.ok()) return scaling.status();
    if (config.rope_scaling && config.rope_scaling != *scaling) {
      reader.refuse("rope_parameters", "the same as rope_scaling, where a file has both");
    }
    config.rope_scaling = *scaling;
    Reader inner(reader.at(key), absl::StrCat("config.json: ", key));
    const double theta = inner.positive("rope_theta", 1e12, config.rope_theta);
    if (!inner.status().ok()) return inner.status();
    if (reader.has("rope_theta") && theta != config.rope_theta) {
      reader.refuse("rope_theta", absl::StrCat("the same as in ", key, ", which has ", theta));
    }
    config.rope_theta = theta;
  }
  return reader.status();
}

}  // namespace

std::string ModelConfig::to_string() const {
  return absl::StrCat("LlamaForCausalLM, ", num_hidden_layers, " layers, hidden ", hidden_size, ", feed-forward ",
                      intermediate_size, ", ", num_attention_heads, " heads of ", head_dim, ", ", num_key_value_heads,
                      " KV heads, vocabulary ", vocab_size, ", context ", max_position_embeddings,
                      tie_word_embeddings ? ", tied embeddings" : "");
}

absl::StatusOr<ModelConfig> parse_model_config(const std::string& json_text) {
  absl::StatusOr<json> object = parse_object(json_text, "config.json");
  if (!object.ok()) return object.status();
  Reader reader(*object, "config.json");
  check_architecture(reader);
  if (!reader.status().ok()) return reader.status();
  ModelConfig config;
  read_sizes(reader, config);
  if (!reader.status().ok()) return reader.status();
  config.rms_norm_eps = reader.positive("rms_norm_eps", 1.0, 1e-6);  // Transformers' default, as the others below
  config.tie_word_embeddings = reader.boolean("tie_word_embeddings", false);
  const std::vector<int32_t> bos = reader.token_ids("bos_token_id", config.vocab_size);
  if (bos.size() > 1) reader.refuse("bos_token_id", "one token id");
  if (!bos.empty()) config.bos_token_id = bos.front();
  config.eos_token_ids = reader.token_ids("eos_token_id", config.vocab_size);
  if (absl::Status status = read_rope(reader, config); !status.ok()) return status;
  return config;
}

absl::StatusOr<GenerationConfig> parse_generation_config(const std::string& json_text) {
  absl::StatusOr<json> object = parse_object(json_text, "generation_config.json");
  if (!object.ok()) return object.status();
  Reader reader(*object, "generation_config.json");
  GenerationConfig config;
  config.eos_token_ids = reader.token_ids("eos_token_id", kMaxWidth);
  if (reader.has("do_sample")) config.do_sample = reader.boolean("do_sample", false);
  // Temperature 0 is legal here: some files write it for greedy decoding.
  if (reader.has("temperature")) {
    const json& value = reader.at("temperature");
    if (!value.is_number() || !(value.get<double>() >= 0 && value.get<double>() <= 100)) {
      reader.refuse("temperature", "a number from 0 to 100");
    } else {
      config.temperature = value.get<float>();
    }
  }
  if (reader.has("top_p")) config.top_p = static_cast<float>(reader.positive("top_p", 1.0, 1.0));
  if (reader.has("top_k")) config.top_k = static_cast<int32_t>(reader.integer("top_k", 0, INT32_MAX, 0));
  if (reader.has("repetition_penalty")) {
    config.repetition_penalty = static_cast<float>(reader.positive("repetition_penalty", 100.0, 1.0));
  }
  if (!reader.status().ok()) return reader.status();
  return config;
}

std::vector<float> rope_inverse_frequencies(const ModelConfig& config) {
  std::vector<float> frequencies;
  for (int64_t i = 0; i < config.head_dim / 2; ++i) {
    double frequency =
        std::pow(config.rope_theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (config.rope_scaling) {
      const RopeScaling& scaling = *config.rope_scaling;
      const double context = static_cast<double>(scaling.original_max_position_embeddings);
      const double wavelength = 2 * std::numbers::pi / frequency;
      if (wavelength > context / scaling.low_freq_factor) {
        frequency /= scaling.factor;
      } else if (wavelength >= context / scaling.high_freq_factor) {
        const double mix =
            (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor);
        frequency = (1 - mix) * frequency / scaling.factor + mix * frequency;
      }
    }
    frequencies.push_back(static_cast<float>(frequency));
  }
  return frequencies;
}

}  // namespace octet
