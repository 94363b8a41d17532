// The row and attention kernels, written once over sixteen lanes. Each instruction family includes this after its
// lanes; the order of every operation is fixed here, so the families give equal bits. Sums inside a row run over
// sixteen strided lanes, which a fixed tree then adds up. Internal linkage throughout, and no library but the
// compiler's.
#pragma once

#include "kernels/cpu/e4m3_bytes.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/packed.h"

#define OCTET_INLINE inline __attribute__((always_inline))

namespace octet::cpu {
namespace {

constexpr float kInfinity = __builtin_inff();

OCTET_INLINE int at_most_16(int64_t n) { return n < 16 ? static_cast<int>(n) : 16; }

// ---- Lane arithmetic

OCTET_INLINE float sum_lanes(Lanes x) {
  alignas(64) float lane[16];
  store(lane, x);
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

OCTET_INLINE float max_lanes(Lanes x) {
  alignas(64) float lane[16];
  store(lane, x);
  for (int width = 8; width >= 1; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] = lane[i] > lane[i + width] ? lane[i] : lane[i + width];
  }
  return lane[0];
}

// e^x within 2 ulp; results below the smallest normal number are 0. x = n ln 2 + r, a polynomial of degree 6 in r
// (relative error 3e-9 on |r| <= ln 2 / 2), and 2^n in two factors so that both ends of the range come out right.
OCTET_INLINE Lanes exponential(Lanes x) {
  x = min_of(splat(89.0f), max_of(splat(-104.0f), x));  // NaN, as second operand, passes
  const Lanes magic = splat(12582912.0f);               // 1.5 * 2^23: adding it rounds to a whole number
  const Lanes n = sub(fma(x, splat(1.44269504f), magic), magic);
  Lanes r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194442e-4f), r);
  Lanes p = splat(0.0013814539415761828f);
  p = fma(p, r, splat(0.00836874544620514f));
  p = fma(p, r, splat(0.04166838899254799f));
  p = fma(p, r, splat(0.1666652113199234f));
  p = fma(p, r, splat(0.4999999403953552f));
  p = fma(mul(r, r), p, r);
  p = add(p, splat(1.0f));
  const Lanes half = sub(fma(n, splat(0.5f), magic), magic);
  return mul(mul(p, power_of_two(half)), power_of_two(sub(n, half)));
}

// ---- Rows

void quantize_group(const uint16_t* x, int64_t n, bool dynamic, float upper_bound, float static_scale, uint8_t* codes,
                    float* scale_out) {
  Lanes largest = zeros();
  for (int64_t i = 0; i < n; i += 16) largest = larger_magnitude(largest, load_bf16_first(x + i, at_most_16(n - i)));
  alignas(64) float lane[16];
  store(lane, largest);
  float amax = lane[0];
  bool nan = amax != amax;
  for (int i = 1; i < 16; ++i) {
    nan = nan || lane[i] != lane[i];
    if (lane[i] > amax) amax = lane[i];
  }
  float scale = static_scale;
  if (dynamic) {
    if (amax > upper_bound) amax = upper_bound;
    scale = amax / 448.0f;
    if (scale < 1.0f / (448.0f * 512.0f)) scale = 1.0f / (448.0f * 512.0f);
  }
  const Lanes factor = splat(1.0f / scale);
  for (int64_t i = 0; i < n; i += 16) {
    const int count = at_most_16(n - i);
    store_e4m3_first(codes + i, mul(load_bf16_first(x + i, count), factor), count);
  }
  *scale_out = nan ? __builtin_nanf("") : scale;
}

void rms_norm_row(const uint16_t* x, const float* weight, int64_t n, float eps, uint16_t* out) {
  const int64_t whole = n / 16 * 16;
  const int tail = static_cast<int>(n - whole);
  Lanes squares = zeros();
  for (int64_t i = 0; i < whole; i += 16) {
    const Lanes v = load_bf16(x + i);
    squares = fma(v, v, squares);
  }
  if (tail > 0) {
    const Lanes v = load_bf16_first(x + whole, tail);
    squares = fma(v, v, squares);
  }
  const float mean = sum_lanes(squares) / static_cast<float>(n);
  const Lanes factor = splat(1.0f / root(mean + eps));
  for (int64_t i = 0; i < whole; i += 16) store_bf16(out + i, mul(mul(load_bf16(x + i), factor), load(weight + i)));
  if (tail > 0) {
    const Lanes v = mul(load_bf16_first(x + whole, tail), factor);
    store_bf16_first(out + whole, mul(v, load_first(weight + whole, tail)), tail);
  }
}

