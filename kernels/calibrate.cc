// Calibration: reads and dots with nothing around them.
#include "kernels/calibrate.h"

#include <algorithm>
#include <atomic>
#include <chrono>

#include "kernels/cpu/kernel_table.h"
#include "kernels/cpu/thread_pool.h"
#include "kernels/cuda/module.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

double read_bytes_per_second(Stream& stream, const Tensor& buffer) {
  // Many pieces, claimed one by one, so that a thread that loses its core for a while does not hold up the others.
  constexpr int64_t kPiece = int64_t{1} << 20;
  const int64_t bytes = buffer.bytes();
  if (stream.device() == Device::kCuda) {
    return static_cast<double>(bytes) / stream.module().read_seconds(stream.queue(), buffer.data(), bytes);
  }
  const char* const data = static_cast<const char*>(buffer.data());
  std::atomic<uint64_t> checksum{0};
  const auto start = Clock::now();
  stream.pool().parallel_for((bytes + kPiece - 1) / kPiece, bytes, [&](int64_t piece, int) {
    const int64_t begin = piece * kPiece;
    checksum ^= stream.kernels().read_all(data + begin, std::min(kPiece, bytes - begin));
  });
  return static_cast<double>(bytes) / seconds_since(start);
}

double dot_flops_per_second(Stream& stream) {
  constexpr int64_t kRounds = 1'000'000;
  constexpr int64_t kPieces = 16;
  const int64_t pieces = kPieces * stream.threads();
  std::atomic<double> flops{0};
  const auto start = Clock::now();
  stream.pool().parallel_for(pieces, kRounds, [&](int64_t, int) {
    flops += stream.kernels().peak_dots(stream.isa() == Isa::kPortable ? kRounds / 1000 : kRounds / kPieces);
  });
  return flops.load() / seconds_since(start);
}

}  // namespace octet
