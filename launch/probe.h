// Probes: what octet doctor looks at on one rank, without a word to the others. Reads files of /proc and /sys and asks
// the kernel; decides nothing.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "launch/job_facts.h"

namespace octet {

// Everything about this process's machine and surroundings that takes no time to find out.
RankFacts probe_machine(const std::string& nvml_library = "libnvidia-ml.so.1",
                        const std::string& numa_folder = "/sys/devices/system/node");

// Opens the model and reads place's part of its weights, for at most `most_bytes` and `most_seconds`, past the page
// cache where the file system lets go of it. `place` counts the ranks that read at once from this node.
ModelFacts probe_model(const std::string& directory, int place, int places, int64_t most_bytes, double most_seconds);

// Fills in port_in_use, port_error and ephemeral_ports by trying to listen on 127.0.0.1.
void probe_ports(int port, JobFacts* job);

// "0-3,8" -> {0, 1, 2, 3, 8}, as the kernel lists CPUs; what is not of that form is left out.
std::vector<int> parse_cpu_list(std::string_view text);

}  // namespace octet
