#include "worker/model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace octet {
namespace {

constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// The first rows of a scratch tensor, seen under the step's own shape.
Tensor front(const Tensor& scratch, Shape shape) {
  return Tensor(scratch.data(), scratch.dtype(), shape, scratch.device());
}

// How layers that read the same input quantise it; kNone where they do not agree, and each has to for itself.
ActivationScheme common_scheme(std::initializer_list<const Linear*> layers) {
  const ActivationScheme& scheme = (*layers.begin())->activations;
  const bool all = std::ranges::all_of(layers, [&](const Linear* layer) { return layer->activations == scheme; });
  return all ? scheme : ActivationScheme{};
}

// Log-sum-exp in parts: sum of exp(x - max) beside max.
struct SoftmaxPart {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0.0;
};

SoftmaxPart merged(const SoftmaxPart& left, const SoftmaxPart& right) {
  const double max = std::max(left.max, right.max);
  return {max, left.sum * std::exp(left.max - max) + right.sum * std::exp(right.max - max)};
}

// The part of node (level, index) of the slice tree.
template <typename Leaf>
SoftmaxPart part_of(const SliceNode& node, int slices, const Leaf& leaf) {
  if (node.level == 0) return leaf(node.index);
  const SliceNode left{node.level - 1, 2 * node.index}, right{node.level - 1, 2 * node.index + 1};
  const SoftmaxPart part = part_of(left, slices, leaf);
  return (right.index << right.level) < slices ? merged(part, part_of(right, slices, leaf)) : part;
}

}  // namespace

StepScratch::Layout StepScratch::device_layout(const ModelConfig& config, const ShardSpec& shard,
                                               const StepBounds& bounds) {
  const bool alone = shard.ranks() == 1;
  const int64_t t = bounds.max_tokens, l = bounds.logit_rows(), hidden = config.hidden_size;
  const int64_t q = shard.query_rows().size(), kv = shard.kv_rows().size(), ffn = shard.ffn().size();
  const SliceRun leaves = shard.leaves(bounds.arithmetic);
  const int64_t subtrees = static_cast<int64_t>(maximal_subtrees(leaves).size());
  const int64_t slices_here = shard.run().count, vocab_here = shard.vocab().size();
  auto f32 = [](Shape shape) { return Tensor(nullptr, DType::kF32, shape); };
  auto bf16 = [](Shape shape) { return Tensor(nullptr, DType::kBF16, shape); };
  return {{&residual, bf16({t, hidden})},
          {&arrived, bf16({alone ? 0 : std::max(t, shard.ranks() * bounds.recorded_sequences()), hidden})},
          {&normed, bf16({t, hidden})},
          {&cos_sin, f32({t, config.head_dim / 2, 2})},
          {&queries_f32, f32({t, q})},
          {&keys_f32, f32({t, kv})},
          {&values_f32, f32({t, kv})},
          {&queries, bf16({t, q})},
          {&attended, bf16({t, q})},
          {&gate, f32({t, ffn})},
          {&up, f32({t, ffn})},
          {&gated, bf16({t, ffn})},
          {&partials, f32({subtrees, t, hidden})},
          {&codes, Tensor(nullptr, DType::kF8E4M3, {t, std::max({hidden, q, ffn})})},
          {&code_scales, f32({t, leaves.count})},
          {&last_rows, bf16({l, hidden})},
          {&last_normed, bf16({l, hidden})},
          {&logits_here, f32({l, vocab_here})},
          {&parts_here, f32({l, slices_here, 2})},
          {&arrived_logits, f32({alone ? 0 : l * config.vocab_size})},
          {&logits, f32({alone ? 0 : l, config.vocab_size})},
          {&arrived_parts, f32({alone ? 0 : l * shard.slices() * 2})}};
}

StepScratch::Layout StepScratch::host_layout(const ModelConfig& config, const ShardSpec& shard,
                                             const StepBounds& bounds) {
  auto f32 = [](Shape shape) { return Tensor(nullptr, DType::kF32, shape); };
  return {{&parts_on_host, f32({bounds.logit_rows() * shard.slices() * 2})},
          {&logits_on_host, f32({bounds.device == Device::kCpu ? 0 : kLogitRows, config.vocab_size})}};
}

int64_t StepScratch::bytes(const Layout& layout) {
  int64_t bytes = 0;
  for (const auto& [member, tensor] : layout) bytes += aligned(tensor.bytes());
  return bytes;
}

