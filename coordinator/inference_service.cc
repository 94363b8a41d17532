#include "coordinator/inference_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/generate_call.h"
#include "coordinator/rpc_status.h"
#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {

struct InferenceService::Impl final : public v1::InferenceService::CallbackService {
  Impl(const StreamLimits& limits, CallListener listener) : room(limits, std::move(listener)) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override {
    return begin(std::make_shared<GenerateCall>(&room, context, request));
  }

  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context, const v1::ChatRequest* request,
                                 v1::ChatResponse* response) override {
    return begin(std::make_shared<ChatCall>(&room, context, *request, response));
  }

  // The room keeps the call until gRPC is done with it.
  template <typename Call>
  Call* begin(std::shared_ptr<Call> call) {
    room.enter(call);
    call->start();
    return call.get();
  }

  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context, const v1::TokenizeRequest* request,
                                     v1::TokenizeResponse* response) override {
    return answer(context, [=](const ServedModel& model) {
      const bool add_special = request->has_add_special() ? request->add_special() : true;
      const std::vector<int32_t> ids = model.tokenizer.encode(request->text(), add_special, request->parse_special());
      response->mutable_token_ids()->Add(ids.begin(), ids.end());
      return absl::OkStatus();
    });
  }

  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context, const v1::DetokenizeRequest* request,
                                       v1::DetokenizeResponse* response) override {
    return answer(context, [=](const ServedModel& model) {
      const auto& ids = request->token_ids();
      const int32_t vocab_size = model.limits.vocab_size;
      for (int i = 0; i < ids.size(); ++i) {
        if (ids[i] >= 0 && ids[i] < vocab_size) continue;
        return bad_request({{absl::StrCat("token_ids[", i, "]"), absl::StrCat("must be a token id of this model, 0 to ",
                                                                              vocab_size - 1, ", found ", ids[i])}});
      }
      const bool skip_special = request->has_skip_special() ? request->skip_special() : true;
      response->set_text(model.tokenizer.decode({ids.data(), static_cast<size_t>(ids.size())}, skip_special));
      return absl::OkStatus();
    });
  }

  // Runs a unary call off gRPC's threads; request and response live until its Finish().
  template <typename Function>
  grpc::ServerUnaryReactor* answer(grpc::CallbackServerContext* context, Function function) {
    grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
    room.admission.add([this, reactor, function] {
      const CallRoom::Serving serving = room.serving();
      reactor->Finish(to_rpc_status(serving.refusal.ok() ? function(*serving.model) : serving.refusal));
    });
    return reactor;
  }

  CallRoom room;
};

InferenceService::InferenceService(const StreamLimits& limits, CallListener listener)
    : impl_(std::make_unique<Impl>(limits, std::move(listener))) {}

InferenceService::~InferenceService() = default;

grpc::Service* InferenceService::service() { return impl_.get(); }

void InferenceService::open(std::shared_ptr<const ServedModel> model, Engine* engine) {
  impl_->room.serve({.model = std::move(model), .engine = engine});
}

void InferenceService::refuse(const absl::Status& status) {
  CallRoom::Serving serving = impl_->room.serving();
  serving.refusal = status;
  impl_->room.serve(std::move(serving));
}

void InferenceService::end_all(const absl::Status& status) {
  for (const std::shared_ptr<EngineCall>& call : impl_->room.calls()) call->end(status);
}

int32_t InferenceService::abort(const std::string& request_id) {
  int32_t aborted = 0;
  for (const std::shared_ptr<EngineCall>& call : impl_->room.calls()) {
    if (call->request_id() != request_id) continue;
    call->end(absl::AbortedError(absl::StrCat("request ", request_id, " was aborted through ControlService")));
    ++aborted;
  }
  return aborted;
}

size_t InferenceService::calls() const { return impl_->room.calls().size(); }

}  // namespace octet
