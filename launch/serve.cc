#include "launch/serve.h"

#include <malloc.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "coordinator/engine.h"
#include "coordinator/metrics.h"
#include "coordinator/rpc_worker_group.h"
#include "coordinator/served_model.h"
#include "coordinator/server.h"
#include "launch/bootstrap.h"
#include "launch/log.h"
#include "launch/options.h"
#include "launch/progress.h"
#include "launch/version.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/inspect.h"
#include "worker/collective/mpi_communicator.h"
#include "worker/kv_cache.h"
#include "worker/memory_plan.h"
#include "worker/numerics.h"
#include "worker/worker.h"
#include "worker/worker_service.h"

namespace octet {
namespace {

struct ServeOptions {
  RuntimeOptions runtime;
  ServerOptions server{.address = "127.0.0.1:50051"};
  std::string metrics_address;  // empty: none
  std::string metrics_compat;
  std::string pretend_nodes;
  int max_waiting = 1024;
  bool prefix_cache = true;
  double drain_seconds = 1.0;
  double stall_seconds = 30.0;
  LogFormat log_format = LogFormat::kText;
};

// Where a signal that means drain is noticed: the handler writes, rank 0's main thread reads.
int drain_event = -1;

void on_drain_signal(int) {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t written = write(drain_event, &one, sizeof one);
}

// From now on these signals do this. Until the server serves they end the process at once, as they do by default.
void on_drain_signals(void (*handler)(int)) {
  struct sigaction action = {};
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  for (int signal : {SIGINT, SIGTERM, SIGUSR1}) sigaction(signal, &action, nullptr);
}

// The name under which other nodes reach this one.
std::string host_name() {
  char name[256] = {};
  gethostname(name, sizeof name - 1);
  return name;
}

// One line for each call that has ended.
void log_call(const CallReport& call) {
  nlohmann::ordered_json fields = {{"method", call.method},
                                   {"request_id", call.request_id},
                                   {"status", absl::StatusCodeToString(call.status.code())}};
  if (!call.trace_id.empty()) fields["trace_id"] = call.trace_id;
  fields.update({{"prompt_tokens", call.prompt_tokens},
                 {"cached_tokens", call.cached_tokens},
                 {"completion_tokens", call.completion_tokens},
                 {"first_token_seconds", call.first_token_seconds},
                 {"total_seconds", call.total_seconds}});
  // What is wrong with a request quotes the request, which is nobody else's to read.
  const bool quotes_client = absl::IsInvalidArgument(call.status) || absl::IsFailedPrecondition(call.status);
  if (!call.status.ok() && !quotes_client) fields["error"] = std::string(call.status.message());
  log_line(LogLevel::kInfo, "call ended", fields);
}

// The last resort: a rank inside a collective whose peers are gone never comes back, so its process ends here.
[[noreturn]] void end_process(int rank, const absl::Status& cause) {
  log_line(LogLevel::kError, absl::StrFormat("rank %d ends: %s", rank, std::string(cause.message())));
  std::_Exit(1);
}

// One rank from start to end. Members are declared in the order in which they are made and outlive what uses them.
class Rank {
 public:
  Rank(const ServeOptions& options, Bootstrap& job) : options_(options), job_(job) {}

  absl::Status run() {
    // Each phase ends with agree(): what fails on one rank fails on all, before anyone waits for it.
    for (auto phase : {&Rank::open_model, &Rank::plan, &Rank::listen, &Rank::load, &Rank::open_plan_streams}) {
      if (absl::Status status = job_.agree((this->*phase)()); !status.ok()) return status;
    }
    const std::string local_address = job_.broadcast(leads() ? group_->local_address() : "");
    const std::string remote_address = job_.broadcast(leads() ? group_->remote_address() : "");
    const absl::Status status =
        leads() ? coordinate() : follow(job_.shares_node_with_rank_0() ? local_address : remote_address);
    // Beyond this point ranks cannot agree any more: one that fails goes at once, and the others notice.
    if (!status.ok()) end_process(job_.rank(), status);
    return status;
  }

 private:
  bool leads() const { return job_.rank() == 0; }

