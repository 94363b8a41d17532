#include "launch/bench_serve.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "launch/connection.h"
#include "launch/interrupt.h"
#include "launch/load_generator.h"
#include "launch/load_report.h"
#include "launch/load_shape.h"
#include "launch/progress.h"
#include "nlohmann/json.hpp"
#include "octet/v1/control_service.grpc.pb.h"

namespace octet {
namespace {

using nlohmann::json;

// How long the server may take to notice that everybody has gone.
constexpr absl::Duration kSettleTime = absl::Seconds(5);
// How long streams may take to be stalled, which takes the server their whole outputs.
constexpr absl::Duration kStallTime = absl::Seconds(120);
constexpr double kDefaultSeconds = 10;

struct BenchServeOptions {
  ConnectionOptions server;
  std::string prompt_tokens = "128", output_tokens = "64";
  LoadSpec load;
  std::optional<int64_t> warmup;
  std::vector<int> sweep;
  int stalled = 0;
  int32_t stalled_tokens = 1024;
  double stalled_seconds = 0;
  bool paired = false;
  int rounds = 5;
  std::string json_file, svg_file;
};

std::string count_of(int64_t count, const char* what) { return absl::StrCat(count, " ", what); }

// One run of the command. Members are declared in the order in which they are made.
class ServeBench {
 public:
  explicit ServeBench(const BenchServeOptions& options)
      : options_(options), server_(options.server), generator_(server_), interrupt_([this] { cancel(); }) {}

  // The signal that ended it, or 0.
  int signal() const { return interrupt_.signal(); }
  // Whether every request was answered, or cancelled as asked, and nothing leaked. After run().
  bool clean() const { return clean_; }

  absl::Status run() {
    if (absl::Status status = prepare(); !status.ok()) return status;
    absl::Status status = options_.paired ? run_paired() : !options_.sweep.empty() ? run_sweep() : run_once();
    if (!status.ok()) return status;
    if (status = report_server(); !status.ok()) return status;
    if (status = write_file(options_.json_file, json_.dump(2) + "\n"); !status.ok()) return status;
    return write_file(options_.svg_file, svg_);
  }

 private:
  void cancel() {
    server_.cancel();
    generator_.cancel();
  }

  absl::Status prepare();
  absl::Status ask_server();
  absl::StatusOr<ServerState> server_state();
  absl::StatusOr<ServerState> settled_state(absl::Duration patience);
  absl::StatusOr<LoadRecord> run_load(const LoadSpec& load, const std::string& label);
  void take_summary(const LoadSummary& summary);

  absl::Status run_once();
  absl::Status run_sweep();
  absl::Status run_paired();
  absl::StatusOr<double> paired_p99(int round, bool stalled, json* rounds);
  absl::Status start_stalled(std::optional<StalledStreams>* streams);
  void report_stalled(StalledStreams* streams);
  bool wait_slices(absl::Duration patience, const std::function<bool(absl::Time)>& done);
  absl::Status report_server();
  absl::Status write_file(const std::string& path, const std::string& text) const;
  std::string fresh_salt();
  std::string title() const;
  std::string what() const;

