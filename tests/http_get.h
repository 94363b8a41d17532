// One HTTP/1.0 request over a plain socket: tests ask servers without the help of a client library.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace octet {

// A socket connected to a.b.c.d:port, or -1.
inline int connect_to(const std::string& address) {
  const size_t colon = address.rfind(':');
  int port = 0;
  sockaddr_in to{};
  to.sin_family = AF_INET;
  if (colon == std::string::npos || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      inet_pton(AF_INET, address.substr(0, colon).c_str(), &to.sin_addr) != 1) {
    return -1;
  }
  to.sin_port = htons(static_cast<uint16_t>(port));
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd >= 0 && connect(fd, reinterpret_cast<const sockaddr*>(&to), sizeof to) == 0) return fd;
  if (fd >= 0) close(fd);
  return -1;
}

struct HttpAnswer {
  int status = 0;  // 0: none came
  std::string head, body;
};

inline HttpAnswer http_get(const std::string& address, const std::string& path) {
  const int fd = connect_to(address);
  if (fd < 0) return {};
  const std::string request = absl::StrCat("GET ", path, " HTTP/1.0\r\nHost: octet\r\n\r\n");
  std::string text;
  if (send(fd, request.data(), request.size(), MSG_NOSIGNAL) == static_cast<ssize_t>(request.size())) {
    char buffer[4096];
    for (ssize_t n = 0; (n = read(fd, buffer, sizeof buffer)) > 0;) text.append(buffer, static_cast<size_t>(n));
  }
  close(fd);
  const size_t end = text.find("\r\n\r\n");
  HttpAnswer answer;
  if (end == std::string::npos || text.size() < 12 || !absl::SimpleAtoi(text.substr(9, 3), &answer.status)) return {};
  answer.head = text.substr(0, end);
  answer.body = text.substr(end + 4);
  return answer;
}

}  // namespace octet
