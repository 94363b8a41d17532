// From a GenerateRequest on the wire to a Request that the engine takes: everything a client can say is checked here,
// at the door, and every refusal names the field. Pure but for the seed of requests that bring none.
#pragma once

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/served_model.h"

namespace octet::v1 {
class GenerateRequest;
}

namespace octet {

// A request at the door's inner side: what the engine runs, and what its text is to look like.
struct AcceptedRequest {
  Request request;                // seed chosen; id and context length are the engine's to settle
  std::vector<std::string> stop;  // stop strings
  bool include_stop = false;
  bool logprobs = false;
};

// INVALID_ARGUMENT with google.rpc.BadRequest details; FAILED_PRECONDITION for a chat with a model that has no chat
// format. May take a while: it tokenises.
absl::StatusOr<AcceptedRequest> accept_request(const v1::GenerateRequest& request, const ServedModel& model);

}  // namespace octet