  const BenchServeOptions& options_;
  LoadSpec load_;
  Connection server_;
  std::unique_ptr<v1::ControlService::Stub> control_;
  LoadGenerator generator_;
  std::string model_;
  ServerState before_;
  json json_;
  std::string svg_;
  bool clean_ = true;
  std::random_device salts_;
  Interrupt interrupt_;  // last: it calls what is above
};

absl::Status ServeBench::prepare() {
  load_ = options_.load;
  absl::StatusOr<LengthDistribution> prompts = LengthDistribution::parse(options_.prompt_tokens);
  if (!prompts.ok()) return absl::InvalidArgumentError(absl::StrCat("--prompt-tokens: ", prompts.status().message()));
  absl::StatusOr<LengthDistribution> outputs = LengthDistribution::parse(options_.output_tokens);
  if (!outputs.ok()) return absl::InvalidArgumentError(absl::StrCat("--output-tokens: ", outputs.status().message()));
  load_.shape.prompt_tokens = *prompts;
  load_.shape.output_tokens = *outputs;
  if (load_.requests == 0 && load_.seconds == 0) load_.seconds = kDefaultSeconds;
  if (options_.paired && options_.stalled == 0) {
    return absl::InvalidArgumentError(
        "--paired compares with and without stalled streams: say how many with --stalled N");
  }
  if (options_.paired && !options_.sweep.empty())
    return absl::InvalidArgumentError("--paired and --sweep: one of them");
  if (absl::Status status = server_.open(); !status.ok()) return status;
  if (absl::Status status = ask_server(); !status.ok()) return status;
  std::printf("%s: %s\n\n", title().c_str(), what().c_str());

  LoadSpec warmup = load_;
  warmup.cache_salt = fresh_salt();
  const int64_t requests = options_.warmup.value_or(load_.concurrency);
  if (absl::Status status = generator_.warm_up(warmup, requests); !status.ok()) return status;
  absl::StatusOr<ServerState> before = settled_state(kSettleTime);
  if (!before.ok()) return before.status();
  before_ = *before;
  if (before_.leaked_requests() > 0) {
    std::fprintf(stderr, "octet bench serve: the server is at work for others (%d requests): figures are of both\n",
                 before_.leaked_requests());
  }
  json_["server"] = {{"address", server_.address()}, {"model", model_}};
  return absl::OkStatus();
}

absl::Status ServeBench::ask_server() {
  control_ = v1::ControlService::NewStub(server_.channel());
  v1::GetModelInfoResponse info;
  const grpc::Status status = server_.with_context(server_.make_context(), [&](grpc::ClientContext* context) {
    return control_->GetModelInfo(context, v1::GetModelInfoRequest(), &info);
  });
  if (!status.ok()) {
    std::string message = status.error_message();
    if (status.error_code() == grpc::StatusCode::UNAUTHENTICATED) message += ": give it with --token-file FILE";
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()), message);
  }
  model_ = info.model();
  load_.shape.vocab_size = info.vocab_size();
  load_.shape.max_context = info.max_context();
  return check_shape(load_.shape);
}

absl::StatusOr<ServerState> ServeBench::server_state() {
  v1::GetLoadResponse load;
  const grpc::Status status = server_.with_context(server_.make_context(), [&](grpc::ClientContext* context) {
    return control_->GetLoad(context, v1::GetLoadRequest(), &load);
  });
  if (!status.ok()) {
    return absl::Status(static_cast<absl::StatusCode>(status.error_code()),
                        absl::StrCat("the server does not tell its load: ", status.error_message()));
  }
  return ServerState{.requests_waiting = load.requests_waiting(),
                     .requests_running = load.requests_running(),
                     .kv_blocks_total = load.kv_blocks_total(),
                     .kv_blocks_free = load.kv_blocks_free(),
                     .resident_bytes = load.resident_bytes()};
}

// When the server has nothing to do any more, or as it is when patience ends.
absl::StatusOr<ServerState> ServeBench::settled_state(absl::Duration patience) {
  const absl::Time give_up = absl::Now() + patience;
  while (true) {
    absl::StatusOr<ServerState> state = server_state();
    if (!state.ok() || absl::Now() >= give_up) return state;
    if (state->leaked_requests() == 0 && state->leaked_blocks() == 0) return state;
    absl::SleepFor(absl::Milliseconds(10));
  }
}

absl::StatusOr<LoadRecord> ServeBench::run_load(const LoadSpec& load, const std::string& label) {
  LoadSpec salted = load;
  salted.cache_salt = fresh_salt();
  const char* unit = load.requests > 0 ? "requests" : "s";
  Progress progress(label, [unit](int64_t total) { return count_of(total, unit); });
  absl::StatusOr<LoadRecord> record = generator_.run(salted, [&](double done, double total) {
    progress.update(static_cast<int64_t>(done), static_cast<int64_t>(std::ceil(total)));
  });
  progress.clear();
  return record;
}

