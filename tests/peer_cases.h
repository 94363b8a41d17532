// A rank's side of sums on its device, for the tests of peer memory with ranks as threads and as processes.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/ops.h"
#include "tests/collective_cases.h"

namespace octet {

class DeviceCase {
 public:
  DeviceCase(const SumCase& c, const SliceRun& run, Stream& stream)
      : stream_(stream), tokens_(c.tokens()), n_(c.n()), initial_(c.residual()) {
    const std::vector<SliceNode> nodes = maximal_subtrees(run);
    std::vector<float> partials;
    for (const SliceNode& node : nodes) {
      for (int64_t j = 0; j < tokens_ * n_; ++j) partials.push_back(c.node_sum(node, j));
    }
    partials_ = put(partials, DType::kF32, {std::ssize(nodes), tokens_, n_});
    residual_ = put(initial_, DType::kBF16, {tokens_, n_});
    std::vector<float> weight;
    for (int64_t j = 0; j < n_; ++j) weight.push_back(std::sin(static_cast<float>(j)));
    weight_ = put(weight, DType::kF32, {n_});
  }

  // The residual as it was before any sum.
  void reset() { copy(stream_, Tensor(initial_.data(), DType::kBF16, residual_.shape()), residual_); }

  Stream& stream() const { return stream_; }
  const Tensor& partials() const { return partials_; }
  const Tensor& residual() const { return residual_; }
  const Tensor& weight() const { return weight_; }  // of a norm
  std::vector<uint16_t> result() const { return read<uint16_t>(residual_); }

  template <typename T>
  std::vector<T> read(const Tensor& there) const {
    std::vector<T> here(there.elements());
    copy(stream_, there, Tensor(here.data(), there.dtype(), there.shape()));
    return here;
  }

 private:
  template <typename T>
  Tensor put(std::vector<T>& values, DType dtype, Shape shape) {
    memory_.emplace_back(std::ssize(values) * size_of(dtype), stream_);
    const Tensor there = memory_.back().tensor(dtype, shape);
    copy(stream_, Tensor(values.data(), dtype, shape), there);
    return there;
  }

  Stream& stream_;
  const int64_t tokens_, n_;
  std::vector<uint16_t> initial_;
  std::vector<Buffer> memory_;
  Tensor partials_, residual_, weight_;
};

// What a layer after a sum reads.
struct Normed {
  std::vector<uint16_t> residual, rows;
  std::vector<uint8_t> codes;
  std::vector<float> scales;
  bool operator==(const Normed&) const = default;
};

// Between what a rank allocates and its next sum: where ranks are threads on one GPU, nobody may be inside a sum while
// another allocates (make_peer_communicator()). What is freed after a sum holds nobody up.
inline void meet_before_sums(Communicator& communicator) { communicator.barrier(); }

enum Norming { kFused, kOwnOp, kSeparate };

// Sums the case and normalises its rows: by reduce_and_norm(), by the op for norm and quantisation behind the sum, or
// by the op of each part.
inline Normed normed(DeviceCase& mine, const ActivationScheme& scheme, Norming norming, Communicator& communicator) {
  constexpr float kEps = 1e-5f;
  Stream& stream = mine.stream();
  const Shape shape = mine.residual().shape();
  const bool quantised = scheme.kind != ActivationScheme::Kind::kNone;
  const Buffer rows(shape.elements() * 2, stream), codes(shape.elements(), stream), scales(shape[0] * 4, stream);
  const Tensor rows_there = rows.tensor(DType::kBF16, shape);
  const Activations out = quantised ? Activations{.values = codes.tensor(DType::kF8E4M3, shape),
                                                  .scales = scales.tensor(DType::kF32, {shape[0], 1})}
                                    : Activations{.values = rows_there, .scales = {}};
  const NormedInput next = {.weight = mine.weight(), .eps = kEps, .scheme = scheme, .normed = rows_there, .out = out};
  mine.reset();
  meet_before_sums(communicator);
  if (norming == kFused) {
    communicator.reduce_and_norm(stream, mine.partials(), mine.residual(), next);
  } else {
    communicator.reduce_over_slices(stream, mine.partials(), mine.residual());
  }
  if (norming == kOwnOp) rms_norm_and_quantize(stream, mine.residual(), next);
  if (norming == kSeparate) {
    const int64_t whole_row[] = {shape[1]};
    rms_norm(stream, mine.residual(), mine.weight(), kEps, rows_there);
    if (quantised) quantize(stream, rows_there, scheme, whole_row, out);
  }
  Normed result = {.residual = mine.result(), .rows = {}, .codes = {}, .scales = {}};
  if (quantised) {
    result.codes = mine.read<uint8_t>(out.values);
    result.scales = mine.read<float>(out.scales);
  } else {
    result.rows = mine.read<uint16_t>(rows_there);
  }
  return result;
}

}  // namespace octet
