// Linear layers of many tokens on a GPU, as one of 8 ranks of Llama 3.1 405B has them: TFLOP/s through cuBLASLt and
// through our own tiles, taken in turns, medians over the rounds. Values are normally distributed, as zeros draw less
// power and so run faster. Times are of many launches one after the other, by the host's clock. Not a test: nothing
// here passes or fails.
//
//   cuda_gemm_bench [--module FILE] [--device N] [--tokens N] [--rounds N] [--only TEXT] [--json FILE]
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/open_module.h"
#include "kernels/fp8.h"
#include "kernels/ops.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr double kSecondsAtATime = 0.1;

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

struct Layer {
  std::string name;
  int64_t outputs, columns;
  DType weight, x;
};

std::vector<Layer> layers() {
  std::vector<Layer> all;
  for (const auto& [weight, x] : {std::pair(DType::kF8E4M3, DType::kF8E4M3), std::pair(DType::kF8E4M3, DType::kBF16),
                                  std::pair(DType::kBF16, DType::kBF16)}) {
    all.push_back({"q k v", 2304, 16384, weight, x});
    all.push_back({"o", 16384, 2048, weight, x});
    all.push_back({"gate up", 13312, 16384, weight, x});
    all.push_back({"down", 16384, 6656, weight, x});
  }
  return all;
}

// A piece of random values, over and over.
void fill(Stream& stream, const Tensor& tensor) {
  constexpr int64_t kPiece = 1 << 20;
  const Buffer piece(kPiece * size_of(tensor.dtype()));
  std::mt19937_64 engine(1);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < kPiece; ++i) {
    const float value = normal(engine);
    if (tensor.dtype() == DType::kBF16) static_cast<uint16_t*>(piece.data())[i] = float_to_bf16(value);
    if (tensor.dtype() == DType::kF8E4M3) static_cast<uint8_t*>(piece.data())[i] = float_to_e4m3(value);
    if (tensor.dtype() == DType::kF32) static_cast<float*>(piece.data())[i] = value;
  }
  for (int64_t at = 0; at < tensor.elements(); at += kPiece) {
    const Shape shape = {std::min(kPiece, tensor.elements() - at)};
    const Tensor part(static_cast<char*>(tensor.data()) + at * size_of(tensor.dtype()), tensor.dtype(), shape,
                      tensor.device());
    copy(stream, piece.tensor(tensor.dtype(), shape), part);
  }
}

// A layer with its memory on a stream's device.
class Work {
 public:
  Work(Stream& stream, const Layer& layer, int64_t tokens) : stream_(stream) {
    linear_ = {.out_features = layer.outputs,
               .in_features = layer.columns,
               .weight = room(layer.weight,
                              {packed_bytes(layer.weight, layer.outputs, layer.columns) / size_of(layer.weight)}),
               .weight_scale = layer.weight == DType::kF8E4M3 ? room(DType::kF32, {layer.outputs}) : Tensor(),
               .activations = {}};
    x_.values = room(layer.x, {tokens, layer.columns});
    if (layer.x == DType::kF8E4M3) x_.scales = room(DType::kF32, {tokens, 1});
    out_ = room(DType::kF32, {tokens, layer.outputs});
  }

  // Seconds that it takes `times` times on a stream of the same device.
  double run(Stream& stream, int times) const {
    const LinearOutput output = {&linear_, out_};
    const auto start = Clock::now();
    for (int i = 0; i < times; ++i) linear(stream, x_, {&output, 1});
    stream.synchronize();
    return std::chrono::duration<double>(Clock::now() - start).count();
  }

 private:
  Tensor room(DType dtype, Shape shape) {
    memory_.emplace_back(shape.elements() * size_of(dtype), stream_);
    const Tensor tensor = memory_.back().tensor(dtype, shape);
    fill(stream_, tensor);
    return tensor;
  }

  Stream& stream_;
  std::vector<Buffer> memory_;
  Linear linear_;
  Activations x_;
  Tensor out_;
};

