// All-reduces over memory that GPUs read from one another: what module.h offers of it. A rank opens a window, shows its
// card to the other ranks (by whatever means they have), looks into theirs, and sums. No CUDA header here either.
#pragma once

#include <cstdint>
#include <span>

#include "kernels/ops.h"

namespace octet::cuda {

// A rank's part of the memory in which ranks meet, and its views of the others' parts. The module's own.
class PeerWindow;

// GPUs of one machine that reach one another.
constexpr int kMaxPeers = 8;

// What others need to look into a window; opaque bytes, which may travel between processes of one machine.
struct PeerCard {
  unsigned char device[16];   // equal where two ranks share a GPU
  unsigned char process[16];  // equal where two ranks are threads of one process
  unsigned char handle[64];   // cudaIpcMemHandle_t
  uint64_t address;           // in that process
  int32_t ordinal;            // of the device, in that process
};

// A wait that lasted longer than its deadline.
struct PeerWait {
  int32_t waited_for;  // the rank that did not come
  uint64_t reduction;  // which one of this window's, from 1
};

struct PeerOptions {
  int rank = 0;
  std::span<const SliceRun> runs;  // of every rank
  int64_t area_bytes = 0;          // of each of the window's two areas: a message that needs more is cut
  int64_t deadline_ms = 0;
  // Told of a missed deadline by the thread that then waits for the queue. Must not return.
  void (*lost)(void* context, const PeerWait& wait) = nullptr;
  void* context = nullptr;
};

// One-shot: every rank reads all pieces of all elements; one meeting, (ranks - 1) messages of FP32 in. Two-shot: every
// rank sums a share of the elements and fetches the others' BF16 results; two meetings, about two messages in.
enum class Shots : uint8_t { kOne, kTwo };

struct PeerReduction {
  Tensor partials;  // [nodes, tokens, n] F32, as linear_over_slices() leaves them
  Tensor residual;  // [tokens, n] BF16, in and out
  Shots shots = Shots::kOne;
  const NormedInput* next = nullptr;  // what follows in the same kernel, or null. REQUIRES: fuses()
};

struct PeerTable {
  // Null, with *why set to a string that stays, when the window cannot be had.
  PeerWindow* (*open)(Queue* queue, const PeerOptions& options, const char** why);
  PeerCard (*card)(const PeerWindow* window);
  // Makes rank `rank`'s window readable here; null, or why not. Once for each other rank.
  const char* (*look_into)(PeerWindow* window, int rank, const PeerCard& card);
  // How many blocks a reduction may have: all ranks' blocks must fit on the GPUs at once, as they wait for one another.
  // The same on every rank. Before the first reduction.
  void (*limit_blocks)(PeerWindow* window, int blocks);
  // Whether the kernel that sums `tokens` rows of n elements can normalise them too: no more than it has blocks (the
  // norm's own kernel has more for many rows), and short enough for shared memory.
  bool (*fuses)(const PeerWindow* window, int64_t tokens, int64_t n);
  // Queues it. Every rank calls it in the same order with the same sizes and shots.
  void (*reduce)(PeerWindow* window, const PeerReduction& reduction);
  // Communicator::gather(): every rank's bytes, in rank order. All on the device; queued in the same order everywhere.
  void (*gather)(PeerWindow* window, const Tensor& mine, std::span<const int64_t> bytes_of_rank, const Tensor& all);
  // Waits for this rank's work. Memory that other processes look into stays until this process ends: nobody knows when
  // they have done.
  void (*close)(PeerWindow* window);
};

extern const PeerTable kPeerTable;  // the module's own

}  // namespace octet::cuda
