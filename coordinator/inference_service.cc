#include "coordinator/inference_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/generate_output.h"
#include "coordinator/generate_request.h"
#include "coordinator/rpc_status.h"
#include "coordinator/task_threads.h"
#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {
namespace {

class GenerateCall;

// What calls share with their service.
struct Shared {
  explicit Shared(const StreamLimits& limits) : limits(limits) {}

  // What serves requests now: a model and its engine, or why there is none.
  struct Serving {
    std::shared_ptr<const ServedModel> model;
    Engine* engine = nullptr;
    absl::Status refusal = absl::UnavailableError("the model is loading: try again later");
  };

  Serving serving() const {
    const std::lock_guard lock(mutex);
    return current;
  }

  const StreamLimits limits;
  mutable std::mutex mutex;
  Serving current;
  std::set<std::shared_ptr<GenerateCall>> calls;  // until OnDone
  std::condition_variable all_gone;

  // Tokenising a long prompt takes a while. Building messages does not, and one thread keeps a token's path short.
  TaskThreads admission{2};
  TaskThreads delivery{1};
};

// One Generate call: gRPC's reactor and the engine's sink. Lives while either has it. `inbox_mutex_` is held for
// moments only, and is all that the engine thread takes; `mutex_` guards the rest.
class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateResponse>,
                           public RequestSink,
                           public std::enable_shared_from_this<GenerateCall> {
 public:
  GenerateCall(Shared* shared, grpc::CallbackServerContext* context, const v1::GenerateRequest* request)
      : shared_(shared), context_(context), request_(request) {}

  void start() {
    echo_request_id();
    shared_->admission.add([self = shared_from_this()] { self->admit(); });
  }

  // Ends the call with UNAVAILABLE and this status's message.
  void end(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    cancel_request();
    message_.Clear();
    finish({grpc::StatusCode::UNAVAILABLE, std::string(status.message())});
  }

  // ---- Engine thread
  void on_event(const TokenEvent& event) override {
    const std::lock_guard lock(inbox_mutex_);
    if (closed_) return;
    inbox_.push_back(event);
    if (std::exchange(delivery_due_, true)) return;
    shared_->delivery.add([self = shared_from_this()] { self->deliver(); });
  }

  // ---- gRPC's threads
  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (ok) write();
  }

  // The client cancelled, its deadline passed, or it is gone.
  void OnCancel() override {
    const std::lock_guard lock(mutex_);
    cancel_request();
    message_.Clear();
    finish(grpc::Status::CANCELLED);
  }

  void OnDone() override {
    {
      const std::lock_guard lock(inbox_mutex_);
      closed_ = true;  // the engine may hold this a little longer, the service need not be there then
      inbox_.clear();
    }
    std::shared_ptr<GenerateCall> self = shared_from_this();
    const std::lock_guard lock(shared_->mutex);
    shared_->calls.erase(self);
    if (shared_->calls.empty()) shared_->all_gone.notify_all();
  }

 private:
  void echo_request_id();
  void admit();
  void deliver();
  void write();
  bool stalled() const;
  void cancel_request();
  void finish(const grpc::Status& status);

  Shared* const shared_;
  grpc::CallbackServerContext* const context_;  // until finish()
  const v1::GenerateRequest* const request_;    // until finish()

  std::mutex inbox_mutex_;
  std::vector<TokenEvent> inbox_;
  bool delivery_due_ = false;
  bool closed_ = false;

  std::mutex mutex_;
  Engine* engine_ = nullptr;  // with request_id_: what to cancel
  RequestId request_id_ = 0;
  std::optional<GenerateOutput> output_;  // from admission on
  std::vector<TokenEvent> taken_;         // swapped with inbox_, so that both keep their memory
  v1::GenerateResponse message_;          // what the next write says
  v1::GenerateResponse sending_;          // what gRPC reads
  bool admitting_ = true;
  std::optional<grpc::Status> deferred_finish_;
  bool message_due_ = false;
  bool writing_ = false;
  bool finished_ = false;
  absl::Time write_began_;
};

