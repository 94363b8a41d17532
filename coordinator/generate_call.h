// GenerateCall and ChatCall: a gRPC call and its request in the engine, from the door to the one status that it ends
// with. A call lives while gRPC or the engine has it.
#pragma once

#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/time.h"
#include "coordinator/call_report.h"
#include "coordinator/engine.h"
#include "coordinator/generate_output.h"
#include "coordinator/inference_service.h"
#include "coordinator/served_model.h"
#include "coordinator/task_threads.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {

class EngineCall;

// What calls share with their service. Any thread.
class CallRoom {
 public:
  // What serves requests now: a model and its engine, or why there is none.
  struct Serving {
    std::shared_ptr<const ServedModel> model;
    Engine* engine = nullptr;
    absl::Status refusal;
  };

  CallRoom(const StreamLimits& limits, CallListener listener);
  ~CallRoom();  // waits for every call to end

  Serving serving() const;
  void serve(Serving serving);

  void enter(std::shared_ptr<EngineCall> call);
  void leave(const std::shared_ptr<EngineCall>& call, const CallReport& report);
  std::vector<std::shared_ptr<EngineCall>> calls() const;

  // How long until a place in the queue may be free, from how long calls took of late.
  absl::Duration retry_hint(const EngineStats& stats) const;

  const StreamLimits limits;

 private:
  void watch();

  const CallListener listener_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;  // the set of calls, or `closing_`
  Serving serving_;
  std::set<std::shared_ptr<EngineCall>> calls_;  // until gRPC is done with them
  double recent_call_seconds_ = 1.0;             // a moving average
  bool closing_ = false;
  std::thread watcher_;  // finds clients that stopped reading

 public:
  // Tokenising a long prompt takes a while. Building messages does not, and one thread keeps a token's path short.
  // Last, so that they end first.
  TaskThreads admission{2};
  TaskThreads delivery{1};
};

// What the two kinds of call have in common. `inbox_mutex_` is held for moments only, and is all that the engine thread
// takes; `mutex_` guards the rest.
class EngineCall : public RequestSink, public std::enable_shared_from_this<EngineCall> {
 public:
  EngineCall(CallRoom* room, grpc::CallbackServerContext* context, const char* method);

  // REQUIRES: room->enter(this) was called.
  void start();
  // Ends the call with this status, which is not OK, wherever it is.
  void end(const absl::Status& status);
  // Ends it if its client has stopped reading.
  void end_if_stalled();
  // As the client named it, or as it was told. Set by start().
  const std::string& request_id() const { return report_.request_id; }

  // Engine thread.
  void on_event(const TokenEvent& event) override;

 protected:
  // The request on the wire. Only until finish().
  virtual const v1::GenerateRequest& request() const = 0;
  // outputs() has something to say, or has ended. REQUIRES, here and below: mutex_.
  virtual void progress() = 0;
  virtual bool stalled() const { return false; }
  virtual void finish_reactor(const grpc::Status& status) = 0;

  GenerateOutputs& outputs() { return *outputs_; }
  const GenerateOutputs& outputs() const { return *outputs_; }
  // REQUIRES: admission, as outputs().
  const ServedModel& model() const { return *model_; }
  // The reactor's end; a status that is not OK cancels what the engine still does. The first counts.
  void finish(const absl::Status& status);
  // For a reactor that ends together with its last write. False when it has ended before.
  bool note_finished(const absl::Status& status);
  bool finished() const { return finished_; }

  // The reactor's events.
  void cancelled_by_client();
  void done();

  CallRoom* const room_;
  grpc::CallbackServerContext* const context_;  // until finish()
  std::mutex mutex_;

 private:
  void identify();
  absl::StatusOr<int32_t> priority_from_metadata() const;
  int64_t deadline_ms() const;
  void admit();
  absl::StatusOr<AcceptedRequest> pass_the_door(const CallRoom::Serving& serving) const;
  void deliver();
  void cancel_request();
  void drop_client();

  std::mutex inbox_mutex_;
  std::vector<TokenEvent> inbox_;
  bool delivery_due_ = false;
  bool closed_ = false;

  Engine* engine_ = nullptr;  // with engine_id_: what to cancel
  RequestId engine_id_ = 0;
  std::shared_ptr<const ServedModel> model_;  // from admission on
  std::optional<GenerateOutputs> outputs_;    // the same
  std::vector<TokenEvent> taken_;             // swapped with inbox_, so that both keep their memory
  bool admitting_ = true;
  std::optional<absl::Status> deferred_finish_;
  bool finished_ = false;
  bool done_ = false;  // gRPC has let go: no context any more
  const absl::Time began_;
  CallReport report_;
};

class GenerateCall final : public grpc::ServerWriteReactor<v1::GenerateResponse>, public EngineCall {
 public:
  GenerateCall(CallRoom* room, grpc::CallbackServerContext* context, const v1::GenerateRequest* request)
      : EngineCall(room, context, "Generate"), request_(request) {}

  void OnWriteDone(bool ok) override;
  void OnCancel() override { cancelled_by_client(); }
  void OnDone() override { done(); }

 private:
  const v1::GenerateRequest& request() const override { return *request_; }
  void progress() override;
  bool stalled() const override;
  void finish_reactor(const grpc::Status& status) override { Finish(status); }

  const v1::GenerateRequest* const request_;
  v1::GenerateResponse sending_;  // what gRPC reads
  bool writing_ = false;
  absl::Time write_began_;
};

class ChatCall final : public grpc::ServerUnaryReactor, public EngineCall {
 public:
  ChatCall(CallRoom* room, grpc::CallbackServerContext* context, const v1::ChatRequest& request,
           v1::ChatResponse* response);

  void OnCancel() override { cancelled_by_client(); }
  void OnDone() override { done(); }

 private:
  const v1::GenerateRequest& request() const override { return request_; }
  void progress() override;
  void find_tool_calls(v1::ChatOutput* output) const;
  void finish_reactor(const grpc::Status& status) override { Finish(status); }

  const v1::GenerateRequest request_;
  v1::ChatResponse* const response_;  // until finish()
  v1::GenerateResponse message_;
};

}  // namespace octet