OCTET_INLINE Lanes silu_times(Lanes gate, Lanes up) {
  const Lanes denominator = add(splat(1.0f), exponential(sub(zeros(), gate)));
  return mul(div(gate, denominator), up);
}

void silu_mul_span(const float* gate, const float* up, int64_t n, uint16_t* out) {
  const int64_t whole = n / 16 * 16;
  const int tail = static_cast<int>(n - whole);
  for (int64_t i = 0; i < whole; i += 16) store_bf16(out + i, silu_times(load(gate + i), load(up + i)));
  if (tail > 0) {
    store_bf16_first(out + whole, silu_times(load_first(gate + whole, tail), load_first(up + whole, tail)), tail);
  }
}

void to_bf16_span(const float* x, int64_t n, uint16_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int count = at_most_16(n - i);
    store_bf16_first(out + i, load_first(x + i, count), count);
  }
}

void exp_span(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 16) {
    const int count = at_most_16(n - i);
    store_first(out + i, exponential(load_first(x + i, count)), count);
  }
}

// The postfix program runs once per 64 columns, on a stack of four vectors a level.
void add_tree_sum_span(const float* const* pieces, const int* program, int program_length, int64_t n,
                       uint16_t* residual) {
  constexpr int kColumns = 64;
  Lanes stack[kMaxTreeDepth][kColumns / 16];
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t left = n - begin;
    int depth = 0;
    for (int step = 0; step < program_length; ++step) {
      if (program[step] >= 0) {
        const float* const piece = pieces[program[step]] + begin;
        for (int v = 0; v < kColumns / 16; ++v) {
          const int64_t count = left - 16 * v;
          if (count >= 16) {
            stack[depth][v] = load(piece + 16 * v);
          } else if (count > 0) {
            stack[depth][v] = load_first(piece + 16 * v, static_cast<int>(count));
          }
        }
        ++depth;
      } else {
        --depth;
        for (int v = 0; v < kColumns / 16 && 16 * v < left; ++v) {
          stack[depth - 1][v] = add(stack[depth - 1][v], stack[depth][v]);
        }
      }
    }
    for (int v = 0; v < kColumns / 16 && 16 * v < left; ++v) {
      uint16_t* const to = residual + begin + 16 * v;
      const int count = at_most_16(left - 16 * v);
      if (count == 16) {
        store_bf16(to, add(load_bf16(to), stack[0][v]));
      } else {
        store_bf16_first(to, add(load_bf16_first(to, count), stack[0][v]), count);
      }
    }
  }
}

void softmax_part(const float* x, int64_t n, float* max_out, float* sum_out) {
  const int64_t whole = n / 16 * 16;
  const int tail = static_cast<int>(n - whole);
  Lanes most = splat(-kInfinity);
  for (int64_t i = 0; i < whole; i += 16) most = max_of(most, load(x + i));
  if (tail > 0) most = max_of(most, keep_first(load_first(x + whole, tail), tail, -kInfinity));
  const float max = max_lanes(most);
  Lanes sum = zeros();
  for (int64_t i = 0; i < whole; i += 16) sum = add(sum, exponential(sub(load(x + i), splat(max))));
  if (tail > 0) {
    const Lanes e = exponential(sub(load_first(x + whole, tail), splat(max)));
    sum = add(sum, keep_first(e, tail, 0.0f));
  }
  *max_out = max;
  *sum_out = sum_lanes(sum);
}

