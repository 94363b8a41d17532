#include "worker/decode_batch.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "kernels/check.h"

namespace octet {
namespace {

// Arrays and tables begin where any load of a kernel may.
int64_t stride_of(int64_t max_sequences) { return (max_sequences + 63) / 64 * 64; }

int64_t blocks_of(int64_t max_context) { return (max_context + kKvBlockTokens - 1) / kKvBlockTokens; }

}  // namespace

// Fine steps where a token more costs most of a token's time, coarser ones where it is one among many.
std::vector<int64_t> decode_buckets(int64_t max_sequences) {
  std::vector<int64_t> buckets;
  for (const int64_t bucket : {1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512}) {
    if (bucket < max_sequences) buckets.push_back(bucket);
  }
  buckets.push_back(max_sequences);
  return buckets;
}

int64_t DecodeBatch::bytes(int64_t max_sequences, int64_t max_context) {
  return (kArrays * stride_of(max_sequences) + max_sequences * blocks_of(max_context)) * size_of(DType::kI32);
}

DecodeBatch::DecodeBatch(Stream& stream, int64_t max_sequences, int64_t max_context, int32_t padding_block)
    : stream_(stream),
      max_sequences_(max_sequences),
      stride_(stride_of(max_sequences)),
      max_blocks_(blocks_of(max_context)),
      padding_block_(padding_block),
      host_memory_(Buffer::page_locked(bytes(max_sequences, max_context), stream)),
      device_memory_(bytes(max_sequences, max_context), stream),
      host_(host_memory_.tensor(DType::kI32, {kArrays, stride_})),
      device_(device_memory_.tensor(DType::kI32, {kArrays, stride_})),
      host_tables_(host_.as<int32_t>() + host_.elements(), DType::kI32, {max_sequences * max_blocks_}),
      device_tables_(static_cast<char*>(device_.data()) + device_.bytes(), DType::kI32, {max_sequences, max_blocks_},
                     stream.device()) {
  std::iota(on_host(kSequenceOf), on_host(kSequenceOf) + max_sequences, 0);
  std::iota(on_host(kSequenceEnds), on_host(kSequenceEnds) + max_sequences, 1);
  queue_copy(stream, host_, device_);
  stream.synchronize();
}

Tensor DecodeBatch::on_device(Array array, int64_t count) const {
  return device_.rows(array, array + 1).reshaped({stride_}).rows(0, count);
}

PlacedBatch DecodeBatch::placed(int64_t bucket) const {
  return {.attention = {.positions = on_device(kPositions, bucket),
                        .sequence_of = on_device(kSequenceOf, bucket),
                        .sequence_ends = on_device(kSequenceEnds, bucket),
                        .block_tables = device_tables_.rows(0, bucket),
                        .context = max_blocks_ * kKvBlockTokens},
          .logit_rows = on_device(kLogitRows, bucket),
          .embedding_rows = on_device(kEmbeddingRows, bucket),
          .own_rows = on_device(kOwnRows, bucket)};
}

void DecodeBatch::send(const StepBatch& batch, std::span<const int32_t> embedding_rows,
                       std::span<const int32_t> own_rows, int64_t bucket) {
  OCTET_CHECK(batch.token_count() == batch.sequence_count() && batch.token_count() <= bucket,
              std::to_string(batch.token_count()) + " tokens of " + std::to_string(batch.sequence_count()) +
                  " sequences in a step recorded for " + std::to_string(bucket));
  const auto fill = [&](Array array, std::span<const int32_t> values) {
    int32_t* const padding = std::copy(values.begin(), values.end(), on_host(array));
    std::fill(padding, on_host(array) + bucket, 0);
  };
  fill(kPositions, batch.positions);
  fill(kLogitRows, batch.logit_rows);
  fill(kEmbeddingRows, embedding_rows);
  fill(kOwnRows, own_rows);
  queue_copy(stream_, host_.rows(0, kChanging), device_.rows(0, kChanging));
  send_tables(batch, bucket);
}

// Of each sequence's table as much as the longest context of the step needs.
void DecodeBatch::send_tables(const StepBatch& batch, int64_t bucket) {
  const int64_t columns = std::max<int64_t>(batch.max_blocks, 1);
  int32_t* const tables = host_tables_.as<int32_t>();
  int32_t* const padding = std::copy(batch.block_tables.begin(), batch.block_tables.end(), tables);
  std::fill(padding, tables + bucket * columns, padding_block_);
  queue_copy(stream_, host_tables_.rows(0, bucket * columns).reshaped({bucket, columns}),
             device_tables_.rows(0, bucket));
}

}  // namespace octet
