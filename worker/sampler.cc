#include "worker/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace octet {
namespace {

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

int32_t best_id(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return static_cast<int32_t>(best);
}

// The first index whose running sum exceeds `target`; the last one when rounding leaves none.
size_t index_at(std::span<const double> weights, double target) {
  double sum = 0.0;
  for (size_t i = 0; i + 1 < weights.size(); ++i) {
    sum += weights[i];
    if (target < sum) return i;
  }
  return weights.size() - 1;
}

}  // namespace

double uniform_at(uint64_t seed, uint32_t output_index, int32_t position) {
  const auto bits = philox({static_cast<uint32_t>(position), output_index, 0, 0},
                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  const uint64_t wide = uint64_t{bits[0]} << 32 | bits[1];
  return static_cast<double>(wide >> 11) * 0x1.0p-53;
}

void Sampler::sample(const LogitsRow& row, const SlotSampling& sampling, int32_t position, SampledToken* out) {
  auto with_logprob = [&](int32_t id) { return TokenLogprob{id, row.logits[id] - row.log_sum_exp}; };
  out->chosen = with_logprob(sampling.temperature == 0.0f ? best_id(row.logits) : draw(row.logits, sampling, position));
  out->top.clear();
  if (sampling.top_logprobs == 0) return;
  take_best(row.logits, sampling.top_logprobs);
  for (int32_t id : candidates_) out->top.push_back(with_logprob(id));
}

void Sampler::take_best(std::span<const float> logits, int64_t count) {
  candidates_.resize(logits.size());
  std::iota(candidates_.begin(), candidates_.end(), 0);
  count = std::min<int64_t>(count, candidates_.size());
  std::partial_sort(candidates_.begin(), candidates_.begin() + count, candidates_.end(),
                    [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; });
  candidates_.resize(count);
}

int32_t Sampler::draw(std::span<const float> logits, const SlotSampling& sampling, int32_t position) {
  const double u = uniform_at(sampling.seed, sampling.output_index, position);
  const double max = logits[best_id(logits)];
  auto weight = [&](int32_t id) { return std::exp((double{logits[id]} - max) / double{sampling.temperature}); };

  const bool filtered = sampling.top_k > 0 || sampling.top_p < 1.0f || sampling.min_p > 0.0f;
  if (!filtered) {
    weights_.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) weights_[i] = weight(static_cast<int32_t>(i));
    return static_cast<int32_t>(index_at(weights_, u * std::accumulate(weights_.begin(), weights_.end(), 0.0)));
  }

  // Best first, as many as could be needed: top_k of them, else more and more until they hold top_p (and reach min_p).
  double total = 0.0;
  if (sampling.top_k == 0) {
    for (size_t i = 0; i < logits.size(); ++i) total += weight(static_cast<int32_t>(i));
  }
  for (int64_t count = sampling.top_k > 0 ? sampling.top_k : 256;; count *= 8) {
    take_best(logits, count);
    weights_.resize(candidates_.size());
    std::transform(candidates_.begin(), candidates_.end(), weights_.begin(), weight);
    if (sampling.top_k > 0) total = std::accumulate(weights_.begin(), weights_.end(), 0.0);

    size_t kept = 0;
    double sum = 0.0;
    while (kept < weights_.size() && (kept == 0 || sum < double{sampling.top_p} * total)) sum += weights_[kept++];
    const bool all_seen = sampling.top_k > 0 || weights_.size() == logits.size();
    const bool ended = sum >= double{sampling.top_p} * total && sampling.top_p < 1.0f;
    // Weights fall, the best is 1: those under min_p are a tail.
    const auto tail =
        std::find_if(weights_.begin(), weights_.begin() + kept, [&](double w) { return w < double{sampling.min_p}; });
    const bool cut = tail != weights_.begin() + kept;
    if (!all_seen && !ended && !cut) continue;

    weights_.resize(std::max<int64_t>(1, tail - weights_.begin()));
    return candidates_[index_at(weights_, u * std::accumulate(weights_.begin(), weights_.end(), 0.0))];
  }
}

}  // namespace octet
