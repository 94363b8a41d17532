// Random leaves and what becomes of them, for the tests of collectives: the tree is evaluated here directly over its
// leaves, by recursion, sharing no code with what is tested.
#pragma once

#include <bit>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "kernels/slice_tree.h"
#include "worker/collective/communicator.h"

namespace octet {

inline float from_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
inline uint16_t to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

class SumCase {
 public:
  SumCase(int slices, int64_t tokens, int64_t n, uint32_t seed)
      : slices_(slices),
        tokens_(tokens),
        n_(n),
        leaves_(slices, std::vector<float>(tokens * n)),
        residual_(tokens * n) {
    std::mt19937 random(seed);
    // Magnitudes far apart, so that the order of a sum shows in its bits.
    std::normal_distribution<float> normal;
    for (std::vector<float>& leaf : leaves_) {
      for (float& value : leaf) value = normal(random) * (random() % 2 == 0 ? 1.0f : 300.0f);
    }
    for (uint16_t& value : residual_) value = to_bf16(0.01f * normal(random));
  }

  int64_t tokens() const { return tokens_; }
  int64_t n() const { return n_; }
  const std::vector<uint16_t>& residual() const { return residual_; }

  // The sum over the slices of a node, element j.
  float node_sum(const SliceNode& node, int64_t j) const {
    if (node.level == 0) return leaves_[node.index][j];
    const SliceNode right{node.level - 1, 2 * node.index + 1};
    const float left_sum = node_sum({right.level, right.index - 1}, j);
    return right.index << right.level < slices_ ? left_sum + node_sum(right, j) : left_sum;
  }

  std::vector<uint16_t> expected() const {
    int level = 0;
    while (1 << level < slices_) ++level;
    return finished([&](int64_t j) { return node_sum({level, 0}, j); });
  }

  std::vector<uint16_t> summed_left_to_right() const {
    return finished([&](int64_t j) {
      float sum = 0;
      for (const std::vector<float>& leaf : leaves_) sum += leaf[j];
      return sum;
    });
  }

 private:
  template <typename Sum>
  std::vector<uint16_t> finished(const Sum& sum) const {
    std::vector<uint16_t> result(residual_.size());
    for (size_t j = 0; j < result.size(); ++j)
      result[j] = to_bf16(from_bf16(residual_[j]) + sum(static_cast<int64_t>(j)));
    return result;
  }

  int slices_;
  int64_t tokens_, n_;
  std::vector<std::vector<float>> leaves_;
  std::vector<uint16_t> residual_;
};

// One rank's side of a sum; the residual that it ends with.
inline std::vector<uint16_t> reduce(const SumCase& c, const SliceRun& run, Communicator& communicator, Stream& stream) {
  const std::vector<SliceNode> nodes = maximal_subtrees(run);
  const int64_t elements = c.tokens() * c.n();
  std::vector<float> partials;
  for (const SliceNode& node : nodes) {
    for (int64_t j = 0; j < elements; ++j) partials.push_back(c.node_sum(node, j));
  }
  std::vector<uint16_t> residual = c.residual();
  communicator.reduce_over_slices(
      stream, Tensor(partials.data(), DType::kF32, {static_cast<int64_t>(nodes.size()), c.tokens(), c.n()}),
      Tensor(residual.data(), DType::kBF16, {c.tokens(), c.n()}));
  return residual;
}

inline uint8_t gathered_byte(int rank, int64_t i) { return static_cast<uint8_t>(37 * rank + i * 11 + (i >> 8)); }

inline std::vector<uint8_t> expected_gather(std::span<const int64_t> bytes_of_rank) {
  std::vector<uint8_t> all;
  for (int rank = 0; rank < static_cast<int>(bytes_of_rank.size()); ++rank) {
    for (int64_t i = 0; i < bytes_of_rank[rank]; ++i) all.push_back(gathered_byte(rank, i));
  }
  return all;
}

// One rank's side of a gathering.
inline std::vector<uint8_t> gather(std::span<const int64_t> bytes_of_rank, int rank, Communicator& communicator) {
  std::vector<uint8_t> mine;
  for (int64_t i = 0; i < bytes_of_rank[rank]; ++i) mine.push_back(gathered_byte(rank, i));
  std::vector<uint8_t> all(expected_gather(bytes_of_rank).size(), 0xee);
  communicator.all_gather(mine.data(), bytes_of_rank, all.data());
  return all;
}

}  // namespace octet
