// The least that a gRPC server can do to stream tokens: what tests/bench/stream_cost_bench.cc compares Octet with. Each
// Generate call gets max_tokens tokens, TOKENS in a message, a message every MICROSECONDS (0: as fast as it is taken),
// without engine, scheduler, detokenizer or limits. Prints its address, ends when stdin does.
// Usage: bare_server MICROSECONDS TOKENS
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {
namespace {

class BareCall;

// Calls that wait for the next tick; ended ones are taken out before they are gone.
struct Ticking {
  std::mutex mutex;
  std::set<BareCall*> calls;
};

class BareCall final : public grpc::ServerWriteReactor<v1::GenerateResponse> {
 public:
  BareCall(const v1::GenerateRequest& request, int tokens_per_message, Ticking* ticking)
      : left_(request.stopping().max_tokens()), tokens_per_message_(tokens_per_message), ticking_(ticking) {
    if (ticking_ == nullptr) {
      write();
      return;
    }
    const std::lock_guard lock(ticking_->mutex);
    ticking_->calls.insert(this);
  }

  // Ticking thread, under its mutex; one message at a time.
  void tick() {
    if (left_ > 0 && !writing_.exchange(true)) write();
  }

 private:
  // As large as Octet's messages to a client that asks for tokens only.
  void write() {
    message_.Clear();
    for (int i = 0; i < tokens_per_message_ && left_ > 0; ++i, --left_) {
      message_.add_tokens()->set_token_id(100);
      message_.mutable_text()->append("a");
    }
    if (left_ > 0) return StartWrite(&message_);
    message_.set_finish_reason(v1::FINISH_REASON_LENGTH);
    message_.mutable_usage()->set_completion_tokens(1);
    StartWriteAndFinish(&message_, grpc::WriteOptions(), grpc::Status::OK);
  }

  void OnWriteDone(bool ok) override {
    if (!ok) return;
    if (ticking_ == nullptr) return write();
    writing_ = false;
  }
  void OnCancel() override {}
  void OnDone() override {
    if (ticking_ != nullptr) {
      const std::lock_guard lock(ticking_->mutex);
      ticking_->calls.erase(this);
    }
    delete this;
  }

  int left_;
  const int tokens_per_message_;
  Ticking* const ticking_;
  std::atomic<bool> writing_{false};
  v1::GenerateResponse message_;
};

class BareService final : public v1::InferenceService::CallbackService {
 public:
  BareService(int tokens_per_message, Ticking* ticking) : tokens_per_message_(tokens_per_message), ticking_(ticking) {}
  grpc::ServerWriteReactor<v1::GenerateResponse>* Generate(grpc::CallbackServerContext*,
                                                           const v1::GenerateRequest* request) override {
    return new BareCall(*request, tokens_per_message_, ticking_);
  }

 private:
  const int tokens_per_message_;
  Ticking* const ticking_;
};

int serve(int step_us, int tokens_per_message) {
  Ticking ticking;
  BareService service(tokens_per_message, step_us > 0 ? &ticking : nullptr);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::printf("127.0.0.1:%d\n", port);
  std::fflush(stdout);
  std::atomic<bool> ended{false};
  std::thread ticker([&] {
    while (step_us > 0 && !ended) {
      std::this_thread::sleep_for(std::chrono::microseconds(step_us));
      const std::lock_guard lock(ticking.mutex);
      for (BareCall* call : ticking.calls) call->tick();
    }
  });
  while (std::getchar() != EOF) {
  }
  ended = true;
  ticker.join();
  server->Shutdown(std::chrono::system_clock::now());
  return 0;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: bare_server MICROSECONDS TOKENS\n");
    return 2;
  }
  return octet::serve(std::atoi(argv[1]), std::atoi(argv[2]));
}
