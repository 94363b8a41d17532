// ControlService: the public control plane. What this server is and how busy it is, and what its operator may tell it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "coordinator/engine.h"
#include "coordinator/served_model.h"

namespace grpc {
class Service;
}

namespace octet {

// What the operator's calls do. Any thread; each returns at once.
struct ControlActions {
  std::function<int32_t(const std::string& request_id)> abort;  // how many calls it ended
  std::function<void()> drain;
  std::function<bool()> draining;
};

class ControlService {
 public:
  explicit ControlService(ControlActions actions);
  ~ControlService();

  // For ServerBuilder::RegisterService.
  grpc::Service* service();

  // Any thread. Before it every question is UNAVAILABLE: the model is loading. The engine outlives every call.
  void open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, const Engine* engine);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace octet
