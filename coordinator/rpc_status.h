// Errors as clients see them: absl::Status inside, gRPC status with google.rpc details outside.
#pragma once

#include <grpcpp/support/status.h>

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace octet {

// One field that was not as it must be. `field` is the path in the request: "sampling.temperature".
struct FieldViolation {
  std::string field;
  std::string description;  // what was expected, what was found
};

// INVALID_ARGUMENT that names every field, in its message and as google.rpc.BadRequest. REQUIRES: violations is not
// empty.
absl::Status bad_request(const std::vector<FieldViolation>& violations);

// What bad_request() was given, as far as it is told; nothing for any other status.
std::vector<FieldViolation> violations_of(const absl::Status& status);

// The status with a reason for programs, UPPER_SNAKE_CASE, where its code alone does not tell: "MODEL_LOADING".
absl::Status with_reason(absl::Status status, absl::string_view reason);

// The status, with the hint that trying again is worth it after `delay`, as google.rpc.RetryInfo.
absl::Status with_retry_hint(absl::Status status, absl::Duration delay);

// What is said until a model is there.
absl::Status model_is_loading();

// Same code and message; google.rpc details travel in grpc-status-details-bin: a google.rpc.ErrorInfo whose reason is
// the code's name unless the status has one, and what the status brings.
grpc::Status to_rpc_status(const absl::Status& status);

}  // namespace octet
