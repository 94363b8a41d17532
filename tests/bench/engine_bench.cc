// What rank 0's mind costs: scheduling with no model behind it, and with a model how long its worker stands still
// between steps. Beside it the time of copying the same plans, as a measure of the machine. Not a test: nothing passes
// or fails.
//
//   engine_bench [--sequences N] [--model DIR [--threads N]]
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/scheduler.h"
#include "coordinator/thread_worker_group.h"
#include "octet/internal/v1/worker.pb.h"
#include "worker/slot_table.h"
#include "worker/step_wire.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

double microseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Clock::now() - start).count();
}

double at(std::vector<double> values, double share) {
  const auto place = values.begin() + static_cast<int64_t>(share * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), place, values.end());
  return *place;
}

void print(const char* what, const std::vector<double>& values, const char* unit) {
  std::printf("  %-44s %8.2f %8.2f %8.2f  %s\n", what, at(values, 0.5), at(values, 0.9), at(values, 0.99), unit);
}

// Decode steps of many sequences, whose tokens are made up.
void measure_scheduler(int32_t sequences) {
  constexpr int kWarmUp = 200, kSteps = 2000;
  const WorkerLimits limits{.slots = sequences,
                            .blocks = sequences * 160,
                            .block_tokens = 16,
                            .max_step_tokens = 2 * sequences,
                            .max_context = 2560,
                            .vocab_size = 128'256};
  Scheduler scheduler({.limits = limits});
  for (int32_t i = 0; i < sequences; ++i) {
    Request request;
    request.id = static_cast<RequestId>(i + 1);
    request.prompt = {i, 1, 2, 3};
    scheduler.add(std::move(request), 0);
  }
  StepPlan plan;
  StepResult result;
  std::vector<TokenEvent> events;
  SlotTable slots(limits);
  std::vector<double> plans, applies, copies, encodes, batches;
  internal::v1::Plan wire;
  for (int step = 0; step < kWarmUp + kSteps; ++step) {
    const auto begin = Clock::now();
    if (!scheduler.plan(step, &plan)) break;
    const double planned = microseconds_since(begin);
    result.step = plan.step;
    result.sampled.resize(plan.run.size());
    for (size_t i = 0; i < plan.run.size(); ++i) {
      result.sampled[i].slot = plan.run[i].slot;
      result.sampled[i].chosen.token = static_cast<int32_t>(static_cast<size_t>(step) * 31 + i) % limits.vocab_size;
    }
    events.clear();
    const auto middle = Clock::now();
    scheduler.apply(result, &events);
    const double applied = microseconds_since(middle);
    const auto copying = Clock::now();
    const StepPlan copy = plan;
    const double copied = microseconds_since(copying);
    const auto encoding = Clock::now();
    encode(copy, &wire);
    const double encoded = microseconds_since(encoding);
    const auto building = Clock::now();
    if (absl::Status status = slots.take(plan); !status.ok()) {
      std::fprintf(stderr, "engine_bench: %s\n", std::string(status.message()).c_str());
      return;
    }
    const double built = microseconds_since(building);
    for (const SampledToken& sampled : result.sampled) {  // as the worker does
      slots.slot(sampled.slot).last_token = sampled.chosen.token;
      slots.slot(sampled.slot).has_sample = true;
    }
    if (step < kWarmUp) continue;
    encodes.push_back(encoded);
    batches.push_back(built);
    plans.push_back(planned);
    applies.push_back(applied);
    copies.push_back(copied);
  }
  std::printf("%zu running sequences, a decode step                %8s %8s %8s\n", plan.run.size(), "median", "p90",
              "p99");
  print("scheduler: plan", plans, "us");
  print("scheduler: apply", applies, "us");
  print("worker: plan to batch", batches, "us");
  print("plan to wire message", encodes, "us");
  print("(calibration: copying the plan)", copies, "us");
}

// How long the worker stood still between steps, as the engine reports it.
class GapObserver : public EngineObserver {
 public:
  void on_step(const StepReport& report) override {
    if (report.sampled_tokens == 0 || report.prompt_tokens > 0) return;
    gaps.push_back(report.gap_seconds * 1e6);
    shares.push_back(100.0 * report.gap_seconds / report.seconds);
    schedules.push_back(report.schedule_seconds * 1e6);
  }
  void on_first_token(double) override {}
  void on_token(double) override {}
  void on_output_end(const OutputReport&) override {}
  std::vector<double> gaps, shares, schedules;
};

class EndSink : public RequestSink {
 public:
  void on_event(const TokenEvent&) override {}
};

absl::Status measure_gap(const std::string& directory, int threads, int32_t sequences) {
  const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(directory);
  if (!checkpoint.ok()) return checkpoint.status();
  ThreadGroupOptions options{.stream = {.threads = threads}, .available_bytes = int64_t{4} << 30};
  absl::StatusOr<std::unique_ptr<ThreadWorkerGroup>> group = ThreadWorkerGroup::start(*checkpoint, options);
  if (!group.ok()) return group.status();
  GapObserver observer;
  {
    Engine engine({.limits = (*group)->plan().limits, .observer = &observer}, group->get(), [](const absl::Status&) {});
    for (int32_t i = 0; i < sequences; ++i) {
      Request request;
      request.prompt = {i + 1, 2, 3};
      request.max_tokens = 200;
      if (absl::Status status = engine.submit(std::move(request), std::make_shared<EndSink>()).status(); !status.ok()) {
        return status;
      }
    }
    engine.wait_idle(Clock::now() + std::chrono::minutes(10));
  }
  if (observer.gaps.empty()) return absl::InternalError("no decode step was seen");
  std::printf("%s, %d sequence(s), %zu decode steps   %8s %8s %8s\n", directory.c_str(), sequences,
              observer.gaps.size(), "median", "p90", "p99");
  print("the worker stood still between steps", observer.gaps, "us");
  print("  of the step", observer.shares, "%");
  print("planning and taking in, beside the step", observer.schedules, "us");
  return absl::OkStatus();
}

int run(int argc, char** argv) {
  int32_t sequences = 256;
  int threads = 1;
  std::string model;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i];
    if (flag == "--sequences") sequences = std::atoi(argv[i + 1]);
    if (flag == "--threads") threads = std::atoi(argv[i + 1]);
    if (flag == "--model") model = argv[i + 1];
  }
  measure_scheduler(sequences);
  if (model.empty()) return 0;
  for (const int32_t count : {1, 16}) {
    if (const absl::Status status = measure_gap(model, threads, count); !status.ok()) {
      std::fprintf(stderr, "engine_bench: %s\n", std::string(status.message()).c_str());
      return 1;
    }
  }
  return 0;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) { return octet::run(argc, argv); }
