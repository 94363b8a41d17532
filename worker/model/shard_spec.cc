#include "worker/model/shard_spec.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"

namespace octet {
namespace {

// The bound before slice s of a dimension n that is cut into `slices`, rounded down to even.
int64_t bound_before(int64_t n, int s, int slices) { return s == slices ? n : (n * s / slices) & ~int64_t{1}; }

}  // namespace

absl::StatusOr<ShardSpec> ShardSpec::make(const ModelConfig& config, int rank, int ranks) {
  OCTET_CHECK(0 <= rank && rank < ranks, "rank " + std::to_string(rank) + " of " + std::to_string(ranks));
  const int slices = static_cast<int>(config.num_key_value_heads);
  if (ranks > slices) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%d ranks were started, but this model has %d KV heads and so at most %d slices: start 1 to %d "
                        "ranks (sharing a KV "
                        "head between ranks is not supported yet)",
                        ranks, slices, slices, slices));
  }
  for (const auto& [name, size] :
       {std::pair{"intermediate_size", config.intermediate_size}, std::pair{"vocab_size", config.vocab_size}}) {
    for (int s = 0; s < slices; ++s) {
      if (bound_before(size, s, slices) >= bound_before(size, s + 1, slices)) {
        return absl::InvalidArgumentError(
            absl::StrFormat("%s is %d: too small to be cut into %d slices of even size", name, size, slices));
      }
    }
    if (size % 2 != 0)
      return absl::InvalidArgumentError(absl::StrFormat("%s is %d: an even number is needed", name, size));
  }
  ShardSpec spec;
  spec.rank_ = rank;
  spec.ranks_ = ranks;
  spec.slices_ = slices;
  spec.heads_per_slice_ = config.num_attention_heads / config.num_key_value_heads;
  spec.head_dim_ = config.head_dim;
  spec.intermediate_size_ = config.intermediate_size;
  spec.vocab_size_ = config.vocab_size;
  return spec;
}

SliceRun ShardSpec::run_of(int rank) const {
  const int each = slices_ / ranks_, longer = slices_ % ranks_;
  return {.first = rank * each + std::min(rank, longer), .count = each + (rank < longer ? 1 : 0), .total = slices_};
}

int64_t ShardSpec::heads() const { return run().count * heads_per_slice_; }
int64_t ShardSpec::kv_heads() const { return run().count; }

Range ShardSpec::slice_of(int64_t n, int first, int count) const {
  return {bound_before(n, first, slices_), bound_before(n, first + count, slices_)};
}

SliceRun ShardSpec::leaves_of(int rank, Arithmetic arithmetic) const {
  return arithmetic == Arithmetic::kFast ? SliceRun{rank, 1, ranks_} : run_of(rank);
}

Range ShardSpec::query_rows() const {
  const int64_t per_slice = heads_per_slice_ * head_dim_;
  return {run().first * per_slice, (run().first + run().count) * per_slice};
}

Range ShardSpec::kv_rows() const { return {run().first * head_dim_, (run().first + run().count) * head_dim_}; }

Range ShardSpec::ffn() const { return slice_of(intermediate_size_, run().first, run().count); }

Range ShardSpec::vocab_of(int rank) const { return slice_of(vocab_size_, run_of(rank).first, run_of(rank).count); }

std::vector<int64_t> ShardSpec::ends_of(int64_t n) const {
  std::vector<int64_t> ends;
  const int64_t begin = slice_of(n, run().first, 0).begin;
  for (int i = 1; i <= run().count; ++i) ends.push_back(slice_of(n, run().first, i).end - begin);
  return ends;
}

std::vector<int64_t> ShardSpec::query_column_ends(Arithmetic arithmetic) const {
  if (arithmetic == Arithmetic::kFast) return {query_rows().size()};
  return ends_of(int64_t{slices_} * heads_per_slice_ * head_dim_);
}
std::vector<int64_t> ShardSpec::ffn_column_ends(Arithmetic arithmetic) const {
  if (arithmetic == Arithmetic::kFast) return {ffn().size()};
  return ends_of(intermediate_size_);
}
std::vector<int64_t> ShardSpec::vocab_ends() const { return ends_of(vocab_size_); }

}  // namespace octet
