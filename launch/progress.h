// Progress: shows how far a long step is, on stderr. A bar on a terminal; a line every few seconds elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace octet {

class Progress {
 public:
  // label: "Loading weights". Amounts are bytes.
  explicit Progress(std::string label);
  // Cheap to call often.
  void update(int64_t done, int64_t total);
  // Says how much was done, how long it took and how fast it was.
  void finish(int64_t total);
  double seconds() const;

 private:
  const std::string label_;
  const bool terminal_;
  const std::chrono::steady_clock::time_point begin_;
  std::chrono::steady_clock::time_point shown_;
};

}  // namespace octet
