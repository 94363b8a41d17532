// The host's side of sums over peer memory: windows, who looks into whose, and messages cut to what an area holds.
// peer_reduce.cu has the kernels and the protocol.
#include <cuda_runtime.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/check.h"
#include "kernels/cuda/peer.h"
#include "kernels/cuda/peer_message.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {

using namespace peer;

namespace {

constexpr int64_t kIpcGrain = int64_t{2} << 20;  // smaller allocations may share a block, and would be shown with it

int64_t align_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }
bool is_aligned(const void* data, int64_t to) { return reinterpret_cast<uintptr_t>(data) % to == 0; }

// A window's memory on its device. Ranks of one process that look into it hold it too.
struct Memory {
  Memory(int device, void* data) : device(device), data(data) {}
  ~Memory() {
    if (shown) return;
    (void)cudaSetDevice(device);
    (void)cudaFree(data);
  }
  const int device;
  void* const data;
  bool shown = false;  // to other processes
};

// Windows of this process by their address on the device.
class Registry {
 public:
  void add(const std::shared_ptr<Memory>& memory) {
    const std::lock_guard lock(mutex_);
    windows_[address_of(*memory)] = memory;
  }
  std::shared_ptr<Memory> find(uint64_t address) {
    const std::lock_guard lock(mutex_);
    return windows_[address].lock();
  }
  static uint64_t address_of(const Memory& memory) { return reinterpret_cast<uintptr_t>(memory.data); }

 private:
  std::mutex mutex_;
  std::map<uint64_t, std::weak_ptr<Memory>> windows_;
};

Registry& registry() {
  static Registry& registry = *new Registry;
  return registry;
}

void name_process(unsigned char (&name)[16]) {
  static const uint64_t kRandom = std::uniform_int_distribution<uint64_t>()(*std::make_unique<std::random_device>());
  const uint64_t pid = static_cast<uint64_t>(getpid());  // asked each time: a forked process is another one
  std::memcpy(name, &kRandom, 8);
  std::memcpy(name + 8, &pid, 8);
}

// ---- The tree as additions in place

struct Tree {
  std::vector<int> owner;  // rank of each piece, left to right
  std::vector<Add> adds;
  int leaves = 0;  // as the kernel's kLeaves
};

void append_whole_tree(int first, int count, std::vector<int>& program) {
  if (count == 1) return program.push_back(first);
  append_whole_tree(first, count / 2, program);
  append_whole_tree(first + count / 2, count / 2, program);
  program.push_back(kAdd);
}

Tree tree_over(std::span<const SliceRun> runs) {
  Tree tree;
  std::vector<SliceNode> pieces;
  for (size_t rank = 0; rank < runs.size(); ++rank) {
    for (const SliceNode& node : maximal_subtrees(runs[rank])) {
      pieces.push_back(node);
      tree.owner.push_back(static_cast<int>(rank));
    }
  }
  const std::vector<int> program = sum_program(pieces, root_of(runs[0].total), runs[0].total);
  std::vector<int> stack;
  for (const int entry : program) {
    if (entry != kAdd) {
      stack.push_back(entry);
      continue;
    }
    tree.adds.push_back({static_cast<uint8_t>(stack.end()[-2]), static_cast<uint8_t>(stack.back())});
    stack.pop_back();
  }
  for (const int leaves : {2, 4, 8}) {
    std::vector<int> whole;
    append_whole_tree(0, leaves, whole);
    if (program == whole) tree.leaves = leaves;
  }
  return tree;
}

}  // namespace

class PeerWindow {
 public:
  PeerWindow(Queue* queue, const PeerOptions& options, Tree tree, std::shared_ptr<Memory> memory, int capacity);
  ~PeerWindow();
  PeerWindow(const PeerWindow&) = delete;

  PeerCard card() const;
  const char* look_into(int rank, const PeerCard& card);
  void limit_blocks(int blocks) { max_blocks_ = std::clamp(blocks, 1, kMaxBlocks); }
  bool fuses(int64_t tokens, int64_t n) const { return tokens <= max_blocks_ && n <= std::min(kMaxRow, capacity_); }
  void reduce(const PeerReduction& reduction);
  void gather(const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all);

 private:
  const char* look_into_neighbour(int rank, const PeerCard& card);
  const char* look_into_process(int rank, const PeerCard& card);
  const char* because(const std::string& what, cudaError_t error);
  void set_meeting(Meeting* a) const;
  Reduction prepared() const;
  void set_part(const PeerReduction& message, int64_t begin, int64_t count, Reduction* a) const;

