// Grids on fibers. A fiber lives from one block to the next: when a thread of a block has ended, its fiber waits to be
// the same thread of the next block.
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <xmmintrin.h>

#include <bit>
#include <cstdio>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "kernels/fp8.h"
#include "tests/cuda_emulation/cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_emulation {

// ---- Device memory: addresses that are never given out twice

#if defined(__SANITIZE_ADDRESS__)

void* allocate(size_t bytes) {
  void* const data = bytes > kMemoryBytes ? nullptr : std::malloc(bytes);
  if (data != nullptr) std::memset(data, kGarbage, bytes);
  return data;
}
void release(void* data) { std::free(data); }
DeviceAccess::DeviceAccess() = default;
DeviceAccess::~DeviceAccess() = default;

#else

namespace {

// Processes that are forked from one that has it have it in common, as processes have a device.
class DeviceMemory {
 public:
  DeviceMemory()
      : begin_(map(kMemoryBytes, PROT_NONE)), used_(*new (map(kPage, PROT_READ | PROT_WRITE)) std::atomic<size_t>(0)) {}

  void* allocate(size_t bytes) {
    const std::lock_guard lock(mutex_);
    const size_t pages = (bytes + kPage - 1) / kPage * kPage;
    if (bytes > kMemoryBytes || used_ + pages > kMemoryBytes) return nullptr;
    char* const data = begin_ + used_.fetch_add(pages);
    bytes_of_[data] = pages;
    mprotect(data, pages, PROT_READ | PROT_WRITE);
    std::memset(data, kGarbage, bytes);
    if (users_ == 0) mprotect(data, pages, PROT_NONE);
    return data;
  }

  // The address stays taken; the less lies behind the others, the faster they are opened and closed.
  void release(void* data) {
    const std::lock_guard lock(mutex_);
    const auto found = bytes_of_.find(data);
    if (found == bytes_of_.end()) return;
    mprotect(data, found->second, PROT_READ | PROT_WRITE);
    madvise(data, found->second, MADV_REMOVE);
    if (users_ == 0) mprotect(data, found->second, PROT_NONE);
    bytes_of_.erase(found);
  }

  void open() {
    const std::lock_guard lock(mutex_);
    if (users_++ == 0) mprotect(begin_, used_, PROT_READ | PROT_WRITE);
  }
  void close() {
    const std::lock_guard lock(mutex_);
    if (--users_ == 0) mprotect(begin_, used_, PROT_NONE);
  }

 private:
  static constexpr size_t kPage = 4096;

