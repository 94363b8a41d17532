// Progress: shows how far a long step is, on stderr. A bar on a terminal; a line every few seconds elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <string>

#include "worker/memory_plan.h"

namespace octet {

class Progress {
 public:
  // label: "Loading weights". amount: an amount in words, "1.5 GiB".
  explicit Progress(std::string label, std::function<std::string(int64_t)> amount = human_bytes);
  // Cheap to call often.
  void update(int64_t done, int64_t total);
  // Says how much was done, how long it took and how fast it was. Amounts are bytes.
  void finish(int64_t total);
  // Takes the bar away: what was done is told elsewhere.
  void clear();
  double seconds() const;

 private:
  const std::string label_;
  const std::function<std::string(int64_t)> amount_;
  const bool terminal_;
  const std::chrono::steady_clock::time_point begin_;
  std::chrono::steady_clock::time_point shown_;
};

}  // namespace octet
