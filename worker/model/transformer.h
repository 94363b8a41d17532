// Transformer: the Llama forward pass over one rank's shard, written once for every back end. Reads like the paper:
// embed, then per layer attention block and feed forward, then logits. Only the worker thread calls these.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "kernels/graph.h"
#include "kernels/memory.h"
#include "kernels/ops.h"
#include "worker/batch.h"
#include "worker/collective/communicator.h"
#include "worker/decode_batch.h"
#include "worker/kv_cache.h"
#include "worker/model/model_config.h"
#include "worker/model/shard_spec.h"
#include "worker/model/step_probe.h"
#include "worker/model/weights.h"
#include "worker/step_plan.h"

namespace octet {

// Rows of logits that the host looks at at a time.
constexpr int64_t kLogitRows = 16;

// What a rank's steps are at most, and where they run.
struct StepBounds {
  Device device = Device::kCpu;
  Arithmetic arithmetic = Arithmetic::kReproducible;
  int64_t max_tokens = 0;
  int64_t max_sequences = 0;

  // Rows of logits that are computed and gathered at a time, so that scratch does not grow with the number of
  // sequences: on a GPU as many as a usual step has, for each time reads the whole matrix.
  int64_t logit_rows() const {
    return device == Device::kCpu ? kLogitRows : std::clamp<int64_t>(max_sequences, kLogitRows, 256);
  }
  // The most that a recorded step has: all its rows of logits are computed at once. On a CPU nothing is recorded.
  int64_t recorded_sequences() const { return device == Device::kCpu ? 0 : std::min(max_sequences, logit_rows()); }
};

// One rank's scratch of a step, allocated once. Comments give shapes for T = max_tokens, L = logit_rows(); a step uses
// the first rows.
struct StepScratch {
  // Bytes that the constructor allocates where the steps run.
  static int64_t bytes(const ModelConfig& config, const ShardSpec& shard, const StepBounds& bounds);
  // Where `stream`, which outlives it, computes. REQUIRES: bounds are of that device.
  StepScratch(const Stream& stream, const ModelConfig& config, const ShardSpec& shard, const StepBounds& bounds);

  Tensor residual;  // [T, hidden] BF16
  // [rows of the embedding, hidden] BF16, as they arrive from several ranks: one for each token from its owner, or, in
  // recorded steps, from every rank
  Tensor arrived;
  Tensor normed;       // [T, hidden] BF16
  Tensor cos_sin;      // [T, head_dim / 2, 2] F32
  Tensor queries_f32;  // [T, query rows here] F32
  Tensor keys_f32;     // [T, kv rows here] F32
  Tensor values_f32;   // [T, kv rows here] F32
  Tensor queries;      // [T, query rows here] BF16
  Tensor attended;     // [T, query rows here] BF16
  Tensor gate, up;     // [T, ffn columns here] F32
  Tensor gated;        // [T, ffn columns here] BF16
  Tensor partials;     // [subtrees, T, hidden] F32
  Tensor codes;        // [T, widest input of a linear layer] F8_E4M3
  Tensor code_scales;  // [T, leaves here] F32
  Tensor last_rows;    // [L, hidden] BF16
  Tensor last_normed;  // [L, hidden] BF16
  Tensor logits_here;  // [L, vocabulary here] F32
  Tensor parts_here;   // [L, slices here, 2] F32
  // Of several ranks
  Tensor arrived_logits;  // [L * vocab_size] F32, rank by rank
  Tensor logits;          // [L, vocab_size] F32
  Tensor arrived_parts;   // [L * slices * 2] F32, rank by rank
  // On the host, page-locked
  Tensor parts_on_host;   // the same
  Tensor logits_on_host;  // [kLogitRows, vocab_size] F32; none where the rank computes there

 private:
  // Each member with its shape.
  using Layout = std::vector<std::pair<Tensor*, Tensor>>;
  Layout device_layout(const ModelConfig& config, const ShardSpec& shard, const StepBounds& bounds);
  Layout host_layout(const ModelConfig& config, const ShardSpec& shard, const StepBounds& bounds);
  static int64_t bytes(const Layout& layout);
  static void place(const Layout& layout, const Buffer& memory, Device device);
  StepScratch() = default;
  Buffer device_memory_, host_memory_;
};

// One row of logits as every rank sees it.
struct LogitsRow {
  std::span<const float> logits;  // [vocab_size], raw
  float log_sum_exp = 0.0f;       // of the whole row; NaN when any logit is NaN
};

class Transformer {
 public:
  // All references outlive it. `limits`: of a step.
  Transformer(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
              const ModelWeights& weights, const WorkerLimits& limits);

  // Rows of logits at a time.
  int64_t logit_rows() const { return bounds_.logit_rows(); }

  // Runs the batch's tokens through all layers and writes their keys and values to the cache.
  // REQUIRES: ids inside the vocabulary; block tables cover every position up to each token's own.
  void forward(const StepBatch& batch, const KvCache& cache);

