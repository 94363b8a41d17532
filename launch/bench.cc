#include "launch/bench.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "coordinator/rpc_worker_group.h"
#include "coordinator/scheduler.h"
#include "coordinator/thread_worker_group.h"
#include "kernels/calibrate.h"
#include "launch/bench_serve.h"
#include "launch/device.h"
#include "launch/machine.h"
#include "launch/options.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/worker_service.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

struct BenchOptions {
  RuntimeOptions runtime;
  Device device = Device::kCpu;
  Arithmetic arithmetic = Arithmetic::kFast;  // of a GPU
  std::vector<int> ranks = {1, 2};
  int rounds = 15;
  int prefill_tokens = 512;
  int decode_steps = 8;  // in each round
  std::string svg;
};

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
  return values[values.size() / 2];
}

// What one number of ranks reached. Shares are of the calibration beside each measurement, medians over the rounds.
struct Row {
  int ranks = 0, threads = 0;
  double load_bytes_per_second = 0;
  double decode_tokens_per_second = 0, read_bytes_per_second = 0, decode_share = 0;
  double prefill_tokens_per_second = 0, dot_flops_per_second = 0, prefill_share = 0;
  std::string peak_source;
};

// One sequence on a group: prefills and decodes, timed from submit to collect.
class Runner {
 public:
  Runner(WorkerGroup& group, const WorkerLimits& limits) : group_(group), limits_(limits) {}

  // Seconds of one step over `tokens` fresh tokens, which begin a new sequence.
  absl::StatusOr<double> prefill(int tokens) {
    StepPlan plan;
    if (open_) plan.close = {0};
    open_ = true;
    position_ = tokens;
    plan.open = {{.slot = 0}};
    const int32_t needed =
        std::min(limits_.blocks, (limits_.max_context + limits_.block_tokens - 1) / limits_.block_tokens);
    for (int32_t block = 0; block < needed; ++block) plan.blocks.push_back({.slot = 0, .block = block});
    SlotTokens run{.slot = 0, .sample = true};
    for (int i = 0; i < tokens; ++i) run.tokens.push_back((i * 7919 + 13) % limits_.vocab_size);
    plan.run = {run};
    return timed(plan);
  }

  // Seconds of one decode step.
  absl::StatusOr<double> decode() {
    StepPlan plan;
    plan.run = {{.slot = 0, .position = position_++, .from_last_sample = true, .sample = true}};
    return timed(plan);
  }

 private:
  absl::StatusOr<double> timed(StepPlan& plan) {
    plan.step = ++step_;
    const auto begin = Clock::now();
    const absl::StatusOr<StepResult> result = group_.run(plan);
    const double seconds = seconds_since(begin);
    if (!result.ok()) return result.status();
    if (!result->error.empty()) return absl::InternalError(result->error);
    return seconds;
  }

  WorkerGroup& group_;
  const WorkerLimits& limits_;
  bool open_ = false;
  int32_t position_ = 0;
  uint64_t step_ = 0;
};

// Multiply-adds count twice. Every token runs the block linears; one runs the lm_head.
double prefill_flops(const ModelConfig& c, int tokens) {
  const double attention = c.hidden_size * c.head_dim * (2.0 * c.num_attention_heads + 2.0 * c.num_key_value_heads);
  const double feed_forward = 3.0 * c.hidden_size * c.intermediate_size;
  const double scores = 2.0 * c.num_attention_heads * c.head_dim * (tokens + 1) / 2;
  return 2.0 * tokens * c.num_hidden_layers * (attention + feed_forward + scores) + 2.0 * c.hidden_size * c.vocab_size;
}

// What there is to divide among the ranks.
absl::StatusOr<int64_t> memory_of(const OpenDevice& device) {
  if (device.gpu) return device.gpu->memory_bytes;
  return available_memory();
}