int64_t StepScratch::bytes(const ModelConfig& config, const ShardSpec& shard, const StepBounds& bounds) {
  StepScratch unplaced;
  const int64_t on_device = bytes(unplaced.device_layout(config, shard, bounds));
  return bounds.device == Device::kCpu ? on_device + bytes(unplaced.host_layout(config, shard, bounds)) : on_device;
}

void StepScratch::place(const Layout& layout, const Buffer& memory, Device device) {
  char* next = static_cast<char*>(memory.data());
  for (const auto& [member, tensor] : layout) {
    *member = Tensor(next, tensor.dtype(), tensor.shape(), device);
    next += aligned(tensor.bytes());
  }
}

StepScratch::StepScratch(const Stream& stream, const ModelConfig& config, const ShardSpec& shard,
                         const StepBounds& bounds) {
  const Layout on_device = device_layout(config, shard, bounds), on_host = host_layout(config, shard, bounds);
  device_memory_ = Buffer(bytes(on_device), stream);
  host_memory_ = Buffer::page_locked(bytes(on_host), stream);
  place(on_device, device_memory_, stream.device());
  place(on_host, host_memory_, Device::kCpu);
}

Transformer::Transformer(Stream& stream, Communicator& communicator, const ModelConfig& config, const ShardSpec& shard,
                         const ModelWeights& weights, const WorkerLimits& limits)
    : stream_(stream),
      communicator_(communicator),
      config_(config),
      shard_(shard),
      weights_(weights),
      bounds_{.device = stream.device(),
              .arithmetic = stream.arithmetic(),
              .max_tokens = limits.max_step_tokens,
              .max_sequences = limits.slots},
      scratch_(stream, config, shard, bounds_),
      limits_(limits),
      inv_freq_memory_(config.head_dim / 2 * int64_t{sizeof(float)}, stream),
      inv_freq_(inv_freq_memory_.tensor(DType::kF32, {config.head_dim / 2})),
      query_column_ends_(shard.query_column_ends(stream.arithmetic())),
      ffn_column_ends_(shard.ffn_column_ends(stream.arithmetic())),
      vocab_ends_(shard.vocab_ends()),
      arrays_(stream, PlacedBatch::bytes(limits.max_step_tokens, limits.slots, limits.max_context)) {
  for (int rank = 0; rank < shard.ranks(); ++rank) rank_ends_.push_back(shard.vocab_of(rank).end);
  std::vector<float> frequencies = rope_inverse_frequencies(config);
  copy(stream, Tensor(frequencies.data(), DType::kF32, inv_freq_.shape()), inv_freq_);
}

void Transformer::forward(const StepBatch& batch, const KvCache& cache) {
  place(batch);
  run_layers(cache);
}

void Transformer::run_recorded(const StepBatch& batch) {
  const RecordedStep* const step = recorded_for(batch);
  OCTET_CHECK(step != nullptr, "no step was recorded for this batch");
  place_decode(batch, step->sequences);
  step->work.launch();
  logits_ = step->logits;
}

const Transformer::RecordedStep* Transformer::recorded_for(const StepBatch& batch) const {
  if (batch.token_count() != batch.sequence_count() || probe_ != nullptr) return nullptr;
  for (const RecordedStep& step : recorded_) {
    if (batch.sequence_count() <= step.sequences) return &step;
  }
  return nullptr;
}

// Each is run once before it is recorded, all padding: what ops prepare for their first time is then there.
void Transformer::record_decode(const KvCache& cache, const std::function<void(const Tensor&)>& then,
                                const std::function<void(int64_t, int64_t)>& progress) {
  const int64_t most = bounds_.recorded_sequences();
  decode_batch_.emplace(stream_, most, limits_.max_context, cache.padding_block());
  const std::vector<int64_t> buckets = decode_buckets(most);
  for (const int64_t sequences : buckets) {
    const auto step = [&] {
      run_layers(cache);
      then(logits(0, sequences));
    };
    place_decode({}, sequences);
    step();
    stream_.synchronize();
    recorded_.push_back({sequences, logits_, Graph(stream_, step)});
    progress(static_cast<int64_t>(recorded_.size()), static_cast<int64_t>(buckets.size()));
  }
}

