#include "worker/model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/fp8.h"
#include "worker/checkpoint/half.h"

namespace octet {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kStagingBytes = 8 << 20;  // one sequential read

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

struct PlacedLinear {
  std::string module;
  Linear* linear;
  int64_t WeightBytes::*part;
  Range rows, columns;
  DType dtype = DType::kBF16;  // resident

  int64_t weight_bytes() const { return packed_bytes(dtype, rows.size(), columns.size()); }
  int64_t scale_bytes() const { return dtype == DType::kF8E4M3 ? rows.size() * int64_t{sizeof(float)} : 0; }
};

struct PlacedNorm {
  std::string name;
  Tensor* norm;
};

// Every tensor of one rank, in the order of the forward pass.
struct Placement {
  std::vector<PlacedLinear> linears;
  std::vector<PlacedNorm> norms;
};

Placement place(const WeightFormats& formats, const ShardSpec& shard, ModelWeights* weights) {
  const ModelConfig& config = formats.config;
  const Range all{0, config.hidden_size};
  Placement placement;
  weights->layers.resize(config.num_hidden_layers);
  for (int64_t i = 0; i < config.num_hidden_layers; ++i) {
    LayerWeights& layer = weights->layers[i];
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    auto attention = [&](const char* name, Linear* linear, Range rows, Range columns) {
      placement.linears.push_back(
          {absl::StrCat(prefix, "self_attn.", name), linear, &WeightBytes::attention, rows, columns});
    };
    auto feed_forward = [&](const char* name, Linear* linear, Range rows, Range columns) {
      placement.linears.push_back(
          {absl::StrCat(prefix, "mlp.", name), linear, &WeightBytes::feed_forward, rows, columns});
    };
    placement.norms.push_back({prefix + "input_layernorm.weight", &layer.input_layernorm});
    attention("q_proj", &layer.q_proj, shard.query_rows(), all);
    attention("k_proj", &layer.k_proj, shard.kv_rows(), all);
    attention("v_proj", &layer.v_proj, shard.kv_rows(), all);
    attention("o_proj", &layer.o_proj, all, shard.query_rows());
    placement.norms.push_back({prefix + "post_attention_layernorm.weight", &layer.post_attention_layernorm});
    feed_forward("gate_proj", &layer.gate_proj, shard.ffn(), all);
    feed_forward("up_proj", &layer.up_proj, shard.ffn(), all);
    feed_forward("down_proj", &layer.down_proj, all, shard.ffn());
  }
  placement.norms.push_back({"model.norm.weight", &weights->norm});
  placement.linears.push_back({"lm_head", &weights->lm_head, &WeightBytes::lm_head, shard.vocab(), all});
  for (PlacedLinear& linear : placement.linears) linear.dtype = formats.resident_dtype(linear.module);
  return placement;
}

WeightBytes bytes_of(const Placement& placement, const ModelConfig& config, const ShardSpec& shard) {
  const int64_t hidden = config.hidden_size;
  WeightBytes bytes;
  bytes.embedding = aligned(shard.vocab().size() * hidden * size_of(DType::kBF16));
  for (const PlacedLinear& linear : placement.linears) {
    bytes.*linear.part += aligned(linear.weight_bytes());
    bytes.scales += aligned(linear.scale_bytes());
  }
  bytes.norms = static_cast<int64_t>(placement.norms.size()) * aligned(hidden * size_of(DType::kF32));
  return bytes;
}

// Copies tensors into one arena, in order.
class Loader {
 public:
  Loader(Stream& stream, const Checkpoint& checkpoint, const Buffer& arena, const LoadOptions& options)
      : stream_(stream), checkpoint_(checkpoint), arena_(arena), options_(options) {}

  absl::Status load_linear(const PlacedLinear& placed) {
    const absl::StatusOr<LinearFormat> format = checkpoint_.linear_format(placed.module);
    if (!format.ok()) return format.status();
    Linear& linear = *placed.linear;
    linear.out_features = placed.rows.size();
    linear.in_features = placed.columns.size();
    linear.weight = take(placed.dtype, {placed.weight_bytes() / size_of(placed.dtype)});
    if (options_.activations == ActivationMode::kFP8) linear.activations = format->activations;
    if (placed.dtype == DType::kF8E4M3) {
      linear.weight_scale = take(DType::kF32, {placed.rows.size()});
      if (absl::Status status = load_scale(*format->weight_scale, placed); !status.ok()) return status;
    }
    return read_rows(*format->weight, placed.rows, placed.columns,
                     [&](const Tensor& raw, int64_t first_row) { pack_rows(stream_, raw, first_row, linear); });
  }

  absl::Status load_embedding(Range rows, Tensor* out) {
    const TensorInfo& info = *checkpoint_.find("model.embed_tokens.weight");
    const int64_t hidden = info.shape[1];
    *out = take(DType::kBF16, {rows.size(), hidden});
    return read_rows(info, rows, {0, hidden}, [&](const Tensor& raw, int64_t first_row) {
      copy(stream_, raw, out->rows(first_row, first_row + raw.dim(0)));
    });
  }