void ServeBench::take_summary(const LoadSummary& summary) { clean_ = clean_ && summary.failures() == 0; }

absl::Status ServeBench::run_once() {
  std::optional<StalledStreams> stalled;
  if (absl::Status status = start_stalled(&stalled); !status.ok()) return status;
  absl::StatusOr<LoadRecord> record = run_load(load_, "Load");
  if (!record.ok()) return record.status();
  const LoadSummary summary = summarize(*record);
  take_summary(summary);
  std::printf("%s\n", to_text(summary).c_str());
  json_["summary"] = to_json(summary);
  if (load_.shape.shared_prefix > 0) {
    const PrefixGain gain = prefix_gain(*record);
    std::printf("%s\n", to_text(gain).c_str());
    json_["prefix_gain"] = to_json(gain);
  }
  svg_ = load_svg(title(), what(), summary);
  if (stalled.has_value()) report_stalled(&*stalled);
  return absl::OkStatus();
}

absl::Status ServeBench::run_sweep() {
  std::vector<Bar> bars;
  json levels = json::array();
  std::printf("%11s %10s %12s %8s %13s %13s\n", "concurrency", "requests", "tokens/s", "ratio", "first token",
              "per token p50");
  double first = 0;
  for (const int concurrency : options_.sweep) {
    LoadSpec load = load_;
    load.concurrency = concurrency;
    if (load.requests > 0) load.requests = std::max<int64_t>(load.requests, concurrency);
    absl::StatusOr<LoadRecord> record = run_load(load, absl::StrCat("Concurrency ", concurrency));
    if (!record.ok()) return record.status();
    const LoadSummary summary = summarize(*record);
    take_summary(summary);
    if (bars.empty()) first = summary.tokens_per_second;
    const double ratio = first > 0 ? summary.tokens_per_second / first : 0.0;
    std::printf("%11d %10d %12.1f %7.2fx %13s %13s\n", concurrency, static_cast<int>(summary.done),
                summary.tokens_per_second, ratio, human_seconds(percentile(summary.first_token, 0.5)).c_str(),
                human_seconds(percentile(summary.per_token, 0.5)).c_str());
    std::fflush(stdout);
    bars.push_back({.name = absl::StrCat(concurrency, " at a time"),
                    .value = summary.tokens_per_second,
                    .text = absl::StrFormat("%.1f tokens/s, %.2fx", summary.tokens_per_second, ratio)});
    levels.push_back({{"concurrency", concurrency}, {"ratio", ratio}, {"summary", to_json(summary)}});
  }
  std::printf("\n%s\n", bars_text(bars).c_str());
  json_["sweep"] = std::move(levels);
  svg_ = bars_svg("Generated tokens/s by concurrent requests", absl::StrCat(title(), ": ", what()), bars);
  return absl::OkStatus();
}

// Rounds in the order without, with, with, without, ..., so that a machine that gets slower favours neither.
absl::Status ServeBench::run_paired() {
  json rounds = json::array();
  std::vector<double> ratios;
  std::vector<Bar> bars;
  for (int round = 1; round <= options_.rounds; ++round) {
    double p99[2] = {};  // without and with
    for (const bool second : {false, true}) {
      const bool stalled = (round % 2 == 1) == second;
      absl::StatusOr<double> measured = paired_p99(round, stalled, &rounds);
      if (!measured.ok()) return measured.status();
      p99[stalled] = *measured;
    }
    ratios.push_back(p99[1] / std::max(p99[0], 1e-9));
    std::printf("round %d: between messages p99 %s without, %s with the stalled: %.3f\n", round,
                human_seconds(p99[0]).c_str(), human_seconds(p99[1]).c_str(), ratios.back());
    std::fflush(stdout);
    for (const bool stalled : {false, true}) {
      bars.push_back({.name = absl::StrCat("round ", round, stalled ? ", with stalled" : ", without"),
                      .value = p99[stalled],
                      .text = human_seconds(p99[stalled])});
    }
  }
  std::printf("\n%s\nmedian ratio of the p99 with %d stalled streams to that without: %.3f\n\n",
              bars_text(bars).c_str(), options_.stalled, median(ratios));
  json_["paired"] = {{"rounds", rounds}, {"stalled", options_.stalled}, {"median_p99_ratio", median(ratios)}};
  svg_ = bars_svg(absl::StrFormat("Between messages p99 beside %d stalled streams: median ratio %.3f", options_.stalled,
                                  median(ratios)),
                  absl::StrCat(title(), ": ", what()), bars);
  return absl::OkStatus();
}

