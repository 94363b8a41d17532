// HOST:PORT for listening: what it means on this machine, found out before gRPC or another server is asked, whose
// errors have no reasons.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace octet {

struct ListenAddress {
  std::string host;  // without brackets
  int port = 0;
  bool loopback = false;  // reaches this machine only
  bool wildcard = false;  // every address of this machine

  // For gRPC and for people: brackets around IPv6.
  std::string to_string() const;
};

// INVALID_ARGUMENT with an example when text is no HOST:PORT or the host is unknown.
absl::StatusOr<ListenAddress> parse_listen_address(const std::string& text);

// Whether the port can be bound. UNAVAILABLE when it is in use, FAILED_PRECONDITION when this machine does not have the
// address or this user may not: each says what helps, and by which option.
absl::Status check_bindable(const ListenAddress& address, absl::string_view option);

// Sockets that listen at every address that the host stands for, all at *port; 0 becomes one that is free. The caller
// closes them. Errors as check_bindable().
absl::StatusOr<std::vector<int>> listen_at(const ListenAddress& address, absl::string_view option, int* port);

}  // namespace octet
