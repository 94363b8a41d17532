// What a batch job says of itself while it runs and at its end: a line, a status file for others, a summary, a picture.
// Pure.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "coordinator/batch/batch_runner.h"
#include "nlohmann/json.hpp"

namespace octet {

// One look at the job.
struct BatchSample {
  double seconds = 0;  // since this run began to run lines
  BatchState state;
  int64_t prompt_tokens = 0, generated_tokens = 0;  // that this run's engine has worked on
};

class BatchReport {
 public:
  // Samples come in order.
  void add(const BatchSample& sample);

  // Of the last ten seconds or so, of a line's tokens that are generated.
  double tokens_per_second() const;
  // Until every line is answered, as this run has gone so far; negative: nobody knows yet.
  double seconds_left() const;

  double share() const;      // of the lines
  std::string line() const;  // "120 of 1000 lines (12.0 %), 2 with errors, 834 tokens/s, about 3 min left"
  // What others may watch. `name` is the job's state in a word: running, finishing, done, stopped.
  nlohmann::ordered_json status(const std::string& name) const;
  std::string summary() const;
  // An SVG document: throughput over this run's time, and how many tokens the answers of all runs had.
  std::string svg(const std::string& title, const std::map<uint32_t, int64_t>& answer_tokens) const;

 private:
  std::vector<double> rates(size_t parts) const;

  std::vector<BatchSample> samples_;
};

// "40 s", "12 min", "3 h 20 min".
std::string human_duration(double seconds);

}  // namespace octet
