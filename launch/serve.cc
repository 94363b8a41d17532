#include "launch/serve.h"

#include <chrono>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_format.h"
#include "absl/time/time.h"
#include "coordinator/engine.h"
#include "coordinator/metrics.h"
#include "coordinator/server.h"
#include "launch/drain.h"
#include "launch/log.h"
#include "launch/rank.h"
#include "launch/version.h"

namespace octet {
namespace {

struct ServeOptions {
  RankOptions rank;
  ServerOptions server{.address = "127.0.0.1:50051"};
  std::string metrics_address;  // empty: none
  std::string metrics_compat;
  int max_waiting = 1024;
  bool prefix_cache = true;
  double drain_seconds = 10.0;
  double stall_seconds = 30.0;
};

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

class Serving final : public Leader {
 public:
  explicit Serving(const ServeOptions& options) : options_(options) {}

  absl::StatusOr<std::optional<int>> prepare(const Job& job) override {
    if (absl::Status status = listen_for_metrics(job); !status.ok()) return status;  // first: calls are counted there
    ServerOptions server_options = options_.server;
    server_options.job_id = job_id();
    server_options.job_end = job_end();
    server_options.streams.stall = absl::Seconds(options_.stall_seconds);
    server_options.on_drain = [drain = job.drain] { drain->request("ControlService.Drain"); };
    server_options.on_call_end = [this](const CallReport& call) {
      log_call(call);
      if (metrics_) metrics_->on_call_end(call.method, call.status.code(), call.total_seconds);
    };
    absl::StatusOr<std::unique_ptr<Server>> server = Server::start(server_options);
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    return std::nullopt;
  }

  absl::StatusOr<int> lead(const Job& job, WorkerGroup* workers) override {
    engine_.emplace(EngineOptions{.limits = job.plan.limits,
                                  .max_waiting = options_.max_waiting,
                                  .prefix_cache = options_.prefix_cache,
                                  .observer = metrics_.get()},
                    workers, [drain = job.drain](const absl::Status& cause) { drain->fail(cause); });
    if (absl::Status status = open(job); !status.ok()) return status;
    const absl::Duration patience = absl::Seconds(options_.drain_seconds);
    const DrainOrder order = job.drain->wait(job_end() - patience - kGoodbye);
    if (order.failure.ok()) finish_requests(order, patience);
    if (absl::Status cause = job.drain->failure(); !cause.ok()) {
      server_->shutdown(cause, absl::Seconds(1));
      return cause;
    }
    server_->shutdown(absl::UnavailableError("the server is shutting down"), absl::Milliseconds(500));
    if (metrics_) metrics_->close();
    engine_.reset();  // sends the stop plan
    log("drained");
    return 0;
  }

 private:
  // What a server needs after its last request, before the batch system ends the job.
  static constexpr absl::Duration kGoodbye = absl::Seconds(5);

  absl::Status listen_for_metrics(const Job& job) {
    if (options_.metrics_address.empty()) return absl::OkStatus();
    absl::StatusOr<std::unique_ptr<Metrics>> metrics = Metrics::start({.address = options_.metrics_address,
                                                                       .vllm_names = options_.metrics_compat == "vllm",
                                                                       .version = kVersion,
                                                                       .ranks = job.facts.ranks,
                                                                       .max_context = job.plan.limits.max_context});
    if (!metrics.ok()) return metrics.status();
    metrics_ = *std::move(metrics);
    log(absl::StrFormat("metrics at http://%s/metrics", metrics_->address()));
    return absl::OkStatus();
  }

  void finish_requests(const DrainOrder& order, absl::Duration patience) {
    log("draining: " + order.reason);
    server_->drain();
    engine_->drain();
    engine_->wait_idle(std::chrono::steady_clock::now() + absl::ToChronoMilliseconds(order.time_left(patience)));
  }

  absl::Status open(const Job& job) {
    if (absl::Status status = server_->open(job.facts, job.model, &*engine_); !status.ok()) return status;
    if (metrics_) {
      metrics_->open(job.facts, job.model->name, job.plan.limits, [this] { return engine_->stats(); });
    }
    log(absl::StrFormat("serving %s on %s: %d ranks with %d threads (%s), numerics id %s", job.model->name,
                        server_->address(), job.facts.ranks, job.facts.threads_per_rank, job.facts.isa,
                        job.facts.numerics_id));
    return absl::OkStatus();
  }

  const ServeOptions& options_;
  std::unique_ptr<Metrics> metrics_;  // null: not asked for
  std::unique_ptr<Server> server_;    // its calls are counted there
  std::optional<Engine> engine_;
};

}  // namespace

void add_serve_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<ServeOptions>();
  CLI::App* command = app.add_subcommand("serve", "Serve a model over gRPC: one rank of mpirun or srun");
  command->footer(
      "mpirun -np 8 octet serve --model Llama-3.1-405B-Instruct-FP8\n"
      "srun --mpi=pmix -n 8 octet serve --model ... --address 0.0.0.0:50051 --token-file ~/.octet-token\n"
      "SIGTERM, SIGINT and SIGUSR1 drain: no new requests, those under way have --drain-seconds to end.");
  add_rank_options(*command, &options->rank);
  command->add_option("--address", options->server.address, "HOST:PORT to listen on; port 0 takes a free one")
      ->capture_default_str();
  command->add_option(
      "--address-file", options->server.address_file,
      "File that says {\"grpc\": \"HOST:PORT\"} while requests are taken, for octet generate --address-file");
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
      ->add_option("--drain-seconds", options->drain_seconds,
                   "Time that requests under way get when the server is told to end; a second when mpirun is dying")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->callback([options, exit_code] {
    Serving serving(*options);
    *exit_code = run_rank(options->rank, &serving);
  });
}

}  // namespace octet
