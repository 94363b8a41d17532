#include "worker/checkpoint/checkpoint.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "kernels/fp8.h"
#include "worker/checkpoint/architecture.h"
#include "worker/checkpoint/file.h"
#include "worker/checkpoint/half.h"
#include "worker/checkpoint/json.h"
#include "worker/checkpoint/quantization.h"
#include "worker/checkpoint/safetensors.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr int64_t kMaxConfigBytes = int64_t{16} << 20;
constexpr int64_t kMaxIndexBytes = int64_t{100} << 20;
// Strided reads go through a scratch of this size.
constexpr int64_t kGroupBytes = int64_t{8} << 20;

uint64_t fnv1a(std::string_view bytes, uint64_t state) {
  for (const char c : bytes) state = (state ^ static_cast<uint8_t>(c)) * 0x100000001B3;
  return state;
}

// The file's text; empty when there is none.
absl::StatusOr<std::string> read_optional(const std::string& path) {
  absl::StatusOr<std::string> text = read_text_file(path, kMaxConfigBytes);
  if (absl::IsNotFound(text.status())) return std::string();
  return text;
}

bool is_plain_name(const std::string& name) {
  return !name.empty() && name.front() != '.' && name.size() <= 255 &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

bool is_scale(std::string_view name) {
  return name.ends_with(".weight_scale") || name.ends_with(".weight_scale_inv") || name.ends_with(".input_scale");
}

bool is_kv_scale(std::string_view name) {
  for (const char* suffix : {".k_scale", ".v_scale", ".kv_scale", ".output_scale", ".q_scale"}) {
    if (name.ends_with(suffix)) return true;
  }
  return false;
}

// Tensors that some writers leave behind and nothing reads.
bool is_leftover(std::string_view name) {
  return name.ends_with(".rotary_emb.inv_freq") || name.ends_with("_zero_point") || name.ends_with(".input_scale_ub");
}

// Rows and columns as read() counts them.
std::pair<int64_t, int64_t> extent_of(const Shape& shape) {
  const int64_t rows = shape.rank() == 0 ? 1 : shape[0];
  return {rows, rows == 0 ? 0 : shape.elements() / rows};
}

// "a, b, c and 12 more"
std::string some_of(const std::vector<std::string>& names) {
  const size_t shown = std::min<size_t>(names.size(), 3);
  std::string text = absl::StrJoin(names.begin(), names.begin() + shown, ", ");
  if (names.size() > shown) absl::StrAppend(&text, " and ", names.size() - shown, " more");
  return text;
}

int64_t first_nan_code(const uint8_t* codes, int64_t count) {
  constexpr int64_t kStretch = 4096;
  for (int64_t begin = 0; begin < count; begin += kStretch) {
    const int64_t end = std::min(begin + kStretch, count);
    uint8_t any = 0;
    for (int64_t i = begin; i < end; ++i) any |= is_e4m3_nan(codes[i]);
    if (any == 0) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (is_e4m3_nan(codes[i])) return i;
    }
  }
  return -1;
}

float to_float(DType dtype, const char* element) {
  uint16_t half = 0;
  switch (dtype) {
    case DType::kF32: {
      float value;
      std::memcpy(&value, element, 4);
      return value;
    }
    case DType::kBF16:
      std::memcpy(&half, element, 2);
      return bf16_to_float(half);
    case DType::kF16:
      std::memcpy(&half, element, 2);
      return f16_to_float(half);
    default:
      OCTET_CHECK(false, std::string("no FP32 value of a ") + name_of(dtype) + " tensor");
  }
}

bool is_float(DType dtype) { return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16; }

}  // namespace

struct Checkpoint::Impl {
  std::string directory;
  ModelConfig config;
  GenerationConfig generation_config;
  Quantization quantization;
  std::vector<ReadFile> files;
  std::map<std::string, TensorInfo, std::less<>> tensors;
  std::map<std::string, std::string, std::less<>> unusable;  // name to "dtype F64" or "8 dimensions"
  std::map<std::string, LinearFormat, std::less<>> linear_formats;
  std::vector<std::string> warnings;
  uint64_t digest = 0xCBF29CE484222325;

