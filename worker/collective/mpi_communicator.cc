#include "worker/collective/mpi_communicator.h"

#include <fcntl.h>
#include <mpi.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"

namespace octet {
namespace {

constexpr char kShmFolder[] = "/dev/shm";
// Each sleep of a wait is twice the one before, between these.
constexpr int kShortestSleepMicroseconds = 20;
constexpr int kLongestSleepMicroseconds = 1000;

// MPI's own waits poll for ever at full speed; these sleep once the policy's polling is over.
void wait_all(std::vector<MPI_Request>& requests, const WaitPolicy& policy) {
  Waiting waiting(policy);
  int sleep_microseconds = kShortestSleepMicroseconds;
  for (;;) {
    int done = 0;
    MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done, MPI_STATUSES_IGNORE);
    if (done) return;
    if (waiting.poll_again()) continue;
    usleep(sleep_microseconds);
    sleep_microseconds = std::min(2 * sleep_microseconds, kLongestSleepMicroseconds);
    waiting.slept();
  }
}

void wait(MPI_Request request) {
  std::vector<MPI_Request> requests{request};
  wait_all(requests, WaitPolicy{});
}

// A communicator of our own, so that our messages meet nobody else's.
class MpiComm {
 public:
  static MpiComm of_world() {
    MpiComm comm;
    MPI_Comm_dup(MPI_COMM_WORLD, &comm.comm_);
    return comm;
  }
  static MpiComm of_node(int node, int rank) {
    MpiComm comm;
    MPI_Comm_split(MPI_COMM_WORLD, node, rank, &comm.comm_);
    return comm;
  }
  ~MpiComm() {
    if (comm_ != MPI_COMM_NULL) MPI_Comm_free(&comm_);
  }
  MpiComm(MpiComm&& other) noexcept : comm_(std::exchange(other.comm_, MPI_COMM_NULL)) {}
  MpiComm& operator=(MpiComm&&) = delete;
  MPI_Comm get() const { return comm_; }

 private:
  MpiComm() = default;
  MPI_Comm comm_ = MPI_COMM_NULL;
};

class MpiLink : public NodeLink {
 public:
  MpiLink(MPI_Comm comm, std::vector<int> leader_of_node, WaitPolicy policy)
      : comm_(comm), leader_of_node_(std::move(leader_of_node)), policy_(std::move(policy)) {}

  void exchange(std::span<const Transfer> sends, std::span<const Transfer> receives) override {
    requests_.clear();
    for (const Transfer& t : receives) {
      MPI_Irecv(t.data, count_of(t), MPI_BYTE, leader_of_node_[t.node], 0, comm_, &requests_.emplace_back());
    }
    for (const Transfer& t : sends) {
      MPI_Isend(t.data, count_of(t), MPI_BYTE, leader_of_node_[t.node], 0, comm_, &requests_.emplace_back());
    }
    wait_all(requests_, policy_);
  }

 private:
  static int count_of(const Transfer& transfer) {
    OCTET_CHECK(transfer.bytes <= INT_MAX, "MPI counts bytes in an int: the window is too large");
    return static_cast<int>(transfer.bytes);
  }

  const MPI_Comm comm_;
  const std::vector<int> leader_of_node_;
  const WaitPolicy policy_;
  std::vector<MPI_Request> requests_;
};

// ---- The window's memory

class SharedMemory {
 public:
  SharedMemory() = default;
  SharedMemory(void* data, int64_t bytes) : data_(data), bytes_(bytes) {}
  ~SharedMemory() {
    if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes_));
  }
  SharedMemory(SharedMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  SharedMemory& operator=(SharedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

std::string mebibytes(int64_t bytes) { return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20)); }

absl::Status no_room(int64_t bytes, int ranks) {
  struct statvfs info {};
  if (statvfs(kShmFolder, &info) != 0) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "there is no ", kShmFolder, " to put shared memory into: ", std::strerror(errno), "; mount a tmpfs there"));
  }
  const auto size_of = [&](fsblkcnt_t blocks) { return mebibytes(static_cast<int64_t>(blocks * info.f_frsize)); };
  return absl::ResourceExhaustedError(absl::StrCat(
      "the ", ranks, " ranks of this node need ", mebibytes(bytes), " in ", kShmFolder, ", which has ",
      size_of(info.f_bavail), " free of ", size_of(info.f_blocks), ": enlarge it (mount -o remount,size=1g ",
      kShmFolder, "; in a container, docker run --shm-size=1g) or remove what others left there"));
}

