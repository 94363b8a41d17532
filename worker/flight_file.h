// The file in which a rank's flight is recorded, as it lies in memory and on disk: a header page, then a ring of
// entries. Mapped by its rank, which may be killed at any instruction; read by others, then or later. Numbers are the
// machine's own: a file is read on a machine like the one that wrote it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "worker/flight.h"

namespace octet {

constexpr std::array<char, 8> kFlightMagic = {'O', 'C', 'T', 'F', 'L', 'G', 'H', 'T'};
constexpr uint32_t kFlightVersion = 1;
constexpr uint64_t kFlightEntries = 4096;
constexpr size_t kLastWordsBytes = 2048;

// One thing that a rank did. Times are CLOCK_MONOTONIC's. The rank may come round to a slot while somebody reads it:
// stores release and loads acquire, so that whoever finds `sequence` the same before and after has read one entry.
struct alignas(64) FlightSlot {
  std::atomic<uint64_t> sequence;  // from 1; 0 while the slot is being written. Entry n lies in slot n % kFlightEntries
  std::atomic<uint64_t> step;
  std::atomic<uint64_t> collective;
  std::atomic<int64_t> size;
  std::atomic<int64_t> begin_ns;
  std::atomic<int64_t> end_ns;  // 0: not ended
  std::atomic<FlightEvent> event;
};
static_assert(sizeof(FlightSlot) == 64);

enum class LastWordsState : uint32_t { kNone, kSpeaking, kSaid };

struct FlightHeader {
  std::array<char, 8> magic;
  uint32_t version;
  int32_t rank, ranks;
  int64_t pid;
  uint64_t process_start;  // of the process, in the kernel's ticks since boot: a number that is used again has another
  int64_t start_realtime_ns, start_monotonic_ns;  // the same instant
  char host[256], job[256];                       // end with a zero

  // Where the rank is.
  alignas(64) std::atomic<uint64_t> entries;  // begun so far
  std::atomic<uint64_t> step;                 // the last one begun
  std::atomic<uint32_t> in_step;
  std::atomic<uint64_t> collectives_entered, collectives_left;

  alignas(64) std::atomic<LastWordsState> words_state;
  uint32_t words_kind;  // LastWordsKind
  int64_t words_realtime_ns;
  uint32_t words_bytes;
  char words[kLastWordsBytes];
};

struct FlightFile {
  alignas(4096) FlightHeader header;
  alignas(4096) FlightSlot slots[kFlightEntries];
};
static_assert(sizeof(FlightFile) == 4096 + kFlightEntries * sizeof(FlightSlot));
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<LastWordsState>::is_always_lock_free);

// Of a header that its rank may be writing. Safe in a signal handler.
Place place_of(const FlightHeader& header);

}  // namespace octet
