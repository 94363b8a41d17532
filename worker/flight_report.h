// What the flights of a job's ranks tell together: which rank the job failed by, what each said last, where each was,
// and who waited for whom. Pure.
#pragma once

#include <span>
#include <string>

#include "worker/flight.h"

namespace octet {

// Lines of text, the verdict first. REQUIRES: at least one flight, all of one job, by rank.
std::string flight_report(std::span<const Flight> flights);

// The verdict alone, one sentence.
std::string flight_verdict(std::span<const Flight> flights);

}  // namespace octet