  Queue* const queue_;
  const PeerOptions options_;  // without runs, which are the caller's
  const int ranks_;
  const Tree tree_;
  const std::shared_ptr<Memory> memory_;
  const int capacity_;
  int max_blocks_ = kMaxBlocks;
  void* windows_[kMaxPeers] = {};
  std::vector<std::shared_ptr<Memory>> neighbours_;
  std::string why_;
  PeerWait* told_ = nullptr;            // in memory of the host
  PeerWait* told_by_device_ = nullptr;  // the same, as the device sees it
};

namespace {

int most_pieces(const Tree& tree) {
  int most = 0;
  for (const int rank : tree.owner) {
    most = std::max(most, static_cast<int>(std::count(tree.owner.begin(), tree.owner.end(), rank)));
  }
  return most;
}

int64_t bytes_of_area(const Tree& tree, int64_t capacity) {
  return align_up(capacity * (most_pieces(tree) * int64_t{sizeof(float)} + int64_t{sizeof(uint16_t)}), 256);
}

bool quantises(const NormedInput& next) { return next.scheme.kind != ActivationScheme::Kind::kNone; }

// Whether everything can be read and written four elements at a time.
bool takes_vectors(const PeerReduction& message) {
  const NormedInput* const next = message.next;
  const int64_t unit = next == nullptr ? message.residual.elements() : message.residual.dim(1);
  if (unit % 4 != 0 || !is_aligned(message.partials.data(), 16) || !is_aligned(message.residual.data(), 8))
    return false;
  if (next == nullptr) return true;
  return is_aligned(next->weight.data(), 16) &&
         (quantises(*next) ? is_aligned(next->out.values.data(), 4) : is_aligned(next->normed.data(), 8));
}

// For the rows from `row` on.
Norm norm_of(const NormedInput& next, int64_t row, int64_t n, Arithmetic arithmetic) {
  const bool codes = quantises(next);
  return {.weight = next.weight.as<float>(),
          .normed = codes ? nullptr : next.normed.as<uint16_t>() + row * n,
          .codes = codes ? next.out.values.as<uint8_t>() + row * n : nullptr,
          .scales = codes ? next.out.scales.as<float>() + row : nullptr,
          .n = static_cast<int>(n),
          .eps = next.eps,
          .fast_order = arithmetic == Arithmetic::kFast && n % 8 == 0,
          .dynamic = next.scheme.kind == ActivationScheme::Kind::kDynamicPerToken,
          .upper_bound = next.scheme.upper_bound,
          .static_scale = next.scheme.scale};
}

PeerWindow* open_window(Queue* queue, const PeerOptions& options, const char** why) {
  if (options.runs.size() > kMaxPeers) {
    *why = "more than 8 ranks";
    return nullptr;
  }
  Tree tree = tree_over(options.runs);
  if (tree.owner.size() > kMaxPieces) {
    *why = "the slices of the ranks have more than 32 subtrees";
    return nullptr;
  }
  const int64_t per_element = bytes_of_area(tree, 1 << 20) >> 20;
  const int capacity = static_cast<int>(
      std::clamp<int64_t>(options.area_bytes / per_element / kGrain * kGrain, kGrain, int64_t{1} << 28));
  const int64_t bytes = align_up(kAreasAt + 2 * bytes_of_area(tree, capacity), kIpcGrain);
  check(cudaSetDevice(queue->device()), "choosing the device");
  void* data = nullptr;
  if (cudaMalloc(&data, static_cast<size_t>(bytes)) != cudaSuccess) {
    (void)cudaGetLastError();  // the next call must not find it
    *why = "the GPU has no memory left for it";
    return nullptr;
  }
  auto memory = std::make_shared<Memory>(queue->device(), data);
  check(cudaMemsetAsync(data, 0, kAreasAt, queue->stream()), "clearing the window");
  queue->synchronize();
  registry().add(memory);
  return new PeerWindow(queue, options, std::move(tree), std::move(memory), capacity);
}

PeerCard card(const PeerWindow* window) { return window->card(); }
const char* look_into(PeerWindow* window, int rank, const PeerCard& card) { return window->look_into(rank, card); }
void limit_blocks(PeerWindow* window, int blocks) { window->limit_blocks(blocks); }
bool fuses(const PeerWindow* window, int64_t tokens, int64_t n) { return window->fuses(tokens, n); }
void reduce(PeerWindow* window, const PeerReduction& reduction) { window->reduce(reduction); }
void gather(PeerWindow* window, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) {
  window->gather(mine, bytes_of_rank, all);
}
void close_window(PeerWindow* window) { delete window; }

}  // namespace

