// Metrics: events are fed by hand, and the page is read over HTTP and held against the rules of Prometheus' text
// format.
#include "coordinator/metrics.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <limits>
#include <map>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "tests/http_get.h"

namespace octet {
namespace {

// ---- A strict reader of the text format

struct Family {
  std::string type, help;
};

struct PageText {
  std::map<std::string, Family> families;
  std::map<std::string, double> values;  // by series, as printed: name{label="value",...}
  double at(const std::string& series) const {
    const auto found = values.find(series);
    if (found != values.end()) return found->second;
    ADD_FAILURE() << "no " << series;
    return std::nan("");
  }
  bool has_family(const std::string& name) const { return families.contains(name); }
};

double parse_value(const std::string& text) {
  if (text == "+Inf") return std::numeric_limits<double>::infinity();
  double value = 0;
  EXPECT_TRUE(absl::SimpleAtod(text, &value)) << text;
  return value;
}

bool is_name(const std::string& text) {
  return !text.empty() && text.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_:") ==
                              std::string::npos;
}

// The family of a series name, given the families announced so far: histograms and summaries have suffixes.
std::string family_of(const std::string& name, const PageText& page) {
  if (page.has_family(name)) return name;
  for (const char* suffix : {"_bucket", "_sum", "_count"}) {
    if (!absl::EndsWith(name, suffix)) continue;
    const std::string base = name.substr(0, name.size() - std::string(suffix).size());
    const auto family = page.families.find(base);
    if (family != page.families.end() && (family->second.type == "histogram" || family->second.type == "summary")) {
      return base;
    }
  }
  return "";
}

// Each histogram's buckets, by its other labels: cumulative, ending at +Inf with _count, with a _sum.
void check_histogram(const std::string& family, const PageText& page) {
  struct Buckets {
    double last_bound = -std::numeric_limits<double>::infinity();
    std::map<double, double> counts;
  };
  std::map<std::string, Buckets> all;
  for (const auto& [series, value] : page.values) {
    if (!absl::StartsWith(series, family + "_bucket{")) continue;
    std::vector<std::string> labels =
        absl::StrSplit(series.substr(family.size() + 8, series.size() - family.size() - 9), ',');
    ASSERT_TRUE(absl::StartsWith(labels.back(), "le=\"")) << series;
    const double bound = parse_value(labels.back().substr(4, labels.back().size() - 5));
    labels.pop_back();
    std::string others;
    for (const std::string& label : labels) absl::StrAppend(&others, others.empty() ? "" : ",", label);
    EXPECT_TRUE(all[others.empty() ? "" : "{" + others + "}"].counts.emplace(bound, value).second) << series;
  }
  EXPECT_FALSE(all.empty()) << family;
  for (const auto& [labels, buckets] : all) {
    double before = 0;
    for (const auto& [bound, count] : buckets.counts) {
      EXPECT_GE(count, before) << family << labels << " up to " << bound;
      before = count;
    }
    EXPECT_TRUE(std::isinf(buckets.counts.rbegin()->first)) << family << labels;
    EXPECT_EQ(page.at(family + "_count" + labels), before);
    EXPECT_GE(page.at(family + "_sum" + labels), 0);
  }
}

// Reads the page and fails the test where it breaks a rule.
PageText parse(const std::string& text) {
  PageText page;
  std::set<std::string> closed;  // families that another one has followed
  std::string open;
  EXPECT_TRUE(text.empty() || text.back() == '\n');
  for (const std::string& line : std::vector<std::string>(absl::StrSplit(text, '\n', absl::SkipEmpty()))) {
    if (line[0] == '#') {
      const std::vector<std::string> words = absl::StrSplit(line, absl::MaxSplits(' ', 3));
      if (words.size() != 4) {
        ADD_FAILURE() << line;
        continue;
      }
      const std::string& name = words[2];
      EXPECT_TRUE(is_name(name)) << line;
      Family& family = page.families[name];
      if (words[1] == "HELP") {
        EXPECT_TRUE(family.help.empty()) << "twice: " << line;
        family.help = words[3];
      } else {
        EXPECT_EQ(words[1], "TYPE") << line;
        EXPECT_TRUE(family.type.empty()) << "twice: " << line;
        EXPECT_FALSE(family.help.empty()) << "no help before " << line;
        family.type = words[3];
      }
      if (name != open) closed.insert(open);
      EXPECT_FALSE(closed.contains(name)) << "in two pieces: " << name;
      open = name;
      continue;
    }
    const size_t space = line.rfind(' ');
    const std::string series = line.substr(0, space);
    const std::string name = series.substr(0, series.find('{'));
    EXPECT_EQ(family_of(name, page), open) << line;
    EXPECT_TRUE(page.values.emplace(series, parse_value(line.substr(space + 1))).second) << "twice: " << line;
  }
  for (const auto& [name, family] : page.families) {
    EXPECT_EQ(family.type == "counter", absl::EndsWith(name, "_total") && family.type != "histogram") << name;
    if (family.type == "histogram") check_histogram(name, page);
  }
  return page;
}

// ---- What is measured

MetricsOptions test_options(bool vllm_names = false) {
  return {.address = "127.0.0.1:0", .vllm_names = vllm_names, .version = "1.2", .ranks = 2, .max_context = 100};
}

std::unique_ptr<Metrics> started(const MetricsOptions& options) {
  absl::StatusOr<std::unique_ptr<Metrics>> metrics = Metrics::start(options);
  EXPECT_TRUE(metrics.ok()) << metrics.status();
  return metrics.ok() ? *std::move(metrics) : nullptr;
}

PageText scrape(const Metrics& metrics) {
  const HttpAnswer answer = http_get(metrics.address(), "/metrics");
  EXPECT_EQ(answer.status, 200);
  EXPECT_TRUE(absl::StrContains(answer.head, "text/plain")) << answer.head;
  return parse(answer.body);
}

EngineStats some_stats() {
  return {.waiting = 3,
          .running = 2,
          .blocks_total = 40,
          .blocks_free = 30,
          .blocks_cached = 12,
          .steps = 7,
          .prompt_tokens = 500,
          .generated_tokens = 90,
          .queried_prompt_tokens = 700,
          .cached_prompt_tokens = 200,
          .preemptions = 1};
}

void open(Metrics& metrics, std::function<EngineStats()> stats = some_stats) {
  metrics.open(
      {.version = "1.2", .numerics_id = "n1", .ranks = 2, .threads_per_rank = 4, .device = "cpu", .isa = "avx2"},
      "tiny", {.slots = 8, .blocks = 40, .block_tokens = 16, .max_context = 100}, std::move(stats));
}

void feed(Metrics& metrics) {
  StepResult result;
  result.timings = {{.run_seconds = 0.004, .collective_seconds = 0.001}, {.run_seconds = 0.003}};
  metrics.on_step({.seconds = 0.005,
                   .gap_seconds = 0.0001,
                   .schedule_seconds = 0.00003,
                   .prompt_tokens = 30,
                   .sampled_tokens = 2,
                   .sequences = 3,
                   .result = &result});
  metrics.on_first_token(0.25);
  metrics.on_token(0.02);
  metrics.on_token(0.03);
  metrics.on_output_end({.finish = FinishReason::kEndToken,
                         .prompt_tokens = 30,
                         .completion_tokens = 3,
                         .queue_seconds = 0.05,
                         .first_token_seconds = 0.25,
                         .total_seconds = 0.75});
  metrics.on_output_end(
      {.finish = FinishReason::kDeadline, .prompt_tokens = 9, .queue_seconds = 2, .total_seconds = 2});
  metrics.on_output_end(
      {.finish = FinishReason::kCancelled, .prompt_tokens = 9, .queue_seconds = 2, .total_seconds = 2});
}

TEST(Metrics, LooksNotReadyBeforeTheEngineIsThere) {
  const auto metrics = started(test_options(true));
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at(R"(octet_build_info{version="1.2"})"), 1);
  EXPECT_EQ(page.at("octet_serving"), 0);
  for (const auto& [name, family] : page.families) {
    EXPECT_TRUE(name == "octet_build_info" || name == "octet_serving" || absl::StartsWith(name, "exposer_")) << name;
  }
}

TEST(Metrics, ShowsTheEnginesOwnFigures) {
  const auto metrics = started(test_options());
  open(*metrics);
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at("octet_serving"), 1);
  EXPECT_EQ(page.at("octet_draining"), 0);
  EXPECT_EQ(page.at("octet_outputs_running"), 2);
  EXPECT_EQ(page.at("octet_outputs_waiting"), 3);
  EXPECT_EQ(page.at("octet_kv_blocks"), 40);
  EXPECT_EQ(page.at("octet_kv_blocks_free"), 30);
  EXPECT_EQ(page.at("octet_kv_blocks_cached"), 12);
  EXPECT_EQ(page.at("octet_kv_usage_ratio"), 0.25);
  EXPECT_EQ(page.at("octet_steps_total"), 7);
  EXPECT_EQ(page.at("octet_prompt_tokens_total"), 500);
  EXPECT_EQ(page.at("octet_queried_prompt_tokens_total"), 700);
  EXPECT_EQ(page.at("octet_cached_prompt_tokens_total"), 200);
  EXPECT_EQ(page.at("octet_generated_tokens_total"), 90);
  EXPECT_EQ(page.at("octet_preemptions_total"), 1);
  EXPECT_EQ(page.at(R"(octet_model_info{model="tiny",numerics_id="n1",ranks="2",threads_per_rank="4",device="cpu",)"
                    R"(isa="avx2",kv_block_tokens="16",kv_blocks="40",max_context="100"})"),
            1);
  EXPECT_GT(page.at("process_cpu_seconds_total"), 0);
  EXPECT_GT(page.at("process_resident_memory_bytes"), 1e6);
}

