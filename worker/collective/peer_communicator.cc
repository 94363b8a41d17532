#include "worker/collective/peer_communicator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"
#include "kernels/cuda/module.h"
#include "kernels/ops.h"

namespace octet {
namespace {

// Where nothing is measured. NVLink would cross over later: with few blocks on one GPU there is less to gain from it.
constexpr int64_t kOneShotBytes = 64 << 10;
// Blocks that all ranks of one GPU have together; the A100 has 108 multiprocessors.
constexpr int kBlocksOfSharedGpu = 64;

constexpr int kRepetitions = 9;  // of which the median counts
constexpr int kSumsAtOnce = 8;   // in one repetition, as a step queues them

// What every rank brings, in rank order.
template <typename T>
std::vector<T> shown_by_all(Communicator& communicator, const T& mine) {
  const std::vector<int64_t> bytes(communicator.size(), sizeof(T));
  std::vector<T> all(communicator.size());
  communicator.all_gather(&mine, bytes, all.data());
  return all;
}

// The largest number of ranks that share a GPU.
int ranks_of_a_gpu(const std::vector<cuda::PeerCard>& cards) {
  const auto same_gpu = [](const cuda::PeerCard& a, const cuda::PeerCard& b) {
    return std::memcmp(a.device, b.device, sizeof(a.device)) == 0;
  };
  long most = 0;
  for (const cuda::PeerCard& card : cards) {
    most = std::max(most, std::count_if(cards.begin(), cards.end(),
                                        [&](const cuda::PeerCard& other) { return same_gpu(card, other); }));
  }
  return static_cast<int>(most);
}

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + std::ssize(values) / 2, values.end());
  return values[values.size() / 2];
}

PeerCommunicatorOptions with_a_clock(PeerCommunicatorOptions options) {
  if (!options.seconds) {
    options.seconds = [] {
      return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    };
  }
  return options;
}

}  // namespace

PeerCommunicator::PeerCommunicator(Stream& stream, Communicator& inner, const PeerCommunicatorOptions& options)
    : stream_(stream),
      peer_(*stream.module().peer),
      options_(with_a_clock(options)),
      pieces_(std::ssize(maximal_subtrees(options.map.runs[inner.rank()]))),
      inner_(&inner) {}

PeerCommunicator::~PeerCommunicator() {
  if (window_ != nullptr) peer_.close(window_);
}

absl::StatusOr<std::unique_ptr<PeerCommunicator>> make_peer_communicator(Stream& stream,
                                                                         std::unique_ptr<Communicator>& inner,
                                                                         const PeerCommunicatorOptions& options) {
  OCTET_CHECK(stream.device() == Device::kCuda, "peer memory is a GPU's");
  OCTET_CHECK(options.map.ranks() == inner->size(), "each rank has a run of leaves");
  if (options.map.nodes() > 1) {
    return absl::FailedPreconditionError(
        "GPUs read one another's memory within a node only: use --allreduce nccl across nodes");
  }
  auto communicator = std::unique_ptr<PeerCommunicator>(new PeerCommunicator(stream, *inner, options));
  if (const absl::Status joined = communicator->join(); !joined.ok()) return joined;
  communicator->owned_ = std::move(inner);
  return communicator;
}

// ---- Joining

absl::Status PeerCommunicator::join() {
  if (const absl::Status opened = agreed(open_window()); !opened.ok()) return opened;
  const std::vector<cuda::PeerCard> cards = shown_by_all(*inner_, peer_.card(window_));
  absl::Status looked;
  for (int other = 0; other < size() && looked.ok(); ++other) {
    if (other == rank()) continue;
    const char* const why = peer_.look_into(window_, other, cards[other]);
    if (why == nullptr) continue;
    looked = absl::FailedPreconditionError(
        absl::StrCat("rank ", rank(), " cannot read the GPU memory of rank ", other, " (", why,
                     "): start containers with --ipc=host and let every rank see all GPUs of its node (Slurm's "
                     "--gpus-per-task hides them: use --gres), or use --allreduce host"));
  }
  if (const absl::Status all = agreed(looked); !all.ok()) return all;
  choose(ranks_of_a_gpu(cards));
  return absl::OkStatus();
}

absl::Status PeerCommunicator::open_window() {
  const cuda::PeerOptions options = {
      .rank = rank(),
      .runs = options_.map.runs,
      .area_bytes = options_.area_bytes,
      .deadline_ms = options_.wait_deadline.count(),
      .lost = [](void* self, const cuda::PeerWait& wait) { static_cast<const PeerCommunicator*>(self)->lose(wait); },
      .context = this};
  const char* why = nullptr;
  window_ = peer_.open(stream_.queue(), options, &why);
  if (window_ != nullptr) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat("rank ", rank(), " has no window of peer memory: ", why,
                                                   "; lower --kv-memory, or use --allreduce host"));
}

// OK where all ranks bring OK, else everywhere what the lowest failing rank brings.
absl::Status PeerCommunicator::agreed(const absl::Status& mine) {
  struct Outcome {
    absl::StatusCode code;
    char message[508];
  };
  Outcome outcome = {.code = mine.code(), .message = {}};
  mine.message().copy(outcome.message, sizeof(outcome.message) - 1);
  for (const Outcome& of_rank : shown_by_all(*inner_, outcome)) {
    if (of_rank.code != absl::StatusCode::kOk) return absl::Status(of_rank.code, of_rank.message);
  }
  return absl::OkStatus();
}

// ---- Which way

