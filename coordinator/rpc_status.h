// Errors as clients see them: absl::Status inside, gRPC status with google.rpc details outside.
#pragma once

#include <grpcpp/support/status.h>

#include <string>
#include <vector>

#include "absl/status/status.h"

namespace octet {

// One field that was not as it must be. `field` is the path in the request: "sampling.temperature".
struct FieldViolation {
  std::string field;
  std::string description;  // what was expected, what was found
};

// INVALID_ARGUMENT that names every field, in its message and as google.rpc.BadRequest. REQUIRES: violations is not
// empty.
absl::Status bad_request(const std::vector<FieldViolation>& violations);

// Same code and message; google.rpc details travel in grpc-status-details-bin.
grpc::Status to_rpc_status(const absl::Status& status);

}  // namespace octet