TEST(Metrics, CountsWhatTheObserverIsTold) {
  const auto metrics = started(test_options());
  open(*metrics);
  feed(*metrics);
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at(R"(octet_outputs_ended_total{reason="end_token"})"), 1);
  EXPECT_EQ(page.at(R"(octet_outputs_ended_total{reason="deadline"})"), 1);
  EXPECT_EQ(page.at(R"(octet_outputs_ended_total{reason="length"})"), 0);
  EXPECT_EQ(page.at("octet_time_to_first_token_seconds_count"), 1);
  EXPECT_EQ(page.at(R"(octet_time_to_first_token_seconds_bucket{le="0.1"})"), 0);
  EXPECT_EQ(page.at(R"(octet_time_to_first_token_seconds_bucket{le="0.25"})"), 1) << "bounds belong to their bucket";
  EXPECT_EQ(page.at("octet_inter_token_latency_seconds_count"), 2);
  EXPECT_DOUBLE_EQ(page.at("octet_inter_token_latency_seconds_sum"), 0.05);
  EXPECT_EQ(page.at("octet_output_seconds_count"), 3);
  EXPECT_EQ(page.at("octet_output_queue_seconds_count"), 3);
  EXPECT_EQ(page.at("octet_output_prefill_seconds_count"), 1) << "without a token there is no prefill to time";
  EXPECT_DOUBLE_EQ(page.at("octet_output_prefill_seconds_sum"), 0.2);
  EXPECT_DOUBLE_EQ(page.at("octet_output_decode_seconds_sum"), 0.5);
  EXPECT_DOUBLE_EQ(page.at("octet_output_inference_seconds_sum"), 0.7);
  EXPECT_EQ(page.at("octet_output_prompt_tokens_sum"), 48);
  EXPECT_EQ(page.at(R"(octet_output_prompt_tokens_bucket{le="100"})"), 3) << "bounds end at the context";
  EXPECT_EQ(page.at("octet_output_generated_tokens_sum"), 3);
  EXPECT_EQ(page.at("octet_step_tokens_sum"), 32);
  EXPECT_EQ(page.at("octet_step_sequences_sum"), 3);
  EXPECT_EQ(page.at("octet_step_seconds_sum"), 0.005);
  EXPECT_EQ(page.at("octet_step_gap_seconds_sum"), 0.0001);
  EXPECT_EQ(page.at("octet_step_schedule_seconds_sum"), 0.00003);
  EXPECT_EQ(page.at(R"(octet_rank_step_seconds_sum{rank="0",stage="collective"})"), 0.001);
  EXPECT_EQ(page.at(R"(octet_rank_step_seconds_sum{rank="1",stage="run"})"), 0.003);
}

