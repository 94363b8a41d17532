// What a load generator asks for: when requests come, how long they are, what they share, which are cancelled and when.
// Pure, and a function of its seed: request i is the same in every run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace octet {

// Random numbers that are the same in every C++ library.
class LoadRandom {
 public:
  explicit LoadRandom(uint64_t seed) : state_(seed) {}
  uint64_t next();
  double uniform();                 // [0, 1)
  double normal();                  // mean 0, deviation 1
  double exponential(double mean);  // the time until the next arrival of a Poisson process
  int32_t below(int32_t limit);     // [0, limit)

 private:
  uint64_t state_;
};

// How many tokens: `128`, `uniform:16-256` (both ends included), or `lognormal:MEAN:SIGMA` (MEAN tokens on average,
// SIGMA the deviation of the logarithm).
class LengthDistribution {
 public:
  // INVALID_ARGUMENT names what was expected.
  static absl::StatusOr<LengthDistribution> parse(const std::string& text);
  // Between least and most, whatever the distribution says. REQUIRES: 1 <= least <= most.
  int32_t draw(LoadRandom* random, int32_t least, int32_t most) const;

 private:
  enum class Kind : uint8_t { kUniform, kLognormal };
  Kind kind_ = Kind::kUniform;
  int32_t low_ = 0, high_ = 0;       // kUniform
  double log_mean_ = 0, sigma_ = 0;  // kLognormal, of the logarithm
};

struct LoadShape {
  LengthDistribution prompt_tokens;  // of the part after the shared prefix
  LengthDistribution output_tokens;
  int32_t shared_prefix = 0;  // tokens
  int32_t prefix_groups = 1;
  double cancel_rate = 0;  // [0, 1]
  uint64_t seed = 0;
  // The server's.
  int32_t vocab_size = 0;
  int32_t max_context = 0;
};

// When a request that will be cancelled is: after so many of its tokens have come; with 0 of them, at this share of the
// time that a first token takes.
struct CancelMoment {
  int32_t tokens = 0;
  double first_token_share = 0;  // [0, 1)
};

struct LoadRequest {
  std::vector<int32_t> prompt;
  int32_t output_tokens = 0;
  int32_t prefix_group = -1;  // -1: no shared prefix
  std::optional<CancelMoment> cancel;
};

// Whether every request can have a prompt and an output inside the context.
absl::Status check_shape(const LoadShape& shape);

// Request `index` of the load. REQUIRES: check_shape() accepts.
LoadRequest make_request(const LoadShape& shape, int64_t index);

// Like request `index`, but its whole prompt is its own and it is not cancelled: for warming up.
LoadRequest make_warmup_request(const LoadShape& shape, int64_t index);

}  // namespace octet
