// Microseconds that choosing a token takes, by way of choosing, beside one pass that reads the same row: medians over
// rounds that take turns between the two. Not a test: nothing here passes or fails.
//
//   sampler_bench [--vocab N] [--rounds N] [--rows N]
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/calibrate.h"
#include "kernels/cpu/thread_pool.h"
#include "worker/sampler.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

struct Way {
  const char* name;
  SlotSampling sampling;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// Rows of logits; flat ones as a random model has them, peaked ones as a trained model has.
struct Rows {
  Rows(int64_t vocab, int64_t rows, bool peaked) : memory(vocab * rows * 4) {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal(0.0f, 2.0f);
    float* const all = static_cast<float*>(memory.data());
    for (int64_t i = 0; i < vocab * rows; ++i) all[i] = normal(random);
    for (int64_t row = 0; row < rows; ++row) {
      float* const logits = all + row * vocab;
      for (int i = 0; peaked && i < 20; ++i) logits[random() % vocab] = 18.0f - 0.5f * static_cast<float>(i);
      double sum = 0;
      for (int64_t i = 0; i < vocab; ++i) sum += std::exp(double{logits[i]});
      views.push_back({{logits, static_cast<size_t>(vocab)}, static_cast<float>(std::log(sum))});
    }
  }
  Buffer memory;
  std::vector<LogitsRow> views;
};

void bench(const Rows& rows, const char* shape, const Way& way, const TokenHistory& history, int threads, int rounds) {
  Stream stream({.threads = threads, .isa = best_isa(), .spin = true});
  const auto vocab = static_cast<int64_t>(rows.views[0].logits.size()), count = static_cast<int64_t>(rows.views.size());
  std::vector<Sampler> samplers(threads, Sampler(stream));
  std::vector<SampledToken> tokens(rows.views.size());
  std::vector<double> reads, rows_took, ratios;
  for (int round = -1; round < rounds; ++round) {
    const double read = static_cast<double>(vocab) * 4 /
                        read_bytes_per_second(stream, rows.memory.tensor(DType::kF32, {vocab * count}));
    const auto begin = Clock::now();
    stream.pool().parallel_for(count, count * vocab, [&](int64_t row, int thread) {
      samplers[thread].sample({.row = rows.views[row],
                               .sampling = way.sampling,
                               .position = round * static_cast<int32_t>(count) + static_cast<int32_t>(row),
                               .completion_tokens = 500,
                               .history = &history},
                              &tokens[row]);
    });
    const double took = std::chrono::duration<double>(Clock::now() - begin).count() / static_cast<double>(count);
    if (round < 0) continue;  // the first one brings memory in
    reads.push_back(read * 1e6);
    rows_took.push_back(took * 1e6);
    ratios.push_back(took / read);
  }
  std::printf("%-26s %-7s %7d %12.1f %12.1f %8.1f\n", way.name, shape, threads, median(rows_took), median(reads),
              median(ratios));
  std::fflush(stdout);
}

int run(int argc, char** argv) {
  int64_t vocab = 128'256, count = 16;
  int rounds = 15;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--vocab") == 0) vocab = std::atoll(argv[i + 1]);
    if (std::strcmp(argv[i], "--rounds") == 0) rounds = std::atoi(argv[i + 1]);
    if (std::strcmp(argv[i], "--rows") == 0) count = std::atoll(argv[i + 1]);
  }
  TokenHistory history;
  std::mt19937_64 random(2);
  for (int i = 0; i < 2000; ++i) history.append(static_cast<int32_t>(random() % vocab), i >= 1500);
  const std::vector<Way> ways = {
      {"greedy", {}},
      {"greedy, 20 logprobs", {.top_logprobs = 20}},
      {"temperature", {.temperature = 1.0f}},
      {"top_k 50", {.temperature = 1.0f, .top_k = 50}},
      {"top_p 0.9", {.temperature = 1.0f, .top_p = 0.9f}},
      {"min_p 0.05", {.temperature = 1.0f, .min_p = 0.05f}},
      {"penalties, greedy", {.repetition_penalty = 1.1f, .presence_penalty = 0.5f, .frequency_penalty = 0.5f}},
      {"penalties, top_p 0.9",
       {.repetition_penalty = 1.1f, .frequency_penalty = 0.5f, .temperature = 1.0f, .top_p = 0.9f}},
  };
  std::printf("%lld rows of %lld logits, %s; a history of 2000 tokens where penalties read it\n",
              static_cast<long long>(count), static_cast<long long>(vocab), name_of(best_isa()));
  std::printf("%-26s %-7s %7s %12s %12s %8s\n", "choice", "rows", "threads", "us per row", "us to read", "ratio");
  for (const bool peaked : {true, false}) {
    const Rows rows(vocab, count, peaked);
    for (const Way& way : ways) {
      for (const int threads : {1, 2}) bench(rows, peaked ? "peaked" : "flat", way, history, threads, rounds);
    }
  }
  return 0;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) { return octet::run(argc, argv); }