  absl::Status load(const std::string& path);
  absl::Status read(const TensorInfo& tensor, int64_t row_begin, int64_t row_end, int64_t col_begin, int64_t col_end,
                    char* dst) const;
  absl::StatusOr<std::vector<float>> read_f32(const TensorInfo& tensor) const;

 private:
  absl::Status read_configs();
  absl::Status open_files();
  absl::Status open_indexed(const std::string& index);
  // Takes from file `name` the tensors in `wanted`, or all when it is null.
  absl::Status add_file(const std::string& name, const std::set<std::string, std::less<>>* wanted);
  absl::Status check_against_architecture(const std::vector<ModelTensor>& expected);
  absl::Status check_tensor(const ModelTensor& expected);
  absl::Status check_extra(const std::vector<ModelTensor>& expected);
  absl::Status resolve_formats(const std::vector<ModelTensor>& expected);
  absl::StatusOr<LinearFormat> resolve(const ModelTensor& linear);
  absl::Status check_weight_scale(const ModelTensor& linear, const TensorInfo& scale);
  void compare_with_ignore_list(const std::vector<ModelTensor>& expected);
  absl::Status finish_digest();

  const TensorInfo* find(std::string_view name) const {
    const auto found = tensors.find(name);
    return found == tensors.end() ? nullptr : &found->second;
  }
  std::string path_of(const std::string& name) const { return directory + "/" + name; }
  void mix(std::string_view bytes) {
    digest = fnv1a(absl::StrCat(bytes.size(), ":"), digest);
    digest = fnv1a(bytes, digest);
  }

  absl::Status read_strided(const TensorInfo& tensor, int64_t row_begin, int64_t row_end, int64_t col_begin,
                            int64_t col_end, char* dst) const;
  absl::Status check_values(const TensorInfo& tensor, int64_t row_begin, int64_t col_begin, int64_t columns,
                            int64_t count, const char* values) const;
};

// ---- Opening

absl::Status Checkpoint::Impl::load(const std::string& path) {
  directory = std::string(absl::StripSuffix(path, "/"));
  struct stat info {};
  if (::stat(path.c_str(), &info) != 0) return errno_status(errno, absl::StrCat("cannot open model directory ", path));
  if (!S_ISDIR(info.st_mode)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " is not a directory: a model is a Hugging Face directory with config.json and safetensors",
                     path.ends_with(".gguf") ? "; make one with octet convert" : ""));
  }
  if (absl::Status status = read_configs(); !status.ok()) return status;
  if (absl::Status status = open_files(); !status.ok()) return status;
  const std::vector<ModelTensor> expected = model_tensors(config);
  if (absl::Status status = check_against_architecture(expected); !status.ok()) return status;
  if (absl::Status status = resolve_formats(expected); !status.ok()) return status;
  compare_with_ignore_list(expected);
  return finish_digest();
}

absl::Status Checkpoint::Impl::read_configs() {
  absl::StatusOr<std::string> text = read_text_file(path_of("config.json"), kMaxConfigBytes);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> parsed = parse_model_config(*text);
  if (!parsed.ok()) return parsed.status();
  config = *std::move(parsed);
  mix(*text);

  absl::StatusOr<std::string> generation = read_optional(path_of("generation_config.json"));
  if (!generation.ok()) return generation.status();
  if (!generation->empty()) {
    absl::StatusOr<GenerationConfig> defaults = parse_generation_config(*generation);
    if (!defaults.ok()) return defaults.status();
    generation_config = *std::move(defaults);
  }
  for (const int32_t id : generation_config.eos_token_ids) {
    if (id >= config.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat("generation_config.json: eos_token_id ", id,
                                                     " is outside the vocabulary of ", config.vocab_size));
    }
  }

  absl::StatusOr<std::string> hf_quant = read_optional(path_of("hf_quant_config.json"));
  if (!hf_quant.ok()) return hf_quant.status();
  absl::StatusOr<json> hf_quant_config = json();
  if (!hf_quant->empty()) hf_quant_config = parse_json(*hf_quant, "hf_quant_config.json");
  if (!hf_quant_config.ok()) return hf_quant_config.status();
  absl::StatusOr<json> object = parse_json(*text, "config.json");
  if (!object.ok()) return object.status();
  absl::StatusOr<Quantization> recipe = parse_quantization(*object, *hf_quant_config);
  if (!recipe.ok()) {
    return absl::Status(recipe.status().code(), absl::StrCat(directory, ": ", recipe.status().message()));
  }
  quantization = *std::move(recipe);
  mix(*hf_quant);
  return absl::OkStatus();
}

