#include "worker/flight.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "worker/flight_file.h"

namespace octet {
namespace {

constexpr char kPrefix[] = "rank-", kSuffix[] = ".flight";

// A file, mapped to be read.
class Mapping {
 public:
  static absl::StatusOr<Mapping> open(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return absl::ErrnoToStatus(errno, path);
    struct stat facts {};
    void* data = MAP_FAILED;
    if (fstat(fd, &facts) == 0 && facts.st_size == sizeof(FlightFile)) {
      data = mmap(nullptr, sizeof(FlightFile), PROT_READ, MAP_SHARED, fd, 0);
    }
    close(fd);
    if (data == MAP_FAILED) {
      return absl::FailedPreconditionError(absl::StrCat(path, " is no flight recorder's file: it has ", facts.st_size,
                                                        " bytes, not ", sizeof(FlightFile)));
    }
    return Mapping(data);
  }
  ~Mapping() {
    if (data_ != nullptr) munmap(data_, sizeof(FlightFile));
  }
  Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  Mapping& operator=(Mapping&&) = delete;
  const FlightFile& file() const { return *static_cast<const FlightFile*>(data_); }

 private:
  explicit Mapping(void* data) : data_(data) {}
  void* data_;
};

// The state's letter and the start of a process, from /proc/PID/stat.
struct ProcessFacts {
  char state = 0;
  uint64_t start = 0;
};

ProcessFacts facts_of(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  // "PID (NAME) STATE ... START": the name may hold anything but ends at the last parenthesis; the start is field 22.
  const size_t end_of_name = text.rfind(')');
  ProcessFacts facts;
  if (end_of_name == std::string::npos) return facts;
  std::istringstream fields(text.substr(end_of_name + 1));
  fields >> facts.state;
  std::string skipped;
  for (int field = 4; field < 22; ++field) fields >> skipped;
  fields >> facts.start;
  return facts;
}

bool ended(const ProcessFacts& facts) { return facts.state == 0 || facts.state == 'Z' || facts.state == 'X'; }

template <size_t N>
std::string text_of(const char (&text)[N]) {
  return std::string(text, strnlen(text, N));
}

std::vector<FlightEntry> entries_of(const FlightFile& file) {
  const int64_t to_realtime = file.header.start_realtime_ns - file.header.start_monotonic_ns;
  const auto time = [&](int64_t monotonic) { return absl::FromUnixNanos(monotonic + to_realtime); };
  const uint64_t last = file.header.entries.load(std::memory_order_acquire);
  std::vector<FlightEntry> entries;
  for (uint64_t sequence = last > kFlightEntries ? last - kFlightEntries + 1 : 1; sequence <= last; ++sequence) {
    const FlightSlot& slot = file.slots[sequence % kFlightEntries];
    if (slot.sequence.load(std::memory_order_acquire) != sequence) continue;  // half written
    FlightEntry entry{.event = slot.event.load(std::memory_order_acquire),
                      .step = slot.step.load(std::memory_order_acquire),
                      .collective = slot.collective.load(std::memory_order_acquire),
                      .size = slot.size.load(std::memory_order_acquire),
                      .begin = time(slot.begin_ns.load(std::memory_order_acquire))};
    if (const int64_t end_ns = slot.end_ns.load(std::memory_order_acquire); end_ns != 0) entry.end = time(end_ns);
    if (slot.sequence.load(std::memory_order_relaxed) == sequence) entries.push_back(entry);
  }
  return entries;
}

std::string own_host() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

}  // namespace

const char* name_of(LastWordsKind kind) {
  switch (kind) {
    case LastWordsKind::kNone:
      return "no words";
    case LastWordsKind::kLost:
      return "lost its peers";
    case LastWordsKind::kCrashSignal:
      return "crash signal";
    case LastWordsKind::kFailedCheck:
      return "failed check";
    case LastWordsKind::kDeviceError:
      return "device error";
    case LastWordsKind::kWatchdog:
    case LastWordsKind::kSilent:
      return "watchdog";
  }
  return "unknown";
}

bool blames_the_work(LastWordsKind kind) {
  return kind != LastWordsKind::kNone && kind != LastWordsKind::kLost && kind != LastWordsKind::kSilent;
}

const char* name_of(FlightEvent event) {
  switch (event) {
    case FlightEvent::kStart:
      return "start";
    case FlightEvent::kLoad:
      return "load";
    case FlightEvent::kReady:
      return "ready";
    case FlightEvent::kPlan:
      return "plan";
    case FlightEvent::kStep:
      return "step";
    case FlightEvent::kAnswer:
      return "answer";
    case FlightEvent::kAllGather:
      return "gather";
    case FlightEvent::kReduce:
      return "sum over slices";
    case FlightEvent::kBarrier:
      return "barrier";
  }
  return "unknown";
}

Place place_of(const FlightHeader& header) {
  Place place;
  place.step = header.step.load(std::memory_order_acquire);
  place.in_step = header.in_step.load(std::memory_order_acquire) != 0;
  // In this order: no collective is left before it is entered.
  const uint64_t left = header.collectives_left.load(std::memory_order_acquire);
  place.collective = header.collectives_entered.load(std::memory_order_acquire);
  place.in_collective = left < place.collective;
  return place;
}

std::string flight_path(const std::string& directory, int rank) {
  return absl::StrCat(directory, "/", kPrefix, rank, kSuffix);
}

absl::StatusOr<Flight> read_flight(const std::string& path) {
  absl::StatusOr<Mapping> mapping = Mapping::open(path);
  if (!mapping.ok()) return mapping.status();
  const FlightHeader& header = mapping->file().header;
  if (header.magic != kFlightMagic || header.version != kFlightVersion) {
    return absl::FailedPreconditionError(
        absl::StrCat(path, " is no flight recorder's file of version ", kFlightVersion, ": another Octet wrote it"));
  }
  Flight flight{.rank = header.rank,
                .ranks = header.ranks,
                .pid = static_cast<pid_t>(header.pid),
                .host = text_of(header.host),
                .job = text_of(header.job),
                .start = absl::FromUnixNanos(header.start_realtime_ns),
                .place = place_of(header),
                .entries = entries_of(mapping->file())};
  flight.here = flight.host == own_host();
  const ProcessFacts process = facts_of(flight.pid);
  flight.running = flight.here && !ended(process) && process.start == header.process_start;
  if (header.words_state.load(std::memory_order_acquire) == LastWordsState::kSaid) {
    flight.kind = static_cast<LastWordsKind>(header.words_kind);
    flight.last_words.assign(header.words, std::min<size_t>(header.words_bytes, kLastWordsBytes));
    flight.last_words_time = absl::FromUnixNanos(header.words_realtime_ns);
  }
  return flight;
}

absl::StatusOr<std::vector<Flight>> read_flights(const std::string& directory) {
  std::vector<Flight> flights;
  std::error_code error;
  for (const auto& file : std::filesystem::directory_iterator(directory, error)) {
    const std::string name = file.path().filename();
    if (!absl::StartsWith(name, kPrefix) || !absl::EndsWith(name, kSuffix)) continue;
    absl::StatusOr<Flight> flight = read_flight(file.path());
    if (!flight.ok()) return flight.status();
    flights.push_back(*std::move(flight));
  }
  if (error && error != std::errc::no_such_file_or_directory) {
    return absl::UnavailableError(absl::StrCat(directory, ": ", error.message()));
  }
  if (flights.empty()) return flights;
  const auto youngest = std::ranges::max_element(flights, {}, &Flight::start);
  const std::string job = youngest->job;
  std::erase_if(flights, [&](const Flight& flight) { return flight.job != job; });
  std::ranges::sort(flights, {}, &Flight::rank);
  return flights;
}

uint64_t process_start(pid_t pid) { return facts_of(pid).start; }

std::string process_state(pid_t pid) {
  const ProcessFacts facts = facts_of(pid);
  if (ended(facts)) return "";
  switch (facts.state) {
    case 'T':
      return "stopped by a signal";
    case 't':
      return "stopped by a debugger";
    case 'D':
      return "waiting for a disk or a driver";
    case 'R':
      return "running";
    default:
      return "sleeping";
  }
}

}  // namespace octet
