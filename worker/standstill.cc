#include "worker/standstill.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace octet {
namespace {

// A place on the common way.
auto order_of(const Place& at) { return std::tuple(at.collective, !at.in_collective, at.step, !at.in_step); }

}  // namespace

Standstill find_standstill(std::span<const RankPlace> ranks) {
  const auto nearer = [](const RankPlace& a, const RankPlace& b) { return order_of(a.place) < order_of(b.place); };
  const auto [least, most] = std::ranges::minmax_element(ranks, nearer);
  Standstill found{.behind_at = least->place, .furthest_at = most->place};
  for (const RankPlace& rank : ranks) {
    if (rank.place == found.furthest_at) {
      found.furthest.push_back(rank.rank);
    } else if (rank.place == found.behind_at) {
      found.behind.push_back(rank.rank);
    }
  }
  return found;
}

std::string to_string(const Standstill& standstill) {
  const Place& furthest = standstill.furthest_at;
  if (standstill.behind.empty()) {
    return absl::StrCat("no rank is behind the others: ", rank_list(standstill.furthest),
                        standstill.furthest.size() == 1 ? " is " : " are ", to_string(furthest));
  }
  const std::string behind = rank_list(standstill.behind);
  const bool one = standstill.behind.size() == 1;
  if (furthest.in_collective) {
    return absl::StrCat(behind, one ? " has" : " have", " not entered collective ", furthest.collective, " of step ",
                        furthest.step, ", in which ", rank_list(standstill.furthest),
                        standstill.furthest.size() == 1 ? " waits: " : " wait: ", one ? "it is " : "they are ",
                        to_string(standstill.behind_at));
  }
  return absl::StrCat(behind, one ? " is " : " are ", to_string(standstill.behind_at), " while ",
                      rank_list(standstill.furthest), standstill.furthest.size() == 1 ? " is " : " are ",
                      to_string(furthest));
}

std::string rank_list(std::span<const int> ranks) {
  if (ranks.size() == 1) return absl::StrCat("rank ", ranks.front());
  return absl::StrCat("ranks ", absl::StrJoin(ranks.first(ranks.size() - 1), ", "), " and ", ranks.back());
}

std::string to_string(const Place& place) {
  if (place.in_collective) return absl::StrCat("in collective ", place.collective, " of step ", place.step);
  if (place.in_step) return absl::StrCat("in step ", place.step, ", after collective ", place.collective);
  return absl::StrCat("idle after step ", place.step);
}

}  // namespace octet