  static char* map(size_t bytes, int protection) {
    return static_cast<char*>(mmap(nullptr, bytes, protection, MAP_SHARED | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  }

  std::mutex mutex_;
  char* const begin_;
  std::atomic<size_t>& used_;         // by all processes
  std::map<void*, size_t> bytes_of_;  // what this one has
  int users_ = 0;
};

// There from the emulation's loading on, so that forks have it in common whenever they begin to use it.
DeviceMemory& device_memory = *new DeviceMemory;

}  // namespace

void* allocate(size_t bytes) { return device_memory.allocate(bytes); }
void release(void* data) { device_memory.release(data); }
DeviceAccess::DeviceAccess() { device_memory.open(); }
DeviceAccess::~DeviceAccess() { device_memory.close(); }

#endif

namespace {

using octet::bf16_to_float;
using octet::e4m3_to_float;

constexpr int kWarp = 32;
constexpr size_t kMostBrought = 6;
constexpr size_t kStackBytes = 128 << 10;
constexpr unsigned kFlushDenormals = 0x8040;  // flush-to-zero and denormals-are-zero in MXCSR

[[noreturn]] void undefined_on_a_gpu(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

// Of 16 bytes.
struct Copy {
  void* to;
  const void* from;  // null: zeros
};

enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;  // where it begins
  jmp_buf place;       // where it goes on
  bool begun = false;
  void* stack = nullptr;
  dim3 index;
  State state = State::kDone;
  unsigned lanes = 0;                   // of the warp barrier at which it waits
  uint32_t brought[kMostBrought] = {};  // to an exchange
  std::vector<Copy> copies;             // not committed yet
  std::deque<std::vector<Copy>> under_way;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

// The blocks of one host thread.
class Machine {
 public:
  ~Machine() {
    for (const auto& fiber : fibers_) munmap(fiber->stack, kStackBytes);
  }

  void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel, size_t shared_bytes) {
    const DeviceAccess access;
    shared_bytes_ = shared_bytes;
    const size_t units = std::max<size_t>((shared_bytes + kSharedAlignment - 1) / kSharedAlignment, 1);
    shared_.reset(static_cast<char*>(std::aligned_alloc(kSharedAlignment, units * kSharedAlignment)));
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | kFlushDenormals);
    kernel_ = &kernel;
    blockDim = block;
    gridDim = grid;
    prepare_fibers(block);
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          run_block();
        }
      }
    }
    _mm_setcsr(mode);
  }

  void wait(State at, unsigned lanes) {
    running->state = at;
    running->lanes = lanes;
    leave(*running);
  }

  Fiber& neighbour(int lane) {
    const size_t at = place_of_running() / kWarp * kWarp + static_cast<size_t>(lane);
    if (lane < 0 || lane >= kWarp || at >= threads_) undefined_on_a_gpu("a shuffle reads a lane that does not exist");
    return *fibers_[at];
  }

  char* shared() const { return shared_.get(); }

  int lane() const { return static_cast<int>(place_of_running() % kWarp); }

  Fiber* running = nullptr;

 private:
  static constexpr size_t kSharedAlignment = 128;

  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  size_t place_of_running() const {
    return running->index.x + blockDim.x * (running->index.y + size_t{blockDim.y} * running->index.z);
  }

  void prepare_fibers(dim3 block) {
    threads_ = size_t{block.x} * block.y * block.z;
    if (threads_ == 0 || threads_ > 1024) undefined_on_a_gpu("a block has 1 to 1024 threads");
    while (fibers_.size() < threads_) fibers_.push_back(make_fiber());
    size_t i = 0;
    for (unsigned z = 0; z < block.z; ++z) {
      for (unsigned y = 0; y < block.y; ++y) {
        for (unsigned x = 0; x < block.x; ++x) fibers_[i++]->index = dim3(x, y, z);
      }
    }
  }

  std::unique_ptr<Fiber> make_fiber() {
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fiber->stack == MAP_FAILED) undefined_on_a_gpu("no memory for a fiber's stack");
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = fiber->stack;
    fiber->context.uc_stack.ss_size = kStackBytes;
    fiber->context.uc_link = nullptr;
    makecontext(&fiber->context, reinterpret_cast<void (*)()>(&Machine::be_a_thread), 0);
    return fiber;
  }

  // A fiber's whole life.
  static void be_a_thread();

  void run_block() {
    for (size_t i = 0; i < threads_; ++i) fibers_[i]->state = State::kReady;
    std::memset(shared_.get(), kGarbage, shared_bytes_);
    while (true) {
      const bool any = run_ready();
      if (done()) return;
      if (!any) release_block();
    }
  }

  bool done() const {
    return std::all_of(fibers_.begin(), fibers_.begin() + static_cast<std::ptrdiff_t>(threads_),
                       [](const auto& fiber) { return fiber->state == State::kDone; });
  }

  // Each thread that can run runs until it waits; from another first one, and by another stride, each time.
  bool run_ready() {
    turn_ = turn_ * 6364136223846793005u + 1442695040888963407u;
    const size_t first = (turn_ >> 33) % threads_;
    const bool backwards = (turn_ >> 32 & 1) != 0;
    bool any = false;
    for (size_t i = 0; i < threads_; ++i) {
      const size_t step = backwards ? threads_ - i : i;
      Fiber& fiber = *fibers_[(first + step) % threads_];
      if (fiber.state != State::kReady) continue;
      any = true;
      enter(fiber);
      if (fiber.state == State::kAtWarpBarrier) release_warp(fiber);
    }
    return any;
  }

  void release_block() {
    for (size_t i = 0; i < threads_; ++i) {
      if (fibers_[i]->state == State::kDone) undefined_on_a_gpu("a thread ended before a barrier that others wait at");
      if (fibers_[i]->state == State::kAtWarpBarrier) {
        undefined_on_a_gpu("a warp waits for a lane that does not come");
      }
    }
    for (size_t i = 0; i < threads_; ++i) fibers_[i]->state = State::kReady;
  }

  // Lets the lanes go that `last` waits with, if all have come.
  void release_warp(const Fiber& last) {
    running = const_cast<Fiber*>(&last);
    const unsigned lanes = last.lanes;
    if ((lanes >> lane() & 1) == 0) undefined_on_a_gpu("a thread is not among the lanes that it names");
    for (int i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) == 0) continue;
      const Fiber& fiber = neighbour(i);
      if (fiber.state == State::kDone) undefined_on_a_gpu("a warp waits for a thread that has ended");
      if (fiber.state != State::kAtWarpBarrier || fiber.lanes != lanes) return;
    }
    for (int i = 0; i < kWarp; ++i) {
      if ((lanes >> i & 1) != 0) neighbour(i).state = State::kReady;
    }
  }

