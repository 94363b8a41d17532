// WeightSource: where a conversion takes a model from, a GGUF file or an unquantised Hugging Face directory. Weights
// come as FP32 rows in Hugging Face's names and order; everything else as the files of the directory that is to be
// written.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "worker/checkpoint/architecture.h"
#include "worker/model/model_config.h"

namespace octet {

class WeightSource {
 public:
  // `path` is a GGUF file or a directory. Errors say what is not supported, and what is.
  static absl::StatusOr<std::unique_ptr<WeightSource>> open(const std::string& path);
  virtual ~WeightSource() = default;

  const ModelConfig& config() const { return config_; }
  // config.json without a word about quantisation.
  const nlohmann::ordered_json& config_json() const { return config_json_; }

  // Rows [begin, end) of a matrix, or elements of a vector. REQUIRES: for the rows of q_proj and k_proj, multiples of
  // head_dim.
  virtual absl::Status read_rows(const ModelTensor& tensor, int64_t begin, int64_t end, float* dst) const = 0;

  // Writes all that belongs beside the weights except config.json: tokenizer, generation defaults, licence.
  virtual absl::Status write_companions(const std::string& directory) const = 0;

 protected:
  ModelConfig config_;
  nlohmann::ordered_json config_json_;
};

}  // namespace octet