absl::StatusOr<double> ServeBench::paired_p99(int round, bool stalled, json* rounds) {
  std::optional<StalledStreams> streams;
  if (stalled) {
    if (absl::Status status = start_stalled(&streams); !status.ok()) return status;
    // Making their outputs is work like any other; what is compared is what it costs that nobody reads them.
    absl::StatusOr<ServerState> state = settled_state(kStallTime);
    if (!state.ok()) return state.status();
  }
  absl::StatusOr<LoadRecord> record = run_load(
      load_, absl::StrFormat("Round %d of %d, %s stalled", round, options_.rounds, stalled ? "with" : "without"));
  if (!record.ok()) return record.status();
  const LoadSummary summary = summarize(*record);
  take_summary(summary);
  rounds->push_back({{"round", round}, {"stalled", stalled}, {"summary", to_json(summary)}});
  return percentile(summary.between_messages, 0.99);
}

// Nothing without --stalled.
absl::Status ServeBench::start_stalled(std::optional<StalledStreams>* streams) {
  if (options_.stalled == 0) return absl::OkStatus();
  streams->emplace(server_, StalledOptions{.streams = options_.stalled,
                                           .output_tokens = options_.stalled_tokens,
                                           .shape = load_.shape,
                                           .cache_salt = fresh_salt()});
  if (wait_slices(kStallTime, [&](absl::Time until) { return (*streams)->wait_stalled(until); })) {
    return absl::OkStatus();
  }
  return absl::DeadlineExceededError(absl::StrCat("the first messages of ", options_.stalled,
                                                  " streams to be stalled did not come within ",
                                                  absl::FormatDuration(kStallTime)));
}

// What has become of them, once they have stalled long enough.
void ServeBench::report_stalled(StalledStreams* streams) {
  const absl::Time over = absl::Now() + absl::Seconds(options_.stalled_seconds);
  wait_slices(absl::Seconds(options_.stalled_seconds), [&](absl::Time until) {
    absl::SleepFor(until - absl::Now());
    return absl::Now() >= over;
  });
  wait_slices(kStallTime, [&](absl::Time until) { return streams->read_on(until); });
  std::map<std::string, int> by_status;
  for (const StreamRecord& record : streams->records()) ++by_status[record.status];
  std::printf("stalled streams, read on %g s after the load:", options_.stalled_seconds);
  for (const auto& [status, count] : by_status) std::printf(" %d %s", count, status.c_str());
  std::printf("\n");
  json_["stalled"] = by_status;
}

// Waits in slices, so that a signal ends the waiting too.
bool ServeBench::wait_slices(absl::Duration patience, const std::function<bool(absl::Time)>& done) {
  const absl::Time give_up = absl::Now() + patience;
  while (interrupt_.signal() == 0) {
    if (done(std::min(give_up, absl::Now() + absl::Milliseconds(200)))) return true;
    if (absl::Now() >= give_up) return false;
  }
  return false;
}

