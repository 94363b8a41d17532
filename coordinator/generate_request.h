// From a GenerateRequest on the wire to a Request that the engine takes: everything a client can say is checked here,
// at the door, and every refusal names the field. Pure but for the seed of requests that bring none.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/request.h"
#include "coordinator/served_model.h"

namespace octet::v1 {
class ChatRequest;
class GenerateRequest;
}  // namespace octet::v1

namespace octet {

// A request at the door's inner side: what the engine runs, and what its text is to look like.
struct AcceptedRequest {
  Request request;                // seed chosen; id, deadline and context length are the engine's to settle
  std::vector<std::string> stop;  // stop strings
  bool include_stop = false;
  bool logprobs = false;
  std::optional<std::string> echo;  // text that each output begins with
};

// INVALID_ARGUMENT with google.rpc.BadRequest details; FAILED_PRECONDITION for a chat with a model that has no chat
// format. May take a while: it tokenises.
absl::StatusOr<AcceptedRequest> accept_request(const v1::GenerateRequest& request, const ServedModel& model);

// What a Chat call is as a Generate call.
v1::GenerateRequest as_generate_request(const v1::ChatRequest& request);

}  // namespace octet
