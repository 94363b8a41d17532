// Attention over the paged cache: parallel over (sequence, KV head, tile of query rows), and over ranges of chunks
// where contexts are long and rows few. Decode is bound by reading the cache once, prefill by the dots.
//
// A tile holds the query rows (token, head) that read the same KV head. Each chunk of positions gives every row a
// partial (max, sum, accumulator); partials are merged left to right, at once where one worker has all chunks of a
// tile, from scratch memory where several shared them. Either way the same numbers meet in the same order.
//
// A cache of e4m3 codes is decoded chunk by chunk to BF16, exactly: its scales are factors of scores and of sums.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels/cpu/cpu_ops.h"
#include "kernels/cpu/e4m3_bytes.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/fp8.h"

namespace octet::cpu {
namespace {

constexpr int kBlocksOfChunk = kAttentionChunk / kKvBlockTokens;

// Rows [first_row, first_row + rows) of (token, head) pairs, token-major, of one sequence's tokens and one KV head;
// chunks [first_chunk, end_chunk).
struct Item {
  int64_t first_token;  // of the sequence, in the batch
  int64_t kv_head;
  int64_t first_row;
  int rows;
  int64_t first_chunk;
  int64_t end_chunk;
  int64_t partials;  // index of its first stored (chunk, row) partial, or -1: the item finishes its rows itself
};

class AttentionPass {
 public:
  AttentionPass(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out)
      : stream_(stream),
        kernels_(stream.kernels()),
        positions_(batch.positions.as<int32_t>()),
        sequence_of_(batch.sequence_of.as<int32_t>()),
        block_tables_(batch.block_tables.as<int32_t>()),
        tokens_(batch.tokens()),
        max_blocks_(batch.max_blocks()),
        q_(q.as<uint16_t>()),
        out_(out.as<uint16_t>()),
        cache_(cache),
        codes_(cache.keys.dtype() == DType::kF8E4M3),
        heads_(q.dim(1)),
        kv_heads_(cache.values.dim(1)),
        head_dim_(q.dim(2)),
        heads_per_kv_(heads_ / kv_heads_),
        scale_(static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim_))) * cache.key_scale) {}

  void run() {
    make_items();
    // head_dim multiply-adds twice for every position and row, 16 a nanosecond.
    stream_.pool().parallel_for(static_cast<int64_t>(items_.size()), row_positions_ * head_dim_ / 8,
                                [&](int64_t item, int worker) { run_item(items_[item], worker); });
    if (shared_.empty()) return;
    stream_.pool().parallel_for(static_cast<int64_t>(shared_.size()), partials_ * head_dim_ / 8,
                                [&](int64_t tile, int worker) { merge_shared(shared_[tile], worker); });
  }

 private:
  int64_t position(const Item& item, int row) const {
    return positions_[item.first_token + (item.first_row + row) / heads_per_kv_];
  }
  // Where a row's head starts in q and out.
  int64_t offset(const Item& item, int row) const {
    const int64_t at = item.first_row + row;
    const int64_t head = item.kv_head * heads_per_kv_ + at % heads_per_kv_;
    return ((item.first_token + at / heads_per_kv_) * heads_ + head) * head_dim_;
  }

  static int64_t chunks_up_to(int64_t position) { return position / kAttentionChunk + 1; }

  // Calls body(first_token, end_token) for each run of tokens of one sequence.
  template <typename Body>
  void for_sequences(const Body& body) const {
    for (int64_t first = 0, end = 0; first < tokens_; first = end) {
      while (end < tokens_ && sequence_of_[end] == sequence_of_[first]) ++end;
      body(first, end);
    }
  }

  void make_items() {
    std::vector<Item> tiles;
    int64_t units = 0;  // (tile, chunk) pairs
    for_sequences([&](int64_t first, int64_t end) {
      const int64_t rows = (end - first) * heads_per_kv_;
      const int64_t count = (rows + kernels_.attend_rows - 1) / kernels_.attend_rows;
      for (int64_t head = 0; head < kv_heads_; ++head) {
        for (int64_t t = 0; t < count; ++t) {
          const int64_t row = t * rows / count;
          Item item = {first, head, row, static_cast<int>((t + 1) * rows / count - row), 0, 0, -1};
          item.end_chunk = chunks_up_to(position(item, item.rows - 1));
          row_positions_ += (position(item, item.rows - 1) + 1) * item.rows;
          units += item.end_chunk;
          tiles.push_back(item);
        }
      }
    });
    // Enough items for every thread to end at about the same time; a thread alone shares with nobody.
    const int64_t wanted = stream_.threads() == 1 ? 1 : 4 * stream_.threads();
    const int64_t most_chunks =
        static_cast<int64_t>(tiles.size()) >= wanted ? units : std::max<int64_t>(1, units / wanted);
    for (const Item& tile : tiles) split(tile, most_chunks);
    if (partials_ > 0)
      partial_memory_ = static_cast<float*>(stream_.pool().shared_scratch(partials_ * partial_bytes()));
  }

  void split(const Item& tile, int64_t most_chunks) {
    const int64_t parts = (tile.end_chunk + most_chunks - 1) / most_chunks;
    if (parts <= 1) {
      items_.push_back(tile);
      return;
    }
    shared_.push_back(tile);
    shared_.back().partials = partials_;
    for (int64_t part = 0; part < parts; ++part) {
      Item item = tile;
      item.first_chunk = part * tile.end_chunk / parts;
      item.end_chunk = (part + 1) * tile.end_chunk / parts;
      item.partials = partials_ + item.first_chunk * tile.rows;
      items_.push_back(item);
    }
    partials_ += tile.end_chunk * tile.rows;
  }

  // A stored partial: max, sum, accumulator.
  int64_t partial_bytes() const { return (head_dim_ + 2) * static_cast<int64_t>(sizeof(float)); }
  float* partial(int64_t index) const { return partial_memory_ + index * (head_dim_ + 2); }

  struct Scratch {
    void* q;
    float* scores;
    float* acc;               // of the chunk
    float* total;             // merged so far
    uint16_t *keys, *values;  // [256 * head_dim] each: a chunk of codes, decoded
  };

  Scratch scratch(int worker) {
    const int64_t rows = kernels_.attend_rows;
    const int64_t q = rows * head_dim_ * 4;
    const int64_t scores = rows * kAttentionChunk * 4;
    const int64_t acc = rows * head_dim_ * 4;
    const int64_t decoded = codes_ ? kAttentionChunk * head_dim_ * 2 : 0;
    char* const memory = static_cast<char*>(stream_.pool().scratch(worker, q + scores + 2 * acc + 2 * decoded));
    char* const chunk = memory + q + scores + 2 * acc;
    return {memory,
            reinterpret_cast<float*>(memory + q),
            reinterpret_cast<float*>(memory + q + scores),
            reinterpret_cast<float*>(memory + q + scores + acc),
            reinterpret_cast<uint16_t*>(chunk),
            reinterpret_cast<uint16_t*>(chunk + decoded)};
  }

  // Where a block's elements for one KV head begin: in the cache, or decoded to `room`.
  const uint16_t* elements(const Tensor& cache, int64_t at, uint16_t* room) const {
    if (!codes_) return cache.as<uint16_t>() + at;
    const uint8_t* const codes = cache.as<uint8_t>() + at;
    for (int64_t i = 0; i < kKvBlockTokens * head_dim_; ++i) room[i] = kBf16OfE4m3.v[codes[i]];
    return room;
  }

  void finish(float sum, float* total, uint16_t* out) const {
    if (codes_) {
      for (int64_t d = 0; d < head_dim_; ++d) total[d] *= cache_.value_scale;
    }
    kernels_.finish_attention(sum, total, static_cast<int>(head_dim_), out);
  }

  void pack_queries(const Item& item, void* out) {
    const uint16_t* rows[kMaxTileRows];
    for (int row = 0; row < item.rows; ++row) rows[row] = q_ + offset(item, row);
    kernels_.pack_pairs(rows, item.rows, head_dim_ / 2, kernels_.attend_format(item.rows), out);
  }

  void run_item(const Item& item, int worker) {
    const Scratch memory = scratch(worker);
    pack_queries(item, memory.q);
    float max[kMaxTileRows];
    float sum[kMaxTileRows];
    bool begun[kMaxTileRows] = {};
    for (int64_t chunk = item.first_chunk; chunk < item.end_chunk; ++chunk) {
      int32_t valid[kMaxTileRows];
      float chunk_max[kMaxTileRows];
      float chunk_sum[kMaxTileRows];
      for (int row = 0; row < item.rows; ++row) {
        const int64_t here = position(item, row) + 1 - chunk * kAttentionChunk;
        valid[row] = static_cast<int32_t>(std::clamp<int64_t>(here, 0, kAttentionChunk));
      }
      attend_chunk(item, chunk, valid, memory, chunk_max, chunk_sum);
      for (int row = 0; row < item.rows; ++row) {
        if (valid[row] == 0) continue;
        const float* const acc = memory.acc + row * head_dim_;
        if (item.partials >= 0) {
          float* const to = partial(item.partials + (chunk - item.first_chunk) * item.rows + row);
          to[0] = chunk_max[row];
          to[1] = chunk_sum[row];
          std::memcpy(to + 2, acc, head_dim_ * sizeof(float));
        } else if (!begun[row]) {
          begun[row] = true;
          max[row] = chunk_max[row];
          sum[row] = chunk_sum[row];
          std::memcpy(memory.total + row * head_dim_, acc, head_dim_ * sizeof(float));
        } else {
          kernels_.merge_partials(&max[row], &sum[row], memory.total + row * head_dim_, chunk_max[row], chunk_sum[row],
                                  acc, static_cast<int>(head_dim_));
        }
      }
    }
    if (item.partials >= 0) return;
    for (int row = 0; row < item.rows; ++row) {
      finish(sum[row], memory.total + row * head_dim_, out_ + offset(item, row));
    }
  }

  void attend_chunk(const Item& item, int64_t chunk, const int32_t* valid, const Scratch& memory, float* max,
                    float* sum) {
    const int64_t sequence = sequence_of_[item.first_token];
    const int32_t* const table = block_tables_ + sequence * max_blocks_ + chunk * kBlocksOfChunk;
    const int64_t blocks = (valid[item.rows - 1] + kKvBlockTokens - 1) / kKvBlockTokens;
    const uint16_t* keys[kBlocksOfChunk];
    const uint16_t* values[kBlocksOfChunk];
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t at = (table[b] * kv_heads_ + item.kv_head) * kKvBlockTokens * head_dim_;
      keys[b] = elements(cache_.keys, at, memory.keys + b * kKvBlockTokens * head_dim_);
      values[b] = elements(cache_.values, at, memory.values + b * kKvBlockTokens * head_dim_);
    }
    kernels_.attend_chunk({.q = memory.q,
                           .rows = item.rows,
                           .valid = valid,
                           .key_blocks = keys,
                           .value_blocks = values,
                           .head_dim = static_cast<int>(head_dim_),
                           .scale = scale_,
                           .scores = memory.scores,
                           .max = max,
                           .sum = sum,
                           .acc = memory.acc});
  }

  void merge_shared(const Item& tile, int worker) {
    float* const total = scratch(worker).total;
    for (int row = 0; row < tile.rows; ++row) {
      const float* first = partial(tile.partials + row);
      float max = first[0];
      float sum = first[1];
      std::memcpy(total, first + 2, head_dim_ * sizeof(float));
      for (int64_t chunk = 1; chunk < chunks_up_to(position(tile, row)); ++chunk) {
        const float* const next = partial(tile.partials + chunk * tile.rows + row);
        kernels_.merge_partials(&max, &sum, total, next[0], next[1], next + 2, static_cast<int>(head_dim_));
      }
      finish(sum, total, out_ + offset(tile, row));
    }
  }

  Stream& stream_;
  const KernelTable& kernels_;
  const int32_t* const positions_;
  const int32_t* const sequence_of_;
  const int32_t* const block_tables_;
  const int64_t tokens_;
  const int64_t max_blocks_;
  const uint16_t* const q_;
  uint16_t* const out_;
  const KvLayer& cache_;
  const bool codes_;
  const int64_t heads_;
  const int64_t kv_heads_;
  const int64_t head_dim_;
  const int64_t heads_per_kv_;
  const float scale_;
  std::vector<Item> items_;
  std::vector<Item> shared_;  // tiles whose chunks several items share
  int64_t row_positions_ = 0;
  int64_t partials_ = 0;
  float* partial_memory_ = nullptr;
};

}  // namespace

