// ShardSpec: which slices of the model a rank owns, and the ranges of heads, columns and vocabulary rows they mean
// (pure).
//
// A model is cut into as many slices as it has KV heads. Slice s is KV head s, the query heads that read it, and of any
// dimension n that is cut (feed-forward columns, vocabulary rows) the range [s*n/S, (s+1)*n/S), bounds rounded down to
// even. A rank owns a contiguous run of slices; runs differ by at most one slice, the longer ones first.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/memory.h"
#include "kernels/slice_tree.h"
#include "worker/model/model_config.h"

namespace octet {

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

class ShardSpec {
 public:
  // INVALID_ARGUMENT when ranks exceeds the slices, or a slice would be empty; the message says what would work.
  static absl::StatusOr<ShardSpec> make(const ModelConfig& config, int rank, int ranks);

  int rank() const { return rank_; }
  int ranks() const { return ranks_; }
  int slices() const { return slices_; }
  SliceRun run() const { return run_of(rank_); }
  SliceRun run_of(int rank) const;

  // What this rank, or another, brings to the sums over ranks: a leaf for each of its slices, or in fast arithmetic one
  // for all that it has.
  SliceRun leaves(Arithmetic arithmetic) const { return leaves_of(rank_, arithmetic); }
  SliceRun leaves_of(int rank, Arithmetic arithmetic) const;

  int64_t heads() const;     // query heads here
  int64_t kv_heads() const;  // KV heads here

  // Rows of q_proj; rows of k_proj and v_proj; columns of o_proj (= rows of q_proj).
  Range query_rows() const;
  Range kv_rows() const;
  // Rows of gate_proj and up_proj, columns of down_proj.
  Range ffn() const;
  // Rows of embed_tokens and lm_head.
  Range vocab() const { return vocab_of(rank_); }
  Range vocab_of(int rank) const;

  // Where the columns of each of this rank's leaves end, counted from the rank's own first one: of o_proj, of
  // down_proj.
  std::vector<int64_t> query_column_ends(Arithmetic arithmetic) const;
  std::vector<int64_t> ffn_column_ends(Arithmetic arithmetic) const;
  // Likewise of the vocabulary, always slice by slice.
  std::vector<int64_t> vocab_ends() const;

 private:
  ShardSpec() = default;
  Range slice_of(int64_t n, int first, int count) const;
  std::vector<int64_t> ends_of(int64_t n) const;

  int rank_ = 0, ranks_ = 1, slices_ = 1;
  int64_t heads_per_slice_ = 0, head_dim_ = 0, intermediate_size_ = 0, vocab_size_ = 0;
};

}  // namespace octet
