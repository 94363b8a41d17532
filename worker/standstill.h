// Who waits for whom when a step does not end: every rank goes through the same collectives in the same order, so the
// one that is least far on this way keeps the others. Pure.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "worker/flight.h"

namespace octet {

struct RankPlace {
  int rank = 0;
  Place place;
};

struct Standstill {
  std::vector<int> behind;    // least far; empty when all are at one place
  std::vector<int> furthest;  // all ranks when they are at one place
  Place behind_at, furthest_at;
};

// REQUIRES: at least one rank.
Standstill find_standstill(std::span<const RankPlace> ranks);

// "rank 2 has not entered collective 812 of step 57, in which ranks 0 and 1 wait: it is in step 57, after collective
// 811"; or that no rank is behind the others.
std::string to_string(const Standstill& standstill);

// "rank 2"; "ranks 0, 1 and 3".
std::string rank_list(std::span<const int> ranks);

// "in collective 812 of step 57"; "in step 57, after collective 811"; "idle after step 57".
std::string to_string(const Place& place);

}  // namespace octet
