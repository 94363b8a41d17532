#include "launch/rank.h"

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "coordinator/rpc_worker_group.h"
#include "launch/bootstrap.h"
#include "launch/device.h"
#include "launch/flight_directory.h"
#include "launch/gpu_binding.h"
#include "launch/machine.h"
#include "launch/progress.h"
#include "launch/version.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/inspect.h"
#include "worker/collective/device_communicator.h"
#include "worker/collective/mpi_communicator.h"
#include "worker/collective/nccl_api.h"
#include "worker/flight_recorder.h"
#include "worker/kv_cache.h"
#include "worker/numerics.h"
#include "worker/worker.h"
#include "worker/worker_service.h"

namespace octet {
namespace {

// What a process that has failed may take to end its calls, and one that is done to say goodbye to the others.
constexpr unsigned kSecondsToFail = 5, kSecondsToLeave = 30;

volatile sig_atomic_t late_exit_status = 1;

// Who watches the watchdog: whatever the threads of this process are stuck in, the kernel ends it after so long.
void end_within(unsigned seconds, int exit_status) {
  late_exit_status = exit_status;
  signal(SIGALRM, [](int) { _exit(late_exit_status); });
  alarm(seconds);
}

const char* environment(const char* name) { return std::getenv(name); }

LastWordsKind kind_of(const absl::Status& cause) {
  if (absl::IsDeadlineExceeded(cause)) return LastWordsKind::kWatchdog;
  if (absl::IsInternal(cause)) return LastWordsKind::kDeviceError;
  return LastWordsKind::kLost;
}

// Members are declared in the order in which they are made and outlive what uses them.
class Rank {
 public:
  Rank(const RankOptions& options, Bootstrap& bootstrap, Leader* leader)
      : options_(options), bootstrap_(bootstrap), leader_(leader) {}

  int run() {
    const int exit_status = live();
    // An end that all ranks have come to is nothing to look into.
    if (recorder_) recorder_->remove();
    return exit_status;
  }

 private:
  int live() {
    // Each phase ends with agree(): what fails on one rank fails on all, before anyone waits for it.
    for (auto phase : {&Rank::open_device, &Rank::open_model, &Rank::plan, &Rank::prepare, &Rank::open_flight,
                       &Rank::load, &Rank::record_steps, &Rank::open_plan_streams}) {
      if (const absl::Status status = bootstrap_.agree((this->*phase)()); !status.ok()) {
        if (leads()) log_line(LogLevel::kError, std::string(status.message()));  // the same on every rank: one says it
        return absl::IsUnavailable(status) ? options_.lost : options_.refused;
      }
      if (phase != &Rank::prepare) continue;
      const std::string exit_status = bootstrap_.broadcast(exit_status_ ? absl::StrCat(*exit_status_) : "");
      if (!exit_status.empty()) return std::atoi(exit_status.c_str());
    }
    const std::string local_address = bootstrap_.broadcast(leads() ? group_->local_address() : "");
    const std::string remote_address = bootstrap_.broadcast(leads() ? group_->remote_address() : "");
    const absl::StatusOr<int> status =
        leads() ? lead() : follow(bootstrap_.shares_node_with_rank_0() ? local_address : remote_address);
    // Beyond this point ranks cannot agree any more: one that fails goes at once, and the others notice.
    if (!status.ok()) end_process(status.status());
    // A clean end is everybody's: the launcher must not take the rank that it hears of first for the job's word.
    if (leads()) end_within(kSecondsToLeave, options_.lost);
    const int exit_status = std::atoi(bootstrap_.broadcast(absl::StrCat(*status)).c_str());
    end_within(kSecondsToLeave, options_.lost);
    return exit_status;
  }

  bool leads() const { return bootstrap_.rank() == 0; }
  std::string family() const {
    return device_.gpu ? family_of(*device_.gpu, arithmetic(), bootstrap_.size()) : family_of(options_.runtime.isa);
  }
  std::string id_of_numerics() const {
    return numerics_id(checkpoint_->config(), family(), options_.runtime.activations, options_.runtime.memory.kv_dtype);
  }
  Arithmetic arithmetic() const { return arithmetic_on(device_, options_.arithmetic); }

