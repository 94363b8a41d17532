// What this machine lends to this process: cores within its affinity and CPU quota, memory within its cgroups' limits.
// Reads files of /proc and /sys; decides nothing.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

// Where to read. Tests point these at files of their own; what mountinfo names as mount points is read as it stands.
struct MachineFiles {
  std::string meminfo = "/proc/meminfo";
  std::string cgroup = "/proc/self/cgroup";
  std::string mountinfo = "/proc/self/mountinfo";
};

// The CPUs that this thread may run on, ascending.
std::vector<int> allowed_cpus();

// How many cores' worth of time the CPU quotas of this process's cgroups allow (v1 and v2, nested), at least 1, rounded
// down; `most` when there is no quota below it.
int cores_within_quota(int most, const MachineFiles& files = {});

// Bytes that can still be had without swapping: MemAvailable, or less where a cgroup above this process (v1 or v2,
// nested) has less room. A cgroup's file cache counts as room. UNAVAILABLE when /proc/meminfo says nothing.
absl::StatusOr<int64_t> available_memory(const MachineFiles& files = {});

// The name under which other nodes reach this one.
std::string host_name();

}  // namespace octet
