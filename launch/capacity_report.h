// What octet plan says: a scenario's bytes, room and predicted times as plain data, as a table for people and as JSON
// for machines (pure). Both have the same figures.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "launch/capacity.h"
#include "nlohmann/json.hpp"

namespace octet {

// The most sequences of `context` tokens that the cache holds at once.
struct BatchRow {
  int64_t context = 0;
  int64_t bf16_kv = 0, fp8_kv = 0;
};

// A step, decoding or prefill. Predicted from the shares that kernels reach, and its limit at full speed.
struct TimeRow {
  StepLoad load;
  bool fits = false;  // beside the weights, with a BF16 cache
  double limit_seconds = 0, predicted_seconds = 0;
  double predicted_fp8_kv_seconds = 0;
};

struct CapacityReport {
  std::string model;     // as it was asked for
  std::string config;    // ModelConfig::to_string()
  std::string recipe;    // "fbgemm", or "as stored"
  std::string hardware;  // "8 x H100-80GB"
  bool on_gpus = false;
  RankResources each;
  double usable_share = 1;
  std::vector<RankBytes> ranks;  // without a cache when it does not fit
  absl::Status fit;              // OK or RESOURCE_EXHAUSTED
  std::vector<Remedy> remedies;  // when it does not fit
  // When it fits:
  int64_t kv_tokens = 0, kv_bytes_per_token = 0;  // BF16; bytes of the rank with the most slices
  int64_t max_context = 0, max_sequences = 0;
  std::vector<BatchRow> batches;
  std::vector<TimeRow> decode, prefill;
  std::vector<std::string> assumptions;  // of the predictions
};

// INVALID_ARGUMENT for scenarios that make no sense. `speed` is one rank's; `assumptions` say where it comes from.
absl::StatusOr<CapacityReport> make_report(const Scenario& scenario, const RankSpeed& speed, const SpeedShares& shares,
                                           std::vector<std::string> assumptions);

std::string to_text(const CapacityReport& report);
nlohmann::ordered_json to_json(const CapacityReport& report);

}  // namespace octet