absl::StatusOr<Row> measure(const Checkpoint& checkpoint, const OpenDevice& device, const BenchOptions& options,
                            int ranks, int cores) {
  Row row{.ranks = ranks, .threads = options.runtime.threads.value_or(std::max(1, cores / ranks))};
  ThreadGroupOptions group_options{
      .ranks = ranks,
      .stream = {.threads = row.threads, .isa = options.runtime.isa, .spin = ranks * row.threads <= cores},
      .cuda = device.module,
      .activations = options.runtime.activations,
      .memory = options.runtime.memory};
  const absl::StatusOr<int64_t> memory = memory_of(device);
  if (!memory.ok()) return memory.status();
  group_options.available_bytes = *memory / ranks;
  absl::StatusOr<std::unique_ptr<ThreadWorkerGroup>> group = ThreadWorkerGroup::start(checkpoint, group_options);
  if (!group.ok()) return group.status();

  double weight_bytes = 0, streamed_bytes = 0;  // a decode step reads all weights but the embedding table
  for (const RankBytes& bytes : (*group)->plan().ranks) {
    weight_bytes += static_cast<double>(bytes.weights.total());
    streamed_bytes += static_cast<double>(bytes.weights.total() - bytes.weights.embedding);
  }
  row.load_bytes_per_second = weight_bytes / (*group)->load_seconds();

  const std::unique_ptr<Stream> calibration =
      open_stream(device, options.runtime.memory.arithmetic,
                  {.threads = ranks * row.threads, .isa = options.runtime.isa, .spin = false});
  auto read_bandwidth = [&] {
    double seconds = 0;
    for (int rank = 0; rank < ranks; ++rank) {
      const auto weights = (*group)->weights(rank);
      const Tensor bytes(const_cast<std::byte*>(weights.data()), DType::kU8, {static_cast<int64_t>(weights.size())},
                         calibration->device());
      seconds += static_cast<double>(weights.size()) / read_bytes_per_second(*calibration, bytes);
    }
    return weight_bytes / seconds;
  };

  Runner runner(**group, (*group)->plan().limits);
  const double flops = prefill_flops(checkpoint.config(), options.prefill_tokens);
  std::vector<double> reads, peaks, decodes, prefills, decode_shares, prefill_shares;
  for (int round = -1; round < options.rounds; ++round) {  // round -1 warms up
    // Of a GPU its datasheet's, of which nothing may be known.
    const PeakFlops known = peak_flops(device, *calibration);
    row.peak_source = known.source;
    const double peak = options.runtime.activations == ActivationMode::kFP8 ? known.fp8 : known.bf16;
    const absl::StatusOr<double> prefill = runner.prefill(options.prefill_tokens);
    if (!prefill.ok()) return prefill.status();
    const double read = read_bandwidth();
    std::vector<double> steps;
    for (int i = 0; i < options.decode_steps; ++i) {
      const absl::StatusOr<double> decode = runner.decode();
      if (!decode.ok()) return decode.status();
      steps.push_back(*decode);
    }
    if (round < 0) continue;
    const double decode = median(steps);
    reads.push_back(read);
    peaks.push_back(peak);
    prefills.push_back(*prefill);
    decodes.push_back(decode);
    decode_shares.push_back(streamed_bytes / decode / read);
    prefill_shares.push_back(peak > 0 ? flops / *prefill / peak : 0);
    if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r%d ranks: round %d of %d ", ranks, round + 1, options.rounds);
  }
  if (isatty(STDERR_FILENO)) std::fprintf(stderr, "\r%40s\r", "");
  row.read_bytes_per_second = median(reads);
  row.dot_flops_per_second = median(peaks);
  row.decode_tokens_per_second = 1.0 / median(decodes);
  row.prefill_tokens_per_second = options.prefill_tokens / median(prefills);
  row.decode_share = median(decode_shares);
  row.prefill_share = median(prefill_shares);
  return row;
}

// Seconds per step of planning and taking in one decoding sequence, with no worker behind it.
double scheduler_seconds(const WorkerLimits& limits) {
  constexpr int kSteps = 2000;
  Scheduler scheduler({.limits = limits});
  scheduler.add({.id = 1, .prompt = {0}, .max_tokens = std::min(kSteps, limits.max_context - 1)}, 0);
  StepPlan plan;
  std::vector<TokenEvent> events;
  int steps = 0;
  const auto begin = Clock::now();
  while (scheduler.plan(0, &plan)) {
    StepResult result{.step = plan.step};
    for (const SlotTokens& run : plan.run) {
      if (run.sample) result.sampled.push_back({.slot = run.slot});
    }
    events.clear();
    scheduler.apply(result, &events);
    ++steps;
  }
  return seconds_since(begin) / steps;
}

