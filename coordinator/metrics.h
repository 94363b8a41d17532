// Metrics: what the engine and the services do, as the page http://HOST:PORT/metrics that Prometheus reads. Counts and
// times only: nothing on it comes from a prompt or an answer.
// Invariant: who reports never waits for who reads. A scrape reads counts while they change; each family is consistent
// in itself, two families may be an event apart.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/engine.h"
#include "coordinator/served_model.h"

namespace octet {

struct MetricsOptions {
  // HOST:PORT, IPv4; port 0: one that is free. Any address will do without a token: giving one is already a decision,
  // and the page shows no more than load.
  std::string address;
  bool vllm_names = false;  // the same values also under the names that dashboards and gateways know from vLLM
  std::string version;      // of this build
  int ranks = 1;
  int max_context = 0;  // positions of one sequence; where the histograms of tokens per output end
};

class Metrics final : public EngineObserver {
 public:
  // Listens. Until open() the page has the version and octet_serving 0, and nothing that would look like an idle server
  // to a gateway. INVALID_ARGUMENT for an address that is none, UNAVAILABLE for a port in use, FAILED_PRECONDITION when
  // this machine may not listen there: each names --metrics-address and says what helps.
  static absl::StatusOr<std::unique_ptr<Metrics>> start(const MetricsOptions& options);
  ~Metrics() override;  // stops listening

  // HOST:PORT with the port that was bound.
  const std::string& address() const;

  // The whole page from now on. `stats` is called by scrapes, on any thread, until close() has returned.
  void open(const ServerFacts& facts, const std::string& model, const WorkerLimits& limits,
            std::function<EngineStats()> stats);
  // The engine is about to go: the page keeps its last figures and says octet_serving 0. Any thread.
  void close();

  // Only the engine thread calls these.
  void on_step(const StepReport& report) override;
  void on_first_token(double seconds_since_submitted) override;
  void on_token(double seconds_since_previous) override;
  void on_output_end(const OutputReport& report) override;

  // A gRPC call has ended. Any thread. `method` becomes a label, and labels live for ever: REQUIRES one of the server's
  // own names, "octet.v1.InferenceService/Generate", not what a client sent.
  void on_call_end(std::string_view method, absl::StatusCode code, double seconds);

 private:
  struct Impl;
  explicit Metrics(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
