#include "worker/checkpoint/inspect.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/check.h"

namespace octet {
namespace {

std::string describe_inputs(const ActivationScheme& scheme) {
  switch (scheme.kind) {
    case ActivationScheme::Kind::kNone:
      return "BF16";
    case ActivationScheme::Kind::kStatic:
      return "e4m3, stored scale";
    case ActivationScheme::Kind::kDynamicPerToken:
      return std::isinf(scheme.upper_bound) ? "e4m3 per token"
                                            : absl::StrCat("e4m3 per token, amax up to ", scheme.upper_bound);
  }
  return "";
}

// One tensor as a summary of its own, layers left out.
PartSummary describe(const Checkpoint& checkpoint, const ModelTensor& tensor) {
  const TensorInfo& weight = *checkpoint.find(tensor.name());
  PartSummary summary{.part = tensor.part,
                      .layers = {},
                      .weights = name_of(weight.dtype),
                      .scales = "",
                      .inputs = "",
                      .parameters = weight.shape.elements(),
                      .bytes = weight.bytes()};
  if (!is_block_linear(tensor.part) && tensor.part != Part::kHead) return summary;
  const absl::StatusOr<LinearFormat> format = checkpoint.linear_format(tensor.module);
  OCTET_CHECK(format.ok(), "an open checkpoint knows the format of " + tensor.module);
  summary.inputs = describe_inputs(format->activations);
  if (format->weight_scale == nullptr) return summary;
  const TensorInfo& scale = *format->weight_scale;
  summary.scales = absl::StrCat(name_of(scale.dtype), scale.shape.elements() == 1 ? " per tensor" : " per row");
  summary.bytes += scale.bytes();
  return summary;
}

bool stored_alike(const PartSummary& a, const PartSummary& b) {
  return a.part == b.part && a.weights == b.weights && a.scales == b.scales && a.inputs == b.inputs;
}

void add_layer(PartSummary& summary, int64_t layer) {
  if (layer < 0) return;
  if (!summary.layers.empty() && summary.layers.back().second >= layer - 1) {
    summary.layers.back().second = layer;
  } else {
    summary.layers.emplace_back(layer, layer);
  }
}

std::string layers_text(const PartSummary& part) {
  return absl::StrJoin(part.layers, ", ", [](std::string* out, const std::pair<int64_t, int64_t>& run) {
    run.first == run.second ? absl::StrAppend(out, run.first) : absl::StrAppend(out, run.first, "-", run.second);
  });
}

}  // namespace

CheckpointSummary summarize(const Checkpoint& checkpoint) {
  CheckpointSummary summary{.model = checkpoint.config().to_string(),
                            .quant_method = checkpoint.quant_method(),
                            .parts = {},
                            .warnings = checkpoint.warnings()};
  for (const ModelTensor& tensor : model_tensors(checkpoint.config())) {
    PartSummary one = describe(checkpoint, tensor);
    summary.parameters += one.parameters;
    summary.bytes += one.bytes;
    const auto known = std::find_if(summary.parts.begin(), summary.parts.end(),
                                    [&](const PartSummary& part) { return stored_alike(part, one); });
    if (known == summary.parts.end()) {
      add_layer(one, tensor.layer);
      summary.parts.push_back(std::move(one));
    } else {
      known->parameters += one.parameters;
      known->bytes += one.bytes;
      add_layer(*known, tensor.layer);
    }
  }
  std::stable_sort(summary.parts.begin(), summary.parts.end(),
                   [](const PartSummary& a, const PartSummary& b) { return a.part < b.part; });
  return summary;
}

std::string to_text(const CheckpointSummary& summary) {
  std::string text = absl::StrCat(summary.model, "\n", with_commas(summary.parameters), " parameters, ",
                                  with_commas(summary.bytes), " bytes, quantisation: ", summary.quant_method, "\n\n");
  constexpr char kRow[] = "%-13s %-10s %-8s %-16s %-32s %17s\n";
  absl::StrAppendFormat(&text, kRow, "part", "layers", "weights", "scales", "inputs as W8A8", "bytes");
  for (const PartSummary& part : summary.parts) {
    absl::StrAppendFormat(&text, kRow, name_of(part.part), layers_text(part), part.weights, part.scales, part.inputs,
                          with_commas(part.bytes));
  }
  for (const std::string& warning : summary.warnings) absl::StrAppend(&text, "note: ", warning, "\n");
  return text;
}

std::string with_commas(int64_t number) {
  const std::string digits = std::to_string(number);
  std::string text;
  for (size_t i = 0; i < digits.size(); ++i) {
    if (i > 0 && (digits.size() - i) % 3 == 0) text += ',';
    text += digits[i];
  }
  return text;
}

}  // namespace octet
