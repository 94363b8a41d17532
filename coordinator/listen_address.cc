#include "coordinator/listen_address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace octet {
namespace {

using AddressList = std::unique_ptr<addrinfo, decltype(&freeaddrinfo)>;

absl::StatusOr<AddressList> resolve(const std::string& host, int port) {
  addrinfo hints{};
  hints.ai_family = AF_UNSPEC;
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  const int error = getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found);
  if (error != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the host \"", host, "\" of the address is unknown here: ", gai_strerror(error)));
  }
  return AddressList(found, &freeaddrinfo);
}

bool is_loopback(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return (ntohl(reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr) >> 24) == 127;
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_LOOPBACK(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

bool is_wildcard(const sockaddr* address) {
  if (address->sa_family == AF_INET) {
    return reinterpret_cast<const sockaddr_in*>(address)->sin_addr.s_addr == htonl(INADDR_ANY);
  }
  return address->sa_family == AF_INET6 &&
         IN6_IS_ADDR_UNSPECIFIED(&reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr);
}

// A socket bound as servers do it, or minus the errno. A port of 0 in *port becomes the one that was given.
int bound_socket(const addrinfo& address, int* port) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return -errno;
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  sockaddr_storage bound = {};
  std::memcpy(&bound, address.ai_addr, address.ai_addrlen);
  in_port_t* const number = address.ai_family == AF_INET6 ? &reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                                          : &reinterpret_cast<sockaddr_in*>(&bound)->sin_port;
  *number = htons(static_cast<uint16_t>(*port));
  socklen_t length = address.ai_addrlen;
  if (bind(fd, reinterpret_cast<const sockaddr*>(&bound), length) != 0 ||
      getsockname(fd, reinterpret_cast<sockaddr*>(&bound), &length) != 0) {
    const int error = errno;
    close(fd);
    return -error;
  }
  *port = ntohs(*number);
  return fd;
}

absl::Status cannot_bind(const ListenAddress& address, absl::string_view option, int error) {
  if (error == EADDRINUSE) {
    return absl::UnavailableError(absl::StrCat("port ", address.port, " of ", address.host,
                                               " is in use: stop the server that has it, or choose another port with ",
                                               option, " (port 0 takes a free one)"));
  }
  if (error == EACCES) {
    return absl::FailedPreconditionError(
        absl::StrCat("port ", address.port, " may not be used by this user: choose one from 1024 on with ", option));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("cannot listen at ", address.to_string(), ": ", std::strerror(error), "; ", option,
                   " takes an address that this machine has, such as 127.0.0.1:", address.port));
}

// Sockets for all of the host's addresses; at least one: a host may lack IPv6. A port in use counts for all of them.
absl::StatusOr<std::vector<int>> bind_at(const ListenAddress& address, absl::string_view option, int* port) {
  absl::StatusOr<AddressList> found = resolve(address.host, address.port);
  if (!found.ok()) return found.status();
  std::vector<int> sockets;
  int error = 0;
  for (const addrinfo* one = found->get(); one != nullptr && error != EADDRINUSE; one = one->ai_next) {
    const int bound = bound_socket(*one, port);
    if (bound >= 0) {
      sockets.push_back(bound);
    } else {
      error = -bound;
    }
  }
  if (!sockets.empty() && error != EADDRINUSE) return sockets;
  for (const int socket : sockets) close(socket);
  return cannot_bind(address, option, error);
}

}  // namespace

std::string ListenAddress::to_string() const {
  const bool ipv6 = host.find(':') != std::string::npos;
  return ipv6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

absl::StatusOr<ListenAddress> parse_listen_address(const std::string& text) {
  const auto refused = [&](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("the address \"", text, "\" ", why,
                                                   ": give HOST:PORT, for example 127.0.0.1:50051 or [::1]:50051"));
  };
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos) return refused("has no port");
  ListenAddress address;
  address.host = text.substr(0, colon);
  if (address.host.size() >= 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  } else if (address.host.find(':') != std::string::npos) {
    return refused("has an IPv6 host without brackets");
  }
  if (address.host.empty()) return refused("has no host");
  if (!absl::SimpleAtoi(text.substr(colon + 1), &address.port) || address.port < 0 || address.port > 65535) {
    return refused("has a port that is not a number from 0 to 65535");
  }
  absl::StatusOr<AddressList> found = resolve(address.host, address.port);
  if (!found.ok()) return found.status();
  address.loopback = true;
  for (const addrinfo* one = found->get(); one != nullptr; one = one->ai_next) {
    address.loopback = address.loopback && is_loopback(one->ai_addr);
    address.wildcard = address.wildcard || is_wildcard(one->ai_addr);
  }
  return address;
}

absl::Status check_bindable(const ListenAddress& address, absl::string_view option) {
  int port = address.port;
  const absl::StatusOr<std::vector<int>> sockets = bind_at(address, option, &port);
  if (!sockets.ok()) return sockets.status();
  for (const int socket : *sockets) close(socket);
  return absl::OkStatus();
}

absl::StatusOr<std::vector<int>> listen_at(const ListenAddress& address, absl::string_view option, int* port) {
  constexpr int kBacklog = 1024;
  absl::StatusOr<std::vector<int>> sockets = bind_at(address, option, port);
  if (!sockets.ok()) return sockets.status();
  for (const int socket : *sockets) {
    if (listen(socket, kBacklog) == 0) continue;
    // Two sockets can be bound to one port, but only one can listen at it.
    const int error = errno;
    for (const int open : *sockets) close(open);
    return cannot_bind(address, option, error);
  }
  return sockets;
}

}  // namespace octet