const PeerTable kPeerTable = {.open = open_window,
                              .card = card,
                              .look_into = look_into,
                              .limit_blocks = limit_blocks,
                              .fuses = fuses,
                              .reduce = reduce,
                              .gather = gather,
                              .close = close_window};

PeerWindow::PeerWindow(Queue* queue, const PeerOptions& options, Tree tree, std::shared_ptr<Memory> memory,
                       int capacity)
    : queue_(queue),
      options_(options),
      ranks_(static_cast<int>(options.runs.size())),
      tree_(std::move(tree)),
      memory_(std::move(memory)),
      capacity_(capacity) {
  windows_[options_.rank] = memory_->data;
  void* told = nullptr;
  check(cudaHostAlloc(&told, sizeof(PeerWait), cudaHostAllocMapped), "allocating mapped memory of the host");
  told_ = new (told) PeerWait{};
  void* seen = nullptr;
  check(cudaHostGetDevicePointer(&seen, told, 0), "mapping memory of the host");
  told_by_device_ = static_cast<PeerWait*>(seen);
  load_kernels();
  queue_->after_wait([this] {
    if (told_->reduction != 0) options_.lost(options_.context, *told_);
  });
}

PeerWindow::~PeerWindow() {
  queue_->synchronize();
  queue_->after_wait(nullptr);
  (void)cudaFreeHost(told_);
}

PeerCard PeerWindow::card() const {
  PeerCard card = {.address = Registry::address_of(*memory_), .ordinal = memory_->device};
  name_process(card.process);
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, memory_->device), "reading a device's properties");
  std::memcpy(card.device, &properties.uuid, sizeof(card.device));
  cudaIpcMemHandle_t handle = {};
  static_assert(sizeof(handle) == sizeof(card.handle));
  check(cudaSetDevice(memory_->device), "choosing the device");
  // Where that is refused a handle of zeros is what the others fail to open.
  if (cudaIpcGetMemHandle(&handle, memory_->data) == cudaSuccess) std::memcpy(card.handle, &handle, sizeof(handle));
  (void)cudaGetLastError();
  return card;
}

const char* PeerWindow::look_into(int rank, const PeerCard& card) {
  check(cudaSetDevice(memory_->device), "choosing the device");
  unsigned char here[16];
  name_process(here);
  const bool neighbour = std::memcmp(here, card.process, sizeof(here)) == 0;
  return neighbour ? look_into_neighbour(rank, card) : look_into_process(rank, card);
}

const char* PeerWindow::because(const std::string& what, cudaError_t error) {
  (void)cudaGetLastError();  // the next call must not find it
  why_ = what + ": " + cudaGetErrorString(error);
  return why_.c_str();
}

// In the same process an address is enough, if the devices reach one another.
const char* PeerWindow::look_into_neighbour(int rank, const PeerCard& card) {
  std::shared_ptr<Memory> memory = registry().find(card.address);
  if (memory == nullptr) return "that rank has closed its window";
  if (memory->device != memory_->device) {
    int can = 0;
    check(cudaDeviceCanAccessPeer(&can, memory_->device, memory->device), "asking which devices reach one another");
    if (can == 0) return "the two GPUs do not reach one another's memory";
    const cudaError_t error = cudaDeviceEnablePeerAccess(memory->device, 0);
    if (error != cudaSuccess && error != cudaErrorPeerAccessAlreadyEnabled) return because("peer access", error);
    (void)cudaGetLastError();
  }
  windows_[rank] = memory->data;
  neighbours_.push_back(std::move(memory));
  return nullptr;
}

const char* PeerWindow::look_into_process(int rank, const PeerCard& card) {
  cudaIpcMemHandle_t handle;
  std::memcpy(&handle, card.handle, sizeof(handle));
  const cudaError_t error = cudaIpcOpenMemHandle(&windows_[rank], handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) return because("CUDA IPC", error);
  memory_->shown = true;
  return nullptr;
}

void PeerWindow::set_meeting(Meeting* a) const {
  a->rank = options_.rank;
  a->ranks = ranks_;
  for (int rank = 0; rank < ranks_; ++rank) a->windows[rank] = static_cast<Window*>(windows_[rank]);
  a->area_bytes = bytes_of_area(tree_, capacity_);
  a->deadline_ns = static_cast<uint64_t>(options_.deadline_ms) * 1000000;
  a->told = told_by_device_;
}