TEST(Metrics, CountsAFailedStepAsNothingElse) {
  const auto metrics = started(test_options());
  open(*metrics);
  StepResult broken;
  broken.error = "NaN in the logits";
  metrics->on_step({.seconds = 1, .prompt_tokens = 5, .result = &broken});
  metrics->on_step({.seconds = 1, .prompt_tokens = 5});
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at("octet_steps_failed_total"), 2);
  EXPECT_EQ(page.at("octet_step_seconds_count"), 0);
}

TEST(Metrics, TakesTimingsOfMoreRanksThanItKnows) {
  const auto metrics = started(test_options());
  open(*metrics);
  StepResult result;
  result.timings.resize(9);
  metrics->on_step({.result = &result});
  EXPECT_EQ(scrape(*metrics).at(R"(octet_rank_step_seconds_count{rank="1",stage="run"})"), 1);
}

TEST(Metrics, CountsCallsByMethodAndCode) {
  const auto metrics = started(test_options());
  open(*metrics);
  EXPECT_FALSE(scrape(*metrics).has_family("octet_calls_ended_total")) << "a family without a series";
  metrics->on_call_end("octet.v1.InferenceService/Generate", absl::StatusCode::kOk, 0.5);
  metrics->on_call_end("octet.v1.InferenceService/Generate", absl::StatusCode::kCancelled, 0.25);
  metrics->on_call_end("octet.v1.ControlService/GetLoad", absl::StatusCode::kOk, 0.001);
  metrics->on_call_end("octet.v1.ControlService/GetLoad", static_cast<absl::StatusCode>(99), 0.001);
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at(R"(octet_calls_ended_total{method="octet.v1.InferenceService/Generate",code="CANCELLED"})"), 1);
  EXPECT_EQ(page.at(R"(octet_calls_ended_total{method="octet.v1.ControlService/GetLoad",code="UNKNOWN"})"), 1);
  EXPECT_EQ(page.at(R"(octet_call_seconds_sum{method="octet.v1.InferenceService/Generate"})"), 0.75);
}