  // Queues the logits of logit_rows [first, first + n) of the batch last run, n <= logit_rows(): [n, vocab_size] F32 on
  // the stream's device, valid until the next call. Collective.
  Tensor logits(int64_t first, int64_t n);
  // Of row i of the logits last queued, over the whole vocabulary; NaN when any logit is. REQUIRES: the stream was
  // synchronised.
  float log_sum_exp(int64_t i) const;
  // That row where the host can read it: at one of kLogitRows places there, until the place gets another row.
  // REQUIRES: likewise.
  LogitsRow on_host(int64_t i, int64_t place);

  // Records steps of one token of each sequence, up to their logits, for every number of sequences in
  // decode_buckets(), and what `then` asks of the stream with these logits; `progress` is told how many are done.
  // Such steps run as one launch, with the same bits. Collective. REQUIRES: the stream computes on a CUDA device and
  // the communicator on_device().
  void record_decode(const KvCache& cache, const std::function<void(const Tensor& logits)>& then,
                     const std::function<void(int64_t done, int64_t total)>& progress);
  // Whether there is a recorded step that the batch fits, and nobody asks for its parts.
  bool has_recorded(const StepBatch& batch) const { return recorded_for(batch) != nullptr; }
  // Runs it: forward(), logits() of all its rows, and what was recorded after them. REQUIRES: has_recorded(batch).
  void run_recorded(const StepBatch& batch);

  // Tells `probe` of each part of what runs from now on, which recorded steps, being one piece, then do not; null:
  // nobody. It outlives this, or the next call.
  void set_probe(StepProbe* probe) { probe_ = probe; }

 private:
  void enter(StepPart part) const {
    if (probe_ != nullptr) probe_->enter(part);
  }

  struct RecordedStep {
    int64_t sequences;
    Tensor logits;
    Graph work;
  };

  // The smallest recorded step that the batch fits; null: none does.
  const RecordedStep* recorded_for(const StepBatch& batch) const;
  // Sends the batch to where the rank computes.
  void place(const StepBatch& batch);
  // Sends it to where a step of so many sequences looks for it.
  void place_decode(const StepBatch& batch, int64_t sequences);
  // Which rows of the embedding this rank gives, and where every token's arrives: each from its owner alone, or from
  // all ranks as many rows, so that nothing depends on whose tokens they are.
  void place_embedding(std::span<const int32_t> tokens);
  void place_decode_embedding(std::span<const int32_t> tokens, int64_t sequences);
  // From the tokens that were placed to the residual stream after the last layer.
  void run_layers(const KvCache& cache);
  void embed();
  // Both take and leave their input normed, in input_: the norm belongs to the sum before it.
  void attention_block(int64_t layer, const KvCache& cache);
  void feed_forward(int64_t layer);
  // What layers with these activations read of the residual stream.
  NormedInput normed_input(const Tensor& norm, const ActivationScheme& scheme);
  NormedInput attention_input(int64_t layer);
  // Column-parallel layers that read the same input; quantises it once per activation scheme, unless it is.
  void project(const Activations& x, std::span<const LinearOutput> outputs);
  // A row-parallel layer, summed over all ranks into the residual stream, and the norm after it, if one follows.
  void project_and_reduce(const Activations& x, const Linear& weight, std::span<const int64_t> column_ends,
                          const std::optional<NormedInput>& next);
  // A part of each rank to the whole, as long as values_of_rank(rank) says of each: in the order of ranks.
  template <typename ValuesOfRank>
  Tensor gathered(const Tensor& here, const Tensor& all, const ValuesOfRank& values_of_rank);
  // Room for x [tokens, n] quantised so, or x itself.
  Activations room_for(const Tensor& x, const ActivationScheme& scheme, int64_t groups);
  Activations quantized(const Tensor& x, const ActivationScheme& scheme, std::span<const int64_t> group_ends);

  Stream& stream_;
  Communicator& communicator_;
  const ModelConfig& config_;
  const ShardSpec& shard_;
  const ModelWeights& weights_;
  StepProbe* probe_ = nullptr;
  const StepBounds bounds_;
  StepScratch scratch_;
  const WorkerLimits limits_;
  Buffer inv_freq_memory_;
  Tensor inv_freq_;  // [head_dim / 2] F32
  std::vector<int64_t> query_column_ends_, ffn_column_ends_, vocab_ends_;
  std::vector<int64_t> rank_ends_;  // columns of the vocabulary where ranks end
  StepArrays arrays_;
  std::optional<DecodeBatch> decode_batch_;  // of recorded steps
  std::vector<RecordedStep> recorded_;       // ascending
  PlacedBatch batch_;                        // the batch last run
  int64_t tokens_ = 0;                       // of it
  Activations input_;                        // of the block that comes next
  Tensor logits_;                            // last queued
  std::vector<int32_t> embedding_rows_, own_rows_;
  std::vector<int64_t> bytes_of_rank_, embedding_bytes_of_rank_;
};

}  // namespace octet
