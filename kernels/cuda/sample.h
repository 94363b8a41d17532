// Choosing tokens from rows of logits where these lie, to the bit as worker/sampler.h does on the host. No CUDA header:
// module.h offers it.
#pragma once

#include <cstdint>

#include "kernels/tensor.h"

namespace octet::cuda {

// Alternatives that are reported of a row at most.
constexpr int kMostAlternatives = 32;

// What is to be chosen from one row, from raw logits: nothing penalised, biased or masked.
struct RowChoice {
  enum Kind : int32_t { kNothing, kGreedy, kDraw };
  int32_t kind = kNothing;
  int32_t alternatives = 0;  // the best logits, at most kMostAlternatives
  // With kDraw:
  int32_t top_k = 0;  // 0: all
  float scale = 1;    // of logits: 1 / temperature
  float top_p = 1;
  float min_p = 0;
  double uniform = 0;  // in [0, 1)
};

struct RowLogit {
  int32_t token = -1;  // -1: there are no more
  float logit = 0;
};

struct ChosenRow {
  RowLogit chosen;
  RowLogit alternatives[kMostAlternatives];  // ascending ids
};

struct SampleArguments {
  Tensor logits;   // [rows, vocabulary] F32
  Tensor choices;  // [rows, sizeof(RowChoice)] U8
  Tensor scratch;  // [rows, sample_scratch_bytes(vocabulary)] U8
  Tensor chosen;   // [rows, sizeof(ChosenRow)] U8; nothing is written to rows of kNothing
};

// Of a row: two lists of weights and ids, and maxima.
constexpr int64_t kMaximaBlock = 64;  // logits whose maximum stands for them
constexpr int64_t sample_scratch_bytes(int64_t vocabulary) {
  const int64_t numbers = (vocabulary + kMaximaBlock - 1) / kMaximaBlock + 4 * vocabulary;
  return (numbers * 4 + 15) / 16 * 16;
}

// The module's own.
class Queue;
void sample(Queue* queue, const SampleArguments& arguments);

}  // namespace octet::cuda
