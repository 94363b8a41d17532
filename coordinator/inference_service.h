// InferenceService: the public data plane. Text to Request on the way in, token events to a gRPC stream on the way out.
// Invariant: every call ends with exactly one status, and its request has left the engine (or is cancelled there) by
// then.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "coordinator/call_report.h"
#include "coordinator/engine.h"
#include "coordinator/served_model.h"

namespace grpc {
class Service;
}

namespace octet {

struct StreamLimits {
  // A client that reads nothing for this long loses its stream, and so does one that is this many tokens behind.
  absl::Duration stall = absl::Seconds(30);
  int32_t unread_tokens = 64 << 10;
};

// Any thread may call any of these.
class InferenceService {
 public:
  // `listener`, if any, hears of every Generate and Chat call that has ended.
  explicit InferenceService(const StreamLimits& limits = {}, CallListener listener = {});
  // REQUIRES: the gRPC server is shut down.
  ~InferenceService();

  // For ServerBuilder::RegisterService.
  grpc::Service* service();

  // From now on requests go to `engine`, which outlives every call. Before it they are refused: the model is loading.
  void open(std::shared_ptr<const ServedModel> model, Engine* engine);

  // New calls are refused with this status, which is not OK.
  void refuse(const absl::Status& status);
  // Every call under way ends with this status; their requests are cancelled.
  void end_all(const absl::Status& status);
  // Ends the calls of this request id with ABORTED; how many those were.
  int32_t abort(const std::string& request_id);
  // Calls whose stream is still open.
  size_t calls() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