bool has_room(int64_t bytes) {
  struct statvfs info {};
  return statvfs(kShmFolder, &info) == 0 && static_cast<uint64_t>(bytes) / info.f_frsize < info.f_bavail;
}

class File {
 public:
  explicit File(int fd) : fd_(fd) {}
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  int fd() const { return fd_; }

 private:
  const int fd_;
};

absl::Status errno_status(int error, const char* what) {
  return absl::ErrnoToStatus(error, absl::StrCat("cannot ", what, " the ranks' shared memory in ", kShmFolder));
}

absl::StatusOr<SharedMemory> map_file(int fd, int64_t bytes) {
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  if (data == MAP_FAILED) return errno_status(errno, "map");
  return SharedMemory(data, bytes);
}

// Creates `name` and takes its memory from /dev/shm now: a page that cannot be had later is a SIGBUS in the middle of a
// step.
absl::StatusOr<SharedMemory> create_shared_memory(const std::string& name, int64_t bytes, int ranks) {
  // Asked first, because taking all that is left before failing disturbs others.
  if (!has_room(bytes)) return no_room(bytes, ranks);
  const File file(shm_open(name.c_str(), O_RDWR | O_CREAT | O_EXCL, 0600));
  if (file.fd() < 0) return errno_status(errno, "create");
  int error = EINTR;
  while (error == EINTR) error = posix_fallocate(file.fd(), 0, bytes);
  if (error == ENOSPC || error == ENOMEM) return no_room(bytes, ranks);
  if (error != 0) return errno_status(error, "allocate");
  return map_file(file.fd(), bytes);
}

absl::StatusOr<SharedMemory> open_shared_memory(const std::string& name, int64_t bytes) {
  const File file(shm_open(name.c_str(), O_RDWR, 0));
  if (file.fd() >= 0) return map_file(file.fd(), bytes);
  if (errno != ENOENT) return errno_status(errno, "open");
  return absl::FailedPreconditionError(
      absl::StrCat("MPI counts this rank to a node whose first rank has another ", kShmFolder,
                   ": start the ranks of a node in one container, or give containers different host names"));
}

// For a rank that has its node to itself: pages that no message needs are never taken.
absl::StatusOr<SharedMemory> private_memory(int64_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* data = mmap(nullptr, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, kFlags, -1, 0);
  if (data == MAP_FAILED) return absl::ErrnoToStatus(errno, "cannot map a window of " + mebibytes(bytes));
  return SharedMemory(data, bytes);
}

std::string random_name() {
  unsigned char bytes[12];
  OCTET_CHECK(getrandom(bytes, sizeof(bytes), 0) == sizeof(bytes), "getrandom failed");
  return absl::StrCat("/octet-", absl::BytesToHexString({reinterpret_cast<char*>(bytes), sizeof(bytes)}));
}

// Collective over the ranks of a node. The name exists only for as long as it takes them to open it, so that whatever
// ends them later leaves nothing behind. A rank that could not do its part because the first one failed brings OK and
// no memory.
absl::StatusOr<SharedMemory> share_memory(MPI_Comm node_comm, int64_t bytes) {
  int place = 0, ranks = 0;
  MPI_Comm_rank(node_comm, &place);
  MPI_Comm_size(node_comm, &ranks);
  if (ranks == 1) return private_memory(bytes);

  std::string name = random_name();
  absl::StatusOr<SharedMemory> memory = SharedMemory();
  if (place == 0) memory = create_shared_memory(name, bytes, ranks);
  if (!memory.ok()) name.assign(name.size(), '\0');  // tells the others that there is nothing to open
  MPI_Request request;
  MPI_Ibcast(name.data(), static_cast<int>(name.size()), MPI_CHAR, 0, node_comm, &request);
  wait(request);
  const bool exists = name[0] != '\0';
  if (place != 0 && exists) memory = open_shared_memory(name, bytes);
  MPI_Ibarrier(node_comm, &request);
  wait(request);
  if (place == 0 && exists) shm_unlink(name.c_str());
  return memory;
}

// Owns what the communicator's window and link use.
class MpiCommunicator : public WindowCommunicator {
 public:
  MpiCommunicator(const RankMap& map, int rank, std::unique_ptr<SharedWindow> window, std::unique_ptr<NodeLink> link,
                  SharedMemory memory, MpiComm comm)
      : WindowCommunicator(map, rank, std::move(window), std::move(link)),
        memory_(std::move(memory)),
        comm_(std::move(comm)) {}