void Transformer::run_layers(const KvCache& cache) {
  enter(StepPart::kEmbedding);
  embed();
  rope_angles(stream_, batch_.attention.positions, inv_freq_, scratch_.cos_sin.rows(0, tokens_));
  const NormedInput first = attention_input(0);
  enter(StepPart::kNorm);
  rms_norm_and_quantize(stream_, scratch_.residual.rows(0, tokens_), first);
  input_ = first.out;
  for (int64_t layer = 0; layer < config_.num_hidden_layers; ++layer) {
    attention_block(layer, cache);
    feed_forward(layer);
  }
}

void Transformer::place(const StepBatch& batch) {
  tokens_ = batch.token_count();
  const int64_t sequences = batch.sequence_count();
  place_embedding(batch.tokens);
  arrays_.begin();
  batch_.attention = {.positions = arrays_.add(batch.positions, {tokens_}),
                      .sequence_of = arrays_.add(batch.sequence_of, {tokens_}),
                      .sequence_ends = arrays_.add(batch.sequence_ends, {sequences}),
                      .block_tables = arrays_.add(batch.block_tables, {sequences, batch.max_blocks}),
                      .context = batch.context};
  batch_.logit_rows = arrays_.add(batch.logit_rows, {static_cast<int64_t>(batch.logit_rows.size())});
  batch_.embedding_rows = arrays_.add(embedding_rows_, {tokens_});
  batch_.own_rows = arrays_.add(own_rows_, {static_cast<int64_t>(own_rows_.size())});
  arrays_.send();
}

void Transformer::place_decode(const StepBatch& batch, int64_t sequences) {
  tokens_ = sequences;
  place_decode_embedding(batch.tokens, sequences);
  decode_batch_->send(batch, embedding_rows_, own_rows_, sequences);
  batch_ = decode_batch_->placed(sequences);
}

// Rows arrive in the order of the ranks that own them.
void Transformer::place_embedding(std::span<const int32_t> tokens) {
  embedding_rows_.assign(tokens.begin(), tokens.end());
  own_rows_.clear();
  if (shard_.ranks() == 1) return;
  embedding_bytes_of_rank_.assign(shard_.ranks(), 0);
  int32_t arrived = 0;
  for (int rank = 0; rank < shard_.ranks(); ++rank) {
    const Range rows = shard_.vocab_of(rank);
    for (size_t t = 0; t < tokens.size(); ++t) {
      if (tokens[t] < rows.begin || tokens[t] >= rows.end) continue;
      embedding_rows_[t] = arrived++;
      embedding_bytes_of_rank_[rank] += config_.hidden_size * size_of(DType::kBF16);
      if (rank == shard_.rank()) own_rows_.push_back(tokens[t] - static_cast<int32_t>(rows.begin));
    }
  }
}

void Transformer::place_decode_embedding(std::span<const int32_t> tokens, int64_t sequences) {
  embedding_rows_.assign(tokens.begin(), tokens.end());
  own_rows_.assign(tokens.size(), 0);
  if (shard_.ranks() == 1) return;
  embedding_bytes_of_rank_.assign(shard_.ranks(), sequences * config_.hidden_size * size_of(DType::kBF16));
  for (int rank = 0; rank < shard_.ranks(); ++rank) {
    const Range rows = shard_.vocab_of(rank);
    for (size_t t = 0; t < tokens.size(); ++t) {
      if (tokens[t] < rows.begin || tokens[t] >= rows.end) continue;
      embedding_rows_[t] = static_cast<int32_t>(rank * sequences + static_cast<int64_t>(t));
      if (rank == shard_.rank()) own_rows_[t] = tokens[t] - static_cast<int32_t>(rows.begin);
    }
  }
}

// Rows travel from the ranks that own them and are put back in the order of tokens.
void Transformer::embed() {
  const Tensor residual = scratch_.residual.rows(0, tokens_);
  if (shard_.ranks() == 1) return copy_rows(stream_, weights_.embed_tokens, batch_.embedding_rows, residual);

  const Tensor own = scratch_.normed.rows(0, batch_.own_rows.dim(0));
  copy_rows(stream_, weights_.embed_tokens, batch_.own_rows, own);
  const int64_t bytes = std::accumulate(embedding_bytes_of_rank_.begin(), embedding_bytes_of_rank_.end(), int64_t{0});
  const Tensor arrived = scratch_.arrived.rows(0, bytes / (config_.hidden_size * size_of(DType::kBF16)));
  communicator_.gather(stream_, own, embedding_bytes_of_rank_, arrived);
  copy_rows(stream_, arrived, batch_.embedding_rows, residual);
}