absl::Status Checkpoint::Impl::open_files() {
  struct stat info {};
  const bool single = ::stat(path_of("model.safetensors").c_str(), &info) == 0;
  absl::StatusOr<std::string> index = read_text_file(path_of("model.safetensors.index.json"), kMaxIndexBytes);
  if (single) {
    // Transformers prefers the single file too.
    if (index.ok()) warnings.push_back("both model.safetensors and an index of shards exist: the index is not used");
    return add_file("model.safetensors", nullptr);
  }
  if (absl::IsNotFound(index.status())) {
    return absl::NotFoundError(
        absl::StrCat(directory,
                     " has neither model.safetensors nor model.safetensors.index.json: other formats "
                     "(.bin, .pth) are not read; download the safetensors files"));
  }
  if (!index.ok()) return index.status();
  return open_indexed(*index);
}

absl::Status Checkpoint::Impl::open_indexed(const std::string& index) {
  const std::string what = path_of("model.safetensors.index.json");
  absl::StatusOr<json> object = parse_json(index, what);
  if (!object.ok()) return object.status();
  if (!object->is_object() || !object->contains("weight_map") || !(*object)["weight_map"].is_object() ||
      (*object)["weight_map"].empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": expected an object weight_map of tensor names to file names"));
  }
  std::map<std::string, std::set<std::string, std::less<>>> names_of;
  for (const auto& [tensor, file] : (*object)["weight_map"].items()) {
    if (!file.is_string() || !is_plain_name(file.get<std::string>())) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": weight_map[\"", tensor.substr(0, 200),
                                                     "\"]: expected a plain file name in the same directory, found ",
                                                     excerpt_of(file)));
    }
    names_of[file.get<std::string>()].insert(tensor);
  }
  std::vector<std::string> missing;
  for (const auto& [file, names] : names_of) {
    struct stat info {};
    if (::stat(path_of(file).c_str(), &info) != 0) missing.push_back(file);
  }
  if (!missing.empty()) {
    return absl::NotFoundError(absl::StrCat(directory, " lacks ", missing.size(), " of the ", names_of.size(),
                                            " files that its index names (", some_of(missing),
                                            "): finish the download"));
  }
  for (const auto& [file, names] : names_of) {
    if (absl::Status status = add_file(file, &names); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::Impl::add_file(const std::string& name, const std::set<std::string, std::less<>>* wanted) {
  absl::StatusOr<ReadFile> file = ReadFile::open(path_of(name));
  if (!file.ok()) return file.status();
  absl::StatusOr<SafetensorsHeader> header = read_safetensors_header(*file);
  if (!header.ok()) return header.status();
  mix(absl::StrCat(name, " ", file->bytes()));
  const int index = static_cast<int>(files.size());
  size_t taken = 0;
  for (SafetensorsEntry& entry : header->tensors) {
    mix(absl::StrCat(entry.name, " ", entry.dtype, " [", absl::StrJoin(entry.shape, ","), "] ", entry.offset));
    if (wanted != nullptr && !wanted->contains(entry.name)) continue;
    ++taken;
    const std::optional<DType> dtype = dtype_named(entry.dtype);
    if (!dtype) {
      unusable[entry.name] = absl::StrCat("type ", entry.dtype.substr(0, 40));
    } else if (entry.shape.size() > static_cast<size_t>(Shape::kMaxRank)) {
      unusable[entry.name] = absl::StrCat(entry.shape.size(), " dimensions");
    } else {
      tensors[entry.name] = TensorInfo{
          .name = entry.name, .dtype = *dtype, .shape = Shape(entry.shape), .file = index, .offset = entry.offset};
    }
  }
  if (wanted != nullptr && taken < wanted->size()) {
    std::vector<std::string> missing(wanted->begin(), wanted->end());
    std::erase_if(missing, [&](const std::string& tensor) {
      return std::any_of(header->tensors.begin(), header->tensors.end(),
                         [&](const SafetensorsEntry& entry) { return entry.name == tensor; });
    });
    return absl::InvalidArgumentError(absl::StrCat(path_of(name), " lacks ", missing.size(),
                                                   " tensors that the index promises (", some_of(missing),
                                                   "): index and shards are of different downloads"));
  }
  if (taken < header->tensors.size()) {
    warnings.push_back(
        absl::StrCat(name, " holds ", header->tensors.size() - taken, " tensors that the index does not name"));
  }
  files.push_back(*std::move(file));
  return absl::OkStatus();
}

// ---- Checking

absl::Status Checkpoint::Impl::check_against_architecture(const std::vector<ModelTensor>& expected) {
  std::vector<std::string> missing;
  for (const ModelTensor& tensor : expected) {
    if (find(tensor.name()) == nullptr && !unusable.contains(tensor.name())) missing.push_back(tensor.name());
  }
  if (!missing.empty()) {
    const bool only_head = missing.size() == 1 && missing[0] == "lm_head.weight";
    return absl::InvalidArgumentError(
        absl::StrCat(directory, " lacks ", missing.size(), " tensors that its config.json asks for: ", some_of(missing),
                     only_head ? "; does the model share it with embed_tokens (tie_word_embeddings)?" : ""));
  }
  for (const ModelTensor& tensor : expected) {
    if (absl::Status status = check_tensor(tensor); !status.ok()) return status;
  }
  return check_extra(expected);
}

absl::Status Checkpoint::Impl::check_tensor(const ModelTensor& expected) {
  const std::string name = expected.name();
  if (const auto found = unusable.find(name); found != unusable.end()) {
    return absl::UnimplementedError(absl::StrCat(directory, ": ", name, " has ", found->second,
                                                 "; supported: BF16, F16, F32, and F8_E4M3 for linears"));
  }
  const TensorInfo& tensor = *find(name);
  if (tensor.shape != expected.shape) {
    return absl::InvalidArgumentError(absl::StrCat(directory, ": ", name, " has shape ", tensor.shape.to_string(),
                                                   ", but config.json asks for ", expected.shape.to_string()));
  }
  const bool may_be_fp8 = is_block_linear(expected.part) || expected.part == Part::kHead;
  if (!is_float(tensor.dtype) && !(may_be_fp8 && tensor.dtype == DType::kF8E4M3)) {
    return absl::UnimplementedError(
        absl::StrCat(directory, ": ", name, " has type ", name_of(tensor.dtype),
                     "; supported: ", may_be_fp8 ? "BF16, F16, F32, F8_E4M3" : "BF16, F16, F32"));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::Impl::check_extra(const std::vector<ModelTensor>& expected) {
  std::set<std::string, std::less<>> names, modules;
  for (const ModelTensor& tensor : expected) {
    names.insert(tensor.name());
    modules.insert(tensor.module);
  }
  if (config.tie_word_embeddings && (tensors.erase("lm_head.weight") + unusable.erase("lm_head.weight")) > 0) {
    warnings.push_back("lm_head.weight is not used: config.json says that it is embed_tokens (tie_word_embeddings)");
  }
  std::vector<std::string> extra;
  int kv_scales = 0;
  const auto examine = [&](const std::string& name) {
    if (names.contains(name) || is_leftover(name)) return;
    if (is_kv_scale(name)) {
      ++kv_scales;
    } else if (!is_scale(name) || !modules.contains(name.substr(0, name.rfind('.')))) {
      extra.push_back(name);
    }
  };
  for (const auto& [name, tensor] : tensors) examine(name);
  for (const auto& [name, fault] : unusable) examine(name);
  if (!extra.empty()) {
    const bool bias = extra[0].ends_with(".bias");
    return absl::InvalidArgumentError(absl::StrCat(directory, " holds ", extra.size(),
                                                   " tensors that a Llama model does not have: ", some_of(extra),
                                                   bias ? "; Octet computes no biases" : ""));
  }
  if (kv_scales > 0 || quantization.has_kv_cache_scheme) {
    warnings.push_back(
        absl::StrCat("the checkpoint is made for an FP8 KV cache (", kv_scales,
                     " scales): --kv-dtype fp8 has one, the default is BF16, exacter and twice as large"));
  }
  return absl::OkStatus();
}

absl::Status Checkpoint::Impl::resolve_formats(const std::vector<ModelTensor>& expected) {
  int fp8 = 0, wider = 0;
  for (const ModelTensor& tensor : expected) {
    const DType dtype = find(tensor.name())->dtype;
    fp8 += dtype == DType::kF8E4M3;
    wider += tensor.part != Part::kNorm && (dtype == DType::kF16 || dtype == DType::kF32);
    if (!is_block_linear(tensor.part) && tensor.part != Part::kHead) continue;
    absl::StatusOr<LinearFormat> format = resolve(tensor);
    if (!format.ok()) {
      return absl::Status(format.status().code(), absl::StrCat(directory, ": ", format.status().message()));
    }
    linear_formats[tensor.module] = *format;
  }
  if (config.tie_word_embeddings)
    linear_formats["lm_head"] = LinearFormat{.weight = find("model.embed_tokens.weight"), .activations = {}};
  if (wider > 0)
    warnings.push_back(absl::StrCat(wider, " F16 or F32 matrices are rounded to BF16 when they are loaded"));
  if (fp8 > 0 && quantization.method == "none") {
    warnings.push_back(absl::StrCat(fp8, " FP8 tensors without a quantization_config: inputs stay BF16"));
  }
  if (fp8 == 0 && quantization.method != "none") {
    warnings.push_back(absl::StrCat("quant_method is ", quantization.method, ", but no tensor is FP8"));
  }
  return absl::OkStatus();
}

absl::StatusOr<LinearFormat> Checkpoint::Impl::resolve(const ModelTensor& linear) {
  LinearFormat format;
  format.weight = find(linear.name());
  if (format.weight->dtype != DType::kF8E4M3) return format;
  const TensorInfo* scale = find(linear.module + ".weight_scale");
  const TensorInfo* scale_inv = find(linear.module + ".weight_scale_inv");
  if (scale != nullptr && scale_inv != nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(linear.module, " has both weight_scale and weight_scale_inv"));
  }
  format.weight_scale = scale != nullptr ? scale : scale_inv;
  if (format.weight_scale == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat(linear.name(), " is F8_E4M3, but neither weight_scale nor weight_scale_inv is beside it"));
  }
  if (absl::Status status = check_weight_scale(linear, *format.weight_scale); !status.ok()) return status;
  format.activations = quantization.activations;
  if (format.activations.kind != ActivationScheme::Kind::kStatic) return format;

  format.input_scale = find(linear.module + ".input_scale");
  if (format.input_scale == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(linear.module, " has no input_scale, but ", quantization.method,
                                                   " says that its inputs have a static one"));
  }
  if (!is_float(format.input_scale->dtype) || format.input_scale->shape.elements() != 1) {
    return absl::InvalidArgumentError(absl::StrCat(format.input_scale->name, " is ", name_of(format.input_scale->dtype),
                                                   " ", format.input_scale->shape.to_string(), ", expected one float"));
  }
  absl::StatusOr<std::vector<float>> value = read_f32(*format.input_scale);
  if (!value.ok()) return value.status();
  if ((*value)[0] == 0) return absl::DataLossError(absl::StrCat(format.input_scale->name, " is 0, expected more"));
  format.activations.scale = (*value)[0];
  return format;
}

absl::Status Checkpoint::Impl::check_weight_scale(const ModelTensor& linear, const TensorInfo& scale) {
  const int64_t out = linear.shape[0];
  const bool single = scale.shape.elements() == 1 && scale.shape.rank() <= 2;
  const bool per_row = scale.shape == Shape{out} || scale.shape == Shape{out, 1};
  if (is_float(scale.dtype) && (single || per_row)) return absl::OkStatus();
  const bool blocks = is_float(scale.dtype) && scale.shape.rank() >= 2;
  return absl::UnimplementedError(absl::StrCat(
      scale.name, " is ", name_of(scale.dtype), " ", scale.shape.to_string(), blocks ? " (block-wise scales)" : "",
      ", expected F32, BF16 or F16 of shape [], [1], [", out, "] or [", out, ", 1]"));
}

void Checkpoint::Impl::compare_with_ignore_list(const std::vector<ModelTensor>& expected) {
  if (quantization.method == "none") return;
  std::vector<std::string> quantised, left_out;
  for (const ModelTensor& tensor : expected) {
    if (!is_block_linear(tensor.part)) continue;
    const bool fp8 = find(tensor.name())->dtype == DType::kF8E4M3;
    const bool ignored = quantization.ignores(tensor.module);
    if (fp8 && ignored) quantised.push_back(tensor.module);
    if (!fp8 && !ignored && quantization.ignored_is_complete) left_out.push_back(tensor.module);
  }
  const auto remark = [&](const std::vector<std::string>& modules, absl::string_view what) {
    if (modules.empty()) return;
    warnings.push_back(
        absl::StrCat("quantization_config ", what, " ", some_of(modules), ": the tensors' types decide"));
  };
  remark(quantised, "lists as not quantised, but FP8 in the files:");
  remark(left_out, "does not list, but not FP8 in the files:");
}

// A sample of every file's data: two models of one shape differ there, and nowhere in their headers.
absl::Status Checkpoint::Impl::finish_digest() {
  for (const ReadFile& file : files) {
    std::string sample(static_cast<size_t>(std::min<int64_t>(file.bytes(), 4096)), '\0');
    const int64_t bytes = static_cast<int64_t>(sample.size());
    if (absl::Status status = file.read((file.bytes() - bytes) / 2, bytes, sample.data()); !status.ok()) return status;
    mix(sample);
  }
  return absl::OkStatus();
}

// ---- Reading

absl::Status Checkpoint::Impl::read(const TensorInfo& tensor, int64_t row_begin, int64_t row_end, int64_t col_begin,
                                    int64_t col_end, char* dst) const {
  const auto [rows, columns] = extent_of(tensor.shape);
  OCTET_CHECK(0 <= row_begin && row_begin <= row_end && row_end <= rows && 0 <= col_begin && col_begin <= col_end &&
                  col_end <= columns,
              "a range outside " + tensor.name + " " + tensor.shape.to_string());
  const int64_t count = (row_end - row_begin) * (col_end - col_begin);
  if (count == 0) return absl::OkStatus();
  const int64_t row_bytes = columns * size_of(tensor.dtype);
  absl::Status status;
  if (col_end - col_begin == columns) {
    status = files[tensor.file].read(tensor.offset + row_begin * row_bytes, (row_end - row_begin) * row_bytes, dst);
  } else {
    status = read_strided(tensor, row_begin, row_end, col_begin, col_end, dst);
  }
  if (status.ok()) return check_values(tensor, row_begin, col_begin, col_end - col_begin, count, dst);
  return absl::Status(status.code(), absl::StrCat("tensor ", tensor.name, ": ", status.message()));
}

absl::Status Checkpoint::Impl::read_strided(const TensorInfo& tensor, int64_t row_begin, int64_t row_end,
                                            int64_t col_begin, int64_t col_end, char* dst) const {
  const ReadFile& file = files[tensor.file];
  const int64_t element = size_of(tensor.dtype);
  const int64_t row_bytes = extent_of(tensor.shape).second * element;
  const int64_t run_bytes = (col_end - col_begin) * element;
  const int64_t first = tensor.offset + row_begin * row_bytes + col_begin * element;
  const int64_t rows = row_end - row_begin;
  // A long run is a large request by itself. Short ones are cheaper to pick out of a sequential stream than to ask for
  // one by one: disks and network file systems read ahead anyway, and the ranks of a node share what was read.
  if (run_bytes >= (int64_t{128} << 10)) {
    for (int64_t row = 0; row < rows; ++row) {
      absl::Status status = file.read(first + row * row_bytes, run_bytes, dst + row * run_bytes);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }
  const int64_t group_rows = std::max<int64_t>(1, kGroupBytes / row_bytes);
  const auto scratch = std::make_unique_for_overwrite<char[]>(std::min(group_rows, rows) * row_bytes);
  for (int64_t row = 0; row < rows; row += group_rows) {
    const int64_t count = std::min(group_rows, rows - row);
    if (row + count < rows)
      file.will_read(first + (row + count) * row_bytes, std::min(count, rows - row - count) * row_bytes);
    absl::Status status = file.read(first + row * row_bytes, (count - 1) * row_bytes + run_bytes, scratch.get());
    if (!status.ok()) return status;
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(dst + (row + i) * run_bytes, scratch.get() + i * row_bytes, static_cast<size_t>(run_bytes));
    }
  }
  return absl::OkStatus();
}

// e4m3 NaN codes decode to no number, and a scale that is not a number from 0 poisons a row: both mean damaged files.
absl::Status Checkpoint::Impl::check_values(const TensorInfo& tensor, int64_t row_begin, int64_t col_begin,
                                            int64_t columns, int64_t count, const char* values) const {
  const auto damaged = [&](int64_t at, absl::string_view what) {
    return absl::DataLossError(absl::StrCat("tensor ", tensor.name, " holds ", what, " at row ",
                                            row_begin + at / columns, ", column ", col_begin + at % columns, " (",
                                            files[tensor.file].path(),
                                            "): the file is damaged; copy or download it again"));
  };
  if (tensor.dtype == DType::kF8E4M3) {
    const int64_t at = first_nan_code(reinterpret_cast<const uint8_t*>(values), count);
    return at < 0 ? absl::OkStatus() : damaged(at, "an e4m3 NaN code");
  }
  if (!is_scale(tensor.name) || !is_float(tensor.dtype)) return absl::OkStatus();
  for (int64_t i = 0; i < count; ++i) {
    const float scale = to_float(tensor.dtype, values + i * size_of(tensor.dtype));
    if (!(scale >= 0) || std::isinf(scale)) return damaged(i, absl::StrCat("the scale ", scale));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<float>> Checkpoint::Impl::read_f32(const TensorInfo& tensor) const {
  if (!is_float(tensor.dtype)) {
    return absl::InvalidArgumentError(
        absl::StrCat(tensor.name, " is ", name_of(tensor.dtype), ", expected F32, BF16 or F16"));
  }
  const auto [rows, columns] = extent_of(tensor.shape);
  std::vector<char> bytes(static_cast<size_t>(tensor.bytes()));
  if (absl::Status status = read(tensor, 0, rows, 0, columns, bytes.data()); !status.ok()) return status;
  std::vector<float> values(static_cast<size_t>(tensor.shape.elements()));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = to_float(tensor.dtype, bytes.data() + i * size_of(tensor.dtype));
  return values;
}

// ---- Checkpoint

absl::StatusOr<Checkpoint> Checkpoint::open(const std::string& directory) {
  auto impl = std::make_unique<Impl>();
  if (absl::Status status = impl->load(directory); !status.ok()) return status;
  return Checkpoint(std::move(impl));
}

Checkpoint::Checkpoint(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Checkpoint::Checkpoint(Checkpoint&&) noexcept = default;
Checkpoint& Checkpoint::operator=(Checkpoint&&) noexcept = default;
Checkpoint::~Checkpoint() = default;

const std::string& Checkpoint::directory() const { return impl_->directory; }
const ModelConfig& Checkpoint::config() const { return impl_->config; }
const GenerationConfig& Checkpoint::generation_config() const { return impl_->generation_config; }
const std::map<std::string, TensorInfo, std::less<>>& Checkpoint::tensors() const { return impl_->tensors; }
uint64_t Checkpoint::digest() const { return impl_->digest; }
const std::string& Checkpoint::quant_method() const { return impl_->quantization.method; }
const std::vector<std::string>& Checkpoint::warnings() const { return impl_->warnings; }

const TensorInfo* Checkpoint::find(std::string_view name) const {
  const auto found = impl_->tensors.find(name);
  return found == impl_->tensors.end() ? nullptr : &found->second;
}

absl::StatusOr<LinearFormat> Checkpoint::linear_format(const std::string& module) const {
  const auto found = impl_->linear_formats.find(module);
  if (found != impl_->linear_formats.end()) return found->second;
  return absl::NotFoundError(absl::StrCat(impl_->directory, " has no linear layer ", module));
}

absl::Status Checkpoint::read(const TensorInfo& tensor, int64_t row_begin, int64_t row_end, int64_t col_begin,
                              int64_t col_end, void* dst) const {
  return impl_->read(tensor, row_begin, row_end, col_begin, col_end, static_cast<char*>(dst));
}

absl::StatusOr<std::vector<float>> Checkpoint::read_f32(const TensorInfo& tensor) const {
  return impl_->read_f32(tensor);
}

}  // namespace octet
