#include "worker/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <limits>

#include "kernels/check.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/ops.h"

namespace octet {
namespace {

constexpr float kMasked = -std::numeric_limits<float>::infinity();
constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kHighest = std::numeric_limits<float>::max();

constexpr size_t kScanBlock = 64;   // logits whose maximum stands for them
constexpr size_t kSumBlock = 1024;  // weights whose sum stands for them
constexpr int kDigit = 10;          // bits of a digit of a weight
constexpr size_t kDigits = size_t{1} << kDigit;

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * counter[0], b = uint64_t{0xCD9E8D57} * counter[2];
    counter = {static_cast<uint32_t>(b >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(b),
               static_cast<uint32_t>(a >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(a)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

// The greatest of 2 * kHalf values to values[0]. In halves of known length, which the compiler takes at once.
template <size_t kHalf>
void fold_max(float* values) {
  for (size_t i = 0; i < kHalf; ++i) values[i] = values[i + kHalf] > values[i] ? values[i + kHalf] : values[i];
  if constexpr (kHalf > 1) fold_max<kHalf / 2>(values);
}

// REQUIRES: no NaN.
float max_of(std::span<const float> values) {
  constexpr size_t kHalf = 32;
  float max = kMasked;
  size_t i = 0;
  for (; i + 2 * kHalf <= values.size(); i += 2 * kHalf) {
    std::array<float, kHalf> half;
    for (size_t j = 0; j < kHalf; ++j) {
      half[j] = values[i + j] > values[i + j + kHalf] ? values[i + j] : values[i + j + kHalf];
    }
    fold_max<kHalf / 2>(half.data());
    max = std::max(max, half[0]);
  }
  for (; i < values.size(); ++i) max = std::max(max, values[i]);
  return max;
}

// Always added in this order: eight sums, then those.
double sum_of(std::span<const float> values) {
  constexpr size_t kLanes = 8;
  std::array<double, kLanes> lanes{};
  size_t i = 0;
  for (; i + kLanes <= values.size(); i += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += double{values[i + lane]};
  }
  for (; i < values.size(); ++i) lanes[0] += double{values[i]};
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

std::span<const float> block_of(std::span<const float> values, size_t block, size_t size) {
  return values.subspan(block * size, std::min(size, values.size() - block * size));
}

size_t blocks_of(size_t values, size_t size) { return (values + size - 1) / size; }
size_t blocks_of(std::span<const float> values, size_t size) { return blocks_of(values.size(), size); }

// Entries of Sampler::sums_ over so many weights: sums of blocks, or of what has one digit.
size_t sums_of(size_t weights) { return std::max(blocks_of(weights, kSumBlock), kDigits); }

// The whole sum; those of its blocks to *sums.
double total_of(std::span<const float> weights, std::vector<double>* sums) {
  sums->clear();
  double total = 0.0;
  for (size_t block = 0; block < blocks_of(weights, kSumBlock); ++block) {
    sums->push_back(sum_of(block_of(weights, block, kSumBlock)));
    total += sums->back();
  }
  return total;
}

// The first index whose running sum exceeds u times the whole, u in [0, 1); never one of weight 0.
size_t index_at(std::span<const float> weights, double u, std::vector<double>* sums) {
  const double target = u * total_of(weights, sums);
  size_t block = 0, next = 0;
  double before = 0.0, sum = 0.0;
  while (next < sums->size() && target >= sum) {
    if ((*sums)[next] > 0.0) {
      block = next;
      before = sum;
      sum += (*sums)[next];
    }
    ++next;
  }
  // Where rounding leaves none, the last.
  const std::span<const float> members = block_of(weights, block, kSumBlock);
  size_t last = 0;
  for (size_t i = 0; i < members.size() && target >= before; ++i) {
    if (members[i] > 0.0f) last = i;
    before += double{members[i]};
  }
  return block * kSumBlock + last;
}

float cut_to_finite(float logit) {
  if (!(logit >= kLowest)) return kLowest;  // NaN as well
  return std::min(logit, kHighest);
}

bool suppresses_end(const Choice& choice) { return choice.completion_tokens < choice.sampling.min_tokens; }

void mask_all_but(std::span<const int32_t> ids, std::vector<float>* logits) {
  std::vector<float> kept;
  kept.reserve(ids.size());
  for (const int32_t id : ids) kept.push_back((*logits)[id]);
  std::fill(logits->begin(), logits->end(), kMasked);
  for (size_t i = 0; i < ids.size(); ++i) (*logits)[ids[i]] = kept[i];
}

void apply_mask(std::span<const uint32_t> words, std::vector<float>* logits) {
  for (size_t word = 0; word < words.size(); ++word) {
    const size_t end = std::min(32 * word + 32, logits->size());
    if (words[word] == ~uint32_t{0}) continue;
    for (size_t id = 32 * word; id < end; ++id) {
      if ((words[word] >> (id % 32) & 1) == 0) (*logits)[id] = kMasked;
    }
  }
}

// Masks the last token of each bad word whose others are what the sequence ends with.
void mask_bad_words(const Choice& choice, std::vector<float>* logits) {
  for (const std::vector<int32_t>& word : choice.sampling.bad_words) {
    const std::span<const int32_t> tokens = choice.history->tokens();
    const size_t before = word.size() - 1;
    if (tokens.size() >= before && std::equal(word.begin(), word.end() - 1, tokens.end() - before)) {
      (*logits)[word.back()] = kMasked;
    }
  }
}

}  // namespace

bool changes_logits(const Choice& choice) {
  const SlotSampling& sampling = choice.sampling;
  return sampling.reads_history() || !sampling.logit_bias.empty() || !sampling.allowed_token_ids.empty() ||
         !choice.mask.empty() || (suppresses_end(choice) && !sampling.end_token_ids.empty());
}

float scale_of(float temperature) {
  const cpu::FlushDenormals flush;
  return std::clamp(1.0f / temperature, std::numeric_limits<float>::min(), kHighest);
}

void report(const TokenLogit& chosen, std::span<TokenLogit> alternatives, float log_sum_exp, SampledToken* out) {
  const cpu::FlushDenormals flush;
  std::sort(alternatives.begin(), alternatives.end(), [](const TokenLogit& a, const TokenLogit& b) {
    return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
  });
  auto with_logprob = [&](const TokenLogit& token) { return TokenLogprob{token.token, token.logit - log_sum_exp}; };
  out->chosen = with_logprob(chosen);
  out->top.clear();
  for (const TokenLogit& token : alternatives) out->top.push_back(with_logprob(token));
}

double uniform_at(uint64_t seed, uint32_t output_index, int32_t position) {
  const auto bits = philox({static_cast<uint32_t>(position), output_index, 0, 0},
                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t wide = uint64_t{bits[0]} << 32 | bits[1];
  return static_cast<double>(wide >> 11) * 0x1.0p-53;
}

void Sampler::reserve(int64_t vocab_size) {
  const auto size = static_cast<size_t>(vocab_size);
  for (std::vector<float>* values : {&adjusted_, &weights_}) values->reserve(size);
  for (std::vector<float>* values : {&maxima_, &ranked_}) values->reserve(blocks_of(size, kScanBlock));
  ids_.reserve(size);
  sums_.reserve(sums_of(size));
}

int64_t Sampler::bytes(int64_t vocab_size) {
  const auto size = static_cast<size_t>(vocab_size);
  const size_t floats = 2 * size + 2 * blocks_of(size, kScanBlock);
  return static_cast<int64_t>(floats * sizeof(float) + size * sizeof(int32_t) + sums_of(size) * sizeof(double));
}

void Sampler::sample(const Choice& choice, SampledToken* out) {
  const SlotSampling& sampling = choice.sampling;
  const Distribution from = distribution(choice);
  const size_t index =
      index_at(from.weights, uniform_at(sampling.seed, sampling.output_index, choice.position), &sums_);
  const int32_t token = from.ids.empty() ? static_cast<int32_t>(index) : from.ids[index];
  score(choice.row, token, sampling.top_logprobs, out);
}

void Sampler::score(const LogitsRow& row, int32_t token, int32_t top, SampledToken* out) {
  const cpu::FlushDenormals flush;
  alternatives_.clear();
  if (top > 0) {
    scan(row.logits);
    take_best(row.logits, static_cast<size_t>(top));
    for (const int32_t id : ids_) alternatives_.push_back({id, row.logits[id]});
  }
  report({token, row.logits[token]}, alternatives_, row.log_sum_exp, out);
}

Distribution Sampler::distribution(const Choice& choice) {
  const cpu::FlushDenormals flush;
  const SlotSampling& sampling = choice.sampling;
  const std::span<const float> logits = adjusted(choice);
  if (sampling.temperature == 0.0f) {
    ids_ = {best_id(logits)};
    weights_ = {1.0f};
    return {ids_, weights_};
  }
  const float scale = scale_of(sampling.temperature);
  if (sampling.top_k > 0 && static_cast<size_t>(sampling.top_k) < logits.size()) {
    const float max = greatest();
    take_best(logits, static_cast<size_t>(sampling.top_k));
    std::sort(ids_.begin(), ids_.end());
    weights_.resize(ids_.size());
    for (size_t i = 0; i < ids_.size(); ++i) weights_[i] = logits[ids_[i]];
    softmax_weights(*stream_, weights_, max, scale, weights_);
  } else {
    ids_.clear();
    weights_.resize(logits.size());
    softmax_weights(*stream_, logits, greatest(), scale, weights_);
  }
  if (sampling.top_p < 1.0f || sampling.min_p > 0.0f) cut_tail(double{sampling.top_p}, sampling.min_p);
  return {ids_, weights_};
}

std::span<const float> Sampler::adjusted(const Choice& choice) {
  if (!changes_logits(choice)) {
    scan(choice.row.logits);
    return choice.row.logits;
  }
  enum GivenUp { kNothing, kBadWords, kMinTokens, kAllowedTokens, kEverything };  // each with those before it
  for (int given_up = kNothing; given_up < kEverything; ++given_up) {
    penalise_and_bias(choice);
    if (given_up < kAllowedTokens && !choice.sampling.allowed_token_ids.empty()) {
      mask_all_but(choice.sampling.allowed_token_ids, &adjusted_);
    }
    apply_mask(choice.mask, &adjusted_);
    if (given_up < kBadWords) mask_bad_words(choice, &adjusted_);
    if (given_up < kMinTokens && suppresses_end(choice)) {
      for (const int32_t id : choice.sampling.end_token_ids) adjusted_[id] = kMasked;
    }
    scan(adjusted_);
    if (greatest() != kMasked) return adjusted_;
  }
  OCTET_CHECK(false, "a token mask without a token");
}

void Sampler::penalise_and_bias(const Choice& choice) {
  const std::span<const float> logits = choice.row.logits;
  adjusted_.resize(logits.size());
  std::transform(logits.begin(), logits.end(), adjusted_.begin(), [](float x) { return x > kLowest ? x : kLowest; });
  const SlotSampling& sampling = choice.sampling;
  if (sampling.repetition_penalty != 1.0f || sampling.presence_penalty != 0.0f || sampling.frequency_penalty != 0.0f) {
    for (const auto& [token, count] : choice.history->completion_counts()) {
      float& logit = adjusted_[token];
      logit = logit > 0.0f ? logit / sampling.repetition_penalty : logit * sampling.repetition_penalty;
      if (count > 0) logit -= sampling.presence_penalty;
      logit = cut_to_finite(logit - sampling.frequency_penalty * static_cast<float>(count));
    }
  }
  for (const TokenBias& bias : sampling.logit_bias) {
    adjusted_[bias.token] = cut_to_finite(adjusted_[bias.token] + bias.bias);
  }
}

void Sampler::scan(std::span<const float> logits) {
  maxima_.resize(blocks_of(logits, kScanBlock));
  for (size_t block = 0; block < maxima_.size(); ++block) {
    maxima_[block] = max_of(block_of(logits, block, kScanBlock));
  }
}

float Sampler::greatest() const { return max_of(maxima_); }

int32_t Sampler::best_id(std::span<const float> logits) const {
  const float best = greatest();
  const auto block = static_cast<size_t>(std::find(maxima_.begin(), maxima_.end(), best) - maxima_.begin());
  return static_cast<int32_t>(std::find(logits.begin() + block * kScanBlock, logits.end(), best) - logits.begin());
}

void Sampler::take_best(std::span<const float> logits, size_t count) {
  // As many blocks as tokens are wanted have a maximum at or above the threshold, hence so many tokens do.
  float threshold = kLowest;
  if (count < maxima_.size()) {
    ranked_ = maxima_;
    std::nth_element(ranked_.begin(), ranked_.begin() + (count - 1), ranked_.end(), std::greater<float>());
    threshold = std::max(threshold, ranked_[count - 1]);
  }
  ids_.clear();
  for (size_t block = 0; block < maxima_.size(); ++block) {
    if (maxima_[block] < threshold) continue;
    const size_t end = std::min((block + 1) * kScanBlock, logits.size());
    for (size_t id = block * kScanBlock; id < end; ++id) {
      if (logits[id] >= threshold) ids_.push_back(static_cast<int32_t>(id));
    }
  }
  if (ids_.size() <= count) return;
  std::nth_element(ids_.begin(), ids_.begin() + count, ids_.end(),
                   [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  ids_.resize(count);
}

template <typename Keep>
void Sampler::keep_if(float least, const Keep& keep) {
  const bool all = ids_.empty();
  size_t kept = 0;
  for (size_t block = 0; block < blocks_of(weights_, kScanBlock); ++block) {
    const std::span<const float> members = block_of(weights_, block, kScanBlock);
    if (max_of(members) < least) continue;
    // Without a branch on what is kept, which nobody could predict.
    std::array<int32_t, kScanBlock> ids;
    const size_t first = kept;
    for (size_t i = block * kScanBlock; i < block * kScanBlock + members.size(); ++i) {
      const float weight = weights_[i];
      ids[kept - first] = all ? static_cast<int32_t>(i) : ids_[i];
      weights_[kept] = weight;
      kept += keep(weight) ? 1 : 0;
    }
    if (all) ids_.resize(kept);
    std::copy_n(ids.begin(), kept - first, ids_.begin() + first);
  }
  ids_.resize(kept);
  weights_.resize(kept);
}

// Weights from min_p on, and of them the heaviest until they make up top_p of what there was.
void Sampler::cut_tail(double top_p, float min_p) {
  const double total = total_of(weights_, &sums_);
  // Weights under this, were all others of them, could not make up the 1 - top_p that may be missing.
  const double negligible = 0.99 * (1.0 - top_p) * total / static_cast<double>(weights_.size());
  const float least = std::max({min_p, static_cast<float>(negligible), std::numeric_limits<float>::min()});
  keep_if(least, [least](float weight) { return weight >= least; });
  if (top_p < 1.0) keep_heaviest(top_p * total);
}

// The heaviest weights (ties: the first) until their sum is `target`; at least one. Finds the lightest that is kept,
// digit by digit of its bits, which are in the order of positive floats: no weight is sorted.
void Sampler::keep_heaviest(double target) {
  target = std::max(target, std::numeric_limits<double>::min());
  double heavier = 0.0;  // the sum of what is kept in any case
  uint32_t lightest = 0;
  for (const int shift : {2 * kDigit, kDigit, 0}) {
    sums_.assign(kDigits, 0.0);
    for (const float weight : weights_) {
      const uint32_t digits = std::bit_cast<uint32_t>(weight) >> shift;
      if (digits >> kDigit == lightest) sums_[digits % kDigits] += double{weight};
    }
    uint32_t chosen = kDigits;  // the lightest digit that occurs, unless a heavier one is enough
    for (uint32_t digit = kDigits; digit-- > 0;) {
      if (sums_[digit] == 0.0) continue;
      if (chosen < kDigits) heavier += sums_[chosen];
      chosen = digit;
      if (heavier + sums_[digit] >= target) break;
    }
    lightest = lightest << kDigit | chosen;
  }
  keep_if(std::bit_cast<float>(lightest), [&](float weight) {
    const uint32_t bits = std::bit_cast<uint32_t>(weight);
    if (bits != lightest) return bits > lightest;
    const bool keep = heavier < target;
    heavier += double{weight};
    return keep;
  });
}

}  // namespace octet