absl::Status ServeBench::report_server() {
  absl::StatusOr<ServerState> after = settled_state(kSettleTime);
  if (!after.ok()) return after.status();
  std::printf("%s", to_text(before_, *after).c_str());
  clean_ = clean_ && after->leaked_requests() == 0 && after->leaked_blocks() == 0;
  json_["before"] = to_json(before_);
  json_["after"] = to_json(*after);
  json_["leaked_requests"] = after->leaked_requests();
  json_["leaked_blocks"] = after->leaked_blocks();
  return absl::OkStatus();
}

absl::Status ServeBench::write_file(const std::string& path, const std::string& text) const {
  if (path.empty()) return absl::OkStatus();
  std::ofstream file(path);
  file << text;
  file.close();
  return file ? absl::OkStatus() : absl::UnavailableError("cannot write " + path);
}

// No load finds what an earlier one has left in the server's prefix cache.
std::string ServeBench::fresh_salt() { return absl::StrFormat("bench-%08x%08x", salts_(), salts_()); }

std::string ServeBench::title() const { return absl::StrCat("Load on ", model_, " at ", server_.address()); }

std::string ServeBench::what() const {
  std::string arrivals = absl::StrCat("closed loop of ", load_.concurrency);
  if (load_.rate.has_value()) arrivals = absl::StrFormat("Poisson arrivals, %.4g requests/s", *load_.rate);
  if (!options_.sweep.empty()) arrivals = "closed loops";
  std::string prefix;
  if (load_.shape.shared_prefix > 0) {
    prefix = absl::StrFormat("%d (one of %d) + ", load_.shape.shared_prefix, load_.shape.prefix_groups);
  }
  return absl::StrCat(arrivals, "; prompts of ", prefix, options_.prompt_tokens, " tokens, outputs of ",
                      options_.output_tokens, "; seed ", load_.shape.seed);
}

int run_bench_serve(const BenchServeOptions& options) {
  ServeBench bench(options);
  const absl::Status status = bench.run();
  if (bench.signal() != 0) return 128 + bench.signal();
  if (status.ok()) return bench.clean() ? 0 : 1;
  std::fprintf(stderr, "octet bench serve: %s\n", std::string(status.message()).c_str());
  return 1;
}

void add_load_options(CLI::App& command, BenchServeOptions* options) {
  const char* group = "The load";
  LoadSpec* load = &options->load;
  CLI::Option* concurrency =
      command.add_option("--concurrency", load->concurrency, "Requests at any time, closed loop")
          ->check(CLI::Range(1, 100000))
          ->group(group)
          ->capture_default_str();
  command.add_option("--rate", load->rate, "Poisson arrivals instead, requests/s")
      ->check(CLI::PositiveNumber)
      ->excludes(concurrency)
      ->group(group);
  command.add_option("--requests", load->requests, "How many requests [as many as --seconds allows]")
      ->check(CLI::PositiveNumber)
      ->group(group);
  command
      .add_option(
          "--seconds", load->seconds,
          absl::StrFormat("How long new requests start [%g, unless --requests says when to stop]", kDefaultSeconds))
      ->check(CLI::PositiveNumber)
      ->group(group);
  command.add_option("--warmup", options->warmup, "Requests before it that do not count [--concurrency]")
      ->check(CLI::NonNegativeNumber)
      ->group(group);
  command.add_option("--cancel-rate", load->shape.cancel_rate, "Share of requests cancelled at a random moment")
      ->check(CLI::Range(0.0, 1.0))
      ->group(group);
  command.add_option("--seed", load->shape.seed, "The same seed, the same requests at the same moments")
      ->group(group)
      ->capture_default_str();
}

