#include "worker/checkpoint/converter.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/fp8.h"
#include "nlohmann/json.hpp"
#include "worker/checkpoint/architecture.h"
#include "worker/checkpoint/safetensors.h"
#include "worker/checkpoint/staging.h"
#include "worker/checkpoint/weight_source.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

// FP32 rows in flight. Several times this is all the memory that a conversion takes, whatever the model.
constexpr int64_t kSlabBytes = int64_t{32} << 20;
constexpr double kActivationUpperBound = 1200.0;  // Meta's

ordered_json fbgemm_config(const std::vector<ModelTensor>& tensors, int64_t layers) {
  ordered_json left_out = ordered_json::array();
  for (const ModelTensor& tensor : tensors) {
    if (is_block_linear(tensor.part) && !becomes_fp8(tensor, Fp8Recipe::kFfn, layers))
      left_out.push_back(tensor.module);
  }
  left_out.push_back("lm_head");
  return {{"quant_method", "fbgemm_fp8"},
          {"activation_scale_ub", kActivationUpperBound},
          {"modules_to_not_convert", left_out}};
}

ordered_json compressed_tensors_config() {
  const auto args = [](const char* strategy, bool dynamic) {
    return ordered_json{
        {"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"strategy", strategy}, {"dynamic", dynamic}};
  };
  const ordered_json group = {{"targets", {"Linear"}},
                              {"weights", args("channel", false)},
                              {"input_activations", args("token", true)},
                              {"output_activations", nullptr}};
  return {{"quant_method", "compressed-tensors"},  {"format", "float-quantized"}, {"quantization_status", "compressed"},
          {"config_groups", {{"group_0", group}}}, {"ignore", {"lm_head"}},       {"kv_cache_scheme", nullptr}};
}

// A tensor of the model on its way, and the one or two tensors of a file that it becomes.
struct Item {
  ModelTensor tensor;
  bool fp8 = false;
  size_t weight = 0;  // index into the shard's plans
  size_t scale = 0;   // likewise; only for FP8

  int64_t rows() const { return tensor.shape[0]; }
  int64_t columns() const { return tensor.shape.rank() == 1 ? 1 : tensor.shape[1]; }
  int64_t bytes() const { return fp8 ? rows() * (columns() + 4) : rows() * columns() * 2; }
};

struct Shard {
  std::vector<Item> items;
  std::vector<SafetensorsWriter::Plan> plans;
  int64_t bytes = 0;

  void add(Item item) {
    item.weight = plans.size();
    plans.push_back({item.tensor.name(), item.fp8 ? DType::kF8E4M3 : DType::kBF16, item.tensor.shape});
    if (item.fp8) {
      item.scale = plans.size();
      plans.push_back({item.tensor.module + ".weight_scale", DType::kF32, {item.rows(), 1}});
    }
    bytes += item.bytes();
    items.push_back(std::move(item));
  }
};

class Conversion {
 public:
  Conversion(const ConvertOptions& options, const WeightSource& source) : options_(options), source_(source) {}

  absl::Status run() {
    if (absl::Status status = plan(); !status.ok()) return status;
    absl::StatusOr<StagingDirectory> staging = StagingDirectory::create(options_.destination);
    if (!staging.ok()) return staging.status();
    if (staging->available_bytes() < progress_.bytes_total) {
      return absl::ResourceExhaustedError(absl::StrCat(options_.destination, " needs ", progress_.bytes_total,
                                                       " bytes, its file system has ", staging->available_bytes(),
                                                       " free"));
    }
    for (size_t i = 0; i < shards_.size(); ++i) {
      if (absl::Status status = write_shard(shards_[i], staging->path() + "/" + file_name(i)); !status.ok())
        return status;
    }
    if (absl::Status status = write_texts(staging->path()); !status.ok()) return status;
    if (absl::Status status = check_cancelled(); !status.ok()) return status;
    return staging->publish();
  }

 private:
  absl::Status plan() {
    const int64_t layers = source_.config().num_hidden_layers;
    tensors_ = model_tensors(source_.config());
    bool any = false;
    for (const ModelTensor& tensor : tensors_) {
      Item item{.tensor = tensor, .fp8 = becomes_fp8(tensor, options_.recipe, layers)};
      any |= item.fp8;
      progress_.bytes_total += item.bytes();
      if (shards_.empty() ||
          (shards_.back().bytes + item.bytes() > options_.max_shard_bytes && shards_.back().bytes > 0)) {
        shards_.emplace_back();
      }
      shards_.back().add(std::move(item));
    }
    if (any || options_.recipe == Fp8Recipe::kNone) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("the ffn recipe leaves out the first and the last layer, and this model has ", layers,
                     ": use --fp8 all or none"));
  }

  std::string file_name(size_t shard) const {
    if (shards_.size() == 1) return "model.safetensors";
    return absl::StrFormat("model-%05d-of-%05d.safetensors", shard + 1, shards_.size());
  }

  absl::Status check_cancelled() const {
    if (options_.cancelled == nullptr || !options_.cancelled->load()) return absl::OkStatus();
    return absl::CancelledError(absl::StrCat("cancelled; ", options_.destination, " was not written"));
  }

  absl::Status write_shard(const Shard& shard, const std::string& path) {
    absl::StatusOr<SafetensorsWriter> writer = SafetensorsWriter::create(path, shard.plans, {{"format", "pt"}});
    if (!writer.ok()) return writer.status();
    for (const Item& item : shard.items) {
      progress_.tensor = item.tensor.name();
      if (absl::Status status = write_item(item, *writer); !status.ok()) return status;
    }
    return writer->finish();
  }

  absl::Status write_item(const Item& item, SafetensorsWriter& writer) {
    const int64_t columns = item.columns();
    const bool by_heads = item.tensor.part == Part::kQuery || item.tensor.part == Part::kKey;
    const int64_t step = by_heads ? source_.config().head_dim : 1;
    const int64_t slab = std::max(step, kSlabBytes / 4 / columns / step * step);
    for (int64_t begin = 0; begin < item.rows(); begin += slab) {
      if (absl::Status status = check_cancelled(); !status.ok()) return status;
      const int64_t rows = std::min(slab, item.rows() - begin);
      values_.resize(static_cast<size_t>(rows * columns));
      absl::Status status = source_.read_rows(item.tensor, begin, begin + rows, values_.data());
      if (status.ok()) status = check_finite(item.tensor);
      if (status.ok()) status = item.fp8 ? write_fp8(item, begin, rows, writer) : write_bf16(item, begin, rows, writer);
      if (!status.ok()) return status;
      if (options_.progress) options_.progress(progress_);
    }
    return absl::OkStatus();
  }

  absl::Status check_finite(const ModelTensor& tensor) const {
    const bool finite = std::all_of(values_.begin(), values_.end(), [](float value) { return std::isfinite(value); });
    if (finite) return absl::OkStatus();
    return absl::DataLossError(
        absl::StrCat(options_.source, ": ", tensor.name(), " holds NaN or infinity: the file is damaged"));
  }

  absl::Status write_bf16(const Item& item, int64_t begin, int64_t rows, SafetensorsWriter& writer) {
    halves_.resize(values_.size());
    std::transform(values_.begin(), values_.end(), halves_.begin(), float_to_bf16);
    progress_.bytes_done += static_cast<int64_t>(halves_.size()) * 2;
    return writer.write(
        item.weight, begin * item.columns() * 2,
        {reinterpret_cast<const char*>(halves_.data()), static_cast<size_t>(rows * item.columns() * 2)});
  }

  absl::Status write_fp8(const Item& item, int64_t begin, int64_t rows, SafetensorsWriter& writer) {
    const int64_t columns = item.columns();
    codes_.resize(values_.size());
    scales_.resize(static_cast<size_t>(rows));
    for (int64_t row = 0; row < rows; ++row) {
      scales_[row] = quantize_row(values_.data() + row * columns, columns, codes_.data() + row * columns);
    }
    progress_.bytes_done += rows * (columns + 4);
    absl::Status status =
        writer.write(item.weight, begin * columns, {reinterpret_cast<const char*>(codes_.data()), codes_.size()});
    if (!status.ok()) return status;
    return writer.write(item.scale, begin * 4, {reinterpret_cast<const char*>(scales_.data()), scales_.size() * 4});
  }

  absl::Status write_texts(const std::string& directory) const {
    if (absl::Status status = source_.write_companions(directory); !status.ok()) return status;
    if (shards_.size() > 1) {
      ordered_json weight_map = ordered_json::object();
      int64_t total = 0;
      // push_back on the underlying list: operator[] would look every name up among all others.
      for (size_t i = 0; i < shards_.size(); ++i) {
        total += shards_[i].bytes;
        for (const SafetensorsWriter::Plan& plan : shards_[i].plans) {
          weight_map.get_ref<ordered_json::object_t&>().push_back({plan.name, file_name(i)});
        }
      }
      const ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", std::move(weight_map)}};
      absl::Status status = write_text_file(directory + "/model.safetensors.index.json", index.dump(2) + "\n");
      if (!status.ok()) return status;
    }
    ordered_json config = source_.config_json();
    if (options_.recipe == Fp8Recipe::kFfn) {
      config["quantization_config"] = fbgemm_config(tensors_, source_.config().num_hidden_layers);
    } else if (options_.recipe == Fp8Recipe::kAll) {
      config["quantization_config"] = compressed_tensors_config();
    }
    return write_text_file(directory + "/config.json", config.dump(2) + "\n");
  }

  const ConvertOptions& options_;
  const WeightSource& source_;
  std::vector<ModelTensor> tensors_;
  std::vector<Shard> shards_;
  ConvertProgress progress_;
  // One slab, reused.
  std::vector<float> values_, scales_;
  std::vector<uint16_t> halves_;
  std::vector<uint8_t> codes_;
};

}  // namespace