#if defined(__SANITIZE_ADDRESS__)
  void enter(Fiber& fiber) {
    running = &fiber;
    threadIdx = fiber.index;
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
    swapcontext(&scheduler_, &fiber.context);
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
  }

  void leave(Fiber& fiber) {
    __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
    swapcontext(&fiber.context, &scheduler_);
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }
#else
  // swapcontext() asks the kernel for the signal mask each time; jumps between stacks that exist do not.
  void enter(Fiber& fiber) {
    running = &fiber;
    threadIdx = fiber.index;
    if (_setjmp(scheduler_place_) != 0) return;
    if (fiber.begun) _longjmp(fiber.place, 1);
    fiber.begun = true;
    setcontext(&fiber.context);
  }

  void leave(Fiber& fiber) {
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_place_, 1);
  }
#endif

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  size_t threads_ = 0;
  std::unique_ptr<char, Free> shared_;
  size_t shared_bytes_ = 0;
  ucontext_t scheduler_;
  jmp_buf scheduler_place_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  uint64_t turn_ = 1;
};

Machine& machine() {
  thread_local Machine machine;
  return machine;
}

void Machine::be_a_thread() {
  Machine& self = machine();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &self.scheduler_stack_, &self.scheduler_stack_bytes_);
#endif
  while (true) {
    Fiber& fiber = *self.running;
    (*self.kernel_)();
    const auto empty = [](const std::vector<Copy>& group) { return group.empty(); };
    if (!fiber.copies.empty() || !std::all_of(fiber.under_way.begin(), fiber.under_way.end(), empty)) {
      undefined_on_a_gpu("a thread ended before its copies to shared memory");
    }
    fiber.under_way.clear();
    fiber.state = State::kDone;
    self.leave(fiber);
  }
}

}  // namespace

void run_grid(dim3 grid, dim3 block, const std::function<void()>& kernel, size_t shared_bytes) {
  machine().run_grid(grid, block, kernel, shared_bytes);
}

char* dynamic_shared() { return machine().shared(); }

int lane() { return machine().lane(); }

// What is waited for may be another process's to do: a sleep lets that run, a yield need not.
void yield() {
  machine().wait(State::kReady, 0);
  std::this_thread::sleep_for(std::chrono::microseconds(10));
}

void block_barrier() { machine().wait(State::kAtBlockBarrier, 0); }
void warp_barrier(unsigned lanes) { machine().wait(State::kAtWarpBarrier, lanes); }

void bring(unsigned lanes, std::span<const uint32_t> words) {
  if (words.size() > kMostBrought) undefined_on_a_gpu("an exchange of too many words");
  std::copy(words.begin(), words.end(), machine().running->brought);
  warp_barrier(lanes);
}

std::span<const uint32_t> brought_by(int lane) { return machine().neighbour(lane).brought; }

// Nobody brings the next words before all have read these.
void end_exchange(unsigned lanes) { warp_barrier(lanes); }

uint32_t shuffle(unsigned lanes, uint32_t bits, int from) {
  if (from < 0 || from >= kWarp || (lanes >> from & 1) == 0) {
    undefined_on_a_gpu("a shuffle reads a lane that it does not name");
  }
  bring(lanes, {&bits, 1});
  const uint32_t result = brought_by(from)[0];
  end_exchange(lanes);
  return result;
}

uint32_t vote(unsigned lanes, bool yes) {
  const uint32_t mine = yes ? 1 : 0;
  bring(lanes, {&mine, 1});
  uint32_t votes = 0;
  for (int i = 0; i < kWarp; ++i) {
    if ((lanes >> i & 1) != 0) votes |= brought_by(i)[0] << i;
  }
  end_exchange(lanes);
  return votes;
}