  // The scale of a layer's cached keys ("k") or values ("v"), under any of the names that writers give it; 1 without.
  absl::Status load_cache_scale(int64_t layer, const char* which, float* out) {
    const std::string attention = absl::StrCat("model.layers.", layer, ".self_attn.");
    for (const std::string& name : {absl::StrCat(attention, which, "_proj.", which, "_scale"),
                                    absl::StrCat(attention, which, "_scale"), absl::StrCat(attention, "kv_scale")}) {
      const TensorInfo* const info = checkpoint_.find(name);
      if (info == nullptr) continue;
      absl::StatusOr<std::vector<float>> values = checkpoint_.read_f32(*info);
      if (!values.ok()) return values.status();
      if (values->size() != 1 || !((*values)[0] > 0) || std::isinf((*values)[0])) {
        return absl::InvalidArgumentError(absl::StrCat(name, " has ", values->size(), " values",
                                                       values->empty() ? "" : ", first ",
                                                       values->empty() ? "" : absl::StrCat((*values)[0]),
                                                       ": the scale of a layer's cache is one positive number"));
      }
      *out = (*values)[0];
      return absl::OkStatus();
    }
    return absl::OkStatus();
  }

  absl::Status load_norm(const PlacedNorm& placed) {
    absl::StatusOr<std::vector<float>> values = checkpoint_.read_f32(*checkpoint_.find(placed.name));
    if (!values.ok()) return values.status();
    *placed.norm = take(DType::kF32, {static_cast<int64_t>(values->size())});
    copy(stream_, Tensor(values->data(), DType::kF32, placed.norm->shape()), *placed.norm);
    return absl::OkStatus();
  }

 private:
  Tensor take(DType dtype, Shape shape) {
    Tensor tensor(static_cast<char*>(arena_.data()) + used_, dtype, shape, stream_.device());
    used_ += aligned(tensor.bytes());
    OCTET_CHECK(used_ <= arena_.bytes(), "the weights are larger than their plan");
    return tensor;
  }

  absl::Status load_scale(const TensorInfo& info, const PlacedLinear& placed) {
    absl::StatusOr<std::vector<float>> values = checkpoint_.read_f32(info);
    if (!values.ok()) return values.status();
    std::vector<float> scales(static_cast<size_t>(placed.rows.size()));
    const bool per_row = values->size() > 1;
    for (int64_t i = 0; i < placed.rows.size(); ++i) scales[i] = (*values)[per_row ? placed.rows.begin + i : 0];
    copy(stream_, Tensor(scales.data(), DType::kF32, {placed.rows.size()}), placed.linear->weight_scale);
    return absl::OkStatus();
  }

  // Hands rows of `info` to `consume` in pieces of whole panels, as F8_E4M3 or BF16, counted from rows.begin.
  template <typename Consume>
  absl::Status read_rows(const TensorInfo& info, Range rows, Range columns, const Consume& consume) {
    const int64_t row_bytes = columns.size() * size_of(info.dtype);
    const int64_t step =
        std::max(kPanelRows, kStagingBytes / std::max<int64_t>(row_bytes, 1) / kPanelRows * kPanelRows);
    for (int64_t first = 0; first < rows.size(); first += step) {
      const int64_t count = std::min(step, rows.size() - first);
      staging_.resize(count * row_bytes);
      absl::Status status = checkpoint_.read(info, rows.begin + first, rows.begin + first + count, columns.begin,
                                             columns.end, staging_.data());
      if (!status.ok()) return status;
      consume(resident(Tensor(staging_.data(), info.dtype, {count, columns.size()})), first);
      if (options_.progress) options_.progress(used_, arena_.bytes());
    }
    return absl::OkStatus();
  }

  // FP8 stays FP8; everything else becomes BF16.
  Tensor resident(const Tensor& raw) {
    if (raw.dtype() == DType::kF8E4M3 || raw.dtype() == DType::kBF16) return raw;
    converted_.resize(raw.elements());
    for (int64_t i = 0; i < raw.elements(); ++i) {
      converted_[i] =
          float_to_bf16(raw.dtype() == DType::kF32 ? raw.as<float>()[i] : f16_to_float(raw.as<uint16_t>()[i]));
    }
    return Tensor(converted_.data(), DType::kBF16, raw.shape());
  }

  Stream& stream_;
  const Checkpoint& checkpoint_;
  const Buffer& arena_;
  const LoadOptions& options_;
  int64_t used_ = 0;
  std::vector<char> staging_;
  std::vector<uint16_t> converted_;
};

}  // namespace

WeightBytes ModelWeights::plan(const WeightFormats& formats, const ShardSpec& shard) {
  ModelWeights unused;
  return bytes_of(place(formats, shard, &unused), formats.config, shard);
}

std::span<const std::byte> ModelWeights::memory() const {
  return {static_cast<const std::byte*>(memory_.data()), static_cast<size_t>(memory_.bytes())};
}

absl::StatusOr<ModelWeights> ModelWeights::load(Stream& stream, const Checkpoint& checkpoint, const ShardSpec& shard,
                                                const LoadOptions& options) {
  ModelWeights weights;
  const Placement placement = place(weight_formats(checkpoint), shard, &weights);
  weights.memory_ = Buffer(bytes_of(placement, checkpoint.config(), shard).total(), stream);
  Loader loader(stream, checkpoint, weights.memory_, options);
  absl::Status status = loader.load_embedding(shard.vocab(), &weights.embed_tokens);
  for (size_t i = 0; status.ok() && i < placement.linears.size(); ++i)
    status = loader.load_linear(placement.linears[i]);
  for (size_t i = 0; status.ok() && i < placement.norms.size(); ++i) status = loader.load_norm(placement.norms[i]);
  const size_t scaled = options.kv_dtype == DType::kF8E4M3 ? weights.layers.size() : 0;
  for (size_t i = 0; status.ok() && i < scaled; ++i) {
    LayerWeights& layer = weights.layers[i];
    status = loader.load_cache_scale(static_cast<int64_t>(i), "k", &layer.key_scale);
    if (status.ok()) status = loader.load_cache_scale(static_cast<int64_t>(i), "v", &layer.value_scale);
  }
  if (!status.ok()) return status;
  return weights;
}

}  // namespace octet
