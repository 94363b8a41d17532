// Shares of what the machine can do: linear layers against a read of the same weights and a loop of dots from
// registers, each measured in turn with the work, medians over the rounds. Not a test: nothing here passes or fails.
//
//   kernel_bench [--megabytes N] [--rounds N] [--isa avx512|avx2]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/calibrate.h"
#include "kernels/ops.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kIn = 4096;
constexpr int64_t kOut = 4096;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Layers of [4096, 4096] that together are larger than any cache.
struct Layers {
  Layers(DType dtype, int64_t megabytes)
      : count(std::max<int64_t>(1, (megabytes << 20) / packed_bytes(dtype, kOut, kIn))),
        memory(count * packed_bytes(dtype, kOut, kIn)),
        scale(kOut * 4) {
    // Small numbers of every code: e4m3 below 2, which as BF16 are small too.
    uint8_t* const bytes = static_cast<uint8_t*>(memory.data());
    uint32_t state = 1;
    for (int64_t i = 0; i < memory.bytes(); ++i) {
      state = state * 1664525 + 1013904223;
      bytes[i] = static_cast<uint8_t>(state >> 24) & 0xBF;
    }
    const int64_t each = packed_bytes(dtype, kOut, kIn);
    for (int64_t i = 0; i < count; ++i) {
      linears.push_back({.out_features = kOut,
                         .in_features = kIn,
                         .weight = Tensor(bytes + i * each, dtype, {each / size_of(dtype)}),
                         .weight_scale = dtype == DType::kF8E4M3 ? scale.tensor(DType::kF32, {kOut}) : Tensor(),
                         .activations = {}});
    }
  }

  int64_t count;
  Buffer memory;
  Buffer scale;
  std::vector<Linear> linears;
};

// Runs `tokens` tokens through layers until 0.15 s have passed; returns seconds per layer.
double seconds_per_layer(Stream& stream, const Layers& layers, int64_t tokens, int64_t& next) {
  const Buffer x(tokens * kIn * 2);
  const Buffer y(tokens * kOut * 4);
  std::memset(x.data(), 0x3C, x.bytes());
  const auto start = Clock::now();
  int64_t done = 0;
  do {
    const LinearOutput output = {&layers.linears[next++ % layers.count], y.tensor(DType::kF32, {tokens, kOut})};
    linear(stream, {x.tensor(DType::kBF16, {tokens, kIn}), {}}, {&output, 1});
    ++done;
  } while (seconds_since(start) < 0.15);
  return seconds_since(start) / static_cast<double>(done);
}

void bench(const Layers& layers, DType dtype, Isa isa, int threads, int64_t tokens, int rounds) {
  Stream stream({threads, isa, true});
  const Tensor whole = layers.memory.tensor(DType::kU8, {layers.memory.bytes()});
  std::vector<double> reads, peaks, seconds, read_shares, peak_shares;
  int64_t next = 0;
  seconds_per_layer(stream, layers, tokens, next);
  for (int round = 0; round < rounds; ++round) {
    const double read = read_bytes_per_second(stream, whole);
    const double peak = dot_flops_per_second(stream);
    const double second = seconds_per_layer(stream, layers, tokens, next);
    reads.push_back(read);
    peaks.push_back(peak);
    seconds.push_back(second);
    read_shares.push_back(static_cast<double>(packed_bytes(dtype, kOut, kIn)) / second / read);
    peak_shares.push_back(2.0 * kOut * kIn * static_cast<double>(tokens) / second / peak);
  }
  const double second = median(seconds);
  std::printf("%-8s %-8s %7d %7lld | %8.1f %8.1f %6.1f %% | %8.1f %8.1f %6.1f %%\n", name_of(dtype), name_of(isa),
              threads, static_cast<long long>(tokens),
              static_cast<double>(packed_bytes(dtype, kOut, kIn)) / second / 1e9, median(reads) / 1e9,
              100 * median(read_shares), 2.0 * kOut * kIn * static_cast<double>(tokens) / second / 1e9,
              median(peaks) / 1e9, 100 * median(peak_shares));
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  int64_t megabytes = 1024;
  int rounds = 7;
  std::string only;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--megabytes") == 0) megabytes = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--isa") == 0) only = argv[i + 1];
  }
  std::printf("%-8s %-8s %7s %7s | %8s %8s %8s | %8s %8s %8s\n", "weights", "family", "threads", "tokens", "GB/s",
              "read", "share", "GFLOP/s", "peak", "share");
  for (const DType dtype : {DType::kF8E4M3, DType::kBF16}) {
    const Layers layers(dtype, megabytes);
    for (const Isa isa : {Isa::kAvx512, Isa::kAvx2}) {
      if (!runs_here(isa) || (!only.empty() && only != name_of(isa))) continue;
      for (const int threads : {1, 2}) {
        for (const int64_t tokens : {1, 2, 4, 8, 12, 16, 252}) bench(layers, dtype, isa, threads, tokens, rounds);
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) { return octet::run(argc, argv); }