// Seconds of a plan's way to a second rank over its gRPC stream and of the answer's way back, with workers that do
// nothing.
absl::StatusOr<double> plan_stream_seconds() {
  constexpr int kSteps = 500;
  const auto nothing = [](const StepPlan& plan) { return StepResult{.step = plan.step}; };
  const std::string secret = "bench";
  auto group = RpcWorkerGroup::listen({.ranks = 2, .job_secret = secret}, nothing);
  if (!group.ok()) return group.status();
  std::thread rank(
      [&] { (void)serve_plans({.coordinator = (*group)->local_address(), .rank = 1, .job_secret = secret}, nothing); });
  absl::Status status = (*group)->wait_for_ranks(absl::Seconds(10));
  std::vector<double> seconds;
  for (uint64_t step = 1; status.ok() && step <= kSteps; ++step) {
    StepPlan plan{.step = step};
    plan.run = {{.slot = 0, .position = static_cast<int32_t>(step), .from_last_sample = true, .sample = true}};
    const auto begin = Clock::now();
    status = (*group)->run(plan).status();
    seconds.push_back(seconds_since(begin));
  }
  (*group)->submit({.step = kSteps + 1, .stop = true});
  rank.join();
  if (!status.ok()) return status;
  return median(seconds);
}

std::string bar(double share) {
  constexpr int kCells = 40;
  const int cells = std::clamp(static_cast<int>(std::lround(share * kCells)), 0, kCells);
  return std::string(cells, '#') + std::string(kCells - cells, '.');
}

void print(const std::vector<Row>& rows) {
  std::printf("%-5s %-7s %9s | %12s %9s %7s | %12s %10s %7s\n", "ranks", "threads", "load GB/s", "decode tok/s",
              "read GB/s", "share", "prefill t/s", "peak GF/s", "share");
  for (const Row& r : rows) {
    std::printf("%-5d %-7d %9.2f | %12.1f %9.1f %6.1f%% | %12.0f %10.0f %6.1f%%\n", r.ranks, r.threads,
                r.load_bytes_per_second / 1e9, r.decode_tokens_per_second, r.read_bytes_per_second / 1e9,
                100 * r.decode_share, r.prefill_tokens_per_second, r.dot_flops_per_second / 1e9, 100 * r.prefill_share);
  }
  std::printf("\nshare of measured read bandwidth (decode) and of the arithmetic peak (prefill; %s)\n",
              rows.back().peak_source.c_str());
  for (const Row& r : rows) {
    std::printf("%d rank%s  decode   %s %5.1f%%\n", r.ranks, r.ranks == 1 ? " " : "s", bar(r.decode_share).c_str(),
                100 * r.decode_share);
    std::printf("%8s prefill  %s %5.1f%%\n", "", bar(r.prefill_share).c_str(), 100 * r.prefill_share);
  }
}

absl::Status draw(const std::vector<Row>& rows, const std::string& path) {
  constexpr int kBar = 22, kLeft = 150, kWidth = 420;
  std::ofstream svg(path);
  const int height = 60 + static_cast<int>(rows.size()) * 2 * (kBar + 8);
  svg << absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' font-family='sans-serif' font-size='13'>\n"
      "<rect width='100%%' height='100%%' fill='white'/>\n"
      "<text x='10' y='22' font-size='15'>Share of what this machine can do</text>\n",
      kLeft + kWidth + 80, height);
  int y = 40;
  for (const Row& row : rows) {
    for (const bool decode : {true, false}) {
      const double share = decode ? row.decode_share : row.prefill_share;
      svg << absl::StrFormat(
          "<text x='10' y='%d'>%d rank%s, %s</text><rect x='%d' y='%d' width='%d' height='%d' fill='#eeeeee'/>"
          "<rect x='%d' y='%d' width='%d' height='%d' fill='%s'/><text x='%d' y='%d'>%.1f%%</text>\n",
          y + 16, row.ranks, row.ranks == 1 ? "" : "s", decode ? "decode" : "prefill", kLeft, y, kWidth, kBar, kLeft, y,
          static_cast<int>(std::min(share, 1.0) * kWidth), kBar, decode ? "#3b6ea5" : "#c77f2f", kLeft + kWidth + 8,
          y + 16, 100 * share);
      y += kBar + 8;
    }
  }
  svg << "</svg>\n";
  svg.close();
  return svg ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