void rope_head(const float* x, const float* cos_sin, int head_dim, uint16_t* out) {
  const int half = head_dim / 2;
  for (int j = 0; j < half; j += 16) {
    const int count = at_most_16(half - j);
    Lanes cosine, sine;
    if (count == 16) {
      load_interleaved(cos_sin + 2 * j, cosine, sine);
    } else {
      float padded[32] = {};
      __builtin_memcpy(padded, cos_sin + 2 * j, 2 * count * sizeof(float));
      load_interleaved(padded, cosine, sine);
    }
    const Lanes first = load_first(x + j, count);
    const Lanes second = load_first(x + half + j, count);
    store_bf16_first(out + j, fma(first, cosine, sub(zeros(), mul(second, sine))), count);
    store_bf16_first(out + half + j, fma(second, cosine, mul(first, sine)), count);
  }
}

// ---- Activations for dots

void decode_e4m3(const uint8_t* codes, int64_t count, uint16_t* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = kBf16OfE4m3.v[codes[i]];
}

void pack_pairs(const uint16_t* const* rows, int count, int64_t pairs, PairFormat format, void* out) {
  for (int row = 0; row < count; ++row) {
    const uint16_t* const from = rows[row];
    if (format == PairFormat::kBf16) {
      uint16_t* const to = static_cast<uint16_t*>(out) + 2 * row;
      for (int64_t k = 0; k < pairs; ++k) __builtin_memcpy(to + 2 * k * count, from + 2 * k, 4);
    } else {
      // Both floats in one store: the odd element's bits below the even one's.
      uint64_t* const to = static_cast<uint64_t*>(out) + row;
      for (int64_t k = 0; k < pairs; ++k) {
        uint32_t pair;
        __builtin_memcpy(&pair, from + 2 * k, 4);
        to[k * count] = (pair & 0xFFFF0000) | static_cast<uint64_t>(pair) << 48;
      }
    }
  }
}

// ---- Dots in FP32. A source yields, for K pair k, P vectors of sixteen outputs' weights, odd and even.

template <int P>
struct ExpandedSource {
  const float* groups;
  const uint8_t* next;
  OCTET_INLINE void fetch_ahead(int64_t k) const { __builtin_prefetch(next + k * 64, 0, 2); }  // as far as L2
  OCTET_INLINE void load_odd(int64_t k, Lanes (&w)[P]) const {
    for (int p = 0; p < P; ++p) w[p] = load(groups + k * (kExpandedGroup / 4) + 16 * p);
  }
  OCTET_INLINE void load_even(int64_t k, Lanes (&w)[P]) const {
    for (int p = 0; p < P; ++p) w[p] = load(groups + k * (kExpandedGroup / 4) + 32 + 16 * p);
  }
};

// P runs of sixteen BF16 pairs, from one K pair to the next `stride` bytes further.
template <int P>
struct Bf16Source {
  const uint8_t* runs[P];
  const uint8_t* next[P];
  int64_t stride;
  OCTET_INLINE void load(int64_t k, Pairs (&w)[P]) const {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      __builtin_prefetch(next[p] + k * stride);
      w[p] = load_pairs(runs[p] + k * stride);
    }
  }
};

// P / 2 panels of FP8 groups.
template <int P>
struct Fp8Source {
  const uint8_t* panels[P / 2];
  const uint8_t* next[P / 2];
  Fp8Tables tables;
  OCTET_INLINE void load(int64_t k, Pairs (&w)[P]) const {
#pragma GCC unroll 4
    for (int p = 0; p < P / 2; ++p) {
      __builtin_prefetch(next[p] + k * kFp8Group);
      load_fp8_group(tables, panels[p] + k * kFp8Group, w[2 * p], w[2 * p + 1]);
    }
  }
};

struct Fp32Dots {
  static constexpr PairFormat kFormat = PairFormat::kF32;

