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

// 0, or the errno of a bind as servers do it. The socket never listens.
int try_bind(const addrinfo& address) {
  const int fd = socket(address.ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return errno;
  const int on = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
  const int error = bind(fd, address.ai_addr, address.ai_addrlen) == 0 ? 0 : errno;
  close(fd);
  return error;
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
  absl::StatusOr<AddressList> found = resolve(address.host, address.port);
  if (!found.ok()) return found.status();
  int error = 0;
  for (const addrinfo* one = found->get(); one != nullptr; one = one->ai_next) {
    const int this_error = try_bind(*one);
    if (this_error == EADDRINUSE) {
      return absl::UnavailableError(
          absl::StrCat("port ", address.port, " of ", address.host,
                       " is in use: stop the server that has it, or choose another port with ", option,
                       " (port 0 takes a free one)"));
    }
    if (this_error == 0) return absl::OkStatus();  // one family is enough: a host may lack IPv6
    error = this_error;
  }
  if (error == EACCES) {
    return absl::FailedPreconditionError(
        absl::StrCat("port ", address.port, " may not be used by this user: choose one from 1024 on with ", option));
  }
  return absl::FailedPreconditionError(
      absl::StrCat("cannot listen at ", address.to_string(), ": ", std::strerror(error), "; ", option,
                   " takes an address that this machine has, such as 127.0.0.1:", address.port));
}

}  // namespace octet
