// Attention on a GPU in fast mode, as one rank of a model has it, over a cache larger than the device's own. Decode:
// the bytes of a longer context over the time that it takes longer, as a share of a plain read of the same memory taken
// in turns with it. Prefill: operations of a causal prompt per second. Medians over the rounds; what is timed was
// recorded before, so that the host has no part in it. Not a test: nothing here passes or fails.
//
//   cuda_attention_bench [--module FILE] [--device N] [--megabytes N] [--rounds N] [--only TEXT] [--json FILE]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/calibrate.h"
#include "kernels/cuda/open_module.h"
#include "kernels/graph.h"
#include "kernels/ops.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int64_t kHeadDim = 128;
constexpr int64_t kShortContext = 8192, kLongContext = 131072;
constexpr int64_t kPrompt = 8192;
constexpr double kSecondsAtATime = 0.02;

struct Shape {
  const char* rank;
  int64_t heads, kv_heads;
};
constexpr Shape kShapes[] = {{"405B/8", 16, 1}, {"70B/8", 8, 1}, {"70B/1", 64, 8}, {"8B/1", 32, 8}};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Tensors that live as long as the bench of a shape.
class Place {
 public:
  explicit Place(Stream& stream) : stream_(stream) {}

  Tensor room(DType dtype, octet::Shape shape) {
    memory_.push_back(std::make_unique<Buffer>(shape.elements() * size_of(dtype), stream_));
    return memory_.back()->tensor(dtype, shape);
  }
  Tensor put(const std::vector<int32_t>& values, octet::Shape shape) {
    const Tensor there = room(DType::kI32, shape);
    copy(stream_, Tensor(const_cast<int32_t*>(values.data()), DType::kI32, shape), there);
    return there;
  }
  // BF16 numbers below 2, of many exponents.
  Tensor numbers(octet::Shape shape) {
    const Tensor there = room(DType::kBF16, shape);
    const Buffer piece(std::min<int64_t>(there.bytes(), int64_t{64} << 20));
    std::mt19937 random(1);
    for (int64_t i = 0; i < piece.bytes(); ++i) {
      static_cast<uint8_t*>(piece.data())[i] = static_cast<uint8_t>(random()) & 0xBF;
    }
    for (int64_t at = 0; at < there.bytes(); at += piece.bytes()) {
      const octet::Shape part = {std::min(piece.bytes(), there.bytes() - at)};
      copy(stream_, piece.tensor(DType::kU8, part),
           Tensor(static_cast<char*>(there.data()) + at, DType::kU8, part, Device::kCuda));
    }
    return there;
  }

 private:
  Stream& stream_;
  std::vector<std::unique_ptr<Buffer>> memory_;
};

class Bench {
 public:
  Bench(Stream& stream, const Shape& shape, int64_t megabytes, int rounds)
      : stream_(stream), shape_(shape), rounds_(rounds), place_(stream) {
    const int64_t blocks = (megabytes << 20) / (2 * shape.kv_heads * kKvBlockTokens * kHeadDim * size_of(DType::kBF16));
    cache_ = {.keys = place_.numbers({blocks, shape.kv_heads, kHeadDim / 2, kKvBlockTokens, 2}),
              .values = place_.numbers({blocks, shape.kv_heads, kKvBlockTokens, kHeadDim})};
    order_.resize(static_cast<size_t>(blocks));
    std::iota(order_.begin(), order_.end(), 0);
    std::shuffle(order_.begin(), order_.end(), std::mt19937(2));
  }

  // Whether the cache holds a step's contexts several times, so that no step finds another's in the device's cache.
  bool holds(int64_t sequences, int64_t context) const {
    return 4 * sequences * context / kKvBlockTokens <= static_cast<int64_t>(order_.size());
  }

  nlohmann::json decode(int64_t sequences) {
    std::vector<double> shares, reads;
    const auto brief = recorded(sequences, 1, kShortContext), lengthy = recorded(sequences, 1, kLongContext);
    const double bytes = static_cast<double>(sequences * (kLongContext - kShortContext) * 2 * shape_.kv_heads *
                                             kHeadDim * size_of(DType::kBF16));
    std::vector<double> short_seconds, long_seconds;
    for (int round = 0; round < rounds_; ++round) {
      reads.push_back(read_bytes_per_second(stream_, cache_.keys));
      short_seconds.push_back(seconds_of(*brief));
      long_seconds.push_back(seconds_of(*lengthy));
      shares.push_back(bytes / (long_seconds.back() - short_seconds.back()) / reads.back());
    }
    std::printf("%-8s decode  %3lld sequences | %8.1f us at %lld, %8.1f us at %lld | %7.1f GB/s %6.1f %% of a read\n",
                shape_.rank, static_cast<long long>(sequences), 1e6 * median(short_seconds),
                static_cast<long long>(kShortContext), 1e6 * median(long_seconds), static_cast<long long>(kLongContext),
                median(shares) * median(reads) / 1e9, 100 * median(shares));
    std::fflush(stdout);
    return {{"rank", shape_.rank},
            {"kind", "decode"},
            {"sequences", sequences},
            {"contexts", {kShortContext, kLongContext}},
            {"seconds", {median(short_seconds), median(long_seconds)}},
            {"read_bytes_per_second", median(reads)},
            {"share_of_read", median(shares)}};
  }

  nlohmann::json prefill() {
    const auto prompt = recorded(1, kPrompt, kPrompt);
    std::vector<double> seconds;
    for (int round = 0; round < rounds_; ++round) seconds.push_back(seconds_of(*prompt));
    // Two products of two operations each, for half of all pairs of positions.
    const double operations = 4.0 * static_cast<double>(shape_.heads * kHeadDim * kPrompt * (kPrompt + 1)) / 2;
    std::printf("%-8s prefill %5lld tokens   | %8.1f us | %7.1f TFLOP/s\n", shape_.rank,
                static_cast<long long>(kPrompt), 1e6 * median(seconds), operations / median(seconds) / 1e12);
    std::fflush(stdout);
    return {{"rank", shape_.rank},
            {"kind", "prefill"},
            {"tokens", kPrompt},
            {"seconds", median(seconds)},
            {"flops_per_second", operations / median(seconds)}};
  }