// So that both sides' logs can be joined. Metadata is printable ASCII; another id is the door's to refuse.
void GenerateCall::echo_request_id() {
  std::string id = request_->request_id();
  if (id.empty()) {
    const auto found = context_->client_metadata().find("x-request-id");
    if (found != context_->client_metadata().end()) id.assign(found->second.data(), found->second.size());
  }
  const bool printable = std::all_of(id.begin(), id.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
  if (!id.empty() && id.size() <= 128 && printable) context_->AddInitialMetadata("x-request-id", id);
}

// Admission thread. What is slow happens without the lock, so that a cancel does not wait; it only defers its finish().
void GenerateCall::admit() {
  const Shared::Serving serving = shared_->serving();
  absl::StatusOr<AcceptedRequest> accepted;
  if (serving.refusal.ok()) {
    accepted = accept_request(*request_, *serving.model);
  } else {
    accepted = serving.refusal;
  }

  const std::lock_guard lock(mutex_);
  admitting_ = false;
  if (deferred_finish_.has_value()) return finish(*deferred_finish_);
  if (!accepted.ok()) return finish(to_rpc_status(accepted.status()));
  output_.emplace(*accepted, serving.model->tokenizer);
  absl::StatusOr<RequestId> id = serving.engine->submit(std::move(accepted->request), shared_from_this());
  if (!id.ok()) return finish(to_rpc_status(id.status()));
  engine_ = serving.engine;
  request_id_ = *id;
}

// Delivery thread.
void GenerateCall::deliver() {
  const std::lock_guard lock(mutex_);
  {
    const std::lock_guard inbox_lock(inbox_mutex_);
    std::swap(inbox_, taken_);
    delivery_due_ = false;
  }
  for (const TokenEvent& event : taken_) {
    if (event.finish != FinishReason::kNone) engine_ = nullptr;  // the engine has let go of it
    if (finished_ || output_->ended()) continue;
    output_->absorb(event, &message_);
    message_due_ = true;
    if (output_->ended()) cancel_request();  // at a stop string: the engine knows nothing of text
  }
  taken_.clear();
  if (stalled()) {
    cancel_request();
    context_->TryCancel();  // OnCancel does the rest
    return;
  }
  write();
}

// REQUIRES: mutex_. One write at a time; what comes meanwhile becomes one message.
void GenerateCall::write() {
  if (writing_ || finished_ || !message_due_) return;
  const bool last = output_->ended();
  if (last && !output_->status().ok()) return finish(to_rpc_status(output_->status()));
  std::swap(message_, sending_);
  message_.Clear();
  message_due_ = false;
  writing_ = true;
  write_began_ = absl::Now();
  if (last) {
    finished_ = true;
    StartWriteAndFinish(&sending_, grpc::WriteOptions(), grpc::Status::OK);
  } else {
    StartWrite(&sending_);
  }
}

// REQUIRES: mutex_.
bool GenerateCall::stalled() const {
  if (!writing_ || finished_) return false;
  return message_.tokens_size() > shared_->limits.unread_tokens || absl::Now() - write_began_ > shared_->limits.stall;
}

// REQUIRES: mutex_.
void GenerateCall::cancel_request() {
  if (engine_ != nullptr) engine_->cancel(request_id_);
  engine_ = nullptr;
}

// REQUIRES: mutex_.
void GenerateCall::finish(const grpc::Status& status) {
  if (finished_) return;
  if (admitting_) {
    deferred_finish_ = status;  // gRPC frees the request after Finish(), and admit() is reading it
    return;
  }
  finished_ = true;
  Finish(status);
}

}  // namespace

struct InferenceService::Impl final : public v1::InferenceService::CallbackService {
  explicit Impl(const StreamLimits& limits) : shared(limits) {}

  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext* context,
                                                           const v1::GenerateRequest* request) override {
    auto call = std::make_shared<GenerateCall>(&shared, context, request);
    {
      const std::lock_guard lock(shared.mutex);
      shared.calls.insert(call);
    }
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
    shared.admission.add([this, reactor, function] {
      const Shared::Serving serving = shared.serving();
      reactor->Finish(to_rpc_status(serving.refusal.ok() ? function(*serving.model) : serving.refusal));
    });
    return reactor;
  }

  Shared shared;
};

InferenceService::InferenceService(const StreamLimits& limits) : impl_(std::make_unique<Impl>(limits)) {}

InferenceService::~InferenceService() {
  std::unique_lock lock(impl_->shared.mutex);
  impl_->shared.all_gone.wait(lock, [this] { return impl_->shared.calls.empty(); });
}

grpc::Service* InferenceService::service() { return impl_.get(); }

void InferenceService::open(std::shared_ptr<const ServedModel> model, Engine* engine) {
  const std::lock_guard lock(impl_->shared.mutex);
  impl_->shared.current = {.model = std::move(model), .engine = engine, .refusal = absl::OkStatus()};
}

void InferenceService::refuse(const absl::Status& status) {
  const std::lock_guard lock(impl_->shared.mutex);
  impl_->shared.current.refusal = status;
}

void InferenceService::end_all(const absl::Status& status) {
  std::set<std::shared_ptr<GenerateCall>> calls;
  {
    const std::lock_guard lock(impl_->shared.mutex);
    calls = impl_->shared.calls;
  }
  for (const std::shared_ptr<GenerateCall>& call : calls) call->end(status);
}

size_t InferenceService::calls() const {
  const std::lock_guard lock(impl_->shared.mutex);
  return impl_->shared.calls.size();
}

}  // namespace octet