std::optional<Fp8Recipe> fp8_recipe_named(std::string_view name) {
  if (name == "none") return Fp8Recipe::kNone;
  if (name == "ffn") return Fp8Recipe::kFfn;
  if (name == "all") return Fp8Recipe::kAll;
  return std::nullopt;
}

ActivationScheme activation_scheme(Fp8Recipe recipe) {
  if (recipe == Fp8Recipe::kNone) return {};
  ActivationScheme scheme{.kind = ActivationScheme::Kind::kDynamicPerToken};
  if (recipe == Fp8Recipe::kFfn) scheme.upper_bound = kActivationUpperBound;
  return scheme;
}

bool becomes_fp8(const ModelTensor& tensor, Fp8Recipe recipe, int64_t num_hidden_layers) {
  if (recipe == Fp8Recipe::kFfn) {
    return is_feed_forward(tensor.part) && tensor.layer > 0 && tensor.layer < num_hidden_layers - 1;
  }
  return recipe == Fp8Recipe::kAll && is_block_linear(tensor.part);
}

float quantize_row(const float* values, int64_t count, uint8_t* codes) {
  float amax = 0;
  for (int64_t i = 0; i < count; ++i) amax = std::max(amax, std::abs(values[i]));
  const float scale = std::max(amax / kE4m3Max, 1.0f / (kE4m3Max * 512.0f));
  const float inverse = 1.0f / scale;
  for (int64_t i = 0; i < count; ++i) codes[i] = float_to_e4m3(values[i] * inverse);  // which clamps
  return scale;
}

absl::Status convert(const ConvertOptions& options) {
  absl::StatusOr<std::unique_ptr<WeightSource>> source = WeightSource::open(options.source);
  if (!source.ok()) return source.status();
  return Conversion(options, **source).run();
}

}  // namespace octet
