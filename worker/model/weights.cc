#include "worker/model/weights.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/fp8.h"
#include "kernels/random_values.h"
#include "worker/checkpoint/half.h"

namespace octet {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kStagingBytes = 8 << 20;  // one sequential read
constexpr char kEmbedding[] = "model.embed_tokens";

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

// Where the values of a shard come from. Modules are named as in the checkpoint: "model.layers.3.mlp.gate_proj".
class ValueSource {
 public:
  // Takes rows of a matrix, [rows, columns] as they rest in memory, that follow those it was given before.
  using Consume = std::function<void(const Tensor& raw, int64_t first_row)>;

  virtual ~ValueSource() = default;
  virtual absl::StatusOr<ActivationScheme> activations(const PlacedLinear& linear) = 0;
  // In pieces of whole panels, counted from rows.begin.
  virtual absl::Status read_rows(const std::string& module, DType dtype, Range rows, Range columns,
                                 const Consume& consume) = 0;
  // One for each row of an FP8 matrix.
  virtual absl::StatusOr<std::vector<float>> scales(const PlacedLinear& linear) = 0;
  virtual absl::StatusOr<std::vector<float>> norm(const PlacedNorm& norm) = 0;
};

// Rows of a piece that is about so large: whole panels.
int64_t rows_of_piece(int64_t piece_bytes, int64_t row_bytes) {
  return std::max(kPanelRows, piece_bytes / std::max<int64_t>(row_bytes, 1) / kPanelRows * kPanelRows);
}

// A rank's part of a checkpoint.
class CheckpointValues final : public ValueSource {
 public:
  CheckpointValues(const Checkpoint& checkpoint, ActivationMode mode) : checkpoint_(checkpoint), mode_(mode) {}

  absl::StatusOr<ActivationScheme> activations(const PlacedLinear& linear) override {
    const absl::StatusOr<LinearFormat> format = checkpoint_.linear_format(linear.module);
    if (!format.ok()) return format.status();
    return mode_ == ActivationMode::kFP8 ? format->activations : ActivationScheme{};
  }