void PeerCommunicator::choose(int ranks_of_a_gpu) {
  if (ranks_of_a_gpu > 1) peer_.limit_blocks(window_, std::max(1, kBlocksOfSharedGpu / ranks_of_a_gpu));
  crossover_.one_shot_bytes = kOneShotBytes;
  const bool measures = size() > 1 && ranks_of_a_gpu == 1;
  std::string why = ", a fixed rule";
  if (ranks_of_a_gpu > 1) why = absl::StrCat(why, ": ", ranks_of_a_gpu, " ranks share a GPU, so no times are taken");
  if (measures) {
    const std::vector<AllReduceTimes> times = measure();
    crossover_ = crossover_of(times);
    why = absl::StrCat(", as measured:\n", table_of(times));
  }
  report_ = absl::StrFormat("all-reduce over peer memory: one-shot up to %d KiB, then two-shot",
                            crossover_.one_shot_bytes >> 10);
  if (crossover_.other_bytes < std::numeric_limits<int64_t>::max()) {
    absl::StrAppendFormat(&report_, ", another way from %d KiB on", crossover_.other_bytes >> 10);
  }
  report_ += why;
}

// Ways take turns, so that what disturbs one disturbs all. A sum takes as long as its slowest rank says.
std::vector<AllReduceTimes> PeerCommunicator::measure() {
  const int64_t most = options_.timed_bytes.back();
  const Buffer partials(pieces_ * most * 2, stream_), residual(most, stream_);
  std::vector<AllReduceTimes> times;
  for (const int64_t bytes : options_.timed_bytes) {
    const int64_t elements = bytes / size_of(DType::kBF16);
    const Tensor from = partials.tensor(DType::kF32, {pieces_, 1, elements});
    const Tensor to = residual.tensor(DType::kBF16, {1, elements});
    const auto over_peers = [&](cuda::Shots shots) {
      return seconds_of([&] { peer_.reduce(window_, {.partials = from, .residual = to, .shots = shots}); });
    };
    std::vector<double> one_shot, two_shot, other;
    for (int repetition = 0; repetition < kRepetitions; ++repetition) {
      one_shot.push_back(over_peers(cuda::Shots::kOne));
      two_shot.push_back(over_peers(cuda::Shots::kTwo));
      if (!options_.inner_sums_on_device) continue;
      other.push_back(seconds_of([&] { inner_->reduce_over_slices(stream_, from, to); }));
    }
    AllReduceTimes mine = {.bytes = bytes, .one_shot = median(one_shot), .two_shot = median(two_shot)};
    if (!other.empty()) mine.other = median(other);
    times.push_back(slowest(mine));
  }
  return times;
}

AllReduceTimes PeerCommunicator::slowest(const AllReduceTimes& mine) {
  AllReduceTimes slowest = mine;
  for (const AllReduceTimes& of_rank : shown_by_all(*inner_, mine)) {
    slowest.one_shot = std::max(slowest.one_shot, of_rank.one_shot);
    slowest.two_shot = std::max(slowest.two_shot, of_rank.two_shot);
    slowest.other = std::max(slowest.other, of_rank.other);
  }
  return slowest;
}

// Of one sum among several that are queued together.
double PeerCommunicator::seconds_of(const std::function<void()>& sum) {
  barrier();
  const double begin = options_.seconds();
  for (int i = 0; i < kSumsAtOnce; ++i) sum();
  stream_.synchronize();
  return (options_.seconds() - begin) / kSumsAtOnce;
}

// ---- Sums

cuda::Shots PeerCommunicator::shots_for(int64_t bytes) const {
  return bytes <= crossover_.one_shot_bytes ? cuda::Shots::kOne : cuda::Shots::kTwo;
}

void PeerCommunicator::gather(Stream& stream, const Tensor& mine, std::span<const int64_t> bytes_of_rank,
                              const Tensor& all) {
  OCTET_CHECK(&stream == &stream_, "a window belongs to one stream");
  peer_.gather(window_, mine, bytes_of_rank, all);
}

void PeerCommunicator::reduce_over_slices(Stream& stream, const Tensor& partials, const Tensor& residual) {
  OCTET_CHECK(&stream == &stream_, "a window belongs to one stream");
  if (goes_elsewhere(residual.bytes())) return inner_->reduce_over_slices(stream, partials, residual);
  peer_.reduce(window_, {.partials = partials, .residual = residual, .shots = shots_for(residual.bytes())});
}

void PeerCommunicator::reduce_and_norm(Stream& stream, const Tensor& partials, const Tensor& residual,
                                       const NormedInput& next) {
  OCTET_CHECK(&stream == &stream_, "a window belongs to one stream");
  if (goes_elsewhere(residual.bytes())) return inner_->reduce_and_norm(stream, partials, residual, next);
  if (!peer_.fuses(window_, residual.dim(0), residual.dim(1))) {
    return Communicator::reduce_and_norm(stream, partials, residual, next);
  }
  peer_.reduce(window_,
               {.partials = partials, .residual = residual, .shots = shots_for(residual.bytes()), .next = &next});
}

void PeerCommunicator::lose(const cuda::PeerWait& wait) const {
  const std::string place = options_.place ? absl::StrCat(" (", options_.place(), ")") : "";
  const absl::Status cause = absl::DeadlineExceededError(absl::StrFormat(
      "rank %d waited %d s for rank %d in sum %d over peer memory%s: rank %d has died or hangs: read its last words "
      "(octet doctor --last tells which rank failed first), then start the job again",
      rank(), options_.wait_deadline.count() / 1000, wait.waited_for, wait.reduction, place, wait.waited_for));
  if (options_.end) options_.end(cause);
  std::fprintf(stderr, "octet: %s\n", std::string(cause.message()).c_str());
  std::abort();
}

}  // namespace octet