void Transformer::attention_block(int64_t index, const KvCache& cache) {
  const LayerWeights& layer = weights_.layers[index];
  const KvLayer kv = cache.layer(index, layer.key_scale, layer.value_scale);
  const Shape q_shape{tokens_, shard_.heads(), config_.head_dim},
      kv_shape{tokens_, shard_.kv_heads(), config_.head_dim};
  const Tensor q = scratch_.queries_f32.rows(0, tokens_), k = scratch_.keys_f32.rows(0, tokens_),
               v = scratch_.values_f32.rows(0, tokens_);
  const Tensor rotated = front(scratch_.queries, q_shape), attended = front(scratch_.attended, q_shape);

  enter(StepPart::kQkv);
  project(input_, {{{&layer.q_proj, q}, {&layer.k_proj, k}, {&layer.v_proj, v}}});
  enter(StepPart::kRope);
  rope_and_cache(stream_, q.reshaped(q_shape), k.reshaped(kv_shape), v.reshaped(kv_shape),
                 scratch_.cos_sin.rows(0, tokens_), batch_.attention, rotated, kv);
  enter(StepPart::kAttention);
  attention(stream_, rotated, kv, batch_.attention, attended);
  enter(StepPart::kOutput);
  const Tensor heads = attended.reshaped({tokens_, shard_.query_rows().size()});
  project_and_reduce(quantized(heads, layer.o_proj.activations, query_column_ends_), layer.o_proj, query_column_ends_,
                     normed_input(layer.post_attention_layernorm, common_scheme({&layer.gate_proj, &layer.up_proj})));
}

void Transformer::feed_forward(int64_t index) {
  const LayerWeights& layer = weights_.layers[index];
  const Tensor gate = scratch_.gate.rows(0, tokens_), up = scratch_.up.rows(0, tokens_);
  const Tensor gated = scratch_.gated.rows(0, tokens_);

  enter(StepPart::kGateUp);
  project(input_, {{{&layer.gate_proj, gate}, {&layer.up_proj, up}}});
  const ActivationScheme& scheme = layer.down_proj.activations;
  const Activations down_input = room_for(gated, scheme, static_cast<int64_t>(ffn_column_ends_.size()));
  enter(StepPart::kSilu);
  silu_mul_and_quantize(stream_, gate, up, scheme, ffn_column_ends_, gated, down_input);
  enter(StepPart::kDown);
  const bool last = index + 1 == config_.num_hidden_layers;
  project_and_reduce(down_input, layer.down_proj, ffn_column_ends_,
                     last ? std::nullopt : std::optional(attention_input(index + 1)));
}

NormedInput Transformer::normed_input(const Tensor& norm, const ActivationScheme& scheme) {
  const Tensor normed = scratch_.normed.rows(0, tokens_);
  return {.weight = norm,
          .eps = static_cast<float>(config_.rms_norm_eps),
          .scheme = scheme,
          .normed = normed,
          .out = room_for(normed, scheme, 1)};
}

NormedInput Transformer::attention_input(int64_t layer) {
  const LayerWeights& weights = weights_.layers[layer];
  return normed_input(weights.input_layernorm, common_scheme({&weights.q_proj, &weights.k_proj, &weights.v_proj}));
}

Activations Transformer::room_for(const Tensor& x, const ActivationScheme& scheme, int64_t groups) {
  if (scheme.kind == ActivationScheme::Kind::kNone) return {.values = x, .scales = {}};
  return {.values = front(scratch_.codes, x.shape()), .scales = front(scratch_.code_scales, {x.dim(0), groups})};
}

Activations Transformer::quantized(const Tensor& x, const ActivationScheme& scheme,
                                   std::span<const int64_t> group_ends) {
  const Activations out = room_for(x, scheme, static_cast<int64_t>(group_ends.size()));
  if (scheme.kind != ActivationScheme::Kind::kNone) quantize(stream_, x, scheme, group_ends, out);
  return out;
}

