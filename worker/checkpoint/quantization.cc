#include "worker/checkpoint/quantization.h"

#include <fnmatch.h>

#include <optional>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "worker/checkpoint/json.h"

namespace octet {
namespace {

using nlohmann::json;
using Kind = ActivationScheme::Kind;

constexpr absl::string_view kSupported =
    "supported: fbgemm_fp8; compressed-tensors FP8 (tensor or channel weights; static, dynamic per-token or no "
    "activation "
    "quantisation); modelopt FP8; fp8 with one scale per tensor; unquantised BF16, F16, F32";

absl::Status refuse(const std::string& key, const json& found, absl::string_view expected) {
  return absl::UnimplementedError(
      absl::StrCat(key, " is ", excerpt_of(found), ", expected ", expected, "; ", kSupported));
}

// object[key], or null.
const json& at(const json& object, const std::string& key) {
  static const json kNull;
  if (!object.is_object()) return kNull;
  const auto found = object.find(key);
  return found == object.end() ? kNull : *found;
}

// Reads a list of module names into `out`.
absl::Status read_ignored(const json& list, const std::string& key, Quantization& out) {
  if (list.is_null()) return absl::OkStatus();
  if (!list.is_array()) return absl::InvalidArgumentError(absl::StrCat(key, " must be a list of module names"));
  for (const json& entry : list) {
    if (!entry.is_string()) return absl::InvalidArgumentError(absl::StrCat(key, " must hold strings only"));
    std::string name = entry.get<std::string>();
    if (name.starts_with("re:")) {
      out.ignored_is_complete = false;  // only a cross-check: not worth running regular expressions from a file
    } else {
      out.ignored.push_back(std::move(name));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Quantization> parse_fbgemm(const json& config) {
  Quantization out;
  out.activations.kind = Kind::kDynamicPerToken;
  out.activations.upper_bound = 1200.0f;
  if (const json& bound = at(config, "activation_scale_ub"); !bound.is_null()) {
    const float value = bound.is_number() ? bound.get<float>() : 0.0f;
    if (!(value > 0) || value > 3e38f) {
      return absl::InvalidArgumentError(absl::StrCat(
          "quantization_config.activation_scale_ub: expected a number above 0, found ", excerpt_of(bound)));
    }
    out.activations.upper_bound = value;
  }
  absl::Status status =
      read_ignored(at(config, "modules_to_not_convert"), "quantization_config.modules_to_not_convert", out);
  if (!status.ok()) return status;
  return out;
}

bool is_fp8(const json& args) { return integer_in(at(args, "num_bits")) == 8 && at(args, "type") == "float"; }

// The activation scheme of one compressed-tensors group.
absl::StatusOr<ActivationScheme> parse_inputs(const json& inputs, const std::string& key) {
  ActivationScheme scheme;
  if (inputs.is_null()) return scheme;
  if (!is_fp8(inputs)) return refuse(key, inputs, "8-bit float");
  if (at(inputs, "symmetric") == false) return refuse(key + ".symmetric", false, "true");
  const json& dynamic = at(inputs, "dynamic");
  const json& strategy = at(inputs, "strategy");
  if (dynamic == true && strategy == "token") {
    scheme.kind = Kind::kDynamicPerToken;
  } else if ((dynamic == false || dynamic.is_null()) && (strategy == "tensor" || strategy.is_null())) {
    scheme.kind = Kind::kStatic;
  } else {
    return refuse(key, inputs, "dynamic per token or static per tensor");
  }
  return scheme;
}

// A group is an object, or a list of targets under the name of a preset.
absl::StatusOr<ActivationScheme> parse_group(const std::string& name, const json& group) {
  const std::string key = absl::StrCat("quantization_config.config_groups.", name);
  if (group.is_array()) {
    ActivationScheme scheme;
    if (name == "FP8_DYNAMIC") {
      scheme.kind = Kind::kDynamicPerToken;
    } else if (name == "FP8") {
      scheme.kind = Kind::kStatic;
    } else {
      return refuse("quantization_config.config_groups", name, "FP8 or FP8_DYNAMIC");
    }
    return scheme;
  }
  if (!group.is_object()) return absl::InvalidArgumentError(absl::StrCat(key, " must be an object"));
  const json& weights = at(group, "weights");
  if (!is_fp8(weights)) return refuse(key + ".weights", weights, "8-bit float");
  if (at(weights, "symmetric") == false) return refuse(key + ".weights.symmetric", false, "true");
  const json& strategy = at(weights, "strategy");
  if (!strategy.is_null() && strategy != "tensor" && strategy != "channel") {
    return refuse(key + ".weights.strategy", strategy, "tensor or channel");
  }
  return parse_inputs(at(group, "input_activations"), key + ".input_activations");
}

absl::StatusOr<Quantization> parse_compressed_tensors(const json& config) {
  Quantization out;
  const json& format = at(config, "format");
  if (!format.is_null() && format != "float-quantized" && format != "naive-quantized") {
    return refuse("quantization_config.format", format, "float-quantized");
  }
  const json& groups = at(config, "config_groups");
  if (!groups.is_object() || groups.empty()) {
    return absl::InvalidArgumentError("quantization_config.config_groups: expected an object with a group, found " +
                                      excerpt_of(groups));
  }
  std::optional<ActivationScheme> scheme;
  for (const auto& [name, group] : groups.items()) {
    absl::StatusOr<ActivationScheme> parsed = parse_group(name, group);
    if (!parsed.ok()) return parsed.status();
    if (scheme && *scheme != *parsed) {
      return refuse("quantization_config.config_groups", groups, "the same input_activations in every group");
    }
    scheme = *parsed;
  }
  out.activations = *scheme;
  out.has_kv_cache_scheme = !at(config, "kv_cache_scheme").is_null();
  if (absl::Status status = read_ignored(at(config, "ignore"), "quantization_config.ignore", out); !status.ok()) {
    return status;
  }
  return out;
}

// `config` is quantization_config of config.json, or "quantization" of hf_quant_config.json.
absl::StatusOr<Quantization> parse_modelopt(const json& config, const std::string& where) {
  Quantization out;
  const json& algorithm = at(config, "quant_algo");
  if (algorithm == "FP8") {
    out.activations.kind = Kind::kStatic;
  } else if (algorithm == "FP8_PER_CHANNEL_PER_TOKEN") {
    out.activations.kind = Kind::kDynamicPerToken;
  } else {
    return refuse(where + ".quant_algo", algorithm, "FP8 or FP8_PER_CHANNEL_PER_TOKEN");
  }
  out.has_kv_cache_scheme = !at(config, "kv_cache_scheme").is_null() || !at(config, "kv_cache_quant_algo").is_null();
  const std::string key = config.contains("exclude_modules") ? "exclude_modules" : "ignore";
  if (!config.contains(key)) out.ignored_is_complete = false;  // old files do not say
  if (absl::Status status = read_ignored(at(config, key), where + "." + key, out); !status.ok()) return status;
  return out;
}

absl::StatusOr<Quantization> parse_fp8(const json& config) {
  Quantization out;
  const json& block = at(config, "weight_block_size");
  if (!block.is_null()) return refuse("quantization_config.weight_block_size", block, "null: one scale per tensor");
  const json& scheme = at(config, "activation_scheme");
  if (scheme == "static") {
    out.activations.kind = Kind::kStatic;
  } else if (scheme == "dynamic" || scheme.is_null()) {
    out.activations.kind = Kind::kDynamicPerToken;
  } else {
    return refuse("quantization_config.activation_scheme", scheme, "static or dynamic");
  }
  for (const std::string key : {"ignored_layers", "modules_to_not_convert"}) {
    if (absl::Status status = read_ignored(at(config, key), "quantization_config." + key, out); !status.ok()) {
      return status;
    }
  }
  return out;
}

absl::StatusOr<Quantization> parse_method(const std::string& method, const json& config) {
  if (method == "fbgemm_fp8") return parse_fbgemm(config);
  if (method == "compressed-tensors") return parse_compressed_tensors(config);
  if (method == "modelopt") return parse_modelopt(config, "quantization_config");
  if (method == "fp8") return parse_fp8(config);
  return refuse("quantization_config.quant_method", method, "one that Octet computes");
}

}  // namespace

bool Quantization::ignores(const std::string& module) const {
  for (const std::string& entry : ignored) {
    if (entry == module || module.starts_with(entry + ".")) return true;
    if (entry.find_first_of("*?[") != std::string::npos && fnmatch(entry.c_str(), module.c_str(), 0) == 0) return true;
  }
  return false;
}

absl::StatusOr<Quantization> parse_quantization(const json& config, const json& hf_quant_config) {
  const std::string key = at(config, "quantization_config").is_null() ? "compression_config" : "quantization_config";
  const json& quantization = at(config, key);
  absl::StatusOr<Quantization> parsed = Quantization();
  std::string method = "none";
  if (!quantization.is_null()) {
    if (!quantization.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(key, ": expected an object, found ", excerpt_of(quantization)));
    }
    const json& name = at(quantization, "quant_method");
    // compression_config of older files has no quant_method.
    method = name.is_string() ? name.get<std::string>() : key == "compression_config" ? "compressed-tensors" : "";
    parsed = parse_method(method, quantization);
  } else if (!hf_quant_config.is_null()) {
    method = "modelopt";
    parsed = parse_modelopt(at(hf_quant_config, "quantization"), "hf_quant_config.json: quantization");
  }
  if (!parsed.ok()) return parsed.status();
  parsed->method = std::move(method);
  return parsed;
}

}  // namespace octet
