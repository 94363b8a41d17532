// CallReport: how a call that asked the engine for something ended, for logs and metrics. Holds nothing of what was
// said.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "absl/status/status.h"

namespace octet {

struct CallReport {
  std::string method;      // "octet.v1.InferenceService/Generate"
  std::string request_id;  // the client's, or given here; printable ASCII
  std::string trace_id;    // of the client's traceparent; empty: none
  absl::Status status;     // OK, or what the client was told
  int32_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  double first_token_seconds = 0;  // 0: none came
  double total_seconds = 0;
};

// Called on any thread, once for each call; must return soon.
using CallListener = std::function<void(const CallReport&)>;

}  // namespace octet
