#include "launch/doctor.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/calibrate.h"
#include "launch/bootstrap.h"
#include "launch/findings.h"
#include "launch/last_flight.h"
#include "launch/probe.h"
#include "launch/progress.h"
#include "launch/version.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/collective/mpi_communicator.h"
#include "worker/memory_plan.h"

namespace octet {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kServePort = 50051;
constexpr int64_t kHidden = 16384;  // of the largest Llama: a token's sum is 32 KiB
constexpr int64_t kTokens[] = {1, 16, 256};
constexpr double kAllReduceSeconds = 1.0;         // for each size
constexpr int64_t kReadBytes = int64_t{1} << 30;  // of the model, by all ranks of a node together
constexpr double kReadSeconds = 3.0;

struct DoctorOptions {
  std::string model;
  bool json = false;
  std::string last_flight;  // with --last: the directory, empty for this machine's last one
};

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// One rank's examination. Every rank takes the same steps, so that nobody waits for one that has given up.
class Examination {
 public:
  Examination(const DoctorOptions& options, Bootstrap& job) : options_(options), job_(job) {}

  // The findings, the same on every rank; `facts` are complete on rank 0 only.
  std::vector<Finding> run(JobFacts* facts) {
    facts->model = options_.model;
    for (auto step : {&Examination::look_around, &Examination::read_memory, &Examination::sum_over_ranks,
                      &Examination::read_model, &Examination::compare_clocks}) {
      show_progress();
      (this->*step)(facts);
    }
    for (const std::string& text : job_.all_gather(encode(mine_))) facts->ranks.push_back(decode(text));
    plan_model(facts);
    if (progress_) progress_->clear();
    return judge(*facts);
  }

 private:
  void show_progress() {
    if (job_.rank() != 0) return;
    if (!progress_) progress_.emplace("Examining", [](int64_t steps) { return absl::StrCat(steps, " steps"); });
    progress_->update(done_++, 5);
  }

  void look_around(JobFacts* facts) {
    mine_ = probe_machine();
    mine_.rank = job_.rank();
    mine_.node = job_.node_of_rank()[job_.rank()];
    mine_.versions["octet"] = kVersion;
    mine_.versions["gRPC"] = grpc::Version();
    const std::string mpi = Bootstrap::mpi_version();
    mine_.versions["Open MPI"] = mpi.substr(mpi.rfind(' ') + 1);
    mine_.node_cores = job_.node_cores();
    mine_.own_cores = job_.own_cores();
    mine_.core_for_each_thread = job_.each_thread_has_a_core(job_.own_cores());
    const absl::StatusOr<int64_t> memory = job_.own_memory();
    mine_.memory_bytes = memory.value_or(0);
    for (int r = 0; r < job_.size(); ++r) map_.runs.push_back({r, 1, job_.size()});
    map_.node_of_rank = job_.node_of_rank();
    mine_.shm_need_bytes =
        SharedWindow::bytes_of(WindowCommunicator::window_layout(map_, mine_.node, kDefaultAreaBytes));
    if (job_.rank() == 0) probe_ports(kServePort, facts);
  }

  void read_memory(JobFacts*) {
    constexpr int kRounds = 5;
    const int64_t bytes = std::clamp<int64_t>(mine_.memory_bytes / 8, int64_t{1} << 20, int64_t{256} << 20);
    Stream stream({.threads = job_.own_cores(), .spin = false});
    const Buffer buffer(bytes);
    const Tensor all = buffer.tensor(DType::kU8, {bytes});
    std::memset(all.data(), 1, static_cast<size_t>(bytes));  // untouched pages would all be one page of zeros
    wait_for_all();
    std::vector<double> speeds;
    for (int round = 0; round < kRounds; ++round) speeds.push_back(read_bytes_per_second(stream, all));
    std::nth_element(speeds.begin(), speeds.begin() + kRounds / 2, speeds.end());
    mine_.read_bytes_per_second = speeds[kRounds / 2];
  }

  void sum_over_ranks(JobFacts* facts) {
    const bool spin = job_.each_thread_has_a_core(1);
    const absl::StatusOr<std::unique_ptr<Communicator>> communicator =
        make_mpi_communicator({.map = map_, .wait = {.spin = spin}});
    if (!communicator.ok()) {
      facts->communicator_error = std::string(communicator.status().message());
      return;
    }
    Stream stream({.threads = 1, .spin = spin});
    for (int64_t tokens : kTokens) facts->all_reduces.push_back(measure(**communicator, stream, tokens));
  }

