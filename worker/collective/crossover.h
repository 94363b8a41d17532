// Up to which size a message is summed in one shot over peer memory, from which size on another communicator is faster:
// what ranks measured, made into a rule (pure). Sizes are those of the message in BF16.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>

namespace octet {

// Seconds of an all-reduce of `bytes`; infinite: not tried.
struct AllReduceTimes {
  int64_t bytes = 0;
  double one_shot = std::numeric_limits<double>::infinity();
  double two_shot = std::numeric_limits<double>::infinity();
  double other = std::numeric_limits<double>::infinity();  // another communicator
};

struct Crossover {
  int64_t one_shot_bytes = 0;                                 // one shot for messages up to this
  int64_t other_bytes = std::numeric_limits<int64_t>::max();  // the other communicator for messages from this on
};

// times: of growing sizes. One shot up to the last size before the first at which it loses to two shots; the other
// communicator from the size from which on it never loses.
Crossover crossover_of(std::span<const AllReduceTimes> times);

// "     bytes  one-shot us  two-shot us  other us", a line for each size, the fastest marked.
std::string table_of(std::span<const AllReduceTimes> times);

}  // namespace octet
