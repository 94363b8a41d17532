// The emulation that CUDA kernels are tested on sees what would go wrong on a GPU.
#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "kernels/cuda/copy_async.cuh"
#include "kernels/cuda/decode.cuh"
#include "kernels/cuda/load_matrix.cuh"
#include "kernels/cuda/mma.cuh"
#include "kernels/fp8.h"

namespace octet {
namespace {

constexpr unsigned kThreads = 64;

// Every thread writes its number and reads its neighbour's.
__global__ void rotate(unsigned* out, bool barrier) {
  __shared__ unsigned numbers[kThreads];
  numbers[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
  if (barrier) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = numbers[(threadIdx.x + 1) % kThreads];
}

std::vector<unsigned> rotated(unsigned blocks, bool barrier) {
  std::vector<unsigned> out(blocks * kThreads);
  cuda_emulation::run_grid(blocks, kThreads, [&] { rotate(out.data(), barrier); });
  return out;
}

TEST(CudaEmulation, KeepsThreadsBeforeABarrierUntilAllHaveCome) {
  const std::vector<unsigned> out = rotated(20, true);
  for (unsigned i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], i / kThreads * 1000 + (i + 1) % kThreads);
}

TEST(CudaEmulation, ShowsAMissingBarrier) { EXPECT_NE(rotated(20, false), rotated(20, true)); }

// Each thread copies 16 bytes to shared memory, in a group of its own, then 16 zeros, and reads the former.
std::vector<unsigned> copied(bool wait) {
  alignas(16) static unsigned from[kThreads][4];
  std::vector<unsigned> out(kThreads);
  for (unsigned i = 0; i < kThreads; ++i) from[i][0] = i;
  const auto copy = [&] {
    auto* const shared = reinterpret_cast<unsigned(*)[4]>(cuda::dynamic_shared());
    cuda::copy_async(shared[threadIdx.x], from[threadIdx.x], true);
    cuda::commit_copies();
    cuda::copy_async(shared[kThreads + threadIdx.x], from[threadIdx.x], false);
    cuda::commit_copies();
    if (wait) cuda::wait_for_copies<1>();
    out[threadIdx.x] = shared[threadIdx.x][0];
    cuda::wait_for_copies<0>();
    if (shared[kThreads + threadIdx.x][0] != 0) out[threadIdx.x] = kThreads;
  };
  cuda_emulation::run_grid(1, kThreads, copy, 2 * sizeof(from));
  return out;
}

TEST(CudaEmulation, CopiesToSharedMemoryWhenTheyAreWaitedFor) {
  const std::vector<unsigned> out = copied(true);
  for (unsigned i = 0; i < kThreads; ++i) ASSERT_EQ(out[i], i);
  EXPECT_NE(copied(false), out) << "a missing wait went unseen";
}

TEST(CudaEmulation, NumbersThreadsAndBlocksInAllDimensions) {
  std::set<std::string> seen;
  cuda_emulation::run_grid(dim3(2, 3, 2), dim3(4, 2, 3), [&] {
    std::string at;
    for (const dim3& index : {blockIdx, threadIdx}) {
      for (const unsigned i : {index.x, index.y, index.z}) at += std::to_string(i) + " ";
    }
    seen.insert(at);
  });
  EXPECT_EQ(seen.size(), 2u * 3 * 2 * 4 * 2 * 3);
}

// Rows of a and columns of b as mma.cuh spreads them over lanes; small whole numbers, so that sums are exact.
TEST(CudaEmulation, MultipliesFragmentsAsTensorCoresDo) {
  const auto a_at = [](int row, int k) { return (3 * row + 5 * k) % 7 - 3; };
  const auto b_at = [](int k, int column) { return (2 * k + 11 * column) % 5 - 2; };
  for (const int width : {2, 4}) {  // elements of a word: BF16, e4m3
    const auto word = [&](const auto& at, int first_k) {
      uint32_t bits = 0;
      for (int i = 0; i < width; ++i) {
        const auto value = static_cast<float>(at(first_k + i));
        bits |= (width == 2 ? uint32_t{float_to_bf16(value)} : uint32_t{float_to_e4m3(value)}) << 32 / width * i;
      }
      return bits;
    };
    float product[16][8];
    cuda_emulation::run_grid(1, 32, [&] {
      const int group = static_cast<int>(threadIdx.x) / 4, in_group = static_cast<int>(threadIdx.x) % 4;
      uint32_t a[4], b[2];
      float c[4] = {1, 2, 3, 4};
      for (int i = 0; i < 4; ++i) {
        a[i] = word([&](int k) { return a_at(group + i % 2 * 8, k); }, i / 2 * 4 * width + in_group * width);
      }
      for (int i = 0; i < 2; ++i) {
        b[i] = word([&](int k) { return b_at(k, group); }, i * 4 * width + in_group * width);
      }
      width == 2 ? cuda::mma_bf16(c, a, b) : cuda::mma_e4m3(c, a, b);
      for (int i = 0; i < 4; ++i) product[group + i / 2 * 8][2 * in_group + i % 2] = c[i];
    });
    for (int row = 0; row < 16; ++row) {
      for (int column = 0; column < 8; ++column) {
        int expected = 1 + row / 8 * 2 + column % 2;
        for (int k = 0; k < 8 * width; ++k) expected += a_at(row, k) * b_at(k, column);
        ASSERT_EQ(product[row][column], static_cast<float>(expected)) << row << ", " << column;
      }
    }
  }
}

TEST(CudaDecode, GivesEveryFiniteCodeItsBf16ValueInItsPlace) {
  std::vector<uint32_t> decoded(2 * 256 * 4);
  cuda_emulation::run_grid(4, 256, [&] {  // code threadIdx.x at place blockIdx.x of a word of another code
    const uint32_t codes = (0xA5A5A5A5u & ~(0xFFu << 8 * blockIdx.x)) | threadIdx.x << 8 * blockIdx.x;
    uint32_t* const pairs = &decoded[2 * (256 * blockIdx.x + threadIdx.x)];
    cuda::decode_e4m3(codes, pairs[0], pairs[1]);
  });
  for (unsigned place = 0; place < 4; ++place) {
    for (unsigned code = 0; code < 256; ++code) {
      if (is_e4m3_nan(static_cast<uint8_t>(code))) continue;
      for (unsigned i = 0; i < 4; ++i) {
        const auto at = static_cast<uint16_t>(decoded[2 * (256 * place + code) + i / 2] >> 16 * (i % 2));
        const uint8_t expected = i == place ? static_cast<uint8_t>(code) : 0xA5;
        ASSERT_EQ(at, float_to_bf16(e4m3_to_float(expected))) << code << " at " << place << ", value " << i;
      }
    }
  }
}

TEST(CudaEmulation, ShufflesWithinAWarpAndItsSegments) {
  std::vector<float> down(kThreads), across(kThreads);
  cuda_emulation::run_grid(1, kThreads, [&] {
    const float mine = static_cast<float>(threadIdx.x);
    across[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFF, mine, 5);
    down[threadIdx.x] = __shfl_down_sync(0xFFFFFFFF, mine, 3, 8);
  });
  for (unsigned i = 0; i < kThreads; ++i) {
    EXPECT_EQ(across[i], static_cast<float>(i ^ 5));
    EXPECT_EQ(down[i], static_cast<float>(i % 8 + 3 < 8 ? i + 3 : i));
  }
}

TEST(CudaEmulation, LoadsMatricesOfSharedMemoryAsFragments) {
  // Element (row, column) of matrix i is 64 i + 8 row + column; rows lie backwards.
  alignas(16) static uint16_t rows[32][8];
  for (int i = 0; i < 256; ++i) rows[31 - i / 8][i % 8] = static_cast<uint16_t>(i);
  uint32_t plain[32][4], transposed[32][4];
  cuda_emulation::run_grid(1, 32, [&] {
    cuda::load_matrices(plain[threadIdx.x], rows[31 - threadIdx.x]);
    cuda::load_transposed_matrices(transposed[threadIdx.x], rows[31 - threadIdx.x]);
  });
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t g = lane / 4, t = lane % 4;
    for (uint32_t i = 0; i < 4; ++i) {
      EXPECT_EQ(plain[lane][i], 64 * i + 8 * g + 2 * t + ((64 * i + 8 * g + 2 * t + 1) << 16));
      EXPECT_EQ(transposed[lane][i], 64 * i + 16 * t + g + ((64 * i + 16 * t + 8 + g) << 16));
    }
  }
}

TEST(CudaEmulation, ShufflesFromLanesAndVotes) {
  uint32_t up[32], from[32], votes[32];
  cuda_emulation::run_grid(1, 32, [&] {
    up[threadIdx.x] = __shfl_up_sync(0xFFFFFFFF, threadIdx.x, 4);
    from[threadIdx.x] = __shfl_sync(0xFFFFFFFF, threadIdx.x, 17);
    votes[threadIdx.x] = __ballot_sync(0xFFFFFFFF, threadIdx.x % 3 == 1);
  });
  for (uint32_t i = 0; i < 32; ++i) {
    EXPECT_EQ(up[i], i < 4 ? i : i - 4);
    EXPECT_EQ(from[i], 17u);
    EXPECT_EQ(votes[i], 0x92492492u);
  }
}

TEST(CudaEmulation, FlushesDenormals) {
  volatile float tiny = 1e-30f, zero = 1;
  cuda_emulation::run_grid(1, 1, [&] { zero = __fmaf_rn(tiny, 1e-10f, 0.0f); });
  EXPECT_EQ(zero, 0.0f);
  EXPECT_GT(tiny * 1e-10f, 0.0f) << "the caller's mode was not restored";
}

TEST(CudaEmulationDeathTest, EndsWhatWouldHangOrMeanNothing) {
  const auto run = [](unsigned threads, auto kernel) { cuda_emulation::run_grid(1, threads, kernel); };
  EXPECT_DEATH(run(8,
                   [] {
                     if (threadIdx.x != 3) __syncthreads();
                   }),
               "a thread ended before a barrier");
  EXPECT_DEATH(run(32,
                   [] {
                     if (threadIdx.x != 3) __syncwarp();
                   }),
               "a warp waits for a thread that has ended");
  EXPECT_DEATH(run(32, [] { __syncwarp(0xFFFF); }), "not among the lanes that it names");
  EXPECT_DEATH(run(16, [] { __shfl_xor_sync(0xFFFF, 1.0f, 16); }), "reads a lane that it does not name");
  EXPECT_DEATH(run(1,
                   [] {
                     cuda::copy_async(cuda::dynamic_shared(), cuda::dynamic_shared(), true);
                     cuda::commit_copies();
                   }),
               "ended before its copies");
  EXPECT_DEATH(run(2000, [] {}), "a block has 1 to 1024 threads");
}

}  // namespace
}  // namespace octet
