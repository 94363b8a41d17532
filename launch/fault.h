// Fault: a rank's failure at a chosen moment, for tests of what everybody else then does.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "worker/worker_service.h"

namespace octet {

struct Fault {
  enum class Kind : uint8_t { kSegv, kCheck, kHang, kExit, kSlow };
  Kind kind = Kind::kSegv;
  std::optional<int> rank;       // absent: every rank
  std::optional<uint64_t> step;  // before the first step of at least this number; kSlow: before each
  std::optional<int32_t> token;  // before a step that brings this token
};

// "rank=1,step=20,kind=hang" or "token=123,kind=segv". INVALID_ARGUMENT says what is wrong.
absl::StatusOr<Fault> parse_fault(const std::string& text);

// `run`, but for the fault, on rank `rank`.
WorkerFunction with_fault(const Fault& fault, int rank, WorkerFunction run);

}  // namespace octet
