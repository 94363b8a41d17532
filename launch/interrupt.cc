#include "launch/interrupt.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "kernels/check.h"

namespace octet {
namespace {

// A handler may do little more than write to a pipe. Written before handlers are installed, read by them.
int wake_fds[2] = {-1, -1};
volatile sig_atomic_t signal_seen = 0;
struct sigaction before_int, before_term;

void on_signal(int number) {
  const int saved = errno;
  if (signal_seen != 0) _exit(128 + number);
  signal_seen = 1;
  const char byte = static_cast<char>(number);
  [[maybe_unused]] const ssize_t written = write(wake_fds[1], &byte, 1);
  errno = saved;
}

}  // namespace

Interrupt::Interrupt(std::function<void()> on_signal_function) : on_signal_(std::move(on_signal_function)) {
  OCTET_CHECK(wake_fds[0] < 0, "two Interrupts at once");
  OCTET_CHECK(pipe2(wake_fds, O_CLOEXEC) == 0, "no pipe for signals");
  signal_seen = 0;
  thread_ = std::thread([this] { watch(); });
  struct sigaction action {};
  action.sa_handler = on_signal;
  sigaction(SIGINT, &action, &before_int);
  sigaction(SIGTERM, &action, &before_term);
}

Interrupt::~Interrupt() {
  sigaction(SIGINT, &before_int, nullptr);
  sigaction(SIGTERM, &before_term, nullptr);
  const char end = 0;
  [[maybe_unused]] const ssize_t written = write(wake_fds[1], &end, 1);
  thread_.join();
  for (int& fd : wake_fds) {
    close(fd);
    fd = -1;
  }
}

void Interrupt::watch() {
  char byte = 0;
  while (true) {
    const ssize_t bytes = read(wake_fds[0], &byte, 1);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0 || byte == 0) return;
    signal_ = byte;
    on_signal_();
  }
}

}  // namespace octet