  // The last resort: a rank inside a collective whose peers are gone never comes back, so its process ends here.
  [[noreturn]] void end_process(const absl::Status& cause) const {
    // What ends another rank is that it has lost this job's rank 0, whatever its stream calls it.
    begin_to_fail(leads() ? kind_of(cause) : LastWordsKind::kLost, cause);
    log_line(LogLevel::kError, absl::StrFormat("rank %d ends: %s", bootstrap_.rank(), std::string(cause.message())));
    std::_Exit(options_.lost);
  }

  // The cause is on record before anything else is tried.
  void begin_to_fail(LastWordsKind kind, const absl::Status& cause) const {
    recorder_->last_words(kind, std::string(cause.message()));
    end_within(kSecondsToFail, options_.lost);
  }

  absl::Status open_flight() {
    const absl::Status status = make_recorder();
    // A full disk may have room again, as far as a job is concerned.
    return absl::IsResourceExhausted(status) ? absl::UnavailableError(status.message()) : status;
  }

  absl::Status make_recorder() {
    const std::string job = bootstrap_.broadcast(leads() ? new_job_name(absl::Now()) : "");
    flight_directory_ = options_.flight_directory;
    if (flight_directory_.empty()) {
      const std::string home = options_.flight_home.empty() ? flight_home() : options_.flight_home;
      absl::StatusOr<std::string> directory = job_directory(home, job);
      if (!directory.ok()) return directory.status();
      flight_directory_ = *directory;
    }
    absl::StatusOr<std::unique_ptr<FlightRecorder>> recorder =
        FlightRecorder::create(flight_directory_, bootstrap_.rank(), bootstrap_.size(), job);
    if (!recorder.ok()) return recorder.status();
    recorder_ = *std::move(recorder);
    recorder_->catch_crashes();
    recorder_->note(FlightEvent::kStart);
    return absl::OkStatus();
  }

  absl::Status open_device() {
    if (options_.device == Device::kCpu) return check_cpu_options();
    if (absl::Status status = bootstrap_.agree(find_gpu()); !status.ok()) return status;
    compare_gpus();
    return absl::OkStatus();
  }

  absl::Status check_cpu_options() const {
    if (options_.all_reduce == AllReduce::kAuto || options_.all_reduce == AllReduce::kHost) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--allreduce ", name_of(options_.all_reduce),
                                                   " is how GPUs sum, and these ranks are CPUs, which meet in the "
                                                   "host's memory: leave it out, or add --device cuda"));
  }

  absl::Status find_gpu() {
    absl::StatusOr<OpenDevice> device =
        octet::open_device(options_.device, bootstrap_.local_rank(), bootstrap_.local_size());
    if (!device.ok()) return device.status();
    device_ = *std::move(device);
    gpu_view_.visible = device_.visible;
    gpu_view_.uuid = device_.gpu->uuid;
    return absl::OkStatus();
  }

  // With those of the other ranks: who shares one, and who has been left a single one.
  void compare_gpus() {
    const std::vector<std::string> uuids = bootstrap_.all_gather(gpu_view_.uuid);
    const std::vector<uint64_t> visible = bootstrap_.all_gather(static_cast<uint64_t>(gpu_view_.visible));
    std::vector<GpuView> node;
    for (int r = 0; r < bootstrap_.size(); ++r) {
      if (bootstrap_.node_of_rank()[r] != bootstrap_.node_of_rank()[bootstrap_.rank()]) continue;
      node.push_back({.visible = static_cast<int>(visible[r]), .uuid = uuids[r]});
    }
    ranks_on_gpu_ = std::count(uuids.begin(), uuids.end(), gpu_view_.uuid);
    if (bootstrap_.local_rank() != 0) return;
    if (ranks_on_gpu_ > 1) {
      log_line(LogLevel::kWarning, absl::StrCat(ranks_on_gpu_,
                                                " ranks share one GPU: they take turns on it and divide its "
                                                "memory, which is for tests only"));
    }
    const auto variable = [](const char* name) {
      const char* const value = environment(name);
      return std::string(value == nullptr ? "" : value);
    };
    if (const std::optional<HiddenPeers> hidden = find_hidden_peers(gpu_view_, node, variable)) {
      log_line(LogLevel::kWarning, absl::StrCat(hidden->message, ": ", hidden->remedy));
    }
  }

