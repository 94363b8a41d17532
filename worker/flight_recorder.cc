#include "worker/flight_recorder.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "worker/flight_file.h"

namespace octet {
namespace {

int64_t nanoseconds(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return int64_t{1'000'000'000} * time.tv_sec + time.tv_nsec;
}

// steady_clock is CLOCK_MONOTONIC.
int64_t nanoseconds(FlightRecorder::Clock::time_point time) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(time.time_since_epoch()).count();
}

template <size_t N>
void copy_text(std::string_view text, char (&to)[N]) {
  const size_t bytes = std::min(text.size(), N - 1);
  std::memcpy(to, text.data(), bytes);
  to[bytes] = '\0';
}

absl::Status errno_status(const std::string& path) {
  return absl::ErrnoToStatus(errno,
                             absl::StrCat("the flight recorder's file ", path, " cannot be made (--flight-directory)"));
}

// An older file is replaced, not written over: somebody may be reading it. A new one is whole before it has its name.
absl::StatusOr<FlightFile*> map_new_file(const std::string& path) {
  const std::string temporary = path + ".new";
  unlink(temporary.c_str());
  const int fd = open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return errno_status(path);
  void* data = MAP_FAILED;
  // Pages that cannot be had later would be a SIGBUS in the middle of a step.
  errno = posix_fallocate(fd, 0, sizeof(FlightFile));
  if (errno == 0) {
    data = mmap(nullptr, sizeof(FlightFile), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
  }
  absl::Status status = data == MAP_FAILED ? errno_status(path) : absl::OkStatus();
  close(fd);
  if (status.ok() && rename(temporary.c_str(), path.c_str()) != 0) status = errno_status(path);
  if (!status.ok()) {
    unlink(temporary.c_str());
    if (data != MAP_FAILED) munmap(data, sizeof(FlightFile));
    return status;
  }
  return static_cast<FlightFile*>(data);
}

void fill_header(int rank, int ranks, const std::string& job, FlightHeader* header) {
  header->version = kFlightVersion;
  header->rank = rank;
  header->ranks = ranks;
  header->pid = getpid();
  header->process_start = process_start(getpid());
  header->start_realtime_ns = nanoseconds(CLOCK_REALTIME);
  header->start_monotonic_ns = nanoseconds(CLOCK_MONOTONIC);
  gethostname(header->host, sizeof header->host - 1);
  copy_text(job, header->job);
  header->magic = kFlightMagic;
}

// ---- Crashes

// Text in a fixed buffer, as signal handlers may write it.
class SignalSafeText {
 public:
  SignalSafeText& operator<<(std::string_view text) {
    const size_t bytes = std::min(text.size(), sizeof buffer_ - size_);
    std::memcpy(buffer_ + size_, text.data(), bytes);
    size_ += bytes;
    return *this;
  }
  SignalSafeText& number(uint64_t value, unsigned base = 10) {
    char digits[20];
    size_t count = 0;
    do {
      digits[count++] = "0123456789abcdef"[value % base];
      value /= base;
    } while (value != 0);
    std::reverse(digits, digits + count);
    return *this << std::string_view(digits, count);
  }
  std::string_view view() const { return {buffer_, size_}; }

 private:
  char buffer_[256];
  size_t size_ = 0;
};

struct CrashSignal {
  int number;
  std::string_view name;
};
constexpr std::array<CrashSignal, 5> kCrashSignals = {
    {{SIGSEGV, "SIGSEGV"}, {SIGBUS, "SIGBUS"}, {SIGILL, "SIGILL"}, {SIGFPE, "SIGFPE"}, {SIGABRT, "SIGABRT"}}};

// Of the process. Set before the handlers are.
FlightRecorder* the_recorder = nullptr;
std::array<struct sigaction, kCrashSignals.size()> earlier_actions;

void append_place(const Place& place, SignalSafeText* text) {
  *text << (place.in_step ? " in step " : " after step ");
  text->number(place.step);
  *text << (place.in_collective ? ", in collective " : ", after collective ");
  text->number(place.collective);
}

// By an instruction's own fault, or by kill() and its kin.
void append_origin(const siginfo_t& info, SignalSafeText* text) {
  if (info.si_code > 0) {
    *text << " at address 0x";
    text->number(reinterpret_cast<uintptr_t>(info.si_addr), 16);
  } else if (info.si_pid != getpid()) {
    *text << ", sent by process ";
    text->number(static_cast<uint64_t>(info.si_pid)) << ",";
  }
}

void on_crash(int number, siginfo_t* info, void*) {
  const int saved = errno;
  const size_t which =
      std::find_if(kCrashSignals.begin(), kCrashSignals.end(), [&](auto& s) { return s.number == number; }) -
      kCrashSignals.begin();
  SignalSafeText text;
  text << kCrashSignals[which].name;
  append_origin(*info, &text);
  append_place(the_recorder->place(), &text);
  the_recorder->last_words(LastWordsKind::kCrashSignal, text.view());
  // Then whatever this signal did before: Open MPI shows a stack, the default makes a core. It comes when we return.
  sigaction(number, &earlier_actions[which], nullptr);
  raise(number);
  errno = saved;
}

void on_failed_check(const char* sentence) { the_recorder->last_words(LastWordsKind::kFailedCheck, sentence); }

}  // namespace

absl::StatusOr<std::unique_ptr<FlightRecorder>> FlightRecorder::create(const std::string& directory, int rank,
                                                                       int ranks, const std::string& job) {
  std::error_code error;
  std::filesystem::create_directories(std::filesystem::path(directory).parent_path(), error);
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) return errno_status(directory);
  absl::StatusOr<FlightFile*> file = map_new_file(flight_path(directory, rank));
  if (!file.ok()) return file.status();
  fill_header(rank, ranks, job, &(*file)->header);
  return std::unique_ptr<FlightRecorder>(new FlightRecorder(directory, *file));
}

FlightRecorder::FlightRecorder(std::string directory, FlightFile* file)
    : directory_(std::move(directory)), file_(file) {}

FlightRecorder::~FlightRecorder() {
  if (catching_) {
    for (size_t i = 0; i < kCrashSignals.size(); ++i) sigaction(kCrashSignals[i].number, &earlier_actions[i], nullptr);
    check_listener = nullptr;
    the_recorder = nullptr;
  }
  munmap(file_, sizeof(FlightFile));
}

void FlightRecorder::remove() {
  unlink(flight_path(directory_, file_->header.rank).c_str());
  rmdir(directory_.c_str());  // fails while others are there
}

void FlightRecorder::catch_crashes() {
  OCTET_CHECK(the_recorder == nullptr, "two flight recorders catch this process's crashes");
  catching_ = true;
  the_recorder = this;
  check_listener = on_failed_check;
  for (size_t i = 0; i < kCrashSignals.size(); ++i) {
    struct sigaction action = {};
    action.sa_sigaction = on_crash;
    action.sa_flags = SA_SIGINFO;
    sigaction(kCrashSignals[i].number, &action, &earlier_actions[i]);
  }
}

FlightRecorder::Span FlightRecorder::begin(FlightEvent event, uint64_t collective, uint64_t step, int64_t size,
                                           int64_t begin_ns, int64_t end_ns) {
  const uint64_t sequence = file_->header.entries.fetch_add(1, std::memory_order_relaxed) + 1;
  FlightSlot& slot = file_->slots[sequence % kFlightEntries];
  slot.sequence.store(0, std::memory_order_relaxed);
  slot.step.store(step, std::memory_order_release);
  slot.collective.store(collective, std::memory_order_release);
  slot.size.store(size, std::memory_order_release);
  slot.begin_ns.store(begin_ns, std::memory_order_release);
  slot.end_ns.store(end_ns, std::memory_order_release);
  slot.event.store(event, std::memory_order_release);
  slot.sequence.store(sequence, std::memory_order_release);
  return {sequence};
}

void FlightRecorder::end(Span span, Clock::time_point now) {
  FlightSlot& slot = file_->slots[span.sequence % kFlightEntries];
  // The ring may have gone round.
  if (slot.sequence.load(std::memory_order_relaxed) == span.sequence) {
    slot.end_ns.store(nanoseconds(now), std::memory_order_relaxed);
  }
}

void FlightRecorder::begin_step(uint64_t step, int64_t tokens, Clock::time_point now) {
  step_begin_ = now;
  step_ = begin(FlightEvent::kStep, 0, step, tokens, nanoseconds(now), 0);
  file_->header.step.store(step, std::memory_order_relaxed);
  file_->header.in_step.store(1, std::memory_order_release);
}

void FlightRecorder::end_step(Clock::time_point now) {
  end(step_, now);
  file_->header.in_step.store(0, std::memory_order_release);
}

void FlightRecorder::begin_collective(FlightEvent event, int64_t bytes, Clock::time_point now) {
  FlightHeader& header = file_->header;
  const uint64_t number = header.collectives_entered.load(std::memory_order_relaxed) + 1;
  collective_ = begin(event, number, header.step.load(std::memory_order_relaxed), bytes, nanoseconds(now), 0);
  header.collectives_entered.store(number, std::memory_order_release);
}

void FlightRecorder::end_collective(Clock::time_point now) {
  end(collective_, now);
  FlightHeader& header = file_->header;
  header.collectives_left.store(header.collectives_entered.load(std::memory_order_relaxed), std::memory_order_release);
}

void FlightRecorder::note(FlightEvent event, uint64_t step, int64_t size) {
  const int64_t now = nanoseconds(Clock::now());
  begin(event, 0, step, size, now, now);
}

Place FlightRecorder::place() const { return place_of(file_->header); }

void FlightRecorder::last_words(LastWordsKind kind, std::string_view words) {
  FlightHeader& header = file_->header;
  LastWordsState state = LastWordsState::kNone;
  if (!header.words_state.compare_exchange_strong(state, LastWordsState::kSpeaking)) return;
  header.words_kind = static_cast<uint32_t>(kind);
  header.words_realtime_ns = nanoseconds(CLOCK_REALTIME);
  header.words_bytes = static_cast<uint32_t>(std::min(words.size(), kLastWordsBytes));
  std::memcpy(header.words, words.data(), header.words_bytes);
  header.words_state.store(LastWordsState::kSaid, std::memory_order_release);
}

}  // namespace octet