  template <int R, int P, typename Source>
  static OCTET_INLINE void run(const Source& source, const void* packed, int64_t pairs, Lanes (&acc)[R][P]) {
    const float* x = static_cast<const float*>(packed);
    for (int64_t k = 0; k < pairs; ++k, x += 2 * R) {
      Pairs w[P];
      source.load(k, w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = fma(splat(x[2 * r]), odd_of(w[p]), acc[r][p]);
      }
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = fma(splat(x[2 * r + 1]), even_of(w[p]), acc[r][p]);
      }
    }
  }

  template <int R, int P>
  static OCTET_INLINE void run(const ExpandedSource<P>& source, const void* packed, int64_t pairs, Lanes (&acc)[R][P]) {
    const float* x = static_cast<const float*>(packed);
    for (int64_t k = 0; k < pairs; ++k, x += 2 * R) {
      Lanes w[P];
      source.fetch_ahead(k);
      source.load_odd(k, w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = fma(splat(x[2 * r]), w[p], acc[r][p]);
      }
      source.load_even(k, w);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) acc[r][p] = fma(splat(x[2 * r + 1]), w[p], acc[r][p]);
      }
    }
  }
};

// Loads or zeroes the accumulators of R rows and P sixteen-output vectors, adds the dots, stores them.
// out(r, p) says where a vector lives.
template <typename Dots, int R, int P, typename Source, typename Where>
OCTET_INLINE void dot_block(const Source& source, const void* x, int64_t pairs, bool accumulate, const Where& where) {
  Lanes acc[R][P];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) acc[r][p] = accumulate ? load(where(r, p)) : zeros();
  }
  Dots::template run<R, P>(source, x, pairs, acc);
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store(where(r, p), acc[r][p]);
  }
}

// Panels [first, first + N) of a tile, which read packed weights.
template <typename Dots, int R, int N>
OCTET_INLINE void dot_panels_bf16(const DotTile& tile, int first) {
  Bf16Source<2 * N> source;
  source.stride = kBf16Group;
  for (int p = 0; p < 2 * N; ++p) {
    source.runs[p] = tile.weights[first + p / 2] + p % 2 * 64;
    source.next[p] = tile.next[first + p / 2] + p % 2 * 64;
  }
  dot_block<Dots, R, 2 * N>(source, tile.x, tile.pairs, tile.accumulate, [&](int r, int p) {
    return tile.acc + (first + p / 2) * tile.acc_stride + r * kPanel + p % 2 * 16;
  });
}

template <typename Dots, int R, int N>
OCTET_INLINE void dot_panels_fp8(const DotTile& tile, int first) {
  Fp8Source<2 * N> source;
  source.tables = load_fp8_tables();
  for (int p = 0; p < N; ++p) {
    source.panels[p] = tile.weights[first + p];
    source.next[p] = tile.next[first + p];
  }
  dot_block<Dots, R, 2 * N>(source, tile.x, tile.pairs, tile.accumulate, [&](int r, int p) {
    return tile.acc + (first + p / 2) * tile.acc_stride + r * kPanel + p % 2 * 16;
  });
}

// Expanded FP32 groups; P sixteen-output vectors at a time.
template <int R, int P>
OCTET_INLINE void dot_panel_expanded(const DotTile& tile, int panel) {
  for (int half = 0; half < 2; half += P) {
    const ExpandedSource<P> source = {reinterpret_cast<const float*>(tile.weights[panel]) + 16 * half,
                                      tile.next[panel]};
    dot_block<Fp32Dots, R, P>(source, tile.x, tile.pairs, tile.accumulate, [&](int r, int p) {
      return tile.acc + panel * tile.acc_stride + r * kPanel + (half + p) * 16;
    });
  }
}

OCTET_INLINE void store_expanded(float* out, Pairs first, Pairs second) {
  store(out, odd_of(first));
  store(out + 16, odd_of(second));
  store(out + 32, even_of(first));
  store(out + 48, even_of(second));
}

void expand_bf16(const uint8_t* weights, int64_t pairs, void* out) {
  for (int64_t k = 0; k < pairs; ++k) {
    const uint8_t* const group = weights + k * kBf16Group;
    store_expanded(static_cast<float*>(out) + k * (kExpandedGroup / 4), load_pairs(group), load_pairs(group + 64));
  }
}

