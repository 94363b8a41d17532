// The public server of a fake model: everything above the workers is real.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "coordinator/engine.h"
#include "coordinator/server.h"
#include "fake_model.h"

namespace octet {

struct FakeServer {
  // Answers every request with `answer` and then the end-of-turn token.
  FakeServer(ServerOptions options, const std::string& answer, ServedModel model = fake_model())
      : tokenizer(model.tokenizer),
        group(script(answer)),
        engine(std::make_unique<Engine>(EngineOptions{.limits = model.limits, .max_waiting = 1024}, &group,
                                        [](const absl::Status&) {})) {
    if (options.address.empty()) options.address = "127.0.0.1:0";
    absl::StatusOr<std::unique_ptr<Server>> started = Server::start(options);
    OCTET_CHECK(started.ok(), started.status().ToString());
    server = *std::move(started);
    const ServerFacts facts{
        .version = "0.1", .numerics_id = "n1", .ranks = 2, .threads_per_rank = 1, .device = "cpu", .isa = "portable"};
    const absl::Status opened = server->open(facts, std::make_shared<ServedModel>(std::move(model)), engine.get());
    OCTET_CHECK(opened.ok(), opened.ToString());
  }
  ~FakeServer() {
    server.reset();  // before the engine that it calls
    engine.reset();
  }

  std::vector<int32_t> script(const std::string& text) const {
    std::vector<int32_t> ids = tokenizer.encode(text, false);
    ids.push_back(kFakeImEnd);
    return ids;
  }

  // Nothing is waiting or running any more; false when that takes longer than a test should.
  bool wait_quiet() { return engine->wait_idle(std::chrono::steady_clock::now() + std::chrono::seconds(30)); }

  Tokenizer tokenizer;
  FakeWorkerGroup group;
  std::unique_ptr<Engine> engine;
  std::unique_ptr<Server> server;
};

}  // namespace octet