 private:
  const SharedMemory memory_;
  const MpiComm comm_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Communicator>> make_mpi_communicator(const MpiCommunicatorOptions& options) {
  int rank = 0, ranks = 0;
  MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const RankMap& map = options.map;
  OCTET_CHECK(map.ranks() == ranks, absl::StrCat("a map of ", map.ranks(), " ranks in a world of ", ranks));

  const int node = map.node_of_rank[rank];
  const std::vector<int> local_ranks = map.ranks_of(node);
  const SharedWindow::Layout layout = WindowCommunicator::window_layout(map, node, options.area_bytes);
  absl::StatusOr<SharedMemory> memory =
      share_memory(MpiComm::of_node(node, rank).get(), SharedWindow::bytes_of(layout));
  if (absl::Status status = agree_over_mpi(memory.status()); !status.ok()) return status;

  const int place = static_cast<int>(std::find(local_ranks.begin(), local_ranks.end(), rank) - local_ranks.begin());
  auto window = std::make_unique<SharedWindow>(memory->data(), layout, place, options.wait);
  MpiComm comm = MpiComm::of_world();
  std::unique_ptr<NodeLink> link;
  if (map.nodes() > 1 && place == 0) {
    std::vector<int> leader_of_node;
    for (int n = 0; n < map.nodes(); ++n) leader_of_node.push_back(map.ranks_of(n)[0]);
    link = std::make_unique<MpiLink>(comm.get(), std::move(leader_of_node), options.wait);
  }
  return std::make_unique<MpiCommunicator>(map, rank, std::move(window), std::move(link), *std::move(memory),
                                           std::move(comm));
}

std::vector<std::string> all_gather_over_mpi(std::string_view mine) {
  int ranks = 0;
  MPI_Comm_size(MPI_COMM_WORLD, &ranks);
  const int64_t my_bytes = static_cast<int64_t>(mine.size());
  std::vector<int64_t> bytes(ranks);
  MPI_Request request;
  MPI_Iallgather(&my_bytes, 1, MPI_INT64_T, bytes.data(), 1, MPI_INT64_T, MPI_COMM_WORLD, &request);
  wait(request);

  const int64_t total = std::accumulate(bytes.begin(), bytes.end(), int64_t{0});
  OCTET_CHECK(total <= INT_MAX, "MPI counts bytes in an int: too much to gather");
  const std::vector<int> counts(bytes.begin(), bytes.end());
  std::vector<int> offsets(ranks);
  std::exclusive_scan(counts.begin(), counts.end(), offsets.begin(), 0);
  std::string all(static_cast<size_t>(total), '\0');
  MPI_Iallgatherv(mine.data(), static_cast<int>(my_bytes), MPI_CHAR, all.data(), counts.data(), offsets.data(),
                  MPI_CHAR, MPI_COMM_WORLD, &request);
  wait(request);

  std::vector<std::string> values;
  for (int r = 0; r < ranks; ++r) values.push_back(all.substr(offsets[r], counts[r]));
  return values;
}

absl::Status agree_over_mpi(const absl::Status& mine) {
  // A byte for the code, then the message; nothing for OK.
  std::string verdict;
  if (!mine.ok()) verdict = absl::StrCat(std::string(1, static_cast<char>(mine.code())), mine.message());
  const std::vector<std::string> verdicts = all_gather_over_mpi(verdict);
  const auto failed = [](const std::string& v) { return !v.empty(); };
  const auto first = std::find_if(verdicts.begin(), verdicts.end(), failed);
  if (first == verdicts.end()) return absl::OkStatus();
  std::string message = first->substr(1);
  const auto code = static_cast<absl::StatusCode>((*first)[0]);
  if (std::count(verdicts.begin(), verdicts.end(), *first) == std::ssize(verdicts)) return absl::Status(code, message);
  message = absl::StrCat("rank ", first - verdicts.begin(), " of ", verdicts.size(), ": ", message);
  const auto others = std::count_if(first + 1, verdicts.end(), failed);
  if (others > 0) absl::StrAppend(&message, " (and ", others, others == 1 ? " other rank" : " other ranks", " failed)");
  return absl::Status(code, message);
}

}  // namespace octet