void Transformer::project(const Activations& x, std::span<const LinearOutput> outputs) {
  if (!x.scales.empty()) return linear(stream_, x, outputs);
  const int64_t whole_row[] = {x.values.dim(1)};
  while (!outputs.empty()) {
    // Neighbours with one activation scheme (nearly always all of them) share one pass over x.
    const ActivationScheme& scheme = outputs.front().weight->activations;
    size_t same = 1;
    while (same < outputs.size() && outputs[same].weight->activations == scheme) ++same;
    linear(stream_, quantized(x.values, scheme, whole_row), outputs.first(same));
    outputs = outputs.subspan(same);
  }
}

void Transformer::project_and_reduce(const Activations& x, const Linear& weight, std::span<const int64_t> column_ends,
                                     const std::optional<NormedInput>& next) {
  const Tensor partials = front(scratch_.partials, {scratch_.partials.dim(0), tokens_, config_.hidden_size});
  const Tensor residual = scratch_.residual.rows(0, tokens_);
  linear_over_slices(stream_, x, weight, shard_.leaves(stream_.arithmetic()), column_ends, partials);
  enter(StepPart::kReduce);
  if (!next) return communicator_.reduce_over_slices(stream_, partials, residual);
  communicator_.reduce_and_norm(stream_, partials, residual, *next);
  input_ = next->out;
}

template <typename ValuesOfRank>
Tensor Transformer::gathered(const Tensor& here, const Tensor& all, const ValuesOfRank& values_of_rank) {
  if (shard_.ranks() == 1) return here.reshaped({here.elements()});
  bytes_of_rank_.clear();
  int64_t values = 0;
  for (int rank = 0; rank < shard_.ranks(); ++rank) {
    bytes_of_rank_.push_back(values_of_rank(rank) * int64_t{sizeof(float)});
    values += values_of_rank(rank);
  }
  communicator_.gather(stream_, here, bytes_of_rank_, all.rows(0, values));
  return all.rows(0, values);
}

Tensor Transformer::logits(int64_t first, int64_t n) {
  OCTET_CHECK(n <= logit_rows(), "logits() takes a few rows at a time");
  enter(StepPart::kLogits);
  const Tensor last = scratch_.last_rows.rows(0, n), normed = scratch_.last_normed.rows(0, n);
  const Tensor here = scratch_.logits_here.rows(0, n);
  const Tensor parts = front(scratch_.parts_here, {n, shard_.run().count, 2});

  copy_rows(stream_, scratch_.residual.rows(0, tokens_), batch_.logit_rows.rows(first, first + n), last);
  rms_norm(stream_, last, weights_.norm, config_.rms_norm_eps, normed);
  project({.values = normed, .scales = {}}, {{{&weights_.lm_head, here}}});
  softmax_parts(stream_, here, vocab_ends_, parts);

  const Tensor all =
      gathered(here, scratch_.arrived_logits, [&](int rank) { return n * shard_.vocab_of(rank).size(); });
  logits_ = shard_.ranks() == 1 ? here : scratch_.logits.rows(0, n);
  if (shard_.ranks() > 1) join_columns(stream_, all, rank_ends_, logits_);
  const Tensor all_parts =
      gathered(parts, scratch_.arrived_parts, [&](int rank) { return n * shard_.run_of(rank).count * 2; });
  queue_copy(stream_, all_parts, scratch_.parts_on_host.rows(0, all_parts.elements()));
  return logits_;
}

LogitsRow Transformer::on_host(int64_t i, int64_t place) {
  Tensor row = logits_.rows(i, i + 1);
  if (row.device() != Device::kCpu) {
    row = scratch_.logits_on_host.rows(place, place + 1);
    copy(stream_, logits_.rows(i, i + 1), row);
  }
  return {.logits = {row.as<float>(), static_cast<size_t>(config_.vocab_size)}, .log_sum_exp = log_sum_exp(i)};
}

// Over slices in tree order.
float Transformer::log_sum_exp(int64_t i) const {
  const int64_t rows = logits_.dim(0);
  const float* const parts = scratch_.parts_on_host.as<float>();
  auto leaf = [&](int slice) {
    int rank = 0;
    while (slice >= shard_.run_of(rank).first + shard_.run_of(rank).count) ++rank;
    const SliceRun run = shard_.run_of(rank);
    const float* part = parts + 2 * (rows * run.first + i * run.count + (slice - run.first));
    return SoftmaxPart{part[0], part[1]};
  };
  const SoftmaxPart whole = part_of(root_of(shard_.slices()), shard_.slices(), leaf);
  return static_cast<float>(whole.max + std::log(whole.sum));
}

}  // namespace octet