namespace {

// Exact products, one rounding of the sum: what tensor cores come close to, in an order of their own.
template <int kWords, typename Value>
void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Value& value) {
  constexpr unsigned kAll = 0xFFFFFFFF;
  const uint32_t words[] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  bring(kAll, words);
  const int group = lane() / 4, in_group = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * in_group + i % 2, lower = i / 2;  // whether the row is in the lower half of a
    double sum = c[i];
    for (int t = 0; t < 4; ++t) {
      const auto from_a = brought_by(4 * group + t), from_b = brought_by(4 * column + t);
      for (int half = 0; half < 2; ++half) {
        for (int k = 0; k < kWords; ++k) {
          sum += double{value(from_a[2 * half + lower], k)} * double{value(from_b[4 + half], k)};
        }
      }
    }
    c[i] = static_cast<float>(sum);
  }
  end_exchange(kAll);
}

}  // namespace

void multiply_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, [](uint32_t word, int k) { return bf16_to_float(static_cast<uint16_t>(word >> 16 * k)); });
}

void multiply_e4m3(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<4>(c, a, b, [](uint32_t word, int k) { return e4m3_to_float(static_cast<uint8_t>(word >> 8 * k)); });
}

namespace {
constexpr size_t kCopied = 16;
}  // namespace

void copy_async(void* shared, const void* global, bool there) {
  const auto misaligned = [](const void* at) { return reinterpret_cast<uintptr_t>(at) % kCopied != 0; };
  if (misaligned(shared) || misaligned(global)) undefined_on_a_gpu("a copy to shared memory is not aligned");
  std::memset(shared, kGarbage, kCopied);  // whoever still reads what lay there sees it
  machine().running->copies.push_back({shared, there ? global : nullptr});
}

void commit_copies() {
  Fiber& fiber = *machine().running;
  fiber.under_way.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}

void wait_for_copies(size_t under_way) {
  Fiber& fiber = *machine().running;
  for (; fiber.under_way.size() > under_way; fiber.under_way.pop_front()) {
    for (const Copy& copy : fiber.under_way.front()) {
      if (copy.from != nullptr) {
        std::memcpy(copy.to, copy.from, kCopied);
      } else {
        std::memset(copy.to, 0, kCopied);
      }
    }
  }
}

void load_matrices(uint32_t (&words)[4], const void* row, bool transposed) {
  constexpr unsigned kAll = 0xFFFFFFFF;
  const auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16 != 0) undefined_on_a_gpu("a row of a matrix is not aligned");
  const uint32_t halves[] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  bring(kAll, halves);
  const auto element = [](int matrix, int row, int column) {
    const auto from = brought_by(8 * matrix + row);
    return reinterpret_cast<const uint16_t*>(uintptr_t{from[1]} << 32 | from[0])[column];
  };
  const int group = lane() / 4, in_group = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    words[i] = 0;
    for (int half = 0; half < 2; ++half) {
      const int at = 2 * in_group + half;
      words[i] |= uint32_t{transposed ? element(i, at, group) : element(i, group, at)} << 16 * half;
    }
  }
  end_exchange(kAll);
}

uint32_t scale_bf16(uint32_t pair, int exponent) {
  uint32_t scaled = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t bits = pair >> 16 * i & 0xFFFF, biased = bits >> 7 & 0xFF, fraction = bits & 0x7F;
    // From whole numbers: as floats, subnormal values would be flushed here.
    const double magnitude =
        std::ldexp(biased == 0 ? fraction : fraction + 128.0, static_cast<int>(std::max(biased, 1u)) - 134 + exponent);
    if (magnitude != 0 && magnitude < 0x1p-126) undefined_on_a_gpu("a scaled BF16 value is subnormal");
    const uint32_t product = std::bit_cast<uint32_t>(static_cast<float>(magnitude));
    if ((product & 0xFFFF) != 0 || product >= 0x7F800000) undefined_on_a_gpu("a scaled BF16 value is not exact");
    scaled |= (product >> 16 | (bits & 0x8000)) << 16 * i;
  }
  return scaled;
}

}  // namespace cuda_emulation