void add_request_options(CLI::App& command, BenchServeOptions* options) {
  const char* group = "The requests";
  LoadSpec* load = &options->load;
  command
      .add_option("--prompt-tokens", options->prompt_tokens,
                  "Random token ids: 128, uniform:16-256 or lognormal:MEAN:SIGMA; clamped to the context")
      ->group(group)
      ->capture_default_str();
  command.add_option("--output-tokens", options->output_tokens, "Likewise")->group(group)->capture_default_str();
  command.add_option("--shared-prefix", load->shape.shared_prefix, "Tokens of a prefix shared by several prompts")
      ->check(CLI::NonNegativeNumber)
      ->group(group);
  command
      .add_option("--prefix-groups", load->shape.prefix_groups, "Different prefixes, in turn for a few requests each")
      ->check(CLI::Range(1, 1000000))
      ->group(group)
      ->capture_default_str();
  command.add_option("--temperature", load->temperature, "0 is greedy")
      ->check(CLI::NonNegativeNumber)
      ->group(group)
      ->capture_default_str();
  command.add_option("--priority", load->priority, "0, the most urgent, to 9 [the server's]")
      ->check(CLI::Range(0, 9))
      ->group(group);
  command.add_option("--logprobs", load->logprobs, "Logprobs of so many alternatives beside each token")
      ->check(CLI::Range(0, 20))
      ->group(group);
  command.add_flag("--ignore-eos,!--no-ignore-eos", load->ignore_eos, "Outputs get their full length [yes]")
      ->group(group);
}

void add_comparison_options(CLI::App& command, BenchServeOptions* options) {
  const char* group = "Comparisons";
  command.add_option("--sweep", options->sweep, "Closed loops of 1,4,16,64 in turn: what batching gains")
      ->delimiter(',')
      ->check(CLI::Range(1, 100000))
      ->group(group);
  command.add_option("--stalled", options->stalled, "Streams beside the load that stop reading after a message")
      ->check(CLI::Range(0, 100000))
      ->group(group);
  command.add_option("--stalled-tokens", options->stalled_tokens, "Tokens of each of their outputs, with 20 logprobs")
      ->check(CLI::PositiveNumber)
      ->group(group)
      ->capture_default_str();
  command
      .add_option("--stalled-seconds", options->stalled_seconds,
                  "How long after the load they go on not to read; then they do, and see what has become of them")
      ->check(CLI::NonNegativeNumber)
      ->group(group)
      ->capture_default_str();
  command.add_flag("--paired", options->paired, "Alternate between rounds with and without the stalled streams")
      ->group(group);
  command.add_option("--rounds", options->rounds, "Pairs of rounds")
      ->check(CLI::Range(1, 1000))
      ->group(group)
      ->capture_default_str();
}

}  // namespace

CLI::App* add_bench_serve_command(CLI::App& bench, int* exit_code) {
  auto options = std::make_shared<BenchServeOptions>();
  CLI::App* command = bench.add_subcommand("serve", "Put load on a running server and measure what its clients see");
  command->footer(
      "Examples:\n"
      "  octet bench serve --concurrency 16 --requests 200 --svg load.svg\n"
      "  octet bench serve --rate 4 --seconds 60 --prompt-tokens lognormal:300:0.8 --output-tokens uniform:16-256\n"
      "  octet bench serve --sweep 1,4,16,64                              what batching gains\n"
      "  octet bench serve --shared-prefix 1000 --prefix-groups 8         what the prefix cache gains\n"
      "  octet bench serve --concurrency 1000 --cancel-rate 0.3           a storm, and whether it leaves anything\n"
      "  octet bench serve --concurrency 50 --stalled 200 --paired        whether slow readers slow down others\n"
      "Between messages is the gap between consecutive messages of a stream, however many tokens each holds.\n"
      "Exit codes: 0, 1 after an error, a failed request or a leak, 130 after Ctrl-C.");
  add_connection_options(*command, &options->server);
  add_load_options(*command, options.get());
  add_request_options(*command, options.get());
  add_comparison_options(*command, options.get());
  command->add_option("--json", options->json_file, "Write all figures into this file")->group("Output");
  command->add_option("--svg", options->svg_file, "Draw them into this file")->group("Output");
  command->callback([options, exit_code] { *exit_code = run_bench_serve(*options); });
  return command;
}

}  // namespace octet
