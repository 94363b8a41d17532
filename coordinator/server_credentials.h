// Who may talk to a listener, and whether others can read along: tokens, TLS, both or, on loopback, neither.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "coordinator/listen_address.h"

namespace grpc {
class ServerCredentials;
}

namespace octet {

struct AccessOptions {
  std::string token_file;  // empty: no token is asked for
  std::string tls_cert;    // PEM files: certificate chain and key of this server; empty: plain text
  std::string tls_key;
  std::string tls_client_ca;  // clients must have a certificate of these authorities; empty: they need none
  bool insecure = false;      // a non-loopback address that anyone may use, knowingly
};

// FAILED_PRECONDITION for files that are missing, unreadable or not what they should be, and for an address beyond this
// machine that anyone could use unasked: each names the file or the address and what helps.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> make_server_credentials(const AccessOptions& access,
                                                                                 const ListenAddress& address);

}  // namespace octet