  absl::Status open_model() {
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options_.runtime.model);
    const uint64_t digest = checkpoint.ok() ? checkpoint->digest() : 0;
    if (absl::Status status = bootstrap_.agree(checkpoint.status()); !status.ok()) return status;
    checkpoint_ = *std::move(checkpoint);
    if (absl::Status status = bootstrap_.all_equal("model files", absl::StrFormat("%016x", digest)); !status.ok())
      return status;
    if (absl::Status status = bootstrap_.all_equal("numerics id", id_of_numerics()); !status.ok()) return status;
    if (!leads()) return absl::OkStatus();
    for (const std::string& warning : checkpoint_->warnings()) log_line(LogLevel::kWarning, warning);
    return open_text();
  }

  absl::Status open_text() {
    absl::StatusOr<Tokenizer> tokenizer = Tokenizer::load(options_.runtime.model);
    if (!tokenizer.ok()) return tokenizer.status();
    absl::StatusOr<ChatFormat> chat = ChatFormat::detect(*tokenizer);
    if (!chat.ok()) log("chat requests will be refused: " + std::string(chat.status().message()));
    std::vector<int32_t> eos = checkpoint_->config().eos_token_ids;
    const std::vector<int32_t>& more = checkpoint_->generation_config().eos_token_ids;
    eos.insert(eos.end(), more.begin(), more.end());
    std::sort(eos.begin(), eos.end());
    eos.erase(std::unique(eos.begin(), eos.end()), eos.end());
    model_ = std::make_shared<ServedModel>(
        ServedModel{.name = std::filesystem::weakly_canonical(options_.runtime.model).filename(),
                    .architecture = "LlamaForCausalLM",
                    .quant_method = checkpoint_->quant_method(),
                    .parameters = summarize(*checkpoint_).parameters,
                    .tokenizer = *std::move(tokenizer),
                    .chat = std::move(chat),
                    .generation_config = checkpoint_->generation_config(),
                    .eos_token_ids = std::move(eos)});
    return absl::OkStatus();
  }

  absl::Status plan() {
    absl::StatusOr<ShardSpec> shard = ShardSpec::make(checkpoint_->config(), bootstrap_.rank(), bootstrap_.size());
    if (!shard.ok()) return shard.status();
    shard_ = *shard;
    absl::StatusOr<int64_t> memory = bootstrap_.own_memory();
    if (!memory.ok()) return memory.status();
    if (device_.gpu) memory = device_.gpu->memory_bytes / ranks_on_gpu_;
    threads_ = options_.runtime.threads.value_or(bootstrap_.own_cores());
    const std::vector<uint64_t> memories = bootstrap_.all_gather(static_cast<uint64_t>(*memory));
    const std::vector<uint64_t> threads = bootstrap_.all_gather(static_cast<uint64_t>(threads_));
    std::vector<RankResources> ranks;
    for (size_t r = 0; r < memories.size(); ++r) {
      ranks.push_back({.memory_bytes = static_cast<int64_t>(memories[r]), .threads = static_cast<int>(threads[r])});
    }
    MemoryOptions options = options_.runtime.memory;
    options.device = options_.device;
    options.window_bytes = device_.gpu ? kDeviceCommunicatorBytes : 2 * kDefaultAreaBytes;
    options.arithmetic = arithmetic();
    absl::StatusOr<MemoryPlan> plan = plan_memory(weight_formats(*checkpoint_), options, ranks);
    if (!plan.ok()) return plan.status();
    plan_ = *std::move(plan);
    if (leads()) show_plan();
    return absl::OkStatus();
  }

  // For people a table; for machines one line, as every other.
  void show_plan() const {
    if (options_.log_format == LogFormat::kText) {
      std::fprintf(stderr, "%s\n", plan_->to_string().c_str());
    } else {
      log_line(LogLevel::kInfo, "memory plan", {{"plan", plan_->to_string()}});
    }
  }

  absl::Status prepare() {
    if (!leads()) return absl::OkStatus();
    drain_.emplace();
    model_->limits = plan_->limits;
    job_ = {.model = model_,
            .facts = {.version = kVersion,
                      .numerics_id = id_of_numerics(),
                      .ranks = bootstrap_.size(),
                      .threads_per_rank = threads_,
                      .device = device_.gpu ? "cuda" : "cpu",
                      .isa = name_of(options_.runtime.isa),
                      .reproducible = arithmetic() == Arithmetic::kReproducible},
            .plan = *plan_,
            .config = checkpoint_->config(),
            .checkpoint_digest = checkpoint_->digest(),
            .drain = &*drain_};
    absl::StatusOr<std::optional<int>> exit_status = leader_->prepare(job_);
    if (exit_status.ok()) exit_status_ = *exit_status;
    return exit_status.status();
  }

  absl::Status load() {
    recorder_->note(FlightEvent::kLoad);
    const bool spin = bootstrap_.each_thread_has_a_core(threads_);
    const Stream::CpuOptions host{.threads = threads_, .isa = options_.runtime.isa, .spin = spin};
    stream_ = open_stream(device_, arithmetic(), host);
    if (device_.gpu) {
      const std::string lacks = device_.module->lacks(stream_->queue());
      if (bootstrap_.local_rank() == 0 && !lacks.empty()) log_line(LogLevel::kWarning, "GPUs here do without " + lacks);
    }
    MpiCommunicatorOptions window{.wait = {.spin = spin}};
    for (int rank = 0; rank < bootstrap_.size(); ++rank) {
      window.map.runs.push_back(shard_->leaves_of(rank, arithmetic()));
    }
    window.map.node_of_rank = bootstrap_.node_of_rank();
    absl::StatusOr<std::unique_ptr<Communicator>> communicator = make_mpi_communicator(window);
    if (!communicator.ok()) return communicator.status();
    communicator_ = *std::move(communicator);
    if (device_.gpu) {
      if (absl::Status status = join_gpus(window.map, host); !status.ok()) return status;
    }
    LoadOptions load{.activations = options_.runtime.activations, .kv_dtype = options_.runtime.memory.kv_dtype};
    std::optional<Progress> progress;
    if (leads() && options_.log_format == LogFormat::kText) {
      progress.emplace("Loading weights");
      load.progress = [&](int64_t done, int64_t total) { progress->update(done, total); };
    }
    absl::StatusOr<ModelWeights> weights = ModelWeights::load(*stream_, *checkpoint_, *shard_, load);
    if (!weights.ok()) return weights.status();
    weights_.emplace(*std::move(weights));
    if (progress) progress->finish(static_cast<int64_t>(weights_->memory().size()));
    worker_.emplace(
        *stream_, *communicator_, checkpoint_->config(), *shard_, *weights_,
        KvCache(*stream_, checkpoint_->config(), *shard_, options_.runtime.memory.kv_dtype, plan_->limits.blocks),
        plan_->limits, recorder_.get());
    return absl::OkStatus();
  }

  // A phase of its own: it is collective, and a rank whose weights did not load would not come.
  absl::Status record_steps() {
    if (!device_.gpu) return absl::OkStatus();
    std::optional<Progress> progress;
    if (leads() && options_.log_format == LogFormat::kText) {
      progress.emplace("Recording decode steps", [](int64_t steps) { return absl::StrFormat("%d", steps); });
    }
    int64_t recorded = 0;
    const absl::Status status = worker_->record_steps([&](int64_t done, int64_t total) {
      recorded = done;
      if (progress) progress->update(done, total);
    });
    if (progress) progress->clear();
    if (leads()) {
      log(status.ok() ? absl::StrFormat("%d sizes of decode steps run as CUDA graphs", recorded)
                      : std::string(status.message()));
    }
    return absl::OkStatus();
  }

  absl::Status join_gpus(const RankMap& map, const Stream::CpuOptions& host) {
    NcclOptions nccl{.map = map,
                     .place = [this] { return place(); },
                     .record = [this](const absl::Status& cause) { begin_to_fail(kind_of(cause), cause); },
                     .end = [this](const absl::Status& cause) { end_process(cause); }};
    PeerCommunicatorOptions peer{.map = map, .place = nccl.place, .end = [this](const absl::Status& cause) {
                                   begin_to_fail(kind_of(cause), cause);
                                   end_process(cause);
                                 }};
    if (options_.watchdog_floor_seconds == 0) {
      nccl.wait_deadline = std::chrono::milliseconds::max();
      peer.wait_deadline = std::chrono::hours(24 * 365);  // nanoseconds of it are counted on the device
    }
    absl::StatusOr<DeviceCommunicator> device =
        make_device_communicator(*stream_, std::move(communicator_), [] { return open_nccl(environment); },
                                 {.wanted = options_.all_reduce,
                                  .gpu = device_.gpu->uuid,
                                  .host = host,
                                  .nccl = std::move(nccl),
                                  .peer = std::move(peer)});
    if (!device.ok()) return device.status();
    communicator_ = std::move(device->communicator);
    if (leads() && bootstrap_.size() > 1) {
      log(absl::StrCat("sums over ranks: --allreduce ", name_of(device->choice.kind), ": ", device->choice.reason));
    }
    return absl::OkStatus();
  }

  // "step 12, 0.41 s old", for who looks into a failure.
  std::string place() const {
    const Place place = recorder_->place();
    const std::chrono::duration<double> age = recorder_->step_age(FlightRecorder::Clock::now());
    return place.in_step ? absl::StrFormat("step %d, %.2f s old", place.step, age.count())
                         : absl::StrFormat("after step %d", place.step);
  }

  // Rank 0 opens the door through which the others will fetch their plans.
  absl::Status open_plan_streams() {
    if (!leads()) return absl::OkStatus();
    RpcWorkerGroupOptions options{.ranks = bootstrap_.size(),
                                  .job_secret = absl::BytesToHexString(bootstrap_.job_secret()),
                                  .remote_ranks = bootstrap_.local_size() < bootstrap_.size(),
                                  .host = host_name(),
                                  .on_failure =
                                      [this](const absl::Status& cause) {
                                        begin_to_fail(kind_of(cause), cause);
                                        drain_->fail(cause);
                                      },
                                  .watchdog = {.floor = absl::ToChronoNanoseconds(silence())},
                                  .recorder = recorder_.get(),
                                  .flight_directory = flight_directory_};
    absl::StatusOr<std::unique_ptr<RpcWorkerGroup>> group = RpcWorkerGroup::listen(options, run_function());
    if (!group.ok()) return group.status();
    group_ = *std::move(group);
    return absl::OkStatus();
  }

  absl::Duration silence() const { return absl::Seconds(options_.watchdog_floor_seconds); }

  WorkerFunction run_function() {
    WorkerFunction run = [this](const StepPlan& plan) { return worker_->run(plan); };
    return options_.fault ? with_fault(*options_.fault, bootstrap_.rank(), std::move(run)) : run;
  }

  absl::StatusOr<int> follow(const std::string& coordinator) {
    recorder_->note(FlightEvent::kReady);
    // Rank 0 decides, and the stop plan says so.
    for (int number : {SIGINT, SIGTERM, SIGUSR1}) signal(number, SIG_IGN);
    const absl::Status status = serve_plans({.coordinator = coordinator,
                                             .rank = bootstrap_.rank(),
                                             .job_secret = absl::BytesToHexString(bootstrap_.job_secret()),
                                             .on_lost = [this](const absl::Status& cause) { end_process(cause); },
                                             .silence = silence(),
                                             .recorder = recorder_.get()},
                                            run_function());
    if (!status.ok()) return status;
    return 0;  // rank 0's word counts
  }

  absl::StatusOr<int> lead() {
    recorder_->note(FlightEvent::kReady);
    if (absl::Status status = group_->wait_for_ranks(absl::Seconds(60)); !status.ok()) return status;
    if (absl::Status status = warm_up(); !status.ok()) return status;
    drain_->catch_signals();
    absl::StatusOr<int> exit_status = leader_->lead(job_, group_.get());
    if (!exit_status.ok()) return exit_status;
    if (absl::Status cause = drain_->failure(); !cause.ok()) return cause;  // after the order to drain
    group_.reset();
    return exit_status;
  }

  // One step on all ranks before there is work: what serves has been seen to work.
  absl::Status warm_up() {
    StepPlan plan;
    plan.open = {{.slot = 0}};
    plan.blocks = {{.slot = 0, .block = 0}};
    plan.run = {{.slot = 0, .tokens = {0}, .sample = true}};
    absl::StatusOr<StepResult> result = group_->run(plan);
    if (!result.ok()) return result.status();
    if (!result->error.empty()) return absl::InternalError("the first step failed: " + result->error);
    StepPlan close;
    close.close = {0};
    return group_->run(close).status();
  }

  const RankOptions& options_;
  Bootstrap& bootstrap_;
  Leader* const leader_;
  std::string flight_directory_;
  std::unique_ptr<FlightRecorder> recorder_;
  OpenDevice device_;
  GpuView gpu_view_;
  int64_t ranks_on_gpu_ = 1;
  std::optional<Checkpoint> checkpoint_;
  std::optional<ShardSpec> shard_;
  std::optional<MemoryPlan> plan_;
  std::unique_ptr<Stream> stream_;
  std::unique_ptr<Communicator> communicator_;
  std::optional<ModelWeights> weights_;
  std::optional<Worker> worker_;
  int threads_ = 1;
  // Rank 0 only.
  std::shared_ptr<ServedModel> model_;
  std::optional<int> exit_status_;  // set when there is nothing to lead
  std::optional<Drain> drain_;
  Job job_;
  std::unique_ptr<RpcWorkerGroup> group_;
};

}  // namespace

