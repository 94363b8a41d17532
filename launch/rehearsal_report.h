// What octet rehearse says: the rank, its bytes, and what its steps took, as tables for people, as JSON for machines
// and as a picture (pure). All have the same figures.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "launch/rehearsal.h"
#include "nlohmann/json.hpp"

namespace octet {

struct RehearsalReport {
  std::string model, recipe, activations;
  DType kv_dtype = DType::kBF16;
  std::string device;  // "CPU, avx512, 2 threads", "NVIDIA H100 80GB HBM3, fast"
  int rank = 0, ranks = 1;
  int64_t layers = 0, layers_of_model = 0;
  RankBytes bytes;
  int64_t usable_bytes = 0;
  double fill_seconds = 0;
  std::vector<StepMeasurement> steps;
  AllReduceCost all_reduce;       // of one sum between all ranks, for the predictions
  std::string all_reduce_source;  // where that comes from
  int64_t hidden_size = 0;

  // Of one sum of the step between the ranks.
  double all_reduce_seconds(const StepMeasurement& step) const;
  // Of the step on all ranks at once. A prediction: no more than one rank was there.
  double predicted_seconds(const StepMeasurement& step) const;
};

// Tokens a second that a step of so many seconds gives: of answers when it decodes, of prompts when it prefills.
double tokens_per_second(const StepMeasurement& step, double seconds);

std::string to_text(const RehearsalReport& report);
nlohmann::ordered_json to_json(const RehearsalReport& report);
// Each step as a bar of its parts' shares.
std::string to_svg(const RehearsalReport& report);

}  // namespace octet
