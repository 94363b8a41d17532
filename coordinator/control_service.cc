#include "coordinator/control_service.h"

#include <grpcpp/grpcpp.h>

#include <unistd.h>

#include <fstream>
#include <mutex>
#include <optional>
#include <utility>

#include "coordinator/rpc_status.h"
#include "octet/v1/control_service.grpc.pb.h"

namespace octet {
namespace {

// Of this process. 0 when the system does not tell.
int64_t resident_bytes() {
  std::ifstream file("/proc/self/statm");
  int64_t all_pages = 0, resident_pages = 0;
  file >> all_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

}  // namespace

struct ControlService::Impl final : public v1::ControlService::CallbackService {
  struct Open {
    ServerFacts facts;
    std::shared_ptr<const ServedModel> model;
    const Engine* engine = nullptr;
  };

  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const v1::GetServerInfoRequest*,
                                          v1::GetServerInfoResponse* response) override {
    return answer(context, [response](const Open& open) {
      response->set_version(open.facts.version);
      response->set_numerics_id(open.facts.numerics_id);
      response->set_ranks(open.facts.ranks);
      response->set_threads_per_rank(open.facts.threads_per_rank);
      response->set_device(open.facts.device);
      response->set_isa(open.facts.isa);
      response->set_kv_blocks(open.model->limits.blocks);
      response->set_kv_block_tokens(open.model->limits.block_tokens);
      response->set_max_context(open.model->limits.max_context);
    });
  }

  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context, const v1::GetModelInfoRequest*,
                                         v1::GetModelInfoResponse* response) override {
    return answer(context, [response](const Open& open) {
      const ServedModel& model = *open.model;
      response->set_model(model.name);
      response->set_architecture(model.architecture);
      response->set_quant_method(model.quant_method);
      response->set_vocab_size(model.limits.vocab_size);
      response->set_max_context(model.limits.max_context);
      response->mutable_eos_token_ids()->Add(model.eos_token_ids.begin(), model.eos_token_ids.end());
      response->set_bos_token_id(model.tokenizer.bos_token_id().value_or(-1));
      if (model.chat.ok()) response->set_chat_format(std::string(model.chat->name()));
      response->set_parameters(model.parameters);
    });
  }

  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context, const v1::GetLoadRequest*,
                                    v1::GetLoadResponse* response) override {
    return answer(context, [this, response](const Open& open) {
      const EngineStats stats = open.engine->stats();
      response->set_requests_waiting(stats.waiting);
      response->set_requests_running(stats.running);
      response->set_kv_blocks_total(stats.blocks_total);
      response->set_kv_blocks_free(stats.blocks_free);
      response->set_steps(stats.steps);
      response->set_prompt_tokens(stats.prompt_tokens);
      response->set_generated_tokens(stats.generated_tokens);
      response->set_kv_blocks_cached(stats.blocks_cached);
      response->set_cached_prompt_tokens(stats.cached_prompt_tokens);
      response->set_preemptions(stats.preemptions);
      response->set_resident_bytes(resident_bytes());
      response->set_draining(actions.draining());
    });
  }

  grpc::ServerUnaryReactor* Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                  v1::AbortResponse* response) override {
    int32_t aborted = 0;
    for (const std::string& id : request->request_ids()) aborted += actions.abort(id);
    response->set_aborted(aborted);
    return finished(context);
  }

  grpc::ServerUnaryReactor* Drain(grpc::CallbackServerContext* context, const v1::DrainRequest*,
                                  v1::DrainResponse*) override {
    actions.drain();
    return finished(context);
  }

  static grpc::ServerUnaryReactor* finished(grpc::CallbackServerContext* context) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    reactor->Finish(grpc::Status::OK);
    return reactor;
  }

  template <typename Function>
  grpc::ServerUnaryReactor* answer(grpc::CallbackServerContext* context, Function fill) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    const std::lock_guard lock(mutex);
    if (open.has_value()) {
      fill(*open);
      reactor->Finish(grpc::Status::OK);
    } else {
      reactor->Finish(to_rpc_status(model_is_loading()));
    }
    return reactor;
  }

  explicit Impl(ControlActions actions) : actions(std::move(actions)) {}

  const ControlActions actions;
  std::mutex mutex;
  std::optional<Open> open;
};

ControlService::ControlService(ControlActions actions) : impl_(std::make_unique<Impl>(std::move(actions))) {}
ControlService::~ControlService() = default;

grpc::Service* ControlService::service() { return impl_.get(); }

void ControlService::open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, const Engine* engine) {
  const std::lock_guard lock(impl_->mutex);
  impl_->open = {.facts = facts, .model = std::move(model), .engine = engine};
}

}  // namespace octet
