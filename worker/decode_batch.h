// DecodeBatch: the arrays of steps that run one token of each sequence, at addresses that never change, so that
// recorded steps find there what each of them is to run. A recorded step has room for a certain number of sequences;
// those that are not there are padding: one token at position 0 of a cache block that no sequence has.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/memory.h"
#include "worker/batch.h"

namespace octet {

// The numbers of sequences that steps are recorded for, ascending, the last one max_sequences.
std::vector<int64_t> decode_buckets(int64_t max_sequences);

class DecodeBatch {
 public:
  // What it takes where the stream computes.
  static int64_t bytes(int64_t max_sequences, int64_t max_context);

  // `stream` outlives it.
  DecodeBatch(Stream& stream, int64_t max_sequences, int64_t max_context, int32_t padding_block);

  // What a step of `bucket` sequences reads, whatever was sent. The context is the longest that there can be.
  PlacedBatch placed(int64_t bucket) const;

  // Sends the sequences of a step, at most `bucket`, and as much padding as they leave room for; without a batch all
  // of it is padding. embedding_rows and own_rows are those of PlacedBatch, [bucket].
  // REQUIRES: the stream was synchronised after the last call; every sequence has one token.
  void send(const StepBatch& batch, std::span<const int32_t> embedding_rows, std::span<const int32_t> own_rows,
            int64_t bucket);

 private:
  // One number for each sequence, the arrays side by side: what changes from step to step comes first.
  enum Array { kPositions, kEmbeddingRows, kOwnRows, kLogitRows, kSequenceOf, kSequenceEnds, kArrays };
  static constexpr int kChanging = kSequenceOf;

  int32_t* on_host(Array array) const { return host_.as<int32_t>() + array * stride_; }
  Tensor on_device(Array array, int64_t count) const;
  void send_tables(const StepBatch& batch, int64_t bucket);

  Stream& stream_;
  const int64_t max_sequences_, stride_, max_blocks_;  // stride_: numbers from one array to the next
  const int32_t padding_block_;
  Buffer host_memory_, device_memory_;
  Tensor host_, device_;  // [kArrays, stride]
  Tensor host_tables_;    // [max_sequences * max_blocks], the rows of a step at the front, as long as that needs
  Tensor device_tables_;  // [max_sequences, max_blocks]
};

}  // namespace octet
