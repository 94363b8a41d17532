// How long reduce_over_slices takes between the ranks of an mpirun. Bound by: two trips of a cache line for a small
// message, the second-level cache for a large one. Usage: mpirun -np 2 --bind-to none collective_bench [--pretend-nodes
// 1+1] [--sleep]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <vector>

#include "kernels/memory.h"
#include "launch/bootstrap.h"
#include "worker/collective/mpi_communicator.h"

namespace octet {
namespace {

struct Row {
  int64_t tokens, n;
};
constexpr Row kRows[] = {{1, 576},   {1, 1024},  {1, 2048},  {1, 4096},   {1, 8192},
                         {1, 16384}, {8, 16384}, {256, 576}, {256, 4096}, {256, 16384}};

void measure(const Row& row, const SliceRun& run, Communicator& communicator, Stream& stream) {
  const int64_t pieces = static_cast<int64_t>(maximal_subtrees(run).size());
  const Buffer partials(pieces * row.tokens * row.n * 4), residual(row.tokens * row.n * 2);
  const Tensor from = partials.tensor(DType::kF32, {pieces, row.tokens, row.n});
  const Tensor to = residual.tensor(DType::kBF16, {row.tokens, row.n});
  const int64_t rounds = std::clamp<int64_t>(int64_t{200'000'000} / (row.tokens * row.n), 50, 20'000);
  std::vector<double> microseconds(rounds);
  for (int64_t i = -rounds / 10; i < rounds; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    communicator.reduce_over_slices(stream, from, to);
    const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - begin;
    if (i >= 0) microseconds[i] = took.count();
  }
  std::sort(microseconds.begin(), microseconds.end());
  if (communicator.rank() != 0) return;
  const double p50 = microseconds[rounds / 2], p99 = microseconds[rounds * 99 / 100];
  std::printf("%6ld x %-6ld %9.1f KB %9.2f us %9.2f us %8.2f GB/s\n", static_cast<long>(row.tokens),
              static_cast<long>(row.n), static_cast<double>(to.bytes()) / 1024, p50, p99,
              static_cast<double>(to.bytes()) * 1e-3 / p50);
}

absl::Status run(int argc, char** argv) {
  Bootstrap::Options options;
  bool sleep = false;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    if (word == "--sleep") {
      sleep = true;
    } else if (word == "--pretend-nodes" && i + 1 < argc) {
      const auto nodes = parse_pretend_nodes(argv[++i]);
      if (!nodes.ok()) return nodes.status();
      options.pretend_nodes = *nodes;
    } else {
      return absl::InvalidArgumentError("usage: collective_bench [--pretend-nodes 1+1] [--sleep]");
    }
  }
  const auto job = Bootstrap::start(options);
  if (!job.ok()) return job.status();

  RankMap map;
  for (int r = 0; r < (*job)->size(); ++r) map.runs.push_back({r, 1, (*job)->size()});
  map.node_of_rank = (*job)->node_of_rank();
  const bool spin = (*job)->each_thread_has_a_core(1) && !sleep;
  const auto communicator = make_mpi_communicator({.map = map, .wait = {.spin = spin}});
  if (!communicator.ok()) return communicator.status();
  Stream stream({.threads = 1, .spin = spin});
  if ((*job)->rank() == 0) {
    std::printf("reduce_over_slices, %d ranks, waiting ranks %s\n", (*job)->size(), spin ? "spin" : "sleep");
    std::printf("  tokens x n         residual       p50          p99       residual/p50\n");
  }
  for (const Row& row : kRows) measure(row, map.runs[(*job)->rank()], **communicator, stream);
  return absl::OkStatus();
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  const absl::Status status = octet::run(argc, argv);
  if (!status.ok()) std::cerr << status << "\n";
  return status.ok() ? 0 : 1;
}
