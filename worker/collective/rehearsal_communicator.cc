#include "worker/collective/rehearsal_communicator.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "kernels/ops.h"

namespace octet {
namespace {

constexpr int64_t kGrain = 32;  // shares begin at whole cache lines

int64_t share_of(int64_t elements, int64_t ranks) {
  const int64_t share = (elements + ranks - 1) / ranks;
  return (share + kGrain - 1) / kGrain * kGrain;
}

std::vector<SliceNode> all_pieces(std::span<const SliceRun> runs) {
  std::vector<SliceNode> all;
  for (const SliceRun& run : runs) {
    const std::vector<SliceNode> trees = maximal_subtrees(run);
    all.insert(all.end(), trees.begin(), trees.end());
  }
  return all;
}

// Each rank's part of a gathering has the same bytes from its front on, again and again where there are fewer of them:
// put(at, count) puts the first `count` of them at byte `at` of what all ranks have.
template <typename Put>
void deal_out(std::span<const int64_t> bytes_of_rank, int64_t most, const Put& put) {
  int64_t at = 0;
  for (const int64_t bytes : bytes_of_rank) {
    for (int64_t done = 0; done < bytes; done += most) put(at + done, std::min(most, bytes - done));
    at += bytes;
  }
}

}  // namespace

int64_t RehearsalCommunicator::bytes(std::span<const SliceRun> runs, int rank, int64_t max_elements) {
  const auto ranks = std::ssize(runs);
  if (ranks == 1) return 0;
  const int64_t peers = std::ssize(all_pieces(runs)) - std::ssize(maximal_subtrees(runs[rank]));
  // The most of a piece that is read at once: all of it in a sum of one shot, else a share.
  const int64_t most = std::max(std::min(max_elements, kOneShotElements), share_of(max_elements, ranks));
  return std::max(peers * most * size_of(DType::kF32), max_elements * size_of(DType::kBF16));
}

RehearsalCommunicator::RehearsalCommunicator(Stream& stream, std::vector<SliceRun> runs, int rank, int64_t max_elements,
                                             RandomValues& values)
    : runs_(std::move(runs)),
      rank_(rank),
      values_(values),
      program_(sum_program(all_pieces(runs_), root_of(runs_[0].total), runs_[0].total)),
      peers_(bytes(runs_, rank, max_elements), stream) {
  for (const SliceRun& run : runs_) pieces_of_rank_.push_back(std::ssize(maximal_subtrees(run)));
  if (size() > 1) values_.fill(stream, peers_.tensor(DType::kBF16, {peers_.bytes() / size_of(DType::kBF16)}));
}

void RehearsalCommunicator::all_gather(const void* mine, std::span<const int64_t> bytes_of_rank, void* all) {
  const int64_t own = bytes_of_rank[rank_];
  const int64_t most = own > 0 ? own : values_.most_elements() * size_of(DType::kBF16);
  deal_out(bytes_of_rank, most, [&](int64_t at, int64_t count) {
    const void* from = own > 0 ? mine : values_.next(DType::kBF16, {count / size_of(DType::kBF16)}).data();
    std::memcpy(static_cast<char*>(all) + at, from, static_cast<size_t>(count));
  });
}

void RehearsalCommunicator::gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank,
                                   const Tensor& all) {
  const int64_t own = bytes_of_rank[rank_];
  void* const from = own > 0 ? mine.data() : peers_.data();
  deal_out(bytes_of_rank, own > 0 ? own : peers_.bytes(), [&](int64_t at, int64_t count) {
    copy(stream, Tensor(from, DType::kU8, {count}, stream.device()),
         Tensor(static_cast<char*>(all.data()) + at, DType::kU8, {count}, stream.device()));
  });
}

// Elements [begin, end) of all ranks' pieces.
std::vector<Tensor> RehearsalCommunicator::pieces(const Tensor& partials, int64_t begin, int64_t end) const {
  const int64_t elements = partials.dim(1) * partials.dim(2);
  std::vector<Tensor> pieces;
  float* peer = static_cast<float*>(peers_.data());
  for (int r = 0; r < size(); ++r) {
    for (int64_t piece = 0; piece < pieces_of_rank_[r]; ++piece) {
      float* const data = r == rank_ ? partials.as<float>() + piece * elements + begin : peer;
      if (r != rank_) peer += end - begin;
      pieces.emplace_back(data, DType::kF32, Shape{1, end - begin}, partials.device());
    }
  }
  return pieces;
}

void RehearsalCommunicator::reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) {
  const int64_t elements = residual.elements();
  OCTET_CHECK(partials.dim(0) == pieces_of_rank_[rank_] && partials.dim(1) * partials.dim(2) == elements &&
                  bytes(runs_, rank_, elements) <= peers_.bytes(),
              "partials " + partials.shape().to_string() + " do not fit residual " + residual.shape().to_string() +
                  ", or that is larger than was announced");
  const Tensor flat = residual.reshaped({elements});
  const bool one_shot = elements <= kOneShotElements || size() == 1;
  const int64_t share = share_of(elements, size());
  const int64_t begin = one_shot ? 0 : std::min(rank_ * share, elements);
  const int64_t end = one_shot ? elements : std::min(begin + share, elements);
  if (begin < end) {
    add_tree_sum(stream, pieces(partials, begin, end), program_, flat.rows(begin, end).reshaped({1, end - begin}));
  }
  const Tensor results = peers_.tensor(DType::kBF16, {size() == 1 ? 0 : elements});
  if (begin > 0) copy(stream, results.rows(0, begin), flat.rows(0, begin));
  if (end < elements) copy(stream, results.rows(end, elements), flat.rows(end, elements));
}

}  // namespace octet