 private:
  struct Steps {
    std::unique_ptr<Graph> graph;
    int count;
  };

  AttentionBatch batch(int64_t sequences, int64_t new_tokens, int64_t context) {
    std::vector<int32_t> positions, sequence_of, ends, tables;
    for (int64_t s = 0; s < sequences; ++s) {
      for (int64_t p = context - new_tokens; p < context; ++p) {
        positions.push_back(static_cast<int32_t>(p));
        sequence_of.push_back(static_cast<int32_t>(s));
      }
      ends.push_back(static_cast<int32_t>(positions.size()));
      for (int64_t b = 0; b < context / kKvBlockTokens; ++b) tables.push_back(order_[next_++ % order_.size()]);
    }
    const int64_t tokens = sequences * new_tokens;
    return {.positions = place_.put(positions, {tokens}),
            .sequence_of = place_.put(sequence_of, {tokens}),
            .sequence_ends = place_.put(ends, {sequences}),
            .block_tables = place_.put(tables, {sequences, context / kKvBlockTokens}),
            .context = context};
  }

  // Steps over the whole cache, one after the other.
  std::unique_ptr<Steps> recorded(int64_t sequences, int64_t new_tokens, int64_t context) {
    constexpr int kMostSteps = 32;
    const int64_t fit = static_cast<int64_t>(order_.size()) * kKvBlockTokens / (sequences * context);
    const Tensor q = place_.numbers({sequences * new_tokens, shape_.heads, kHeadDim});
    const Tensor out = place_.room(DType::kBF16, q.shape());
    std::vector<AttentionBatch> batches;
    for (int64_t i = 0; i < std::clamp<int64_t>(fit, 1, kMostSteps); ++i) {
      batches.push_back(batch(sequences, new_tokens, context));
    }
    const auto run = [&] {
      for (const AttentionBatch& step : batches) attention(stream_, q, cache_, step, out);
    };
    run();
    stream_.synchronize();
    return std::make_unique<Steps>(std::make_unique<Graph>(stream_, run), static_cast<int>(batches.size()));
  }

  // Of one step.
  double seconds_of(Steps& steps) {
    const auto run = [&](int times) {
      const auto start = Clock::now();
      for (int i = 0; i < times; ++i) steps.graph->launch();
      stream_.synchronize();
      return seconds_since(start) / times;
    };
    const int times = static_cast<int>(std::clamp(kSecondsAtATime / run(1), 1.0, 1000.0));
    return run(times) / steps.count;
  }

  Stream& stream_;
  const Shape shape_;
  const int rounds_;
  Place place_;
  KvLayer cache_;
  std::vector<int32_t> order_;
  size_t next_ = 0;
};

struct Options {
  std::string module = cuda::module_path();
  int device = 0;
  int64_t megabytes = 8192;
  int rounds = 7;
  std::string only, json;
};

// False: not understood.
bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; i += 2) {
    const std::string word = argv[i];
    if (i + 1 == argc) return false;
    if (word == "--module") {
      options.module = argv[i + 1];
    } else if (word == "--device") {
      options.device = std::atoi(argv[i + 1]);
    } else if (word == "--megabytes") {
      options.megabytes = std::atoll(argv[i + 1]);
    } else if (word == "--rounds") {
      options.rounds = std::max(std::atoi(argv[i + 1]), 1);
    } else if (word == "--only") {
      options.only = argv[i + 1];
    } else if (word == "--json") {
      options.json = argv[i + 1];
    } else {
      return false;
    }
  }
  return options.megabytes > 0;
}

int run(const Options& options) {
  const auto module = cuda::open_module(options.module);
  const absl::Status status = module.ok() ? cuda::check_device(**module, options.device) : module.status();
  if (!status.ok()) {
    std::fprintf(stderr, "cuda_attention_bench: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  const std::string device = (*module)->device_facts(options.device).name;
  nlohmann::json rows = nlohmann::json::array();
  std::printf("%s, module of %s; a cache of %lld MB, medians of %d rounds\n", device.c_str(), (*module)->built_for,
              static_cast<long long>(options.megabytes), options.rounds);
  for (const Shape& shape : kShapes) {
    if (std::string(shape.rank).find(options.only) == std::string::npos) continue;
    Stream stream(**module, options.device, Arithmetic::kFast, {.threads = 1, .isa = Isa::kPortable, .spin = false});
    Bench bench(stream, shape, options.megabytes, options.rounds);
    for (const int64_t sequences : {1, 4, 16}) {
      if (bench.holds(sequences, kLongContext)) rows.push_back(bench.decode(sequences));
    }
    if (bench.holds(1, kPrompt)) rows.push_back(bench.prefill());
  }
  if (options.json.empty()) return 0;
  std::ofstream file(options.json);
  file << nlohmann::json{{"device", device}, {"built_for", (*module)->built_for}, {"attention", rows}}.dump(2) << "\n";
  if (file.flush()) return 0;
  std::fprintf(stderr, "cuda_attention_bench: cannot write %s\n", options.json.c_str());
  return 1;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  octet::Options options;
  if (octet::parse(argc, argv, options)) return octet::run(options);
  std::fprintf(stderr,
               "usage: cuda_attention_bench [--module FILE] [--device N] [--megabytes N] [--rounds N] [--only TEXT] "
               "[--json FILE]\n");
  return 2;
}
