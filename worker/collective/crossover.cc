#include "worker/collective/crossover.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace octet {
namespace {

std::string cell(double seconds, double best) {
  if (std::isinf(seconds)) return absl::StrFormat("%13s", "-");
  return absl::StrFormat("%12.1f%c", seconds * 1e6, seconds == best ? '*' : ' ');
}

}  // namespace

Crossover crossover_of(std::span<const AllReduceTimes> times) {
  Crossover crossover;
  for (const AllReduceTimes& at : times) {
    if (at.one_shot > at.two_shot) break;
    crossover.one_shot_bytes = at.bytes;
  }
  for (size_t i = times.size(); i > 0; --i) {
    const AllReduceTimes& at = times[i - 1];
    if (at.other >= std::min(at.one_shot, at.two_shot)) break;
    crossover.other_bytes = at.bytes;
  }
  return crossover;
}

std::string table_of(std::span<const AllReduceTimes> times) {
  std::string table = absl::StrFormat("%10s%13s%13s%13s", "bytes", "one-shot us ", "two-shot us ", "other us ");
  for (const AllReduceTimes& at : times) {
    const double best = std::min({at.one_shot, at.two_shot, at.other});
    absl::StrAppendFormat(&table, "\n%10d%s%s%s", at.bytes, cell(at.one_shot, best), cell(at.two_shot, best),
                          cell(at.other, best));
  }
  return table;
}

}  // namespace octet