namespace {

// Where a token's key or value of one head goes: `stride` elements apart, in pairs.
void store(const Tensor& cache, int64_t at, int64_t stride, const uint16_t* bf16, int64_t n, float scale) {
  if (cache.dtype() == DType::kBF16) {
    uint16_t* const to = cache.as<uint16_t>() + at;
    for (int64_t j = 0; j < n; j += 2) std::memcpy(to + j / 2 * stride, bf16 + j, 4);
    return;
  }
  uint8_t* const to = cache.as<uint8_t>() + at;
  const float factor = 1.0f / scale;
  for (int64_t j = 0; j < n; ++j) to[j / 2 * stride + j % 2] = float_to_e4m3(bf16_to_float(bf16[j]) * factor);
}

}  // namespace

void rope_and_cache(Stream& stream, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cos_sin,
                    const AttentionBatch& batch, const Tensor& q_out, const KvLayer& cache) {
  const KernelTable& kernels = stream.kernels();
  const int64_t heads = q.dim(1);
  const int64_t kv_heads = k.dim(1);
  const int head_dim = static_cast<int>(q.dim(2));
  const int32_t* const positions = batch.positions.as<int32_t>();
  const int32_t* const sequence_of = batch.sequence_of.as<int32_t>();
  const int32_t* const tables = batch.block_tables.as<int32_t>();
  stream.pool().parallel_for(q.dim(0), (q.elements() + 2 * k.elements()) / 2, [&](int64_t token, int) {
    const float* const angles = cos_sin.as<float>() + token * head_dim;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t at = (token * heads + head) * head_dim;
      kernels.rope_head(q.as<float>() + at, angles, head_dim, q_out.as<uint16_t>() + at);
    }
    const int64_t position = positions[token];
    const int64_t block = tables[sequence_of[token] * batch.max_blocks() + position / kKvBlockTokens];
    const int64_t slot = position % kKvBlockTokens;
    for (int64_t head = 0; head < kv_heads; ++head) {
      const int64_t at = (token * kv_heads + head) * head_dim;
      const int64_t cached = (block * kv_heads + head) * kKvBlockTokens * head_dim;
      uint16_t key[256], value[256];
      kernels.rope_head(k.as<float>() + at, angles, head_dim, key);
      kernels.to_bf16(v.as<float>() + at, head_dim, value);
      store(cache.keys, cached + slot * 2, 2 * kKvBlockTokens, key, head_dim, cache.key_scale);
      store(cache.values, cached + slot * head_dim, 2, value, head_dim, cache.value_scale);
    }
  });
}

void attention(Stream& stream, const Tensor& q, const KvLayer& cache, const AttentionBatch& batch, const Tensor& out) {
  AttentionPass(stream, q, cache, batch, out).run();
}

}  // namespace octet::cpu
