#include "launch/probe.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <gnu/libc-version.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "launch/machine.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/file.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

std::string read_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::vector<std::vector<int>> read_numa_nodes(const std::string& folder) {
  std::vector<std::vector<int>> nodes;
  for (int node = 0;; ++node) {
    const std::string path = absl::StrCat(folder, "/node", node, "/cpulist");
    if (!std::filesystem::exists(path)) return nodes;
    if (std::vector<int> cpus = parse_cpu_list(read_line(path)); !cpus.empty()) nodes.push_back(std::move(cpus));
  }
}

int64_t limit_of(__rlimit_resource resource) {
  struct rlimit limit {};
  getrlimit(resource, &limit);
  return limit.rlim_cur == RLIM_INFINITY ? -1 : static_cast<int64_t>(limit.rlim_cur);
}

void probe_gpus(const std::string& library, RankFacts* facts) {
  const absl::StatusOr<std::unique_ptr<Nvml>> nvml = Nvml::open(library);
  facts->nvidia_driver = !absl::IsNotFound(nvml.status());
  if (!nvml.ok()) {
    if (facts->nvidia_driver) facts->gpu_error = std::string(nvml.status().message());
    return;
  }
  absl::StatusOr<GpuNodeFacts> gpus = (*nvml)->read();
  if (!gpus.ok()) {
    facts->gpu_error = std::string(gpus.status().message());
    return;
  }
  facts->gpus = *std::move(gpus);
}

// Of statfs(2); magic numbers as in linux/magic.h and in the file systems' own sources.
std::string filesystem_of(const std::string& path) {
  struct statfs info {};
  if (statfs(path.c_str(), &info) != 0) return "an unknown file system";
  constexpr std::pair<uint32_t, const char*> kNames[] = {
      {0x6969, "nfs"},       {0x0BD00BD0, "lustre"},  {0xEF53, "ext4"},        {0x58465342, "xfs"},
      {0x01021994, "tmpfs"}, {0x794C7630, "overlay"}, {0x9123683E, "btrfs"},   {0x47504653, "gpfs"},
      {0x65735546, "fuse"},  {0x2FC12FC1, "zfs"},     {0x19830326, "beegfs"},  {0xFF534D42, "cifs"},
      {0x00C36400, "ceph"},  {0x01021997, "9p"},      {0x73717368, "squashfs"}};
  const auto type = static_cast<uint32_t>(info.f_type);
  for (const auto& [magic, name] : kNames) {
    if (magic == type) return name;
  }
  return absl::StrFormat("file system 0x%x", type);
}

std::vector<std::string> weight_files(const std::string& directory) {
  std::vector<std::string> files;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(directory, error)) {
    if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
  }
  std::sort(files.begin(), files.end());
  return files;
}

// Reads a file's range until `deadline`; how much it was. The kernel is first told to forget what it has of it.
int64_t read_range(const std::string& path, int64_t begin, int64_t end, Clock::time_point deadline) {
  constexpr int64_t kPiece = int64_t{8} << 20;
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (file.get() < 0) return 0;
  posix_fadvise(file.get(), begin, end - begin, POSIX_FADV_DONTNEED);
  std::vector<char> piece(kPiece);
  int64_t done = 0;
  while (begin + done < end && Clock::now() < deadline) {
    const auto wanted = static_cast<size_t>(std::min(kPiece, end - begin - done));
    const ssize_t got = pread(file.get(), piece.data(), wanted, begin + done);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    done += got;
  }
  return done;
}

// A socket that listens on 127.0.0.1:port, for a moment; 0 or the errno.
int try_to_listen(int port) {
  const FileDescriptor socket(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
  if (socket.get() < 0) return errno;
  const int yes = 1;
  setsockopt(socket.get(), SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);  // a server that has just ended is no obstacle
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  if (bind(socket.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) return errno;
  return listen(socket.get(), 1) == 0 ? 0 : errno;
}

}  // namespace

std::vector<int> parse_cpu_list(std::string_view text) {
  std::vector<int> cpus;
  for (absl::string_view part : absl::StrSplit(absl::string_view(text.data(), text.size()), ',')) {
    const std::pair<absl::string_view, absl::string_view> bounds =
        absl::StrSplit(absl::StripAsciiWhitespace(part), absl::MaxSplits('-', 1));
    int first = 0, last = 0;
    if (!absl::SimpleAtoi(bounds.first, &first)) continue;
    if (bounds.second.empty()) last = first;
    if (!bounds.second.empty() && !absl::SimpleAtoi(bounds.second, &last)) continue;
    for (int cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
  }
  return cpus;
}

RankFacts probe_machine(const std::string& nvml_library, const std::string& numa_folder) {
  RankFacts facts;
  struct utsname system {};
  uname(&system);
  facts.host = system.nodename;
  facts.versions = {{"Linux", system.release}, {"glibc", gnu_get_libc_version()}};
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES",
                           "SLURM_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND", "CUDA_VISIBLE_DEVICES"}) {
    if (const char* value = std::getenv(name); value != nullptr) facts.environment[name] = value;
  }
  facts.cpus = allowed_cpus();
  facts.online_cpus = static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  facts.numa_nodes = read_numa_nodes(numa_folder);
  struct statvfs shm {};
  if (statvfs("/dev/shm", &shm) == 0) facts.shm_free_bytes = static_cast<int64_t>(shm.f_bavail * shm.f_frsize);
  facts.open_files = limit_of(RLIMIT_NOFILE);
  facts.locked_bytes = limit_of(RLIMIT_MEMLOCK);
  probe_gpus(nvml_library, &facts);
  return facts;
}

ModelFacts probe_model(const std::string& directory, int place, int places, int64_t most_bytes, double most_seconds) {
  ModelFacts facts;
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory);
  if (!checkpoint.ok()) {
    facts.error = std::string(checkpoint.status().message());
    return facts;
  }
  facts.digest = absl::StrFormat("%016x", checkpoint->digest());
  facts.filesystem = filesystem_of(directory);
  const auto begin = Clock::now();
  const auto deadline =
      begin + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(most_seconds));
  for (const std::string& path : weight_files(directory)) {
    std::error_code error;
    const auto bytes = static_cast<int64_t>(std::filesystem::file_size(path, error));
    if (error) continue;
    facts.weight_bytes += bytes;
    const int64_t from = bytes * place / places, to = bytes * (place + 1) / places;
    const int64_t left = most_bytes - facts.read_bytes;
    facts.read_bytes += read_range(path, from, from + std::min(to - from, left), deadline);
  }
  facts.read_seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  return facts;
}

void probe_ports(int port, JobFacts* job) {
  job->ephemeral_ports = read_line("/proc/sys/net/ipv4/ip_local_port_range");
  std::replace(job->ephemeral_ports.begin(), job->ephemeral_ports.end(), '\t', '-');
  if (const int error = try_to_listen(0); error != 0) {
    job->port_error = absl::StrCat("cannot listen on 127.0.0.1: ", std::strerror(error));
  } else if (try_to_listen(port) == EADDRINUSE) {
    job->port_in_use = absl::StrCat("127.0.0.1:", port);
  }
}

}  // namespace octet