TEST(Metrics, ShowsTheSameValuesUnderVllmsNames) {
  const auto metrics = started(test_options(true));
  open(*metrics);
  feed(*metrics);
  const PageText page = scrape(*metrics);
  const std::string model = R"({model_name="tiny",engine="0"})";
  EXPECT_EQ(page.at("vllm:num_requests_running" + model), 2);
  EXPECT_EQ(page.at("vllm:num_requests_waiting" + model), 3);
  EXPECT_EQ(page.at("vllm:kv_cache_usage_perc" + model), 0.25);
  EXPECT_EQ(page.at(R"(vllm:cache_config_info{model_name="tiny",engine="0",block_size="16",num_gpu_blocks="40"})"), 1);
  EXPECT_EQ(page.at("vllm:prompt_tokens_total" + model), 700);
  EXPECT_EQ(page.at("vllm:generation_tokens_total" + model), 90);
  EXPECT_EQ(page.at("vllm:prefix_cache_queries_total" + model), 700);
  EXPECT_EQ(page.at("vllm:prefix_cache_hits_total" + model), 200);
  EXPECT_EQ(page.at("vllm:num_preemptions_total" + model), 1);
  EXPECT_EQ(page.at(R"(vllm:request_success_total{model_name="tiny",engine="0",finished_reason="stop"})"), 1);
  EXPECT_EQ(page.at(R"(vllm:request_success_total{model_name="tiny",engine="0",finished_reason="abort"})"), 2);
  EXPECT_EQ(page.at("vllm:iteration_tokens_total_sum" + model), 32);
  EXPECT_EQ(page.at("vllm:time_to_first_token_seconds_count" + model), 1);
  EXPECT_EQ(page.at("vllm:inter_token_latency_seconds_count" + model), 2);
  EXPECT_EQ(page.at("vllm:e2e_request_latency_seconds_count" + model), 3);
  EXPECT_EQ(page.at("octet_outputs_running"), 2) << "our own names stay";
}

TEST(Metrics, HasNoOtherNamesUnlessAsked) {
  const auto metrics = started(test_options());
  open(*metrics);
  for (const auto& [name, family] : scrape(*metrics).families) EXPECT_FALSE(absl::StartsWith(name, "vllm")) << name;
}

TEST(Metrics, SaysThatADrainingOrFailedServerDoesNotServe) {
  EngineStats stats;
  const auto metrics = started(test_options());
  open(*metrics, [&stats] { return stats; });
  EXPECT_EQ(scrape(*metrics).at("octet_kv_usage_ratio"), 0) << "no blocks, no division by them";
  stats.draining = true;
  EXPECT_EQ(scrape(*metrics).at("octet_serving"), 0);
  EXPECT_EQ(scrape(*metrics).at("octet_draining"), 1);
  stats = {.failed = true};
  EXPECT_EQ(scrape(*metrics).at("octet_serving"), 0);
}

