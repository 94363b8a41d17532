// Interrupt: SIGINT and SIGTERM become a call on an ordinary thread, for as long as it lives. A second signal ends the
// process at once, as a signal would. One at a time.
#pragma once

#include <atomic>
#include <functional>
#include <thread>

namespace octet {

class Interrupt {
 public:
  // `on_signal` is called at most once, on a thread of this object.
  explicit Interrupt(std::function<void()> on_signal);
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;

  // The signal that came, or 0.
  int signal() const { return signal_; }

 private:
  void watch();

  std::function<void()> on_signal_;
  std::atomic<int> signal_{0};
  std::thread thread_;
};

}  // namespace octet