absl::Status run(const BenchOptions& options) {
  const int cores = cores_within_quota(static_cast<int>(allowed_cpus().size()));
  const absl::StatusOr<OpenDevice> device = open_device(options.device, 0, 1);
  if (!device.ok()) return device.status();
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options.runtime.model);
  if (!checkpoint.ok()) return checkpoint.status();
  BenchOptions sized = options;
  MemoryOptions& memory = sized.runtime.memory;
  memory.arithmetic = arithmetic_on(*device, options.arithmetic);
  memory.max_step_tokens = std::max(memory.max_step_tokens, options.prefill_tokens);
  const int64_t context = options.prefill_tokens + options.decode_steps + 1;
  if (!memory.max_context) memory.max_context = std::min(context, checkpoint->config().max_position_embeddings);
  if (context > *memory.max_context) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%d tokens are needed, and the context is %d: lower --prefill-tokens", context, *memory.max_context));
  }

  std::printf("%s, %s, %s activations, KV cache in %s, prefill of %d tokens, decode of one sequence after it\n\n",
              options.runtime.model.c_str(), describe(*device, memory.arithmetic, options.runtime.isa).c_str(),
              options.runtime.activations == ActivationMode::kFP8 ? "fp8" : "bf16", name_of(memory.kv_dtype),
              options.prefill_tokens);
  std::vector<Row> rows;
  for (int ranks : options.ranks) {
    absl::StatusOr<Row> row = measure(*checkpoint, *device, sized, ranks, cores);
    if (!row.ok()) return row.status();
    rows.push_back(*row);
  }
  print(rows);

  const WorkerLimits limits{
      .slots = 1, .blocks = 1024, .block_tokens = 16, .max_step_tokens = 64, .max_context = 4096, .vocab_size = 1};
  const double planned = scheduler_seconds(limits);
  const absl::StatusOr<double> streamed = plan_stream_seconds();
  if (!streamed.ok()) return streamed.status();
  std::printf(
      "\nstep overhead: scheduler %.2f us, plan and answer over gRPC to a second rank %.0f us: %.2f %% of a decode "
      "step\n",
      1e6 * planned, 1e6 * *streamed, 100 * (planned + *streamed) * rows.back().decode_tokens_per_second);
  return options.svg.empty() ? absl::OkStatus() : draw(rows, options.svg);
}

}  // namespace

void add_bench_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command =
      app.add_subcommand("bench", "Measure decode and prefill as shares of this machine's bandwidth and peak");
  command->footer(
      "Ranks are threads of this process here, with serve's shards and collectives; with --device cuda they share one\n"
      "GPU. Calibration and measurement take turns; the figures are medians over the rounds. The peak of a GPU is its\n"
      "datasheet's.");
  add_runtime_options(*command, &options->runtime);
  add_device_options(*command, &options->device, &options->arithmetic);
  command->add_option("--ranks", options->ranks, "Numbers of ranks to measure, 1,2 [1,2]")
      ->delimiter(',')
      ->check(CLI::Range(1, 64));
  command->add_option("--rounds", options->rounds, "Rounds of calibration and measurement")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  command->add_option("--prefill-tokens", options->prefill_tokens, "Tokens of the prefill step")
      ->check(CLI::Range(2, 65536))
      ->capture_default_str();
  command->add_option("--svg", options->svg, "Draw the shares into this file");
  CLI::App* serve = add_bench_serve_command(*command, exit_code);
  // Parents of a chosen sub-command are parsed and called as well: a server has its model already.
  serve->preparse_callback([command](size_t) { command->get_option("--model")->required(false); });
  command->callback([options, exit_code, command, serve] {
    if (command->got_subcommand(serve)) return;
    const absl::Status status = run(*options);
    if (!status.ok()) std::fprintf(stderr, "octet bench: %s\n", std::string(status.message()).c_str());
    *exit_code = status.ok() ? 0 : 1;
  });
}

}  // namespace octet