  absl::Status read_rows(const std::string& module, DType, Range rows, Range columns, const Consume& consume) override {
    const TensorInfo* info = checkpoint_.find("model.embed_tokens.weight");
    if (module != kEmbedding) {
      const absl::StatusOr<LinearFormat> format = checkpoint_.linear_format(module);
      if (!format.ok()) return format.status();
      info = format->weight;
    }
    const int64_t row_bytes = columns.size() * size_of(info->dtype);
    const int64_t step = rows_of_piece(kStagingBytes, row_bytes);
    for (int64_t first = 0; first < rows.size(); first += step) {
      const int64_t count = std::min(step, rows.size() - first);
      staging_.resize(count * row_bytes);
      absl::Status status = checkpoint_.read(*info, rows.begin + first, rows.begin + first + count, columns.begin,
                                             columns.end, staging_.data());
      if (!status.ok()) return status;
      consume(resident(Tensor(staging_.data(), info->dtype, {count, columns.size()})), first);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<float>> scales(const PlacedLinear& linear) override {
    const absl::StatusOr<LinearFormat> format = checkpoint_.linear_format(linear.module);
    if (!format.ok()) return format.status();
    absl::StatusOr<std::vector<float>> stored = checkpoint_.read_f32(*format->weight_scale);
    if (!stored.ok()) return stored.status();
    const bool per_row = stored->size() > 1;
    std::vector<float> scales(static_cast<size_t>(linear.rows.size()));
    for (int64_t i = 0; i < linear.rows.size(); ++i) scales[i] = (*stored)[per_row ? linear.rows.begin + i : 0];
    return scales;
  }

  absl::StatusOr<std::vector<float>> norm(const PlacedNorm& norm) override {
    return checkpoint_.read_f32(*checkpoint_.find(norm.name));
  }

 private:
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

  const Checkpoint& checkpoint_;
  const ActivationMode mode_;
  std::vector<char> staging_;
  std::vector<uint16_t> converted_;
};

// No checkpoint at all.
class RandomShard final : public ValueSource {
 public:
  RandomShard(const ModelConfig& config, const ActivationScheme& activations)
      : hidden_(config.hidden_size),
        activations_(activations),
        values_(kSeed, std::max(kPieceElements, kPanelRows * widest_input(config))) {}

  absl::StatusOr<ActivationScheme> activations(const PlacedLinear& linear) override {
    return linear.dtype == DType::kF8E4M3 ? activations_ : ActivationScheme{};
  }

  absl::Status read_rows(const std::string&, DType dtype, Range rows, Range columns, const Consume& consume) override {
    const int64_t step = rows_of_piece(kPieceElements, columns.size());
    for (int64_t first = 0; first < rows.size(); first += step) {
      consume(values_.next(dtype, {std::min(step, rows.size() - first), columns.size()}), first);
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<float>> scales(const PlacedLinear& linear) override {
    std::vector<float> scales = values_.near_one(linear.rows.size(), 0.25f);
    for (float& scale : scales) scale *= RandomValues::kDeviation / RandomValues::kCodeDeviation;
    return scales;
  }

  absl::StatusOr<std::vector<float>> norm(const PlacedNorm&) override { return values_.near_one(hidden_, 0.25f); }

 private:
  static int64_t widest_input(const ModelConfig& config) {
    return std::max({config.hidden_size, config.intermediate_size, config.num_attention_heads * config.head_dim});
  }

  static constexpr uint64_t kSeed = 405;
  static constexpr int64_t kPieceElements = 2 << 20;
  const int64_t hidden_;
  const ActivationScheme activations_;
  RandomValues values_;
};

// Brings a shard from its source into one arena, in the order of its placement.
class Filler {
 public:
  Filler(Stream& stream, const Buffer& arena, ValueSource& source, const ShardProgress& progress)
      : stream_(stream), arena_(arena), source_(source), progress_(progress) {}

  absl::Status embedding(Range rows, int64_t hidden, Tensor* out) {
    *out = take(DType::kBF16, {rows.size(), hidden});
    return source_.read_rows(kEmbedding, DType::kBF16, rows, {0, hidden}, [&](const Tensor& raw, int64_t first_row) {
      copy(stream_, raw, out->rows(first_row, first_row + raw.dim(0)));
      report();
    });
  }

  absl::Status linear(const PlacedLinear& placed) {
    Linear& linear = *placed.linear;
    linear.out_features = placed.rows.size();
    linear.in_features = placed.columns.size();
    linear.weight = take(placed.dtype, {placed.weight_bytes() / size_of(placed.dtype)});
    const absl::StatusOr<ActivationScheme> activations = source_.activations(placed);
    if (!activations.ok()) return activations.status();
    linear.activations = *activations;
    if (placed.dtype == DType::kF8E4M3) {
      linear.weight_scale = take(DType::kF32, {placed.rows.size()});
      if (absl::Status status = put(source_.scales(placed), linear.weight_scale); !status.ok()) return status;
    }
    return source_.read_rows(placed.module, placed.dtype, placed.rows, placed.columns,
                             [&](const Tensor& raw, int64_t first_row) {
                               pack_rows(stream_, raw, first_row, linear);
                               report();
                             });
  }

  absl::Status norm(const PlacedNorm& placed, int64_t hidden) {
    *placed.norm = take(DType::kF32, {hidden});
    return put(source_.norm(placed), *placed.norm);
  }

 private:
  Tensor take(DType dtype, Shape shape) {
    Tensor tensor(static_cast<char*>(arena_.data()) + used_, dtype, shape, stream_.device());
    used_ += aligned(tensor.bytes());
    OCTET_CHECK(used_ <= arena_.bytes(), "the weights are larger than their plan");
    return tensor;
  }

  absl::Status put(absl::StatusOr<std::vector<float>> values, const Tensor& to) {
    if (!values.ok()) return values.status();
    copy(stream_, Tensor(values->data(), DType::kF32, {static_cast<int64_t>(values->size())}), to);
    return absl::OkStatus();
  }

  void report() {
    if (progress_) progress_(used_, arena_.bytes());
  }

  Stream& stream_;
  const Buffer& arena_;
  ValueSource& source_;
  const ShardProgress& progress_;
  int64_t used_ = 0;
};

absl::Status fill(Stream& stream, const WeightFormats& formats, const ShardSpec& shard, ValueSource& source,
                  const ShardProgress& progress, ModelWeights* weights, Buffer* memory) {
  const Placement placement = place(formats, shard, weights);
  const int64_t hidden = formats.config.hidden_size;
  *memory = Buffer(bytes_of(placement, formats.config, shard).total(), stream);
  Filler filler(stream, *memory, source, progress);
  absl::Status status = filler.embedding(shard.vocab(), hidden, &weights->embed_tokens);
  for (size_t i = 0; status.ok() && i < placement.linears.size(); ++i) status = filler.linear(placement.linears[i]);
  for (size_t i = 0; status.ok() && i < placement.norms.size(); ++i) status = filler.norm(placement.norms[i], hidden);
  return status;
}

// The scale of a layer's cached keys ("k") or values ("v"), under any of the names that writers give it; 1 without.
absl::Status read_cache_scale(const Checkpoint& checkpoint, size_t layer, const char* which, float* out) {
  const std::string attention = absl::StrCat("model.layers.", layer, ".self_attn.");
  for (const std::string& name : {absl::StrCat(attention, which, "_proj.", which, "_scale"),
                                  absl::StrCat(attention, which, "_scale"), absl::StrCat(attention, "kv_scale")}) {
    const TensorInfo* const info = checkpoint.find(name);
    if (info == nullptr) continue;
    const absl::StatusOr<std::vector<float>> values = checkpoint.read_f32(*info);
    if (!values.ok()) return values.status();
    if (values->size() != 1) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, " has ", values->size(), " values, expected one for the layer: use --kv-dtype bf16"));
    }
    *out = values->front();
    if (*out > 0 && std::isfinite(*out)) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(name, " is ", *out, ", expected a positive number: use --kv-dtype bf16"));
  }
  return absl::OkStatus();
}

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
  CheckpointValues values(checkpoint, options.activations);
  ModelWeights weights;
  absl::Status status =
      fill(stream, weight_formats(checkpoint), shard, values, options.progress, &weights, &weights.memory_);
  const size_t scaled = options.kv_dtype == DType::kF8E4M3 ? weights.layers.size() : 0;
  for (size_t i = 0; status.ok() && i < scaled; ++i) {
    LayerWeights& layer = weights.layers[i];
    status = read_cache_scale(checkpoint, i, "k", &layer.key_scale);
    if (status.ok()) status = read_cache_scale(checkpoint, i, "v", &layer.value_scale);
  }
  if (!status.ok()) return status;
  return weights;
}

ModelWeights ModelWeights::random(Stream& stream, const WeightFormats& formats, const ShardSpec& shard,
                                  const ActivationScheme& activations, const ShardProgress& progress) {
  RandomShard values(formats.config, activations);
  ModelWeights weights;
  const absl::Status status = fill(stream, formats, shard, values, progress, &weights, &weights.memory_);
  OCTET_CHECK(status.ok(), "random numbers cannot fail");
  return weights;
}

}  // namespace octet
