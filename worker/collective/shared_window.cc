#include "worker/collective/shared_window.h"

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <ctime>
#include <new>
#include <utility>

#include "kernels/check.h"

namespace octet {
namespace {

constexpr int64_t kLine = 64;

// Long enough to bridge the skew between ranks inside a step, short enough that a rank whose peer was preempted sleeps.
constexpr std::chrono::microseconds kSpin{2000};
// A handful of polls for those who may not spin: the peer may be about to arrive on another core.
constexpr int kFewPolls = 64;

constexpr int64_t align_up(int64_t value) { return (value + kLine - 1) / kLine * kLine; }

void pause_cpu() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Sleeps until `word` no longer holds `seen`, somebody wakes it, or Waiting::kSleep has passed. Not a private futex:
// the word may be shared between processes.
void futex_sleep(std::atomic<uint32_t>& word, uint32_t seen) {
  timespec timeout{};
  timeout.tv_nsec = std::chrono::nanoseconds(Waiting::kSleep).count();
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &timeout, nullptr, 0);
}

void futex_wake_all(std::atomic<uint32_t>& word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace

bool Waiting::poll_again() {
  const int polls = polls_++;
  if (polls == 0) begin_ = reported_ = std::chrono::steady_clock::now();
  pause_cpu();
  if (polls < kFewPolls) return true;
  // Reading the clock costs as much as a poll, so it is read at every 16th.
  return policy_.spin && (polls % 16 != 0 || std::chrono::steady_clock::now() - begin_ < kSpin);
}

void Waiting::slept() {
  const auto now = std::chrono::steady_clock::now();
  if (!policy_.on_wait || now - reported_ < kSleep) return;
  reported_ = now;
  policy_.on_wait(std::chrono::duration_cast<std::chrono::milliseconds>(now - begin_));
}

// At the front of the window. Zero bytes are its initial state, so that no rank need be first.
struct SharedWindow::Control {
  // Barriers that ranks have entered, all together; barrier b is complete at b * ranks. Wraps, so it is compared by
  // difference.
  alignas(kLine) std::atomic<uint32_t> entered;
  // How many ranks sleep on `entered`: the last one to enter makes a system call only if somebody does.
  alignas(kLine) std::atomic<uint32_t> sleepers;
};

int64_t SharedWindow::bytes_of(const Layout& layout) {
  return align_up(sizeof(Control)) + 2 * layout.ranks * align_up(layout.area_bytes) + align_up(layout.common_bytes);
}

SharedWindow::SharedWindow(void* memory, const Layout& layout, int rank, WaitPolicy policy)
    : control_(static_cast<Control*>(memory)), layout_(layout), rank_(rank), policy_(std::move(policy)) {
  static_assert(std::atomic<uint32_t>::is_always_lock_free, "the window's counters are shared between processes");
  OCTET_CHECK(reinterpret_cast<uintptr_t>(memory) % kLine == 0, "the window must be aligned to a cache line");
  OCTET_CHECK(rank >= 0 && rank < layout.ranks, "a rank outside the window's ranks");
  areas_ = static_cast<std::byte*>(memory) + align_up(sizeof(Control));
  common_ = areas_ + 2 * layout.ranks * align_up(layout.area_bytes);
}

std::byte* SharedWindow::area(int rank, uint32_t half) const {
  return areas_ + (2 * rank + half) * align_up(layout_.area_bytes);
}

void SharedWindow::barrier() {
  const uint32_t target = ++barriers_ * static_cast<uint32_t>(layout_.ranks);
  // Sequentially consistent with the sleepers' count: either the last rank sees a sleeper, or the sleeper sees the last
  // rank's entry (in futex_sleep, which compares the word again).
  const uint32_t entered = control_->entered.fetch_add(1) + 1;
  if (entered != target) return wait_until(target);
  if (control_->sleepers.load() != 0) futex_wake_all(control_->entered);
}

void SharedWindow::wait_until(uint32_t target) {
  struct Sleeper {
    explicit Sleeper(std::atomic<uint32_t>& count) : count(count) { count.fetch_add(1); }
    ~Sleeper() { count.fetch_sub(1); }
    std::atomic<uint32_t>& count;
  };
  Waiting waiting(policy_);
  for (;;) {
    const uint32_t entered = control_->entered.load(std::memory_order_acquire);
    if (static_cast<int32_t>(entered - target) >= 0) return;
    if (waiting.poll_again()) continue;
    {
      Sleeper sleeper(control_->sleepers);
      futex_sleep(control_->entered, entered);
    }
    waiting.slept();
  }
}

}  // namespace octet