TEST(Metrics, KeepsTheLastFiguresOfAnEngineThatIsGone) {
  auto steps = std::make_unique<uint64_t>(11);
  const auto metrics = started(test_options());
  open(*metrics, [&steps] { return EngineStats{.steps = *steps}; });
  metrics->close();
  steps.reset();
  const PageText page = scrape(*metrics);
  EXPECT_EQ(page.at("octet_steps_total"), 11);
  EXPECT_EQ(page.at("octet_serving"), 0);
}

TEST(Metrics, RefusesAddressesWithAReasonAndARemedy) {
  const auto first = started(test_options());
  const auto refusal = [](const std::string& address) {
    MetricsOptions options = test_options();
    options.address = address;
    const absl::Status status = Metrics::start(options).status();
    EXPECT_TRUE(absl::StartsWith(status.message(), "--metrics-address: ")) << status;
    return status;
  };
  const absl::Status taken = refusal(first->address());
  EXPECT_EQ(taken.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(absl::StrContains(taken.message(), "is in use")) << taken;
  EXPECT_TRUE(absl::StrContains(taken.message(), "another port with --metrics-address")) << taken;
  EXPECT_EQ(refusal("nonsense").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(absl::StrContains(refusal("[::1]:0").message(), "IPv4 only"));
  EXPECT_EQ(refusal("192.0.2.1:0").code(), absl::StatusCode::kFailedPrecondition);
}

TEST(Metrics, TakesANameForAnAddress) {
  MetricsOptions options = test_options();
  options.address = "localhost:0";
  EXPECT_TRUE(absl::StartsWith(started(options)->address(), "127."));
}

TEST(Metrics, ServesNothingBesideThePage) {
  const auto metrics = started(test_options());
  for (const char* path : {"/", "/etc/passwd", "/../etc/passwd", "/metrics/../../etc/passwd"}) {
    const HttpAnswer answer = http_get(metrics->address(), path);
    EXPECT_FALSE(absl::StrContains(answer.body, "root:")) << path;
    EXPECT_NE(answer.status, 0) << path;
  }
  EXPECT_EQ(http_get(metrics->address(), "/").status, 404);
}

TEST(Metrics, EndsWhileClientsAreSilent) {
  auto metrics = started(test_options());
  const int silent = connect_to(metrics->address());
  ASSERT_GE(silent, 0);
  metrics.reset();
  close(silent);
}

TEST(Metrics, CountsEveryEventWhileOthersScrape) {
  const auto metrics = started(test_options(true));
  open(*metrics);
  std::atomic<bool> enough = false;
  std::atomic<int> tokens = 0, calls = 0;
  std::thread engine([&] {
    for (; !enough; ++tokens) metrics->on_token(0.001 * (tokens % 100));
  });
  std::vector<std::thread> callers;
  for (int i = 0; i < 2; ++i) {
    callers.emplace_back([&] {
      for (; !enough; ++calls) metrics->on_call_end("a/B", absl::StatusCode::kOk, 0.01);
    });
  }
  for (int i = 0; i < 20; ++i) scrape(*metrics);  // each checks itself
  enough = true;
  engine.join();
  for (std::thread& caller : callers) caller.join();
  const PageText page = scrape(*metrics);
  EXPECT_GT(tokens, 0);
  EXPECT_EQ(page.at("octet_inter_token_latency_seconds_count"), tokens);
  EXPECT_EQ(page.at(R"(octet_calls_ended_total{method="a/B",code="OK"})"), calls);
}

TEST(Metrics, AreAllInTheReadme) {
  std::ostringstream readme;
  readme << std::ifstream(OCTET_README).rdbuf();
  const auto metrics = started(test_options(true));
  open(*metrics);
  metrics->on_call_end("a/B", absl::StatusCode::kOk, 1);
  for (const auto& [name, family] : scrape(*metrics).families) {
    if (absl::StartsWith(name, "exposer_")) continue;  // the library's own
    EXPECT_TRUE(absl::StrContains(readme.str(), "`" + name + "`")) << name;
  }
}

}  // namespace
}  // namespace octet