struct Options {
  std::string module = cuda::module_path();
  int device = 0;
  int64_t tokens = 4096;
  int rounds = 7;
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
    else if (word == "--tokens")
      options.tokens = std::max(std::atoll(argv[i + 1]), 1LL);
    else if (word == "--rounds")
      options.rounds = std::max(std::atoi(argv[i + 1]), 1);
    else if (word == "--only")
      options.only = argv[i + 1];
    else if (word == "--json")
      options.json = argv[i + 1];
    else
      return false;
  }
  return true;
}

// What W8A16 has no library for is computed by our tiles either way.
nlohmann::json measure(Stream& library, Stream& tiles, const Layer& layer, const Options& options) {
  const Work work(library, layer, options.tokens);
  library.synchronize();
  const double flops = 2.0 * static_cast<double>(options.tokens) * static_cast<double>(layer.outputs * layer.columns);
  Stream* const streams[] = {&library, &tiles};
  int times[2];
  std::vector<double> rates[2];
  for (int i = 0; i < 2; ++i) {
    work.run(*streams[i], 1);
    times[i] = static_cast<int>(std::clamp(kSecondsAtATime / work.run(*streams[i], 1), 1.0, 1000.0));
  }
  for (int round = 0; round < options.rounds; ++round) {
    for (int i = 0; i < 2; ++i) rates[i].push_back(flops * times[i] / work.run(*streams[i], times[i]));
  }
  return {{"layer", layer.name},
          {"outputs", layer.outputs},
          {"columns", layer.columns},
          {"weights", name_of(layer.weight)},
          {"inputs", name_of(layer.x)},
          {"tokens", options.tokens},
          {"flops_per_second", median(rates[0])},
          {"tiles_flops_per_second", median(rates[1])}};
}

int run(const Options& options) {
  const auto module = cuda::open_module(options.module);
  const absl::Status status = module.ok() ? cuda::check_device(**module, options.device) : module.status();
  if (!status.ok()) {
    std::fprintf(stderr, "cuda_gemm_bench: %s\n", std::string(status.message()).c_str());
    return 1;
  }
  const Stream::CpuOptions host = {.threads = 1, .isa = Isa::kPortable, .spin = false};
  Stream library(**module, options.device, Arithmetic::kFast, host);
  setenv("OCTET_CUBLASLT_LIBRARY", "/none: the tiles' own turn", 1);
  Stream tiles(**module, options.device, Arithmetic::kFast, host);
  const std::string device = (*module)->device_facts(options.device).name;
  const std::string lacks = (*module)->lacks(library.queue());
  std::printf("%s, module of %s; medians of %d rounds\n", device.c_str(), (*module)->built_for, options.rounds);
  if (!lacks.empty()) std::printf("both columns are our tiles, without %s\n", lacks.c_str());
  std::printf("%-8s %8s %8s %-8s %-8s %6s | %14s %14s\n", "layer", "outputs", "columns", "weights", "inputs", "tokens",
              "as it is", "tiles");
  nlohmann::json rows = nlohmann::json::array();
  for (const Layer& layer : layers()) {
    if (layer.name.find(options.only) == std::string::npos) continue;
    rows.push_back(measure(library, tiles, layer, options));
    const nlohmann::json& row = rows.back();
    std::printf("%-8s %8lld %8lld %-8s %-8s %6lld | %7.1f TFLOP/s %7.1f TFLOP/s\n", layer.name.c_str(),
                static_cast<long long>(layer.outputs), static_cast<long long>(layer.columns), name_of(layer.weight),
                name_of(layer.x), static_cast<long long>(options.tokens), row["flops_per_second"].get<double>() / 1e12,
                row["tiles_flops_per_second"].get<double>() / 1e12);
    std::fflush(stdout);
  }
  if (options.json.empty()) return 0;
  std::ofstream file(options.json);
  file << nlohmann::json{{"device", device}, {"built_for", (*module)->built_for}, {"lacks", lacks}, {"gemm", rows}}
              .dump(2)
       << "\n";
  if (file.flush()) return 0;
  std::fprintf(stderr, "cuda_gemm_bench: cannot write %s\n", options.json.c_str());
  return 1;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  octet::Options options;
  if (octet::parse(argc, argv, options)) return octet::run(options);
  std::fprintf(stderr,
               "usage: cuda_gemm_bench [--module FILE] [--device N] [--tokens N] [--rounds N] [--only TEXT] "
               "[--json FILE]\n");
  return 2;
}
