#include "coordinator/thread_worker_group.h"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"
#include "worker/collective/staged_communicator.h"
#include "worker/collective/thread_communicator.h"
#include "worker/kv_cache.h"
#include "worker/worker.h"

namespace octet {
namespace {

// One rank: its thread builds everything the rank owns, then runs plans.
class Rank {
 public:
  Rank(const Checkpoint& checkpoint, const ThreadGroupOptions& options, const ShardSpec& shard,
       const WorkerLimits& limits, std::unique_ptr<Communicator> communicator)
      : shard_(shard), communicator_(std::move(communicator)) {
    if (options.cuda == nullptr) {
      stream_.emplace(options.stream);
    } else {
      stream_.emplace(*options.cuda, 0, options.memory.arithmetic, options.stream);
      communicator_ = std::make_unique<StagedCommunicator>(std::move(communicator_), options.stream);
    }
    thread_ = std::thread([this, &checkpoint, options, limits] {
      absl::Status status = load(checkpoint, options, limits);
      const bool loaded = status.ok();
      put(&loaded_, std::move(status));
      if (loaded) run_plans();
    });
  }

  ~Rank() {
    put(&plans_, std::optional<StepPlan>());
    thread_.join();
  }

  absl::Status wait_loaded() { return take(&loaded_); }
  void submit(const StepPlan& plan) { put(&plans_, std::optional(plan)); }
  StepResult collect() { return take(&results_); }
  std::span<const std::byte> weights() const { return weights_->memory(); }

 private:
  absl::Status load(const Checkpoint& checkpoint, const ThreadGroupOptions& options, const WorkerLimits& limits) {
    absl::StatusOr<ModelWeights> weights =
        ModelWeights::load(*stream_, checkpoint, shard_,
                           {.activations = options.activations, .kv_dtype = options.memory.kv_dtype, .progress = {}});
    if (!weights.ok()) return weights.status();
    weights_.emplace(std::move(*weights));
    worker_.emplace(*stream_, *communicator_, checkpoint.config(), shard_, *weights_,
                    KvCache(*stream_, checkpoint.config(), shard_, options.memory.kv_dtype, limits.blocks), limits);
    if (options.cuda != nullptr && options.record_steps) {
      worker_->record_steps([](int64_t, int64_t) {}).IgnoreError();  // where they cannot, steps run op by op
    }
    return absl::OkStatus();
  }

  void run_plans() {
    while (std::optional<StepPlan> plan = take(&plans_)) put(&results_, worker_->run(*plan));
  }

  template <typename T>
  void put(std::deque<T>* queue, T value) {
    std::lock_guard lock(mutex_);
    queue->push_back(std::move(value));
    changed_.notify_all();
  }

  template <typename T>
  T take(std::deque<T>* queue) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return !queue->empty(); });
    T value = std::move(queue->front());
    queue->pop_front();
    return value;
  }

  const ShardSpec shard_;
  std::optional<Stream> stream_;
  std::unique_ptr<Communicator> communicator_;
  std::optional<ModelWeights> weights_;
  std::optional<Worker> worker_;

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<absl::Status> loaded_;
  std::deque<std::optional<StepPlan>> plans_;
  std::deque<StepResult> results_;
  std::thread thread_;
};

RankMap rank_map(const ShardSpec& any_shard, Arithmetic arithmetic, const std::vector<int>& pretend_nodes) {
  RankMap map;
  for (int rank = 0; rank < any_shard.ranks(); ++rank) map.runs.push_back(any_shard.leaves_of(rank, arithmetic));
  map.node_of_rank.assign(any_shard.ranks(), 0);
  int rank = 0;
  for (size_t node = 0; node < pretend_nodes.size(); ++node) {
    for (int i = 0; i < pretend_nodes[node]; ++i) map.node_of_rank.at(rank++) = static_cast<int>(node);
  }
  return map;
}

}  // namespace

struct ThreadWorkerGroup::Impl {
  MemoryPlan plan;
  std::vector<std::unique_ptr<Rank>> ranks;
  double load_seconds = 0;
};

ThreadWorkerGroup::ThreadWorkerGroup(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ThreadWorkerGroup::~ThreadWorkerGroup() = default;

absl::StatusOr<std::unique_ptr<ThreadWorkerGroup>> ThreadWorkerGroup::start(const Checkpoint& checkpoint,
                                                                            const ThreadGroupOptions& options) {
  const auto begin = std::chrono::steady_clock::now();
  auto impl = std::make_unique<Impl>();
  const RankResources each{.memory_bytes = options.available_bytes, .threads = options.stream.threads};
  MemoryOptions memory = options.memory;
  memory.device = options.cuda == nullptr ? Device::kCpu : Device::kCuda;
  absl::StatusOr<MemoryPlan> plan =
      plan_memory(weight_formats(checkpoint), memory, std::vector<RankResources>(options.ranks, each));
  if (!plan.ok()) return plan.status();
  impl->plan = *std::move(plan);

  std::vector<ShardSpec> shards;
  for (int rank = 0; rank < options.ranks; ++rank) {
    shards.push_back(*ShardSpec::make(checkpoint.config(), rank, options.ranks));
  }
  auto communicators =
      make_thread_communicators(rank_map(shards.front(), options.memory.arithmetic, options.pretend_nodes));
  for (int rank = 0; rank < options.ranks; ++rank) {
    std::unique_ptr<Communicator> communicator = std::move(communicators[rank]);
    if (options.wrap_communicator) communicator = options.wrap_communicator(std::move(communicator));
    impl->ranks.push_back(
        std::make_unique<Rank>(checkpoint, options, shards[rank], impl->plan.limits, std::move(communicator)));
  }
  for (int rank = 0; rank < options.ranks; ++rank) {
    if (absl::Status status = impl->ranks[rank]->wait_loaded(); !status.ok()) return status;
  }
  impl->load_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return std::unique_ptr<ThreadWorkerGroup>(new ThreadWorkerGroup(std::move(impl)));
}

void ThreadWorkerGroup::submit(const StepPlan& plan) {
  for (auto& rank : impl_->ranks) rank->submit(plan);
}

absl::StatusOr<StepResult> ThreadWorkerGroup::collect() {
  StepResult first = impl_->ranks[0]->collect();
  for (size_t rank = 1; rank < impl_->ranks.size(); ++rank) {
    const StepResult other = impl_->ranks[rank]->collect();
    if (other.step != first.step || other.sampled != first.sampled || other.scored != first.scored ||
        other.error != first.error) {
      return absl::UnavailableError(absl::StrCat("rank ", rank, " disagrees with rank 0 about step ", first.step));
    }
    first.timings.push_back(other.timings.front());
  }
  return first;
}

const MemoryPlan& ThreadWorkerGroup::plan() const { return impl_->plan; }
std::span<const std::byte> ThreadWorkerGroup::weights(int rank) const { return impl_->ranks[rank]->weights(); }
double ThreadWorkerGroup::load_seconds() const { return impl_->load_seconds; }

}  // namespace octet
