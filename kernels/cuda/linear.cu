// Linear layers in the order that numerics ask for: a block has 32 outputs of 8 tokens, a thread one of them, whose sum
// visits K in pairs. Weights and activations come to shared memory tile by tile, decoded on the way.
//
// Weights lie row by row, [out_features, in_features], padded to whole panels: what a GEMM library, tensor core tiles
// and kernels that stream rows at the speed of memory all read, so one copy of the weights serves every mode. Fast mode
// turns to skinny_linear.h for few tokens, to gemm.h for more.
#include <algorithm>
#include <vector>

#include "kernels/backend.h"
#include "kernels/cuda/arithmetic.cuh"
#include "kernels/cuda/cuda_ops.h"
#include "kernels/cuda/gemm.h"
#include "kernels/cuda/queue.h"
#include "kernels/cuda/skinny_linear.h"

namespace octet::cuda {
namespace {

constexpr int kOutputs = 32;
constexpr int kTokens = 8;
constexpr int kColumns = 64;  // of a tile

// After the entries of sum_program(): the result is one of the output's nodes.
constexpr int kStore = -2;

struct Dots {
  const void* x;
  const float* x_scales;  // [tokens, leaves], or null
  const void* weight;
  const float* weight_scale;  // [outputs], or null
  float* out;                 // [nodes, tokens, outputs]
  int64_t tokens, columns, outputs;
  const int64_t* leaf_ends;  // columns where leaves end
  int64_t leaves;
  const int* program;  // leaves, kAdd, kStore
  int program_length;
};

template <typename X, typename W>
struct Tiles {
  float x[kTokens][kColumns];
  float w[kOutputs][kColumns + 1];  // so that the threads of a warp read different banks