void expand_fp8(const uint8_t* weights, int64_t pairs, void* out) {
  const Fp8Tables tables = load_fp8_tables();
  for (int64_t k = 0; k < pairs; ++k) {
    Pairs first, second;
    load_fp8_group(tables, weights + k * kFp8Group, first, second);
    store_expanded(static_cast<float*>(out) + k * (kExpandedGroup / 4), first, second);
  }
}

void finish_tile(const FinishTile& tile) {
  for (int row = 0; row < tile.rows; ++row) {
    for (int c = 0; c < tile.columns; c += 16) {
      const int count = at_most_16(tile.columns - c);
      const int64_t at = row * kPanel + c;
      Lanes v = load(tile.acc + at);
      if (tile.weight_scale != nullptr) v = mul(v, load_first(tile.weight_scale + c, count));
      if (tile.x_scale != nullptr) v = mul(v, splat(tile.x_scale[row * tile.x_scale_stride]));
      for (int left = 0; left < tile.left_count; ++left) v = add(load(tile.lefts[left] + at), v);
      store_first(tile.out + row * tile.out_stride + c, v, count);
    }
  }
}

// ---- Attention

// Scores of key blocks [block, blocks), P at a time.
template <typename Dots, int R, int P>
OCTET_INLINE void score_blocks(const AttendChunk& chunk, int block, int blocks) {
  for (; block + P <= blocks; block += P) {
    Bf16Source<P> source;
    source.stride = 64;
    for (int p = 0; p < P; ++p) {
      const int after = block + P + p < blocks ? block + P + p : block + p;
      source.runs[p] = reinterpret_cast<const uint8_t*>(chunk.key_blocks[block + p]);
      source.next[p] = reinterpret_cast<const uint8_t*>(chunk.key_blocks[after]);
    }
    Lanes acc[R][P];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) acc[r][p] = zeros();
    }
    Dots::template run<R, P>(source, chunk.q, chunk.head_dim / 2, acc);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        store(chunk.scores + r * 256 + (block + p) * 16, mul(acc[r][p], splat(chunk.scale)));
      }
    }
  }
  if constexpr (P > 1) score_blocks<Dots, R, P / 2>(chunk, block, blocks);
}

// Scores of one row become exp(score - max); positions beyond the row's own are never looked at.
OCTET_INLINE void softmax_row(float* scores, int valid, float* max_out, float* sum_out) {
  const int whole = valid / 16 * 16;
  const int tail = valid - whole;
  Lanes most = splat(-kInfinity);
  for (int i = 0; i < whole; i += 16) most = max_of(most, load(scores + i));
  if (tail > 0) most = max_of(most, keep_first(load(scores + whole), tail, -kInfinity));
  const float max = max_lanes(most);
  Lanes sum = zeros();
  for (int i = 0; i < whole; i += 16) {
    const Lanes p = exponential(sub(load(scores + i), splat(max)));
    store(scores + i, p);
    sum = add(sum, p);
  }
  if (tail > 0) {
    const Lanes p = keep_first(exponential(sub(load(scores + whole), splat(max))), tail, 0.0f);
    store(scores + whole, p);
    sum = add(sum, p);
  }
  *max_out = max;
  *sum_out = sum_lanes(sum);
}

// acc += p v over positions [begin, end), R rows from `row`, D vectors of head elements from `element`.
template <int R, int D>
OCTET_INLINE void weigh_values(const AttendChunk& chunk, int row, int element, int begin, int end) {
  float* const acc_at = chunk.acc + static_cast<int64_t>(row) * chunk.head_dim + element;
  const float* const p = chunk.scores + row * 256;
  Lanes acc[R][D];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) acc[r][d] = load(acc_at + r * chunk.head_dim + 16 * d);
  }
  for (int at = begin; at < end; ++at) {
    const uint16_t* const v_at = chunk.value_blocks[at / 16] + at % 16 * chunk.head_dim + element;
    Lanes v[D];
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) v[d] = load_bf16(v_at + 16 * d);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int d = 0; d < D; ++d) acc[r][d] = fma(splat(p[r * 256 + at]), v[d], acc[r][d]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int d = 0; d < D; ++d) store(acc_at + r * chunk.head_dim + 16 * d, acc[r][d]);
  }
}

