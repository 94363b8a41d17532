// Counts are atomics that the engine thread alone writes; the table below says how each metric is called and which
// counts it shows; a scrape walks the table. prometheus-cpp writes the text and serves it.
#include "coordinator/metrics.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <netinet/in.h>
#include <prometheus/client_metric.h>
#include <prometheus/collectable.h>
#include <prometheus/exposer.h>
#include <prometheus/metric_family.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <deque>
#include <exception>
#include <fstream>
#include <limits>
#include <map>
#include <mutex>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/listen_address.h"

namespace octet {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;
using Samples = std::vector<ClientMetric>;
using Bounds = std::span<const double>;

// ---- Bounds of histograms. Where vLLM has the metric they are vLLM's, so that one histogram serves both names.

constexpr double kFirstTokenSeconds[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                         1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
constexpr double kTokenSeconds[] = {.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80};
constexpr double kOutputSeconds[] = {.3, .5, .8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                                     30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
constexpr double kStepTokens[] = {1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384};
constexpr double kStepSequences[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
constexpr double kStepSeconds[] = {.0005, .001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10};
constexpr double kOverheadSeconds[] = {.000005, .00001, .00002, .00005, .0001, .0002, .0005, .001, .002, .005, .01, .1};

// 1, 2, 5, 10, 20, ... up to `largest`.
std::vector<double> one_two_five(double largest) {
  std::vector<double> bounds;
  for (double decade = 1; decade <= largest; decade *= 10) {
    for (const double bound : {decade, 2 * decade, 5 * decade}) {
      if (bound <= largest) bounds.push_back(bound);
    }
  }
  return bounds;
}

// ---- Counts

// Each count has one writer at a time, so that it needs no locked instruction.
template <typename T>
void add(std::atomic<T>& count, T amount) {
  count.store(count.load(std::memory_order_relaxed) + amount, std::memory_order_relaxed);
}

// How many values fell up to each bound and beyond the last one, and their sum. One writer at a time, any readers.
class Histogram {
 public:
  explicit Histogram(Bounds bounds) : bounds_(bounds.begin(), bounds.end()), counts_(bounds_.size() + 1) {}

  void observe(double value) {
    add<uint64_t>(counts_[std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin()], 1);
    add(sum_, value);
  }

  // The total is that of the buckets as they were read, so that the sample agrees with itself.
  ClientMetric sample(Labels labels = {}) const {
    ClientMetric metric;
    metric.label = std::move(labels);
    metric.histogram.sample_sum = sum_.load(std::memory_order_relaxed);
    uint64_t total = 0;
    for (size_t i = 0; i < counts_.size(); ++i) {
      total += counts_[i].load(std::memory_order_relaxed);
      const double bound = i < bounds_.size() ? bounds_[i] : std::numeric_limits<double>::infinity();
      metric.histogram.bucket.push_back({.cumulative_count = total, .upper_bound = bound});
    }
    metric.histogram.sample_count = total;
    return metric;
  }

 private:
  const std::vector<double> bounds_;
  std::vector<std::atomic<uint64_t>> counts_;  // [bounds + 1]
  std::atomic<double> sum_ = 0;
};

constexpr size_t kFinishReasons = static_cast<size_t>(FinishReason::kError) + 1;
constexpr size_t kStatusCodes = static_cast<size_t>(absl::StatusCode::kUnauthenticated) + 1;

struct RankHistograms {
  Histogram run{kStepSeconds}, collective{kStepSeconds};
};

struct CallCounts {
  std::array<uint64_t, kStatusCodes> by_code{};
  Histogram seconds{kFirstTokenSeconds};
};

// All that was reported.
struct Counts {
  explicit Counts(const MetricsOptions& options)
      : prompt_tokens(one_two_five(options.max_context)), generated_tokens(one_two_five(options.max_context)) {
    for (int rank = 0; rank < options.ranks; ++rank) ranks.emplace_back();
  }

  // Written by the engine thread.
  Histogram step_seconds{kStepSeconds}, gap_seconds{kOverheadSeconds}, schedule_seconds{kOverheadSeconds};
  Histogram step_tokens{kStepTokens}, step_sequences{kStepSequences};
  std::deque<RankHistograms> ranks;
  std::atomic<uint64_t> failed_steps = 0;
  Histogram first_token_seconds{kFirstTokenSeconds}, token_seconds{kTokenSeconds};
  Histogram queue_seconds{kOutputSeconds}, prefill_seconds{kOutputSeconds}, decode_seconds{kOutputSeconds};
  Histogram inference_seconds{kOutputSeconds}, output_seconds{kOutputSeconds};
  Histogram prompt_tokens, generated_tokens;
  std::array<std::atomic<uint64_t>, kFinishReasons> ended{};

  mutable std::mutex calls_mutex;                        // guards what the threads of gRPC write
  std::map<std::string, CallCounts, std::less<>> calls;  // by method
};

// ---- What a scrape sees

struct Facts {
  ServerFacts server;
  std::string model;
  WorkerLimits limits;
};

struct View {
  const Counts& counts;
  const std::string& version;
  const Facts& facts;
  EngineStats stats;
  bool serving = false;
};

// A sample of one number. The type of its row says which of the two is read.
ClientMetric number(double value, Labels labels = {}) {
  ClientMetric metric;
  metric.label = std::move(labels);
  metric.gauge.value = metric.counter.value = value;
  return metric;
}

const char* name_of(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "none";
    case FinishReason::kEndToken:
      return "end_token";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "cancelled";
    case FinishReason::kDeadline:
      return "deadline";
    case FinishReason::kError:
      return "error";
  }
  return "none";
}

double ended(const Counts& counts, FinishReason reason) {
  return static_cast<double>(counts.ended[static_cast<size_t>(reason)].load(std::memory_order_relaxed));
}

Samples ended_by_reason(const View& view) {
  Samples samples;
  for (size_t i = static_cast<size_t>(FinishReason::kNone) + 1; i < kFinishReasons; ++i) {
    const auto reason = static_cast<FinishReason>(i);
    samples.push_back(number(ended(view.counts, reason), {{"reason", name_of(reason)}}));
  }
  return samples;
}

Samples ended_by_vllm_reason(const View& view) {
  const auto count = [&](FinishReason reason) { return ended(view.counts, reason); };
  return {number(count(FinishReason::kEndToken), {{"finished_reason", "stop"}}),
          number(count(FinishReason::kLength), {{"finished_reason", "length"}}),
          number(count(FinishReason::kCancelled) + count(FinishReason::kDeadline), {{"finished_reason", "abort"}}),
          number(count(FinishReason::kError), {{"finished_reason", "error"}})};
}

Samples rank_seconds(const View& view) {
  Samples samples;
  for (size_t rank = 0; rank < view.counts.ranks.size(); ++rank) {
    const RankHistograms& histograms = view.counts.ranks[rank];
    samples.push_back(histograms.run.sample({{"rank", absl::StrCat(rank)}, {"stage", "run"}}));
    samples.push_back(histograms.collective.sample({{"rank", absl::StrCat(rank)}, {"stage", "collective"}}));
  }
  return samples;
}

Samples calls_by_code(const View& view) {
  Samples samples;
  const std::lock_guard lock(view.counts.calls_mutex);
  for (const auto& [method, call] : view.counts.calls) {
    for (size_t code = 0; code < kStatusCodes; ++code) {
      if (call.by_code[code] == 0) continue;
      const std::string name = absl::StatusCodeToString(static_cast<absl::StatusCode>(code));
      samples.push_back(number(static_cast<double>(call.by_code[code]), {{"method", method}, {"code", name}}));
    }
  }
  return samples;
}

Samples call_seconds(const View& view) {
  Samples samples;
  const std::lock_guard lock(view.counts.calls_mutex);
  for (const auto& [method, call] : view.counts.calls) samples.push_back(call.seconds.sample({{"method", method}}));
  return samples;
}

Samples model_info(const View& view) {
  const ServerFacts& server = view.facts.server;
  const WorkerLimits& limits = view.facts.limits;
  return {number(1, {{"model", view.facts.model},
                     {"numerics_id", server.numerics_id},
                     {"ranks", absl::StrCat(server.ranks)},
                     {"threads_per_rank", absl::StrCat(server.threads_per_rank)},
                     {"device", server.device},
                     {"isa", server.isa},
                     {"kv_block_tokens", absl::StrCat(limits.block_tokens)},
                     {"kv_blocks", absl::StrCat(limits.blocks)},
                     {"max_context", absl::StrCat(limits.max_context)}})};
}

Samples vllm_cache_config_info(const View& view) {
  return {number(1, {{"block_size", absl::StrCat(view.facts.limits.block_tokens)},
                     {"num_gpu_blocks", absl::StrCat(view.facts.limits.blocks)}})};
}

double kv_usage(const EngineStats& stats) {
  return stats.blocks_total == 0 ? 0.0 : 1.0 - static_cast<double>(stats.blocks_free) / stats.blocks_total;
}

double process_cpu_seconds() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double process_resident_bytes() {
  double all_pages = 0, resident_pages = 0;
  std::ifstream("/proc/self/statm") >> all_pages >> resident_pages;
  return resident_pages * static_cast<double>(sysconf(_SC_PAGESIZE));
}

// ---- The table: every metric's name, meaning and source, once

struct Row {
  MetricType type;
  const char* name;
  const char* vllm_name;  // the same values as vLLM calls them; null: it has none
  const char* help;
  Samples (*samples)(const View& view);
};

constexpr MetricType kGauge = MetricType::Gauge, kCounter = MetricType::Counter, kHistogram = MetricType::Histogram;

Samples one(double value) { return {number(value)}; }
Samples one(const Histogram& histogram) { return {histogram.sample()}; }

// On the page from the first moment.
constexpr Row kRowsBeforeOpen[] = {
    {kGauge, "octet_build_info", nullptr, "The version of this build.",
     [](const View& v) -> Samples {
       return {number(1, {{"version", v.version}})};
     }},
    {kGauge, "octet_serving", nullptr, "1 while requests are taken: loaded, neither draining nor failed.",
     [](const View& v) { return one(v.serving); }},
};

constexpr Row kRows[] = {
    {kGauge, "octet_model_info", nullptr, "What is served, and on what.", model_info},
    {kGauge, "octet_draining", nullptr, "1 when no new requests are taken and those under way go on.",
     [](const View& v) { return one(v.stats.draining); }},

    {kGauge, "octet_outputs_running", "vllm:num_requests_running", "Outputs that have a slot.",
     [](const View& v) { return one(v.stats.running); }},
    {kGauge, "octet_outputs_waiting", "vllm:num_requests_waiting", "Outputs that wait for a slot.",
     [](const View& v) { return one(v.stats.waiting); }},
    {kCounter, "octet_outputs_ended_total", nullptr, "Outputs that ended, by reason.", ended_by_reason},
    {kCounter, "octet_preemptions_total", "vllm:num_preemptions_total", "Outputs that lost their blocks to others.",
     [](const View& v) { return one(v.stats.preemptions); }},

    {kGauge, "octet_kv_blocks", nullptr, "Blocks of the KV cache.",
     [](const View& v) { return one(v.stats.blocks_total); }},
    {kGauge, "octet_kv_blocks_free", nullptr, "Blocks that no output holds.",
     [](const View& v) { return one(v.stats.blocks_free); }},
    {kGauge, "octet_kv_blocks_cached", nullptr, "Of the free blocks, those that hold a prefix.",
     [](const View& v) { return one(v.stats.blocks_cached); }},
    {kGauge, "octet_kv_usage_ratio", "vllm:kv_cache_usage_perc", "Share of the blocks that outputs hold, 0 to 1.",
     [](const View& v) { return one(kv_usage(v.stats)); }},

    {kCounter, "octet_prompt_tokens_total", nullptr, "Prompt tokens that were run.",
     [](const View& v) { return one(v.stats.prompt_tokens); }},
    {kCounter, "octet_queried_prompt_tokens_total", "vllm:prefix_cache_queries_total",
     "Prompt tokens that were looked up in the prefix cache.",
     [](const View& v) { return one(v.stats.queried_prompt_tokens); }},
    {kCounter, "octet_cached_prompt_tokens_total", "vllm:prefix_cache_hits_total",
     "Prompt tokens that the prefix cache saved.", [](const View& v) { return one(v.stats.cached_prompt_tokens); }},
    {kCounter, "octet_generated_tokens_total", "vllm:generation_tokens_total", "Tokens that were sampled.",
     [](const View& v) { return one(v.stats.generated_tokens); }},

    {kHistogram, "octet_time_to_first_token_seconds", "vllm:time_to_first_token_seconds",
     "From submission to an output's first token.", [](const View& v) { return one(v.counts.first_token_seconds); }},
    {kHistogram, "octet_inter_token_latency_seconds", "vllm:inter_token_latency_seconds",
     "From one token of an output to the next.", [](const View& v) { return one(v.counts.token_seconds); }},
    {kHistogram, "octet_output_seconds", "vllm:e2e_request_latency_seconds", "From submission to an output's end.",
     [](const View& v) { return one(v.counts.output_seconds); }},
    {kHistogram, "octet_output_queue_seconds", "vllm:request_queue_time_seconds",
     "From submission to an output's first slot.", [](const View& v) { return one(v.counts.queue_seconds); }},
    {kHistogram, "octet_output_prefill_seconds", "vllm:request_prefill_time_seconds",
     "From an output's first slot to its first token.", [](const View& v) { return one(v.counts.prefill_seconds); }},
    {kHistogram, "octet_output_decode_seconds", "vllm:request_decode_time_seconds",
     "From an output's first token to its end.", [](const View& v) { return one(v.counts.decode_seconds); }},
    {kHistogram, "octet_output_inference_seconds", "vllm:request_inference_time_seconds",
     "From the first slot to the end of an output that had a token.",
     [](const View& v) { return one(v.counts.inference_seconds); }},
    {kHistogram, "octet_output_prompt_tokens", "vllm:request_prompt_tokens", "Prompt tokens of an output.",
     [](const View& v) { return one(v.counts.prompt_tokens); }},
    {kHistogram, "octet_output_generated_tokens", "vllm:request_generation_tokens", "Generated tokens of an output.",
     [](const View& v) { return one(v.counts.generated_tokens); }},

    {kCounter, "octet_steps_total", nullptr, "Steps that ran on all ranks.",
     [](const View& v) { return one(v.stats.steps); }},
    {kCounter, "octet_steps_failed_total", nullptr, "Steps that did not count.",
     [](const View& v) { return one(v.counts.failed_steps); }},
    {kHistogram, "octet_step_seconds", nullptr, "From one step's result to the next one's.",
     [](const View& v) { return one(v.counts.step_seconds); }},
    {kHistogram, "octet_step_gap_seconds", nullptr, "Of a step, the time in which rank 0 had nothing to run.",
     [](const View& v) { return one(v.counts.gap_seconds); }},
    {kHistogram, "octet_step_schedule_seconds", nullptr, "Time spent on planning a step and applying its result.",
     [](const View& v) { return one(v.counts.schedule_seconds); }},
    {kHistogram, "octet_step_tokens", "vllm:iteration_tokens_total", "Prompt tokens run and tokens sampled in a step.",
     [](const View& v) { return one(v.counts.step_tokens); }},
    {kHistogram, "octet_step_sequences", nullptr, "Sequences in a step.",
     [](const View& v) { return one(v.counts.step_sequences); }},
    {kHistogram, "octet_rank_step_seconds", nullptr,
     "Time a rank spent in a step (stage run), and of it in collectives, waiting for other ranks included.",
     rank_seconds},

    {kCounter, "octet_calls_ended_total", nullptr, "gRPC calls that ended, by method and status code.", calls_by_code},
    {kHistogram, "octet_call_seconds", nullptr, "Duration of a gRPC call, by method.", call_seconds},

    {kCounter, "process_cpu_seconds_total", nullptr, "CPU time of rank 0's process.",
     [](const View&) { return one(process_cpu_seconds()); }},
    {kGauge, "process_resident_memory_bytes", nullptr, "Resident memory of rank 0's process.",
     [](const View&) { return one(process_resident_bytes()); }},
};

// What vLLM counts differently.
constexpr Row kVllmRows[] = {
    {kGauge, nullptr, "vllm:cache_config_info", "Shape of the KV cache.", vllm_cache_config_info},
    {kCounter, nullptr, "vllm:prompt_tokens_total", "Prompt tokens that were run or came from the prefix cache.",
     [](const View& v) { return one(v.stats.prompt_tokens + v.stats.cached_prompt_tokens); }},
    {kCounter, nullptr, "vllm:request_success_total", "Outputs that ended, by reason.", ended_by_vllm_reason},
};

// vLLM labels everything with the model and the number of the engine, of which there is one here.
Samples with_vllm_labels(Samples samples, const View& view) {
  for (ClientMetric& sample : samples) {
    sample.label.insert(sample.label.begin(), {{"model_name", view.facts.model}, {"engine", "0"}});
  }
  return samples;
}

void append(std::span<const Row> rows, const View& view, bool vllm_names, std::vector<MetricFamily>* page) {
  for (const Row& row : rows) {
    Samples samples = row.samples(view);
    if (samples.empty()) continue;
    if (row.name != nullptr) page->push_back({row.name, row.help, row.type, samples});
    if (vllm_names && row.vllm_name != nullptr) {
      page->push_back({row.vllm_name, row.help, row.type, with_vllm_labels(std::move(samples), view)});
    }
  }
}

class Page final : public prometheus::Collectable {
 public:
  explicit Page(const MetricsOptions& options) : options_(options), counts_(options) {}

  void open(Facts facts, std::function<EngineStats()> stats) {
    const std::lock_guard lock(mutex_);
    facts_ = std::move(facts);
    stats_ = std::move(stats);
  }

  void close() {
    const std::lock_guard lock(mutex_);
    if (stats_) stats_ = [last = stats_()] { return last; };
    closed_ = true;
  }

  std::vector<MetricFamily> Collect() const override {
    const std::lock_guard lock(mutex_);
    View view{counts_, options_.version, facts_};
    if (stats_) view.stats = stats_();
    view.serving = stats_ && !closed_ && !view.stats.draining && !view.stats.failed;
    std::vector<MetricFamily> page;
    append(kRowsBeforeOpen, view, options_.vllm_names, &page);
    if (!stats_) return page;
    append(kRows, view, options_.vllm_names, &page);
    if (options_.vllm_names) append(kVllmRows, view, true, &page);
    return page;
  }

  Counts& counts() { return counts_; }

 private:
  const MetricsOptions options_;
  Counts counts_;
  mutable std::mutex mutex_;  // what open() and close() set. Never taken to report
  Facts facts_;
  std::function<EngineStats()> stats_;  // empty until open()
  bool closed_ = false;
};

// ---- The port

// The IPv4 address that HOST:PORT means here: Debian's civetweb, which prometheus-cpp serves with, knows no IPv6.
absl::StatusOr<sockaddr_in> ipv4_of(const ListenAddress& address) {
  addrinfo hints{};
  hints.ai_family = AF_INET;
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  if (getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &found) != 0) {
    return absl::InvalidArgumentError(absl::StrCat("the host \"", address.host,
                                                   "\" has no IPv4 address, and metrics are served over IPv4 only: "
                                                   "give HOST:PORT, for example 127.0.0.1:9464"));
  }
  const sockaddr_in ipv4 = *reinterpret_cast<const sockaddr_in*>(found->ai_addr);
  freeaddrinfo(found);
  return ipv4;
}

absl::StatusOr<sockaddr_in> free_address(const std::string& text) {
  absl::StatusOr<ListenAddress> address = parse_listen_address(text);
  if (!address.ok()) return address.status();
  const absl::StatusOr<sockaddr_in> ipv4 = ipv4_of(*address);
  if (!ipv4.ok()) return ipv4.status();
  address->host = inet_ntoa(ipv4->sin_addr);
  if (absl::Status status = check_bindable(*address, "--metrics-address"); !status.ok()) return status;
  return ipv4;
}

std::string to_string(const sockaddr_in& address) {
  return absl::StrCat(inet_ntoa(address.sin_addr), ":", ntohs(address.sin_port));
}

// Two threads serve, so a client that connects and then says nothing may not keep one for longer than a second.
absl::StatusOr<std::unique_ptr<prometheus::Exposer>> listen(const sockaddr_in& address) {
  try {
    return std::make_unique<prometheus::Exposer>(std::vector<std::string>{
        "listening_ports", to_string(address), "num_threads", "2", "request_timeout_ms", "1000"});
  } catch (const std::exception&) {  // says nothing that helps
    return absl::UnavailableError(
        absl::StrCat("cannot listen at ", to_string(address), ": its port was taken this very moment; try again"));
  }
}

void connect_once(const sockaddr_in& address) {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  [[maybe_unused]] const int connected = connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address);
  close(fd);
}

// civetweb notices that it is to stop when somebody connects, or else every two seconds, which is longer than mpirun
// gives to ranks that it ends. So somebody connects until it has stopped. A client in the middle of a request can still
// delay it, by request_timeout_ms at most.
void stop(std::unique_ptr<prometheus::Exposer> exposer, const sockaddr_in& address) {
  std::atomic<bool> stopped = false;
  std::thread visitor([&] {
    while (!stopped) {
      connect_once(address);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  exposer.reset();
  stopped = true;
  visitor.join();
}

}  // namespace

struct Metrics::Impl {
  std::shared_ptr<Page> page;
  std::unique_ptr<prometheus::Exposer> exposer;
  sockaddr_in bound{};
  std::string address;
};

absl::StatusOr<std::unique_ptr<Metrics>> Metrics::start(const MetricsOptions& options) {
  const auto refused = [](const absl::Status& status) {
    return absl::Status(status.code(), absl::StrCat("--metrics-address: ", status.message()));
  };
  const absl::StatusOr<sockaddr_in> address = free_address(options.address);
  if (!address.ok()) return refused(address.status());
  absl::StatusOr<std::unique_ptr<prometheus::Exposer>> exposer = listen(*address);
  if (!exposer.ok()) return refused(exposer.status());
  auto impl = std::make_unique<Impl>(Impl{std::make_shared<Page>(options), *std::move(exposer), *address, ""});
  impl->bound.sin_port = htons(static_cast<uint16_t>(impl->exposer->GetListeningPorts().front()));
  impl->address = to_string(impl->bound);
  impl->exposer->RegisterCollectable(impl->page);
  return std::unique_ptr<Metrics>(new Metrics(std::move(impl)));
}

Metrics::Metrics(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Metrics::~Metrics() { stop(std::move(impl_->exposer), impl_->bound); }

const std::string& Metrics::address() const { return impl_->address; }

void Metrics::open(const ServerFacts& facts, const std::string& model, const WorkerLimits& limits,
                   std::function<EngineStats()> stats) {
  impl_->page->open({facts, model, limits}, std::move(stats));
}

void Metrics::close() { impl_->page->close(); }

void Metrics::on_step(const StepReport& report) {
  Counts& counts = impl_->page->counts();
  if (report.result == nullptr || !report.result->error.empty()) return add<uint64_t>(counts.failed_steps, 1);
  counts.step_seconds.observe(report.seconds);
  counts.gap_seconds.observe(report.gap_seconds);
  counts.schedule_seconds.observe(report.schedule_seconds);
  counts.step_tokens.observe(report.prompt_tokens + report.sampled_tokens);
  counts.step_sequences.observe(report.sequences);
  const size_t ranks = std::min(report.result->timings.size(), counts.ranks.size());
  for (size_t rank = 0; rank < ranks; ++rank) {
    counts.ranks[rank].run.observe(report.result->timings[rank].run_seconds);
    counts.ranks[rank].collective.observe(report.result->timings[rank].collective_seconds);
  }
}

void Metrics::on_first_token(double seconds_since_submitted) {
  impl_->page->counts().first_token_seconds.observe(seconds_since_submitted);
}

void Metrics::on_token(double seconds_since_previous) {
  impl_->page->counts().token_seconds.observe(seconds_since_previous);
}

void Metrics::on_output_end(const OutputReport& report) {
  Counts& counts = impl_->page->counts();
  add<uint64_t>(counts.ended[static_cast<size_t>(report.finish)], 1);
  counts.prompt_tokens.observe(report.prompt_tokens);
  counts.generated_tokens.observe(report.completion_tokens);
  counts.output_seconds.observe(report.total_seconds);
  counts.queue_seconds.observe(report.queue_seconds);
  if (report.completion_tokens == 0) return;
  counts.prefill_seconds.observe(report.first_token_seconds - report.queue_seconds);
  counts.decode_seconds.observe(report.total_seconds - report.first_token_seconds);
  counts.inference_seconds.observe(report.total_seconds - report.queue_seconds);
}

void Metrics::on_call_end(std::string_view method, absl::StatusCode code, double seconds) {
  Counts& counts = impl_->page->counts();
  const std::lock_guard lock(counts.calls_mutex);
  auto call = counts.calls.find(method);
  if (call == counts.calls.end()) call = counts.calls.try_emplace(std::string(method)).first;
  const auto index = static_cast<size_t>(code);
  ++call->second.by_code[index < kStatusCodes ? index : static_cast<size_t>(absl::StatusCode::kUnknown)];
  call->second.seconds.observe(seconds);
}

}  // namespace octet
