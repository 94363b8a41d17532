#include "launch/machine.h"

#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <sstream>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"

namespace octet {
namespace {

std::optional<std::string> read_file(const std::string& path) {
  std::ifstream file(path);
  if (!file) return std::nullopt;
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

// A file with one number in it. None for "max" and for what is not there.
std::optional<int64_t> read_number(const std::string& path) {
  const std::optional<std::string> text = read_file(path);
  int64_t value = 0;
  if (!text || !absl::SimpleAtoi(absl::StripAsciiWhitespace(*text), &value)) return std::nullopt;
  return value;
}

// The number after `key` in a file of "key number" lines; 0 when it is not there.
int64_t read_field(const std::string& path, absl::string_view key) {
  const std::string text = read_file(path).value_or("");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> words = absl::StrSplit(line, absl::ByAnyChar(" :\t"), absl::SkipEmpty());
    int64_t value = 0;
    if (words.size() >= 2 && words[0] == key && absl::SimpleAtoi(words[1], &value)) return value;
  }
  return 0;
}

struct Mount {
  std::string root;   // the cgroup that is mounted
  std::string point;  // where
};

// The mount of cgroup v2, or of the v1 hierarchy that has `controller`.
std::optional<Mount> find_mount(const MachineFiles& files, absl::string_view controller, bool v2) {
  const std::string text = read_file(files.mountinfo).value_or("");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    // 36 35 98:0 ROOT POINT options ... - TYPE source super-options
    const std::pair<absl::string_view, absl::string_view> halves = absl::StrSplit(line, absl::MaxSplits(" - ", 1));
    const std::vector<absl::string_view> left = absl::StrSplit(halves.first, ' ');
    const std::vector<absl::string_view> right = absl::StrSplit(halves.second, ' ');
    if (left.size() < 5 || right.size() < 3) continue;
    const std::vector<absl::string_view> options = absl::StrSplit(right[2], ',');
    const bool matches =
        v2 ? right[0] == "cgroup2"
           : right[0] == "cgroup" && std::find(options.begin(), options.end(), controller) != options.end();
    if (matches) return Mount{std::string(left[3]), std::string(left[4])};
  }
  return std::nullopt;
}

// The process's path in cgroup v2, or in the v1 hierarchy that has `controller`.
std::optional<std::string> find_path(const MachineFiles& files, absl::string_view controller, bool v2) {
  const std::string text = read_file(files.cgroup).value_or("");
  for (absl::string_view line : absl::StrSplit(text, '\n')) {
    const std::vector<absl::string_view> fields = absl::StrSplit(line, absl::MaxSplits(':', 2));  // ID:CONTROLLERS:PATH
    if (fields.size() != 3) continue;
    const std::vector<absl::string_view> controllers = absl::StrSplit(fields[1], ',');
    const bool matches = v2 ? fields[0] == "0" && fields[1].empty()
                            : std::find(controllers.begin(), controllers.end(), controller) != controllers.end();
    if (matches) return std::string(fields[2]);
  }
  return std::nullopt;
}

// The folders of the cgroups that hold this process, the innermost first. A limit of any of them binds.
std::vector<std::string> cgroup_folders(const MachineFiles& files, absl::string_view controller, bool v2) {
  const std::optional<Mount> mount = find_mount(files, controller, v2);
  const std::optional<std::string> path = find_path(files, controller, v2);
  if (!mount || !path) return {};
  // In a container the mounted cgroup is often the process's own, and its path is told from the host's root; or the
  // path leaves the mount ("/../.."), and only the mount itself can be read.
  absl::string_view below = *path;
  if (mount->root != "/" && !absl::ConsumePrefix(&below, mount->root)) below = "";
  if (absl::StrContains(below, "..")) below = "";
  std::vector<std::string> folders;
  for (std::string inner(absl::StripSuffix(below, "/")); !inner.empty(); inner.resize(inner.rfind('/'))) {
    folders.push_back(mount->point + inner);
  }
  folders.push_back(mount->point);
  return folders;
}

struct MemoryNames {
  const char *limit, *usage;
  const char *inactive, *active;  // file cache, in memory.stat
};
constexpr MemoryNames kV1{"memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", "total_active_file"};
constexpr MemoryNames kV2{"memory.max", "memory.current", "inactive_file", "active_file"};

// What a cgroup still allows; none without a limit.
std::optional<int64_t> room_in(const std::string& folder, const MemoryNames& names) {
  const std::optional<int64_t> limit = read_number(absl::StrCat(folder, "/", names.limit));
  const std::optional<int64_t> usage = read_number(absl::StrCat(folder, "/", names.usage));
  if (!limit || !usage) return std::nullopt;
  const std::string stat = absl::StrCat(folder, "/memory.stat");
  const int64_t cache = read_field(stat, names.inactive) + read_field(stat, names.active);
  return std::max<int64_t>(0, *limit - (*usage - std::min(cache, *usage)));
}

// The cores of a cgroup's CPU quota; none without one.
std::optional<double> quota_of(const std::string& folder, bool v2) {
  int64_t quota = 0, period = 0;
  if (v2) {
    const std::string text = read_file(absl::StrCat(folder, "/cpu.max")).value_or("");
    const std::vector<absl::string_view> words = absl::StrSplit(text, absl::ByAnyChar(" \n"), absl::SkipEmpty());
    if (words.size() != 2 || !absl::SimpleAtoi(words[0], &quota) || !absl::SimpleAtoi(words[1], &period)) return {};
  } else {
    quota = read_number(absl::StrCat(folder, "/cpu.cfs_quota_us")).value_or(-1);
    period = read_number(absl::StrCat(folder, "/cpu.cfs_period_us")).value_or(0);
  }
  if (quota <= 0 || period <= 0) return std::nullopt;
  return static_cast<double>(quota) / static_cast<double>(period);
}

}  // namespace

std::vector<int> allowed_cpus() {
  // The kernel refuses a mask that is shorter than its own, so it is grown until it fits.
  for (int cpus = CPU_SETSIZE; cpus <= 1 << 20; cpus *= 2) {
    std::vector<cpu_set_t> mask(cpus / CPU_SETSIZE);
    const size_t bytes = mask.size() * sizeof(cpu_set_t);
    if (sched_getaffinity(0, bytes, mask.data()) != 0) continue;
    std::vector<int> allowed;
    for (int cpu = 0; cpu < cpus; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask.data())) allowed.push_back(cpu);
    }
    return allowed;
  }
  return {0};
}

int cores_within_quota(int most, const MachineFiles& files) {
  double cores = most;
  for (const bool v2 : {false, true}) {
    for (const std::string& folder : cgroup_folders(files, "cpu", v2)) {
      cores = std::min(cores, quota_of(folder, v2).value_or(cores));
    }
  }
  return std::max(1, static_cast<int>(cores));
}

absl::StatusOr<int64_t> available_memory(const MachineFiles& files) {
  int64_t bytes = read_field(files.meminfo, "MemAvailable") * 1024;
  if (bytes == 0) return absl::UnavailableError(absl::StrCat("cannot read MemAvailable in ", files.meminfo));
  for (const bool v2 : {false, true}) {
    for (const std::string& folder : cgroup_folders(files, "memory", v2)) {
      bytes = std::min(bytes, room_in(folder, v2 ? kV2 : kV1).value_or(bytes));
    }
  }
  return bytes;
}

std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace octet