  absl::Status open_model() {
    absl::StatusOr<Checkpoint> checkpoint = Checkpoint::open(options_.runtime.model);
    const uint64_t digest = checkpoint.ok() ? checkpoint->digest() : 0;
    if (absl::Status status = job_.agree(checkpoint.status()); !status.ok()) return status;
    checkpoint_ = *std::move(checkpoint);
    const std::string id = numerics_id(checkpoint_->config(), options_.runtime.isa, options_.runtime.activations);
    if (absl::Status status = job_.all_equal("model files", absl::StrFormat("%016x", digest)); !status.ok())
      return status;
    if (absl::Status status = job_.all_equal("numerics id", id); !status.ok()) return status;
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
    absl::StatusOr<ShardSpec> shard = ShardSpec::make(checkpoint_->config(), job_.rank(), job_.size());
    if (!shard.ok()) return shard.status();
    shard_ = *shard;
    absl::StatusOr<int64_t> memory = job_.own_memory();
    if (!memory.ok()) return memory.status();
    std::vector<int64_t> available;
    for (uint64_t bytes : job_.all_gather(static_cast<uint64_t>(*memory)))
      available.push_back(static_cast<int64_t>(bytes));
    MemoryOptions options = options_.runtime.memory;
    options.window_bytes = 2 * kDefaultAreaBytes;
    absl::StatusOr<MemoryPlan> plan = plan_memory(*checkpoint_, options, available);
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

  // Before the weights are loaded is the time to find out that a port is taken.
  absl::Status listen() {
    if (!leads()) return absl::OkStatus();
    if (absl::Status status = listen_for_metrics(); !status.ok()) return status;  // first: calls are counted there
    drain_event = eventfd(0, EFD_CLOEXEC);
    ServerOptions server_options = options_.server;
    server_options.streams.stall = absl::Seconds(options_.stall_seconds);
    server_options.on_drain = [] { on_drain_signal(0); };
    server_options.on_call_end = [this](const CallReport& call) {
      log_call(call);
      if (metrics_) metrics_->on_call_end(call.method, call.status.code(), call.total_seconds);
    };
    absl::StatusOr<std::unique_ptr<Server>> server = Server::start(server_options);
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    return absl::OkStatus();
  }

  absl::Status listen_for_metrics() {
    if (options_.metrics_address.empty()) return absl::OkStatus();
    absl::StatusOr<std::unique_ptr<Metrics>> metrics = Metrics::start({.address = options_.metrics_address,
                                                                       .vllm_names = options_.metrics_compat == "vllm",
                                                                       .version = kVersion,
                                                                       .ranks = job_.size(),
                                                                       .max_context = plan_->limits.max_context});
    if (!metrics.ok()) return metrics.status();
    metrics_ = *std::move(metrics);
    log(absl::StrFormat("metrics at http://%s/metrics", metrics_->address()));
    return absl::OkStatus();
  }

  absl::Status load() {
    threads_ = options_.runtime.threads.value_or(job_.own_cores());
    const bool spin = job_.each_thread_has_a_core(threads_);
    stream_.emplace(Stream::CpuOptions{.threads = threads_, .isa = options_.runtime.isa, .spin = spin});
    MpiCommunicatorOptions window{.wait = {.spin = spin}};
    for (int rank = 0; rank < job_.size(); ++rank) window.map.runs.push_back(shard_->run_of(rank));
    window.map.node_of_rank = job_.node_of_rank();
    absl::StatusOr<std::unique_ptr<Communicator>> communicator = make_mpi_communicator(window);
    if (!communicator.ok()) return communicator.status();
    communicator_ = *std::move(communicator);

    LoadOptions load{.activations = options_.runtime.activations};
    std::optional<Progress> progress;
    if (leads() && options_.log_format == LogFormat::kText) {
      progress.emplace("Loading weights");
      load.progress = [&](int64_t done, int64_t total) { progress->update(done, total); };
    }
    absl::StatusOr<ModelWeights> weights = ModelWeights::load(*stream_, *checkpoint_, *shard_, load);
    if (!weights.ok()) return weights.status();
    weights_.emplace(*std::move(weights));
    if (progress) progress->finish(static_cast<int64_t>(weights_->memory().size()));
    worker_.emplace(*stream_, *communicator_, checkpoint_->config(), *shard_, *weights_,
                    KvCache(checkpoint_->config(), *shard_, plan_->limits.blocks), plan_->limits);
    return absl::OkStatus();
  }

  // Rank 0 opens the door through which the others will fetch their plans.
  absl::Status open_plan_streams() {
    if (!leads()) return absl::OkStatus();
    RpcWorkerGroupOptions options{.ranks = job_.size(),
                                  .job_secret = absl::BytesToHexString(job_.job_secret()),
                                  .remote_ranks = job_.local_size() < job_.size(),
                                  .host = host_name(),
                                  .on_failure = [this](const absl::Status& cause) { fail(cause); }};
    absl::StatusOr<std::unique_ptr<RpcWorkerGroup>> group =
        RpcWorkerGroup::listen(options, [this](const StepPlan& plan) { return worker_->run(plan); });
    if (!group.ok()) return group.status();
    group_ = *std::move(group);
    return absl::OkStatus();
  }

  absl::Status follow(const std::string& coordinator) {
    on_drain_signals(SIG_IGN);  // rank 0 decides, and the stop plan says so
    const int rank = job_.rank();
    return serve_plans({.coordinator = coordinator,
                        .rank = rank,
                        .job_secret = absl::BytesToHexString(job_.job_secret()),
                        .on_lost = [rank](const absl::Status& cause) { end_process(rank, cause); }},
                       [this](const StepPlan& plan) { return worker_->run(plan); });
  }

  absl::Status coordinate() {
    if (absl::Status status = group_->wait_for_ranks(absl::Seconds(60)); !status.ok()) return status;
    if (absl::Status status = warm_up(); !status.ok()) return status;

    on_drain_signals(on_drain_signal);
    std::optional<Engine> engine;
    engine.emplace(EngineOptions{.limits = plan_->limits,
                                 .max_waiting = options_.max_waiting,
                                 .prefix_cache = options_.prefix_cache,
                                 .observer = metrics_.get()},
                   group_.get(), [this](const absl::Status& cause) { fail(cause); });
    model_->limits = plan_->limits;
    const ServerFacts facts{
        .version = kVersion,
        .numerics_id = numerics_id(checkpoint_->config(), stream_->isa(), options_.runtime.activations),
        .ranks = job_.size(),
        .threads_per_rank = threads_,
        .device = "cpu",
        .isa = name_of(stream_->isa())};
    if (absl::Status status = server_->open(facts, model_, &*engine); !status.ok()) return status;
    if (metrics_) metrics_->open(facts, model_->name, plan_->limits, [&engine] { return engine->stats(); });
    log(absl::StrFormat("serving %s on %s: %d ranks with %d threads (%s), numerics id %s", model_->name,
                        server_->address(), facts.ranks, facts.threads_per_rank, facts.isa, facts.numerics_id));

    uint64_t events = 0;
    while (read(drain_event, &events, sizeof events) < 0) {
    }
    if (const absl::Status cause = failure(); !cause.ok()) {
      server_->shutdown(cause, absl::Seconds(1));
      end_process(0, cause);  // the engine's end would wait for a step that may never end
    }
    log("draining");
    server_->drain();
    engine->drain();
    engine->wait_idle(std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::milliseconds>(
                                                             std::chrono::duration<double>(options_.drain_seconds)));
    server_->shutdown(absl::UnavailableError("the server is shutting down"), absl::Milliseconds(500));
    if (metrics_) metrics_->close();
    engine.reset();  // sends the stop plan
    group_.reset();
    log("drained");
    return absl::OkStatus();
  }

  // Any thread, any number of times: the group is dead, idle or not. The first cause counts; the main thread does the
  // rest.
  void fail(const absl::Status& cause) {
    {
      std::lock_guard lock(failure_mutex_);
      if (failure_.ok()) failure_ = cause;
    }
    on_drain_signal(0);
  }

  absl::Status failure() {
    std::lock_guard lock(failure_mutex_);
    return failure_;
  }

  // One step on all ranks before the first client is let in: what serves has been seen to work.
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

  const ServeOptions& options_;
  Bootstrap& job_;
  std::optional<Checkpoint> checkpoint_;
  std::optional<ShardSpec> shard_;
  std::optional<MemoryPlan> plan_;
  std::optional<Stream> stream_;
  std::unique_ptr<Communicator> communicator_;
  std::optional<ModelWeights> weights_;
  std::optional<Worker> worker_;
  int threads_ = 1;
  // Rank 0 only.
  std::mutex failure_mutex_;
  absl::Status failure_;
  std::shared_ptr<ServedModel> model_;
  std::unique_ptr<Metrics> metrics_;  // null: not asked for
  std::unique_ptr<Server> server_;    // its calls are counted there
  std::unique_ptr<RpcWorkerGroup> group_;
};

int run_serve(const ServeOptions& options) {
  // glibc would give every few threads a pool of their own, and memory would follow which of them met which request.
  mallopt(M_ARENA_MAX, 1);
  absl::StatusOr<std::vector<int>> pretend_nodes = std::vector<int>();
  if (!options.pretend_nodes.empty()) pretend_nodes = parse_pretend_nodes(options.pretend_nodes);
  if (!pretend_nodes.ok()) {
    log("--pretend-nodes: " + std::string(pretend_nodes.status().message()));
    return 1;
  }
  absl::StatusOr<std::unique_ptr<Bootstrap>> job = Bootstrap::start({.pretend_nodes = *pretend_nodes});
  if (!job.ok()) {
    log(std::string(job.status().message()));
    return 1;
  }
  start_log(options.log_format, (*job)->rank());
  // Every rank has the same status; one says it.
  const absl::Status status = Rank(options, **job).run();
  if (!status.ok() && (*job)->rank() == 0) log(std::string(status.message()));
  return status.ok() ? 0 : 1;
}

}  // namespace

void add_serve_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<ServeOptions>();
  CLI::App* command = app.add_subcommand("serve", "Serve a model over gRPC: one rank of mpirun or srun");
  command->footer(
      "mpirun -np 8 octet serve --model Llama-3.1-405B-Instruct-FP8\n"
      "srun --mpi=pmix -n 8 octet serve --model ... --address 0.0.0.0:50051 --token-file ~/.octet-token\n"
      "SIGTERM, SIGINT and SIGUSR1 drain: no new requests, those under way have --drain-seconds to end.");
  add_runtime_options(*command, &options->runtime);
  command->add_option("--address", options->server.address, "HOST:PORT to listen on; port 0 takes a free one")
      ->capture_default_str();
  command->add_option("--address-file", options->server.address_file,
                      "File that gets {\"grpc\": \"HOST:PORT\"} when ready, for octet generate --address-file");
  AccessOptions& access = options->server.access;
  command->add_option("--token-file", access.token_file,
                      "File with the token that every call must carry (authorization: Bearer TOKEN)");
  command->add_option("--tls-cert", access.tls_cert,
                      "PEM file with this server's certificate chain: TLS instead of plain text");
  command->add_option("--tls-key", access.tls_key, "PEM file with its private key");
  command->add_option("--tls-client-ca", access.tls_client_ca,
                      "PEM file with authorities: clients must have a certificate of theirs");
  command->add_option("--control-address", options->server.control_address,
                      "HOST:PORT or unix:/PATH where ControlService listens instead of beside the others");
  command->add_flag("--channelz", options->server.channelz, "Serve grpc.channelz, for looking into connections");
  command->add_flag("--insecure", options->server.access.insecure,
                    "Listen beyond this machine without a token, knowingly");
  command->add_option("--advertise-host", options->server.advertise_host,
                      "What others call this machine, for the address file [its host name]");
  CLI::Option* metrics_address = command->add_option(
      "--metrics-address", options->metrics_address,
      "HOST:PORT for Prometheus, IPv4: http://HOST:PORT/metrics, without a token; port 0 takes a free one [none]");
  command
      ->add_option("--metrics-compat", options->metrics_compat,
                   "vllm: serve metrics under vLLM's names too, for dashboards and gateways made for them")
      ->check(CLI::IsMember({"vllm"}))
      ->needs(metrics_address);
  command->add_option("--max-waiting", options->max_waiting, "Outputs that may wait for a slot; more are refused")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command->add_flag("!--no-prefix-cache", options->prefix_cache,
                    "Compute every prompt whole, although its beginning was computed before");
  command
      ->add_option("--stall-seconds", options->stall_seconds,
                   "A client that reads nothing for this long while its answer waits loses its call")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option_function<std::string>(
          "--log-format",
          [options](const std::string& name) {
            options->log_format = name == "json" ? LogFormat::kJson : LogFormat::kText;
          },
          "Lines on standard error: text, or json, one object each [text]")
      ->check(CLI::IsMember({"text", "json"}));
  command
      ->add_option("--drain-seconds", options->drain_seconds,
                   "Time that requests under way get when the server is told to end; mpirun itself allows about 2 s")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--pretend-nodes", options->pretend_nodes,
                      "Treat ranks as if on several nodes, 2+1: exercises the way between nodes on one machine");
  command->callback([options, exit_code] { *exit_code = run_serve(*options); });
}

}  // namespace octet
