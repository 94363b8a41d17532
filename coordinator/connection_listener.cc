#include "coordinator/connection_listener.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdint>
#include <utility>

namespace octet {
namespace {

// Descriptors that no connection may take: files, other listeners, pipes of the process.
constexpr rlim_t kSpareDescriptors = 64;

// The kernel gives the lowest free number, so a high one means that nearly all are taken.
bool leaves_spares(int fd) {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return true;
  return static_cast<rlim_t>(fd) + kSpareDescriptors < limit.rlim_cur;
}

}  // namespace

absl::StatusOr<std::unique_ptr<ConnectionListener>> ConnectionListener::listen(const ListenAddress& address,
                                                                               absl::string_view option) {
  std::unique_ptr<ConnectionListener> listener(new ConnectionListener());
  listener->port_ = address.port;
  const absl::StatusOr<std::vector<int>> sockets = listen_at(address, option, &listener->port_);
  if (!sockets.ok()) return sockets.status();
  listener->listeners_ = *sockets;
  listener->stop_event_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  return listener;
}

ConnectionListener::~ConnectionListener() {
  if (thread_.joinable()) {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(stop_event_, &one, sizeof one);
    thread_.join();
  }
  for (const int listener : listeners_) close(listener);
  if (stop_event_ >= 0) close(stop_event_);
}

void ConnectionListener::start(std::function<void(int listener, int connection)> take) {
  take_ = std::move(take);
  thread_ = std::thread([this] { run(); });
}

void ConnectionListener::run() {
  std::vector<pollfd> watched = {{.fd = stop_event_, .events = POLLIN, .revents = 0}};
  for (const int listener : listeners_) watched.push_back({.fd = listener, .events = POLLIN, .revents = 0});
  while (true) {
    if (poll(watched.data(), watched.size(), -1) < 0) continue;  // interrupted
    if (watched[0].revents != 0) return;
    for (size_t i = 1; i < watched.size(); ++i) {
      if (watched[i].revents != 0) accept_from(watched[i].fd);
    }
  }
}

void ConnectionListener::accept_from(int listener) {
  const int connection = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (connection < 0) {
    // Somebody else has taken the spares: until they are back the client waits in the kernel's queue.
    if (errno == EMFILE || errno == ENFILE) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    return;
  }
  if (!leaves_spares(connection)) {
    close(connection);
    return;
  }
  const int on = 1;
  setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  take_(listener, connection);
}

}  // namespace octet
