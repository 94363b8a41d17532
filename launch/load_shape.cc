#include "launch/load_shape.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace octet {
namespace {

// Requests in a row with the same prefix. The first ones of the groups, whose prefixes nobody has cached, are so spread
// among the others, and what slows down the machine for a while slows down both.
constexpr int64_t kPrefixRun = 8;

// Streams of random numbers that have nothing to do with each other.
enum class Stream : uint64_t { kRequest = 1, kPrefix = 2, kWarmup = 3 };

LoadRandom random_for(const LoadShape& shape, Stream stream, int64_t index) {
  LoadRandom seeds(shape.seed * 4 + static_cast<uint64_t>(stream));
  return LoadRandom(seeds.next() ^ LoadRandom(static_cast<uint64_t>(index)).next());
}

void append_tokens(LoadRandom* random, int32_t count, int32_t vocab_size, std::vector<int32_t>* tokens) {
  for (int32_t i = 0; i < count; ++i) tokens->push_back(random->below(vocab_size));
}

// Lengths that the context can hold, the prompt's first.
void draw_lengths(const LoadShape& shape, LoadRandom* random, int32_t* own_tokens, int32_t* output_tokens) {
  const int32_t most = shape.max_context - shape.shared_prefix - 1;
  *own_tokens = shape.prompt_tokens.draw(random, 1, most);
  *output_tokens = shape.output_tokens.draw(random, 1, shape.max_context - shape.shared_prefix - *own_tokens);
}

std::optional<CancelMoment> draw_cancel(const LoadShape& shape, int32_t output_tokens, LoadRandom* random) {
  // All are drawn, whether needed or not, so that another rate leaves the rest of the load as it is.
  const bool cancelled = random->uniform() < shape.cancel_rate;
  const bool early = random->uniform() < 0.25;  // before the first token
  const CancelMoment moment{.tokens = early ? 0 : random->below(output_tokens), .first_token_share = random->uniform()};
  return cancelled ? std::optional(moment) : std::nullopt;
}

}  // namespace

uint64_t LoadRandom::next() {  // SplitMix64
  state_ += 0x9e3779b97f4a7c15;
  uint64_t x = state_;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

double LoadRandom::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

double LoadRandom::normal() {  // Box and Muller's
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

double LoadRandom::exponential(double mean) { return -mean * std::log(1.0 - uniform()); }

int32_t LoadRandom::below(int32_t limit) { return static_cast<int32_t>(uniform() * limit); }

absl::StatusOr<LengthDistribution> LengthDistribution::parse(const std::string& text) {
  const absl::Status refusal = absl::InvalidArgumentError(
      absl::StrCat("a length is 128, uniform:16-256 or lognormal:MEAN:SIGMA, in tokens from 1; found \"", text, "\""));
  LengthDistribution lengths;
  absl::string_view rest = text;
  if (absl::ConsumePrefix(&rest, "lognormal:")) {
    const std::vector<absl::string_view> numbers = absl::StrSplit(rest, ':');
    double mean = 0;
    lengths.kind_ = Kind::kLognormal;
    if (numbers.size() != 2 || !absl::SimpleAtod(numbers[0], &mean) || !absl::SimpleAtod(numbers[1], &lengths.sigma_) ||
        !(mean >= 1 && mean < 1e9) || !(lengths.sigma_ >= 0 && lengths.sigma_ < 10)) {
      return refusal;
    }
    lengths.log_mean_ = std::log(mean) - lengths.sigma_ * lengths.sigma_ / 2;
    return lengths;
  }
  std::vector<absl::string_view> ends = {rest, rest};
  if (absl::ConsumePrefix(&rest, "uniform:")) ends = absl::StrSplit(rest, '-');
  if (ends.size() != 2 || !absl::SimpleAtoi(ends[0], &lengths.low_) || !absl::SimpleAtoi(ends[1], &lengths.high_) ||
      lengths.low_ < 1 || lengths.high_ < lengths.low_) {
    return refusal;
  }
  return lengths;
}

int32_t LengthDistribution::draw(LoadRandom* random, int32_t least, int32_t most) const {
  double tokens = 0;
  if (kind_ == Kind::kLognormal) {
    tokens = std::round(std::exp(log_mean_ + sigma_ * random->normal()));
  } else {
    tokens = low_ + std::floor(random->uniform() * (static_cast<double>(high_) - low_ + 1));
  }
  return static_cast<int32_t>(std::clamp<double>(tokens, least, most));
}

absl::Status check_shape(const LoadShape& shape) {
  if (shape.shared_prefix + 2 <= shape.max_context) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("a shared prefix of ", shape.shared_prefix,
                                                 " tokens leaves no room for a prompt and an output in the ",
                                                 "server's context of ", shape.max_context, ": lower --shared-prefix"));
}

LoadRequest make_request(const LoadShape& shape, int64_t index) {
  LoadRandom random = random_for(shape, Stream::kRequest, index);
  LoadRequest request;
  int32_t own_tokens = 0;
  draw_lengths(shape, &random, &own_tokens, &request.output_tokens);
  if (shape.shared_prefix > 0) {
    request.prefix_group = static_cast<int32_t>(index / kPrefixRun % shape.prefix_groups);
    LoadRandom prefix = random_for(shape, Stream::kPrefix, request.prefix_group);
    append_tokens(&prefix, shape.shared_prefix, shape.vocab_size, &request.prompt);
  }
  request.cancel = draw_cancel(shape, request.output_tokens, &random);
  append_tokens(&random, own_tokens, shape.vocab_size, &request.prompt);
  return request;
}

LoadRequest make_warmup_request(const LoadShape& shape, int64_t index) {
  LoadRandom random = random_for(shape, Stream::kWarmup, index);
  LoadRequest request;
  int32_t own_tokens = 0;
  draw_lengths(shape, &random, &own_tokens, &request.output_tokens);
  append_tokens(&random, own_tokens + shape.shared_prefix, shape.vocab_size, &request.prompt);
  return request;
}

}  // namespace octet