  AllReduceFacts measure(Communicator& communicator, Stream& stream, int64_t tokens) {
    const auto pieces = static_cast<int64_t>(maximal_subtrees(map_.runs[job_.rank()]).size());
    const Buffer partials(pieces * tokens * kHidden * 4), residual(tokens * kHidden * 2);
    const Tensor from = partials.tensor(DType::kF32, {pieces, tokens, kHidden});
    const Tensor to = residual.tensor(DType::kBF16, {tokens, kHidden});
    // In turns, after each of which rank 0's clock says for all whether there is another.
    constexpr size_t kTurn = 20, kMost = 2000;
    std::vector<double> seconds;
    const auto begin = Clock::now();
    for (bool more = true; more && seconds.size() < kMost;) {
      for (size_t i = 0; i < kTurn; ++i) {
        const auto start = Clock::now();
        communicator.reduce_over_slices(stream, from, to);
        seconds.push_back(seconds_since(start));
      }
      more = job_.all_gather(static_cast<uint64_t>(seconds_since(begin) < kAllReduceSeconds))[0] != 0;
    }
    std::sort(seconds.begin(), seconds.end());
    return {.bytes = to.bytes(),
            .p50_seconds = seconds[seconds.size() / 2],
            .p99_seconds = seconds[seconds.size() * 99 / 100]};
  }

  void read_model(JobFacts*) {
    if (options_.model.empty()) return;
    wait_for_all();
    mine_.model =
        probe_model(options_.model, job_.local_rank(), job_.local_size(), kReadBytes / job_.local_size(), kReadSeconds);
  }

  void compare_clocks(JobFacts*) {
    wait_for_all();
    mine_.clock_seconds = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  }

  void plan_model(JobFacts* facts) const {
    if (options_.model.empty() || !mine_.model.error.empty()) return;
    const absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options_.model);
    if (!checkpoint.ok()) return;
    std::vector<RankResources> ranks;
    for (const RankFacts& rank : facts->ranks) {
      ranks.push_back({.memory_bytes = rank.memory_bytes, .threads = rank.own_cores});
    }
    const auto plan = plan_memory(weight_formats(*checkpoint), {.window_bytes = 2 * kDefaultAreaBytes}, ranks);
    if (!plan.ok()) facts->plan_error = std::string(plan.status().message());
  }

  void wait_for_all() { (void)job_.agree(absl::OkStatus()); }

  const DoctorOptions& options_;
  Bootstrap& job_;
  RankFacts mine_;
  RankMap map_;  // a slice for each rank
  std::optional<Progress> progress_;
  int64_t done_ = 0;
};

void print(const DoctorOptions& options, const JobFacts& facts, const std::vector<Finding>& findings) {
  if (!options.json) {
    std::fputs(to_text(findings).c_str(), stdout);
    return;
  }
  nlohmann::ordered_json json = {{"ok", !any_failure(findings)}, {"findings", to_json(findings)}};
  json["ranks"] = nlohmann::ordered_json::array();
  for (const RankFacts& rank : facts.ranks) json["ranks"].push_back(nlohmann::ordered_json::parse(encode(rank)));
  json["all_reduces"] = nlohmann::ordered_json::array();
  for (const AllReduceFacts& row : facts.all_reduces) {
    json["all_reduces"].push_back(
        {{"bytes", row.bytes}, {"p50_seconds", row.p50_seconds}, {"p99_seconds", row.p99_seconds}});
  }
  std::printf("%s\n", json.dump(2).c_str());
}

int run_doctor(const DoctorOptions& options) {
  const absl::StatusOr<std::unique_ptr<Bootstrap>> job = Bootstrap::start({});
  if (!job.ok()) {
    const std::vector<Finding> findings = {{.level = FindingLevel::kFailure,
                                            .check = "launch",
                                            .ranks = {0},
                                            .message = std::string(job.status().message())}};
    print(options, {}, findings);
    return 1;
  }
  JobFacts facts;
  const std::vector<Finding> findings = Examination(options, **job).run(&facts);
  if ((*job)->rank() == 0) print(options, facts, findings);
  // A launcher reports the first rank that fails: they all say what rank 0 says.
  return (*job)->broadcast(any_failure(findings) ? "1" : "0") == "1" ? 1 : 0;
}

}  // namespace

void add_doctor_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<DoctorOptions>();
  CLI::App* command =
      app.add_subcommand("doctor", "Look at the ranks of mpirun or srun, and at what lies between them, in a minute");
  command->footer(
      "mpirun -np 8 --bind-to none octet doctor --model Llama-3.1-405B-Instruct-FP8\n"
      "srun --mpi=pmix -N 2 -n 8 octet doctor || scontrol requeue $SLURM_JOB_ID\n"
      "octet doctor --last                 by which rank the last job failed, and what every rank did then\n"
      "Exit status: 0, with warnings or without; 1 when something is wrong.");
  CLI::Option* model =
      command->add_option("--model", options->model, "Look at this model's files too, from every rank");
  command->add_flag("--json", options->json, "One JSON object with findings and facts instead of lines");
  CLI::Option* last =
      command
          ->add_option("--last", options->last_flight,
                       "Instead: what the ranks left of this machine's last job that failed, or what lies in this "
                       "--flight-directory")
          ->expected(0, 1)
          ->excludes(model);
  command->callback([options, last, exit_code] {
    *exit_code = last->count() > 0 ? tell_last_flight(options->last_flight) : run_doctor(*options);
  });
}

}  // namespace octet
