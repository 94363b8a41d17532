#include "launch/drain.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "kernels/check.h"

namespace octet {
namespace {

// What a dying mpirun leaves of its two seconds for letting work end; the rest is for saying goodbye.
constexpr absl::Duration kHaste = absl::Seconds(1);
// In which the failure shows that mpirun dies of: both learn of a rank's end at the same time.
constexpr absl::Duration kMoment = absl::Milliseconds(100);

// Set before handlers are installed: a handler reads and writes, it does nothing else.
int wake_event = -1;
pid_t open_mpi_parent = 0;  // 0: the parent is something else
std::atomic<int> caught_signal = 0;

constexpr int kDrainSignals[] = {SIGINT, SIGTERM, SIGUSR1, SIGCONT};

void wake() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(wake_event, &one, sizeof one);
}

void on_signal(int number, siginfo_t* info, void*) {
  const int saved = errno;
  const bool resume = number == SIGCONT && (open_mpi_parent == 0 || info->si_pid != open_mpi_parent);
  int none = 0;
  if (!resume && caught_signal.compare_exchange_strong(none, number)) wake();
  errno = saved;
}

pid_t find_open_mpi_parent() {
  const pid_t parent = getppid();
  std::ifstream file(absl::StrCat("/proc/", parent, "/comm"));
  std::string name;
  std::getline(file, name);
  for (const char* launcher : {"mpirun", "mpiexec", "orterun", "orted", "prterun", "prted"}) {
    if (name == launcher) return parent;
  }
  return 0;
}

const char* environment(const char* name) { return std::getenv(name); }

}  // namespace

absl::Duration DrainOrder::time_left(absl::Duration patience) const {
  return hasty ? std::min(patience, kHaste) : patience;
}

Drain::Drain() {
  OCTET_CHECK(wake_event < 0, "two Drains at once");
  wake_event = eventfd(0, EFD_CLOEXEC);
  OCTET_CHECK(wake_event >= 0, "no eventfd");
  caught_signal = 0;
}

Drain::~Drain() {
  if (catching_) {
    for (int number : kDrainSignals) signal(number, SIG_DFL);
  }
  close(std::exchange(wake_event, -1));
}

void Drain::catch_signals() {
  catching_ = true;
  open_mpi_parent = find_open_mpi_parent();
  for (int number : kDrainSignals) {
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_RESTART;
    // Whoever presses Ctrl-C twice means it. A second SIGTERM means nothing: Slurm's and mpirun's both arrive.
    if (number == SIGINT) action.sa_flags |= SA_RESETHAND;
    sigaction(number, &action, nullptr);
  }
}

void Drain::request(const std::string& reason) { give({.reason = reason, .failure = absl::OkStatus()}); }

void Drain::fail(const absl::Status& cause) { give({.reason = "the workers failed", .failure = cause}); }

void Drain::give(DrainOrder order) {
  {
    const std::lock_guard lock(mutex_);
    // A failure counts even after an order to drain: there is nobody left who could.
    if (ordered_ && (order.failure.ok() || !order_.failure.ok())) return;
    if (order.hasty) may_fail_until_ = absl::Now() + kMoment;
    if (!order.failure.ok()) may_fail_until_ = absl::InfinitePast();
    ordered_ = true;
    order_ = std::move(order);
  }
  wake();
}

absl::Status Drain::failure() const {
  const std::lock_guard lock(mutex_);
  return order_.failure;
}

DrainOrder Drain::wait(absl::Time latest) {
  while (true) {
    if (const int number = caught_signal.exchange(0); number != 0) {
      give({.reason = absl::StrCat("SIG", sigabbrev_np(number)),
            .hasty = open_mpi_parent != 0 && number != SIGUSR1,
            .failure = absl::OkStatus()});
    }
    if (absl::Now() >= latest) request("the job's time ends");
    absl::Time until = latest;
    {
      const std::lock_guard lock(mutex_);
      if (ordered_ && absl::Now() >= may_fail_until_) return order_;
      if (ordered_) until = may_fail_until_;
    }
    const absl::Duration left = std::clamp(until - absl::Now(), absl::ZeroDuration(), absl::Hours(1));
    pollfd event{.fd = wake_event, .events = POLLIN, .revents = 0};
    if (poll(&event, 1, static_cast<int>(absl::ToInt64Milliseconds(left)) + 1) > 0) {
      uint64_t wakes = 0;
      [[maybe_unused]] const ssize_t bytes = read(wake_event, &wakes, sizeof wakes);
    }
  }
}

absl::Time job_end(const char* (*variable)(const char* name)) {
  const char* text = variable("SLURM_JOB_END_TIME");
  int64_t seconds = 0;
  if (text == nullptr || !absl::SimpleAtoi(text, &seconds) || seconds <= 0) return absl::InfiniteFuture();
  return absl::FromUnixSeconds(seconds);
}

absl::Time job_end() { return job_end(environment); }

std::string job_id() {
  const char* id = environment("SLURM_JOB_ID");
  return id == nullptr ? "" : id;
}

}  // namespace octet