  // Columns [first, first + count) of the block's tokens and outputs; zeros beyond the last of them.
  __device__ void load(const Dots& a, int64_t token, int64_t output, int64_t first, int count) {
    for (int i = threadIdx.x; i < kTokens * kColumns; i += blockDim.x) {
      const int64_t row = token + i / kColumns;
      const bool there = row < a.tokens && i % kColumns < count;
      const int64_t at = row * a.columns + first + i % kColumns;
      x[i / kColumns][i % kColumns] = there ? decode(static_cast<const X*>(a.x)[at]) : 0.0f;
    }
    for (int i = threadIdx.x; i < kOutputs * kColumns; i += blockDim.x) {
      const int64_t row = output + i / kColumns;
      const bool there = row < a.outputs && i % kColumns < count;
      const int64_t at = row * a.columns + first + i % kColumns;
      w[i / kColumns][i % kColumns] = there ? decode(static_cast<const W*>(a.weight)[at]) : 0.0f;
    }
  }
};

template <typename X, typename W>
__global__ void dots_kernel(Dots a) {
  __shared__ Tiles<X, W> tiles;
  const int my_token = threadIdx.x / kOutputs, my_output = threadIdx.x % kOutputs;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kOutputs, output = first_output + my_output;
  const int64_t first_token = static_cast<int64_t>(blockIdx.y) * kTokens, token = first_token + my_token;
  const bool there = token < a.tokens && output < a.outputs;
  float stack[kMaxSumDepth];
  int depth = 0;
  int64_t node = 0;
  for (int step = 0; step < a.program_length; ++step) {
    const int leaf = a.program[step];
    if (leaf == kAdd) {
      --depth;
      stack[depth - 1] += stack[depth];
      continue;
    }
    if (leaf == kStore) {
      --depth;
      if (there) a.out[(node * a.tokens + token) * a.outputs + output] = stack[depth];
      ++node;
      continue;
    }
    const int64_t end = a.leaf_ends[leaf];
    float sum = 0;
    for (int64_t at = leaf == 0 ? 0 : a.leaf_ends[leaf - 1]; at < end; at += kColumns) {
      const int count = lesser(kColumns, end - at);
      tiles.load(a, first_token, first_output, at, count);
      __syncthreads();
      for (int k = 0; k < count; k += 2) {
        sum = __fmaf_rn(tiles.x[my_token][k + 1], tiles.w[my_output][k + 1], sum);
        sum = __fmaf_rn(tiles.x[my_token][k], tiles.w[my_output][k], sum);
      }
      __syncthreads();
    }
    if (there && a.weight_scale != nullptr) sum *= a.weight_scale[output];
    if (there && a.x_scales != nullptr) sum *= a.x_scales[token * a.leaves + leaf];
    stack[depth++] = sum;
  }
}

bool is_skinny(const Stream& stream, const Activations& x, const Linear& weight) {
  return stream.arithmetic() == Arithmetic::kFast && fits_skinny_linear(*stream.queue(), x, weight);
}

// Whether fast mode computes whole rows' sums as a product. No checkpoint has e4m3 inputs of BF16 weights.
bool is_product(const Stream& stream, const Activations& x, const Linear& weight, std::span<const int64_t> leaf_ends) {
  return stream.arithmetic() == Arithmetic::kFast && leaf_ends.size() == 1 &&
         (x.values.dtype() == DType::kBF16 || weight.weight.dtype() == DType::kF8E4M3);
}

void run(Stream& stream, const Activations& x, const Linear& weight, std::span<const int64_t> leaf_ends,
         std::span<const int> program, float* out) {
  Queue& queue = queue_of(stream);
  const bool codes = x.values.dtype() == DType::kF8E4M3;
  const bool weight_codes = weight.weight.dtype() == DType::kF8E4M3;
  const float* const x_scales = codes ? x.scales.as<float>() : nullptr;
  const float* const weight_scales = weight.weight_scale.empty() ? nullptr : weight.weight_scale.as<float>();
  if (is_product(stream, x, weight, leaf_ends)) {
    return multiply(queue, {.x = x.values.data(),
                            .x_type = x.values.dtype(),
                            .x_scales = x_scales,
                            .weight = weight.weight.data(),
                            .weight_type = weight.weight.dtype(),
                            .weight_scales = weight_scales,
                            .out = out,
                            .tokens = x.values.dim(0),
                            .outputs = weight.out_features,
                            .columns = weight.in_features});
  }
  const Dots dots = {.x = x.values.data(),
                     .x_scales = x_scales,
                     .weight = weight.weight.data(),
                     .weight_scale = weight_scales,
                     .out = out,
                     .tokens = x.values.dim(0),
                     .columns = weight.in_features,
                     .outputs = weight.out_features,
                     .leaf_ends = queue.constant(leaf_ends),
                     .leaves = static_cast<int64_t>(leaf_ends.size()),
                     .program = queue.constant(program),
                     .program_length = static_cast<int>(program.size())};
  const auto kernel = codes ? (weight_codes ? dots_kernel<uint8_t, uint8_t> : dots_kernel<uint8_t, uint16_t>)
                            : (weight_codes ? dots_kernel<uint16_t, uint8_t> : dots_kernel<uint16_t, uint16_t>);
  queue.launch(kernel, dim3(blocks_for(dots.outputs, kOutputs), blocks_for(dots.tokens, kTokens)), kOutputs * kTokens,
               dots);
}

}  // namespace

void pack_rows(Stream& stream, const Tensor& raw, int64_t first_row, const Linear& weight) {
  const int64_t bytes = raw.dim(0) * weight.in_features;
  Tensor rows(static_cast<char*>(weight.weight.data()) + first_row * weight.in_features * size_of(raw.dtype()),
              raw.dtype(), raw.shape(), Device::kCuda);
  if (bytes > 0) cuda::copy(stream, raw, rows);
}

void linear(Stream& stream, const Activations& x, std::span<const LinearOutput> outputs) {
  const int64_t whole[] = {x.values.dim(1)};
  const int program[] = {0, kStore};
  std::vector<LinearOutput> skinny;
  for (const LinearOutput& output : outputs) {
    if (is_skinny(stream, x, *output.weight)) {
      skinny.push_back(output);
    } else {
      run(stream, x, *output.weight, whole, program, output.out.as<float>());
    }
  }
  if (!skinny.empty()) skinny_linear(queue_of(stream), x, skinny);
}

void linear_over_slices(Stream& stream, const Activations& x, const Linear& weight, const SliceRun& run_of_slices,
                        std::span<const int64_t> column_ends, const Tensor& partials) {
  if (column_ends.size() == 1 && is_skinny(stream, x, weight)) {
    const LinearOutput output = {&weight, partials};
    return skinny_linear(queue_of(stream), x, {&output, 1});
  }
  std::vector<int> program;
  int next = 0;  // slice of the run
  for (const SliceNode& node : maximal_subtrees(run_of_slices)) {
    const int end = std::min((node.index + 1) << node.level, run_of_slices.total) - run_of_slices.first;
    std::vector<SliceNode> slices;
    for (int i = next; i < end; ++i) slices.push_back({0, run_of_slices.first + i});
    for (const int entry : sum_program(slices, node, run_of_slices.total)) {
      program.push_back(entry == kAdd ? kAdd : next + entry);
    }
    program.push_back(kStore);
    next = end;
  }
  run(stream, x, weight, column_ends, program, partials.as<float>());
}

}  // namespace octet::cuda