void add_rank_options(CLI::App& command, RankOptions* options) {
  add_runtime_options(command, &options->runtime);
  add_device_options(command, &options->device, &options->arithmetic);
  add_all_reduce_option(command, &options->all_reduce);
  command
      .add_option_function<std::string>(
          "--log-format",
          [options](const std::string& name) {
            options->log_format = name == "json" ? LogFormat::kJson : LogFormat::kText;
          },
          "Lines on standard error: text, or json, one object each [text]")
      ->check(CLI::IsMember({"text", "json"}));
  command.add_option(
      "--flight-directory", options->flight_directory,
      "Where each rank keeps its last steps and last words for octet doctor --last; a clean end removes "
      "them [of batch OUTPUT.octet/flights, else /dev/shm/octet-flights-UID: a directory for each of the last jobs]");
  command
      .add_option("--watchdog-floor-seconds", options->watchdog_floor_seconds,
                  "A rank without a sign of life for so long is lost; a step may take as long, or 20 times as long as "
                  "such steps do. 0: no watchdog, for debuggers")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      .add_option_function<std::string>(
          "--inject-fault",
          [options](const std::string& text) {
            absl::StatusOr<Fault> fault = parse_fault(text);
            if (!fault.ok()) throw CLI::ValidationError("--inject-fault", std::string(fault.status().message()));
            options->fault = *fault;
          },
          "For tests: rank=1,step=20,kind=segv, or token=123,kind=segv; kinds are segv, check, hang, exit and slow")
      ->group("");  // hidden
  command.add_option("--pretend-nodes", options->pretend_nodes,
                     "Treat ranks as if on several nodes, 2+1: exercises the way between nodes on one machine");
}

int run_rank(const RankOptions& options, Leader* leader) {
  // glibc would give every few threads a pool of their own, and memory would follow which of them met which request.
  mallopt(M_ARENA_MAX, 1);
  absl::StatusOr<std::vector<int>> pretend_nodes = std::vector<int>();
  if (!options.pretend_nodes.empty()) pretend_nodes = parse_pretend_nodes(options.pretend_nodes);
  if (!pretend_nodes.ok()) {
    log("--pretend-nodes: " + std::string(pretend_nodes.status().message()));
    return options.refused;
  }
  absl::StatusOr<std::unique_ptr<Bootstrap>> bootstrap = Bootstrap::start({.pretend_nodes = *pretend_nodes});
  if (!bootstrap.ok()) {
    log(std::string(bootstrap.status().message()));
    return options.refused;
  }
  start_log(options.log_format, (*bootstrap)->rank());
  return Rank(options, **bootstrap, leader).run();
}

}  // namespace octet
