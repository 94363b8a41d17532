// ControlService: the public control plane. What this server is and how busy it is; plain reads of facts and of the
// engine's counters.
#pragma once

#include <memory>

#include "coordinator/engine.h"
#include "coordinator/served_model.h"

namespace grpc {
class Service;
}

namespace octet {

class ControlService {
 public:
  ControlService();
  ~ControlService();

  // For ServerBuilder::RegisterService.
  grpc::Service* service();

  // Any thread. Before it every call is UNAVAILABLE: the model is loading. The engine outlives every call.
  void open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, const Engine* engine);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
