// Linear layers of few tokens on a GPU, as one rank of a model has them: how fast they stream their weights, beside a
// plain read of the same memory taken in turns with them, medians over the rounds. Layers walk through more memory than
// any cache holds. Times are of many launches one after the other, by the host's clock: what is so small that the host
// cannot queue it fast enough shows the host. Not a test: nothing here passes or fails.
//
//   cuda_bench [--module FILE] [--device N] [--megabytes N] [--rounds N] [--datasheet GB/s] [--only TEXT] [--json FILE]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/calibrate.h"
#include "kernels/cuda/open_module.h"
#include "kernels/ops.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSecondsAtATime = 0.02;
constexpr int64_t kMaxTokens = 16;
constexpr int64_t kAlignment = 256;  // as ModelWeights has it

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What one op computes: matrices of one input.
struct Layer {
  std::string name;
  int64_t columns;
  std::vector<int64_t> rows;
  DType weight, x;

  int64_t bytes() const {
    int64_t total = 0;
    for (const int64_t n : rows) total += n * columns * size_of(weight);
    return total;
  }
};

// The layers of one of `ranks` ranks of Llama 3.1, in every type.
std::vector<Layer> layers() {
  const struct {
    const char* model;
    int64_t ranks, hidden, heads, feed_forward;
  } shards[] = {{"405B/8", 8, 16384, 128, 53248},
                {"70B/8", 8, 8192, 64, 28672},
                {"70B/2", 2, 8192, 64, 28672},
                {"70B/1", 1, 8192, 64, 28672},
                {"8B/1", 1, 4096, 32, 14336}};
  constexpr int64_t kHeadDim = 128, kKvHeads = 8, kVocabulary = 128256;
  std::vector<Layer> all;
  for (const auto& [model, ranks, hidden, heads, feed_forward] : shards) {
    const int64_t q = heads * kHeadDim / ranks, kv = kKvHeads * kHeadDim / ranks, cut = feed_forward / ranks;
    const std::string prefix = std::string(model) + " ";
    for (const auto& [weight, x] : {std::pair(DType::kBF16, DType::kBF16), std::pair(DType::kF8E4M3, DType::kBF16),
                                    std::pair(DType::kF8E4M3, DType::kF8E4M3)}) {
      all.push_back({prefix + "q k v", hidden, {q, kv, kv}, weight, x});
      all.push_back({prefix + "o", q, {hidden}, weight, x});
      all.push_back({prefix + "gate up", hidden, {cut, cut}, weight, x});
      all.push_back({prefix + "down", cut, {hidden}, weight, x});
    }
    all.push_back({prefix + "logits", hidden, {kVocabulary / ranks}, DType::kBF16, DType::kBF16});
  }
  return all;
}

// Weights of all layers in turn: a ring of memory that each next matrix takes its bytes from.
class Ring {
 public:
  Ring(Stream& stream, int64_t bytes) : memory_(bytes, stream) {
    // Small numbers of every code: e4m3 below 2, which as BF16 are small too.
    const Buffer piece(std::min<int64_t>(bytes, int64_t{64} << 20));
    uint32_t state = 1;
    for (int64_t i = 0; i < piece.bytes(); ++i) {
      state = state * 1664525 + 1013904223;
      static_cast<uint8_t*>(piece.data())[i] = static_cast<uint8_t>(state >> 24) & 0xBF;
    }
    for (int64_t at = 0; at < bytes; at += piece.bytes()) {
      const Shape shape = {std::min(piece.bytes(), bytes - at)};
      copy(stream, piece.tensor(DType::kU8, shape),
           Tensor(static_cast<char*>(memory_.data()) + at, DType::kU8, shape, Device::kCuda));
    }
  }

  Tensor whole() const { return memory_.tensor(DType::kU8, {memory_.bytes()}); }

  Tensor next(DType dtype, int64_t bytes) {
    if (used_ + bytes > memory_.bytes()) used_ = 0;
    char* const data = static_cast<char*>(memory_.data()) + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return Tensor(data, dtype, {bytes / size_of(dtype)}, Device::kCuda);
  }

 private:
  Buffer memory_;
  int64_t used_ = 0;
};

class Bench {
 public:
  Bench(Stream& stream, int64_t megabytes, int rounds)
      : stream_(stream), ring_(stream, megabytes << 20), rounds_(rounds) {}

