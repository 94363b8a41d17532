// SharedWindow: memory that the ranks of one node share, and the barrier that orders what they write there. The same
// code runs over a process's own memory (threads) and over POSIX shared memory (MPI).
//
// Invariant: what a rank writes into mine() between barriers b-1 and b may be read by all between barriers b and b+1,
// and is not overwritten before barrier b+1. Each rank has two areas that take turns, so one barrier per exchange is
// enough.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>

namespace octet {

// How ranks wait for one another.
struct WaitPolicy {
  // Keep polling for a while before sleeping. Only where every thread on the node owns a core: elsewhere a polling rank
  // burns the time slice of the rank it waits for. Sleeping ranks cost nothing.
  bool spin = false;
  // Called about every 100 ms from inside a wait, with how long this wait has lasted. May end the process, or throw;
  // then this rank's communicator cannot be used again. This is where a watchdog looks; without one a wait has no end.
  std::function<void(std::chrono::milliseconds waited)> on_wait = {};
};

// The clock of one wait: polls for a while if the policy spins, then asks the caller to sleep, and calls on_wait.
class Waiting {
 public:
  explicit Waiting(const WaitPolicy& policy) : policy_(policy) {}
  // True while it is worth polling again at once; it has paused a moment. False: sleep, at most kSleep.
  bool poll_again();
  // To be called after every sleep.
  void slept();

  static constexpr std::chrono::milliseconds kSleep{100};

 private:
  const WaitPolicy& policy_;
  int polls_ = 0;
  std::chrono::steady_clock::time_point begin_, reported_;
};

class SharedWindow {
 public:
  struct Layout {
    int ranks = 1;
    int64_t area_bytes = 0;    // of each of a rank's two areas
    int64_t common_bytes = 0;  // of the part that any rank may write: its users order themselves with barriers
  };
  static int64_t bytes_of(const Layout& layout);

  // memory: bytes_of(layout) bytes that were zero before the first rank came, 64-byte aligned, not owned.
  SharedWindow(void* memory, const Layout& layout, int rank, WaitPolicy policy);

  int rank() const { return rank_; }
  const Layout& layout() const { return layout_; }
  const WaitPolicy& policy() const { return policy_; }

  // Returns when every rank has called it as often as this one.
  void barrier();

  // Where this rank writes what others may read after the next barrier.
  std::byte* mine() const { return area(rank_, barriers_ & 1); }
  // What `rank` wrote before the last barrier.
  const std::byte* of(int rank) const { return area(rank, (barriers_ - 1) & 1); }
  std::byte* common() const { return common_; }

 private:
  struct Control;
  std::byte* area(int rank, uint32_t half) const;
  void wait_until(uint32_t target);

  Control* control_;
  std::byte* areas_;
  std::byte* common_;
  Layout layout_;
  int rank_;
  WaitPolicy policy_;
  uint32_t barriers_ = 0;  // passed by this rank; wraps
};

}  // namespace octet