// All but the message.
Reduction PeerWindow::prepared() const {
  Reduction a = {};
  set_meeting(&a);
  a.results_at = int64_t{capacity_} * most_pieces(tree_) * int64_t{sizeof(float)};
  a.capacity = capacity_;
  a.pieces = static_cast<int>(tree_.owner.size());
  std::copy(tree_.adds.begin(), tree_.adds.end(), a.adds);
  int of_rank[kMaxPeers] = {};
  for (int p = 0; p < a.pieces; ++p) {
    const int owner = tree_.owner[p];
    const auto* const area = reinterpret_cast<const float*>(static_cast<const char*>(windows_[owner]) + kAreasAt);
    a.piece[p] = {.data = area + int64_t{of_rank[owner]++} * capacity_,
                  .other_area = a.area_bytes / int64_t{sizeof(float)}};
  }
  a.own_pieces = of_rank[options_.rank];
  return a;
}

// Elements [begin, begin + count) of a message. This rank's own pieces are read where they are.
void PeerWindow::set_part(const PeerReduction& message, int64_t begin, int64_t count, Reduction* a) const {
  a->stride = message.residual.elements();
  a->partials = message.partials.as<float>() + begin;
  a->residual = message.residual.as<uint16_t>() + begin;
  int own = 0;
  for (int p = 0; p < a->pieces; ++p) {
    if (tree_.owner[p] == options_.rank) a->piece[p] = {.data = a->partials + own++ * a->stride, .other_area = 0};
  }
  const int64_t blocks = std::clamp<int64_t>(count / kLeastElements, 1, max_blocks_);
  a->elements = static_cast<int>(count);
  a->per_block = static_cast<int>(align_up((count + blocks - 1) / blocks, kGrain));
  a->blocks = static_cast<int>(blocks_for(count, a->per_block));
}

void PeerWindow::reduce(const PeerReduction& message) {
  queue_->begin_op();
  const NormedInput* const next = message.next;
  const int64_t n = message.residual.dim(1), elements = message.residual.elements();
  OCTET_CHECK(next == nullptr || fuses(message.residual.dim(0), n),
              "residual " + message.residual.shape().to_string() + " is normalised elsewhere");
  const int64_t most = next == nullptr ? capacity_ : capacity_ / n * n;
  Reduction a = prepared();
  OCTET_CHECK(message.partials.elements() == a.own_pieces * elements,
              "partials " + message.partials.shape().to_string() + " do not fit residual " +
                  message.residual.shape().to_string());
  a.two_shot = message.shots == Shots::kTwo;
  const ReduceKernel kernel = reduce_kernel(takes_vectors(message), tree_.leaves, next != nullptr);
  for (int64_t begin = 0; begin < elements; begin += most) {
    set_part(message, begin, std::min(most, elements - begin), &a);
    if (next != nullptr) a.norm = norm_of(*next, begin / n, n, queue_->arithmetic());
    queue_->launch(kernel, static_cast<unsigned>(a.blocks), kThreads, a);
  }
}

// Parts of all ranks' contributions, each from the same byte on.
void PeerWindow::gather(const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all) {
  queue_->begin_op();
  bool words = is_aligned(mine.data(), 16) && is_aligned(all.data(), 16);
  for (const int64_t bytes : bytes_of_rank) words = words && bytes % 16 == 0;
  const int64_t word = words ? 16 : 1;
  Gathering a = {};
  set_meeting(&a);
  const int64_t longest = *std::max_element(bytes_of_rank.begin(), bytes_of_rank.end());
  for (int64_t from = 0; from < longest; from += a.area_bytes) {
    a.mine = static_cast<const char*>(mine.data()) + from;
    a.all = all.data();
    int64_t before = 0, most = 0;
    for (int rank = 0; rank < ranks_; before += bytes_of_rank[rank++]) {
      const int64_t count = std::clamp<int64_t>(bytes_of_rank[rank] - from, 0, a.area_bytes) / word;
      a.begin[rank] = (before + from) / word;
      a.count[rank] = static_cast<int>(count);
      most = std::max(most, count);
    }
    const int64_t blocks = std::clamp<int64_t>(most / kThreads, 1, max_blocks_);
    a.per_block = static_cast<int>((most + blocks - 1) / blocks);
    a.blocks = static_cast<int>(blocks_for(most, a.per_block));
    queue_->launch(gather_kernel(words), static_cast<unsigned>(a.blocks), kThreads, a);
  }
}

}  // namespace octet::cuda
