// Sums over peer memory between processes, which share it through CUDA IPC: `peer_processes MODULE RANKS [GPUS
// [ROUNDS]]` starts RANKS processes on the first GPUS GPUs (1), which sum messages of several sizes ROUNDS times (200),
// and says whether every sum, and what follows it, had the bits it should.
// 0: all had; 1: some had not; 3: CUDA IPC is refused here; 77: there is no GPU. Processes on one GPU take turns in
// time, so nothing is timed.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "tests/peer_cases.h"
#include "worker/collective/peer_communicator.h"
#include "worker/collective/thread_communicator.h"

namespace octet {
namespace {

constexpr int kWrongBits = 1, kRefused = 3, kNoGpu = 77;
constexpr int kSlices = 8;
constexpr int kDefaultRounds = 200;

struct Job {
  std::string module;
  int ranks = 0, gpus = 1, rounds = kDefaultRounds;
};

RankMap map_of(int ranks) {
  std::vector<int> slices_of_rank(ranks, kSlices / ranks);
  for (int rank = 0; rank < kSlices % ranks; ++rank) ++slices_of_rank[rank];
  return one_node(slices_of_rank);
}

int wrong_sums(const RankMap& map, int rounds, Stream& stream, Communicator& peers) {
  const SumCase sums[] = {{kSlices, 1, 4096, 1}, {kSlices, 3, 1001, 2}, {kSlices, 16, 4096, 3}, {kSlices, 40, 2048, 4}};
  const ActivationScheme schemes[] = {{}, {.kind = ActivationScheme::Kind::kDynamicPerToken}};
  std::mt19937 random(peers.rank());
  int wrong = 0;
  for (const SumCase& c : sums) {
    DeviceCase mine(c, map.runs[peers.rank()], stream);
    const std::vector<uint16_t> expected = c.expected();
    for (int round = 0; round < rounds; ++round) {
      if (random() % 8 == 0) usleep(random() % 3000);
      mine.reset();
      peers.reduce_over_slices(stream, mine.partials(), mine.residual());
      wrong += mine.result() != expected;
    }
    for (const ActivationScheme& scheme : schemes) {
      wrong += normed(mine, scheme, kFused, peers) != normed(mine, scheme, kSeparate, peers);
    }
  }
  return wrong;
}

// A rank's process. Nothing of CUDA has been touched before: what a process has begun with a device a fork cannot use.
int run_rank(const cuda::ModuleTable& module, const RankMap& map, int rank, const Job& job, void* memory) {
  const int device = rank % job.gpus;
  if (const absl::Status usable = cuda::check_device(module, device); !usable.ok()) {
    if (rank == 0) std::fprintf(stderr, "%s\n", std::string(usable.message()).c_str());
    return kNoGpu;
  }
  const SharedWindow::Layout layout = WindowCommunicator::window_layout(map, 0, kDefaultAreaBytes);
  std::unique_ptr<Communicator> host = std::make_unique<WindowCommunicator>(
      map, rank, std::make_unique<SharedWindow>(memory, layout, rank, WaitPolicy{}), nullptr);
  Stream stream(module, device, Arithmetic::kReproducible, {.threads = 1, .spin = false});
  const auto peers = make_peer_communicator(stream, host, {.map = map});
  if (!peers.ok()) {
    if (rank == 0) std::fprintf(stderr, "%s\n", std::string(peers.status().message()).c_str());
    return kRefused;
  }
  if (rank == 0) std::printf("%s\n", (*peers)->report().c_str());
  const int wrong = wrong_sums(map, job.rounds, stream, **peers);
  if (wrong > 0) std::fprintf(stderr, "rank %d: %d sums with wrong bits\n", rank, wrong);
  (*peers)->barrier();
  return wrong > 0 ? kWrongBits : 0;
}

// The first exit status that is not 0; then the others are ended, as they would wait for that rank.
int wait_for(std::vector<pid_t> ranks) {
  int first = 0;
  for (size_t left = ranks.size(); left > 0; --left) {
    int status = 0;
    const pid_t ended = wait(&status);
    const int exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    std::erase(ranks, ended);
    if (exit_status == 0 || first != 0) continue;
    first = exit_status;
    if (first == kNoGpu || first == kRefused) continue;  // which all find
    for (const pid_t other : ranks) kill(other, SIGKILL);
  }
  return first;
}

int run(const Job& job) {
  const auto module = cuda::open_module(job.module);
  if (!module.ok()) {
    std::fprintf(stderr, "%s\n", std::string(module.status().message()).c_str());
    return kNoGpu;
  }
  const RankMap map = map_of(job.ranks);
  const int64_t bytes = SharedWindow::bytes_of(WindowCommunicator::window_layout(map, 0, kDefaultAreaBytes));
  void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return std::perror("memory that processes share"), 1;
  std::vector<pid_t> started;
  for (int rank = 0; rank < job.ranks; ++rank) {
    const pid_t pid = fork();
    if (pid == 0) {
      const int status = run_rank(**module, map, rank, job, memory);
      std::fflush(nullptr);
      _exit(status);
    }
    started.push_back(pid);
  }
  const int status = wait_for(started);
  if (status == 0) std::printf("%d processes: all sums have the tree's bits\n", job.ranks);
  return status;
}

}  // namespace
}  // namespace octet

int main(int count, char** arguments) {
  octet::Job job;
  if (count > 2) job.module = arguments[1], job.ranks = std::atoi(arguments[2]);
  if (count > 3) job.gpus = std::atoi(arguments[3]);
  if (count > 4) job.rounds = std::atoi(arguments[4]);
  if (job.ranks < 1 || job.ranks > octet::kSlices || job.gpus < 1) {
    std::fprintf(stderr, "usage: peer_processes MODULE RANKS [GPUS [ROUNDS]], with 1 to 8 ranks\n");
    return 2;
  }
  return octet::run(job);
}
