// Sampler: from a row of raw logits to a token (pure). Every rank calls it on the same bits and gets the same token.
//
// Order: repetition, presence and frequency penalty; logit_bias; masks (allowed_token_ids, SlotMask, bad_words, end
// tokens before min_tokens); then greedy, or temperature, top_k, top_p, min_p. Ties go to the smaller id. Randomness is
// counter-based (Philox 4x32-10) with key (seed, output_index, position), so a token depends on nothing else that was
// ever sampled.
//
// Always a choice, and always the same: changed logits are cut to finite floats (a NaN counts as the lowest), denormals
// count as 0. Where masks leave nothing, bad_words give way, then min_tokens as well; where allowed_token_ids and
// SlotMask have no token in common, SlotMask alone decides.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/memory.h"
#include "worker/model/transformer.h"
#include "worker/step_plan.h"
#include "worker/token_history.h"

namespace octet {

// A number in [0, 1) with 53 random bits.
double uniform_at(uint64_t seed, uint32_t output_index, int32_t position);

// What a token is chosen from.
struct Choice {
  LogitsRow row;                          // REQUIRES: log_sum_exp is finite
  const SlotSampling& sampling;           // REQUIRES: every id is inside the vocabulary, bad words have tokens
  int32_t position = 0;                   // of the token to be chosen
  int32_t completion_tokens = 0;          // how many tokens of the completion come before it
  const TokenHistory* history = nullptr;  // all tokens before it; not null if sampling.reads_history()
  std::span<const uint32_t> mask;         // SlotMask::words, at least one bit inside the vocabulary; empty: no mask
};

// Whether the choice is made from other logits than the row's own: penalised, biased or masked.
bool changes_logits(const Choice& choice);
// What logits are multiplied by. temperature is above 0.
float scale_of(float temperature);

struct TokenLogit {
  int32_t token = 0;
  float logit = 0.0f;
};
// What is told of a choice: logprobs of the raw distribution, the alternatives, which come in any order, best first.
// Sets all of *out but its slot.
void report(const TokenLogit& chosen, std::span<TokenLogit> alternatives, float log_sum_exp, SampledToken* out);

// Weights, not normalised, of the tokens that may be chosen; at least one is above 0.
struct Distribution {
  std::span<const int32_t> ids;    // ascending; empty: weights[i] is that of token i
  std::span<const float> weights;  // 0 to 1; the likeliest token's is 1
};

// Not for several threads at once: each has its own.
class Sampler {
 public:
  // `stream` outlives it; of its threads only the calling one is used.
  explicit Sampler(const Stream& stream) : stream_(&stream) {}

  // Takes at once what rows of vocab_size logits can ever ask for: bytes(vocab_size), of which pages are touched as
  // requests need them. Without it memory grows with what is asked.
  void reserve(int64_t vocab_size);
  static int64_t bytes(int64_t vocab_size);

  // chosen.logprob and top are of the raw distribution. Sets all of *out but its slot.
  void sample(const Choice& choice, SampledToken* out);
  // The same report of a token that is known already, with `top` alternatives.
  void score(const LogitsRow& row, int32_t token, int32_t top, SampledToken* out);

  // What sample() draws from; a greedy choice has one token. Valid until the next call of any function.
  // top_k ranks tokens by logit, top_p and min_p by weight, a float.
  Distribution distribution(const Choice& choice);

 private:
  // The logits after penalties, bias and masks (-infinity: masked), scanned; the greatest is finite.
  std::span<const float> adjusted(const Choice& choice);
  void penalise_and_bias(const Choice& choice);
  // Leaves the `count` best ids in ids_, in no order; fewer where the others are -infinity. REQUIRES: logits are
  // scanned.
  void take_best(std::span<const float> logits, size_t count);
  // What becomes of weights_ and ids_.
  void cut_tail(double top_p, float min_p);
  void keep_heaviest(double target);
  // Keeps the weights for which keep(weight), asked in their order. REQUIRES: none of them is under `least`.
  template <typename Keep>
  void keep_if(float least, const Keep& keep);
  // The maxima of blocks, from which what comes next skips most of the row.
  void scan(std::span<const float> logits);
  float greatest() const;
  int32_t best_id(std::span<const float> logits) const;

  const Stream* stream_;
  std::vector<float> adjusted_;         // [vocab_size]
  std::vector<float> maxima_, ranked_;  // of the blocks of the row last scanned
  std::vector<int32_t> ids_;
  std::vector<TokenLogit> alternatives_;
  std::vector<float> weights_;
  std::vector<double> sums_;
};

}  // namespace octet
