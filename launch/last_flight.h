// octet doctor --last: what the ranks of the last job that failed were doing, and what they said, at its end.
#pragma once

#include <string>

namespace octet {

// Prints it on standard output. `directory`: a job's flights, or one file of each of its ranks gathered from several
// machines; empty: those of this machine's last job that ended by failure. The exit status: 1 when there are none.
int tell_last_flight(const std::string& directory);

}  // namespace octet