// The last head elements, where head_dim is no multiple of 16.
inline void weigh_values_tail(const AttendChunk& chunk, int row, int element, int begin, int end) {
  const int count = chunk.head_dim - element;
  float* const acc_at = chunk.acc + static_cast<int64_t>(row) * chunk.head_dim + element;
  Lanes acc = load_first(acc_at, count);
  for (int at = begin; at < end; ++at) {
    const uint16_t* const v_at = chunk.value_blocks[at / 16] + at % 16 * chunk.head_dim + element;
    acc = fma(splat(chunk.scores[row * 256 + at]), load_bf16_first(v_at, count), acc);
  }
  store_first(acc_at, acc, count);
}

template <int R>
OCTET_INLINE void weigh_values_rows(const AttendChunk& chunk, int row, int begin, int end) {
  int element = 0;
  for (; element + 16 * kValueVectors <= chunk.head_dim; element += 16 * kValueVectors) {
    weigh_values<R, kValueVectors>(chunk, row, element, begin, end);
  }
  for (; element + 16 <= chunk.head_dim; element += 16) weigh_values<R, 1>(chunk, row, element, begin, end);
  if (element < chunk.head_dim) {
    for (int r = 0; r < R; ++r) weigh_values_tail(chunk, row + r, element, begin, end);
  }
}

template <int R>
OCTET_INLINE void weigh_values_rest(const AttendChunk& chunk, int row, int begin, int end) {
  if constexpr (R > 0) {
    if (chunk.rows - row == R) return weigh_values_rows<R>(chunk, row, begin, end);
    weigh_values_rest<R - 1>(chunk, row, begin, end);
  }
}

// Rows [row, chunk.rows) over positions that all of them read.
void weigh_values_range(const AttendChunk& chunk, int row, int begin, int end) {
  for (; chunk.rows - row >= kValueRows; row += kValueRows) weigh_values_rows<kValueRows>(chunk, row, begin, end);
  weigh_values_rest<kValueRows - 1>(chunk, row, begin, end);
}

// Everything after the scores. Rows of later tokens read more positions: the common ones first, then each row's own.
void finish_chunk(const AttendChunk& chunk) {
  int row = 0;
  while (row < chunk.rows && chunk.valid[row] == 0) ++row;
  for (int r = row; r < chunk.rows; ++r) {
    softmax_row(chunk.scores + r * 256, chunk.valid[r], &chunk.max[r], &chunk.sum[r]);
    float* const acc = chunk.acc + static_cast<int64_t>(r) * chunk.head_dim;
    for (int d = 0; d < chunk.head_dim; ++d) acc[d] = 0.0f;
  }
  for (int begin = 0; row < chunk.rows;) {
    const int end = chunk.valid[row];
    weigh_values_range(chunk, row, begin, end);
    begin = end;
    while (row < chunk.rows && chunk.valid[row] == end) ++row;
  }
}

void merge_partials(float* max, float* sum, float* acc, float next_max, float next_sum, const float* next_acc,
                    int head_dim) {
  const float most = *max > next_max ? *max : next_max;
  alignas(64) float change[16] = {*max - most, next_max - most};
  store(change, exponential(load(change)));
  const Lanes ours = splat(change[0]);
  const Lanes theirs = splat(change[1]);
  *max = most;
  alignas(64) float sums[16];
  store(sums, fma(splat(next_sum), theirs, mul(splat(*sum), ours)));
  *sum = sums[0];
  for (int d = 0; d < head_dim; d += 16) {
    const int count = at_most_16(head_dim - d);
    const Lanes merged = fma(load_first(next_acc + d, count), theirs, mul(load_first(acc + d, count), ours));
    store_first(acc + d, merged, count);
  }
}

void finish_attention(float sum, const float* acc, int head_dim, uint16_t* out) {
  for (int d = 0; d < head_dim; d += 16) {
    const int count = at_most_16(head_dim - d);
    store_bf16_first(out + d, div(load_first(acc + d, count), splat(sum)), count);
  }
}

}  // namespace
}  // namespace octet::cpu
