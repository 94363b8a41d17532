// What the kernels over peer memory share with the window that starts them: the layout of a window, and a message as
// they take it. Only peer_reduce.cu and peer_window.cc include this.
#pragma once

#include <cstdint>

#include "kernels/cuda/peer.h"

namespace octet::cuda::peer {

constexpr int kThreads = 512;  // of a block
constexpr int kMaxBlocks = 32;
constexpr int kMaxPieces = 32;
constexpr int kLeastElements = 512;  // of a block: fewer save nothing
constexpr int kGrain = 32;           // elements; blocks begin at multiples of it
constexpr int kMaxRow = 16384;       // elements of a row that is normalised: 32 KiB of shared memory

// Points at which ranks meet.
enum { kPublished, kFinished, kPoints };

struct Window {
  // By point, block and rank: the last reduction in which that rank's block came there. Written by the peers.
  uint64_t signals[kPoints][kMaxBlocks][kMaxPeers];
  // The ledger: the owner's alone.
  uint64_t reductions[kMaxBlocks];  // finished so far; one number, of which each block has a copy
  uint64_t lost;                    // not 0 after a missed deadline
  int arrived[kMaxBlocks];          // elements of a row that are summed, while it is not complete
};
constexpr int64_t kAreasAt = (sizeof(Window) + 255) / 256 * 256;

struct Piece {
  const float* data;
  int64_t other_area;  // elements from area 0's to area 1's; 0 for this rank's own partials
};

struct Add {
  uint8_t into, from;
};

struct Norm {
  const float* weight;
  uint16_t* normed;  // null where it is quantised
  uint8_t* codes;
  float* scales;
  int n;
  float eps;
  bool fast_order;  // of the sum of squares
  bool dynamic;
  float upper_bound, static_scale;
};

// What every kernel has that meets others.
struct Meeting {
  int rank, ranks;
  Window* windows[kMaxPeers];
  int64_t area_bytes;
  uint64_t deadline_ns;
  PeerWait* told;  // memory of the host
  int blocks;
};

struct Reduction : Meeting {
  int64_t results_at;  // bytes from an area's begin
  int capacity;        // elements that an area holds of each piece
  int own_pieces, pieces;
  Piece piece[kMaxPieces];  // left to right in the tree
  Add adds[kMaxPieces];     // after the last one piece 0 is the sum

  const float* partials;  // [own_pieces, stride]
  int64_t stride;
  uint16_t* residual;
  int elements, per_block;
  bool two_shot;
  Norm norm;
};

// Bytes of every rank, in rank order. In words of `all`, of which a rank's part begins anywhere.
struct Gathering : Meeting {
  const void* mine;
  void* all;
  int64_t begin[kMaxPeers];
  int count[kMaxPeers];
  int per_block;
};

// Loads the kernels, which later would wait for the device.
void load_kernels();

using ReduceKernel = void (*)(Reduction);
// vectors: everything can be read four elements at a time. leaves: how many pieces there are where they are the leaves
// of a whole tree of 2, 4 or 8, else 0. norm: what follows is done as well.
ReduceKernel reduce_kernel(bool vectors, int leaves, bool norm);

using GatherKernel = void (*)(Gathering);
// words: in units of 16 bytes, else of one.
GatherKernel gather_kernel(bool words);

}  // namespace octet::cuda::peer