  nlohmann::json measure(const Layer& layer, int64_t tokens) {
    run(layer, tokens, 1);
    const auto start = Clock::now();
    run(layer, tokens, 4);
    const int launches = static_cast<int>(std::clamp(4 * kSecondsAtATime / seconds_since(start), 4.0, 10'000.0));
    std::vector<double> speeds, reads, shares;
    for (int round = 0; round < rounds_; ++round) {
      const double read = read_bytes_per_second(stream_, ring_.whole());
      const auto begin = Clock::now();
      run(layer, tokens, launches);
      const double speed = static_cast<double>(layer.bytes()) * launches / seconds_since(begin);
      reads.push_back(read);
      speeds.push_back(speed);
      shares.push_back(speed / read);
    }
    return {{"layer", layer.name},
            {"rows", layer.rows},
            {"columns", layer.columns},
            {"weights", name_of(layer.weight)},
            {"inputs", name_of(layer.x)},
            {"tokens", tokens},
            {"microseconds", static_cast<double>(layer.bytes()) / median(speeds) * 1e6},
            {"bytes_per_second", median(speeds)},
            {"lowest", *std::min_element(speeds.begin(), speeds.end())},
            {"highest", *std::max_element(speeds.begin(), speeds.end())},
            {"read_bytes_per_second", median(reads)},
            {"share_of_read", median(shares)}};
  }

 private:
  // Memory that lasts as long as the bench, by its use.
  Tensor room(const std::string& use, DType dtype, Shape shape) {
    const int64_t bytes = shape.elements() * size_of(dtype);
    Buffer& buffer = rooms_[use];
    if (buffer.bytes() < bytes) buffer = Buffer(bytes, stream_);
    return buffer.tensor(dtype, shape);
  }

  // Queues the layer with other weights each time, then waits.
  void run(const Layer& layer, int64_t tokens, int times) {
    const bool codes = layer.x == DType::kF8E4M3;
    const Activations x = {room("x", layer.x, {tokens, layer.columns}),
                           codes ? room("x scales", DType::kF32, {tokens, 1}) : Tensor()};
    for (int i = 0; i < times; ++i) {
      std::vector<Linear> weights;
      for (const int64_t rows : layer.rows) {
        weights.push_back(
            {.out_features = rows,
             .in_features = layer.columns,
             .weight = ring_.next(layer.weight, packed_bytes(layer.weight, rows, layer.columns)),
             .weight_scale = layer.weight == DType::kF8E4M3 ? room("scales", DType::kF32, {rows}) : Tensor(),
             .activations = {}});
      }
      std::vector<LinearOutput> outputs;
      for (size_t m = 0; m < weights.size(); ++m) {
        outputs.push_back(
            {&weights[m], room("out" + std::to_string(m), DType::kF32, {tokens, weights[m].out_features})});
      }
      linear(stream_, x, outputs);
    }
    stream_.synchronize();
  }

  Stream& stream_;
  Ring ring_;
  const int rounds_;
  std::map<std::string, Buffer> rooms_;
};

struct Options {
  std::string module = cuda::module_path();
  int device = 0;
  int64_t megabytes = 4096;
  int rounds = 7;
  double datasheet = 0;  // bytes per second
  std::string only, json;
};

// False: not understood.
bool parse(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; i += 2) {
    const std::string word = argv[i];
    if (i + 1 == argc) return false;
    if (word == "--module")
      options.module = argv[i + 1];
    else if (word == "--device")
      options.device = std::atoi(argv[i + 1]);
    else if (word == "--megabytes")
      options.megabytes = std::atoll(argv[i + 1]);
    else if (word == "--rounds")
      options.rounds = std::max(std::atoi(argv[i + 1]), 1);
    else if (word == "--datasheet")
      options.datasheet = std::atof(argv[i + 1]) * 1e9;
    else if (word == "--only")
      options.only = argv[i + 1];
    else if (word == "--json")
      options.json = argv[i + 1];
    else
      return false;
  }
  return true;
}

void print(const nlohmann::json& row, double datasheet) {
  std::printf("%-14s %-8s %-8s %6d | %9.1f us %8.1f GB/s %6.1f %% of a read", row["layer"].get<std::string>().c_str(),
              row["weights"].get<std::string>().c_str(), row["inputs"].get<std::string>().c_str(),
              row["tokens"].get<int>(), row["microseconds"].get<double>(), row["bytes_per_second"].get<double>() / 1e9,
              100 * row["share_of_read"].get<double>());
  if (datasheet > 0) std::printf(" %6.1f %%", 100 * row["bytes_per_second"].get<double>() / datasheet);
  std::printf("\n");
  std::fflush(stdout);
}

int run(const Options& options) {
  const auto module = cuda::open_module(options.module);
  const absl::Status status = module.ok() ? cuda::check_device(**module, options.device) : module.status();
  if (!status.ok()) {
    std::fprintf(stderr, "cuda_bench: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  const std::string device = (*module)->device_facts(options.device).name;
  Stream stream(**module, options.device, Arithmetic::kFast, {.threads = 1, .isa = Isa::kPortable, .spin = false});
  Bench bench(stream, options.megabytes, options.rounds);
  nlohmann::json rows = nlohmann::json::array();
  std::printf("%s, module of %s; weights over %lld MB, medians of %d rounds\n%-14s %-8s %-8s %6s |\n", device.c_str(),
              (*module)->built_for, static_cast<long long>(options.megabytes), options.rounds, "layer", "weights",
              "inputs", "tokens");
  for (const Layer& layer : layers()) {
    if (layer.name.find(options.only) == std::string::npos || layer.bytes() > options.megabytes << 20) continue;
    for (int64_t tokens = 1; tokens <= kMaxTokens; tokens *= 2) {
      rows.push_back(bench.measure(layer, tokens));
      print(rows.back(), options.datasheet);
    }
  }
  if (options.json.empty()) return 0;
  std::ofstream file(options.json);
  file << nlohmann::json{{"device", device}, {"built_for", (*module)->built_for}, {"linear", rows}}.dump(2) << "\n";
  if (file.flush()) return 0;
  std::fprintf(stderr, "cuda_bench: cannot write %s\n", options.json.c_str());
  return 1;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  octet::Options options;
  if (octet::parse(argc, argv, options)) return octet::run(options);
  std::fprintf(stderr,
               "usage: cuda_bench [--module FILE] [--device N] [--megabytes N] [--rounds N] "
               "[--datasheet GB/s] [--only TEXT] [--json FILE]\n");
  return 2;
}
