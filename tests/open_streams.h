// Many Generate streams to one server that go on until something ends them, with how and when each ended.
#pragma once

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {

class OpenStreams {
 public:
  struct End {
    grpc::StatusCode code = grpc::StatusCode::OK;
    std::string message;
    std::chrono::steady_clock::time_point time;
  };

  // Prompts are kFirstToken and what tells one stream from another.
  static constexpr int32_t kFirstToken = 7;

  OpenStreams(const std::string& address, int streams)
      : stub_(v1::InferenceService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))) {
    for (int i = 0; i < streams; ++i) streams_.push_back(std::make_unique<Stream>(this, i));
  }
  ~OpenStreams() {
    for (const auto& stream : streams_) stream->context.TryCancel();
    wait_for_ends(std::chrono::seconds(60));
  }

  // Until every stream has had a message.
  bool wait_for_tokens(std::chrono::seconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [&] { return begun_ == streams_.size(); });
  }
  bool wait_for_ends(std::chrono::seconds limit) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, limit, [&] { return ended_ == streams_.size(); });
  }
  // REQUIRES: all have ended.
  std::vector<End> ends() const {
    std::vector<End> ends;
    for (const auto& stream : streams_) ends.push_back(stream->end);
    return ends;
  }

 private:
  struct Stream final : grpc::ClientReadReactor<v1::GenerateResponse> {
    Stream(OpenStreams* owner, int number) : owner(owner) {
      for (int32_t token : {kFirstToken, number % 250}) request.mutable_token_ids()->add_ids(token);
      request.mutable_stopping()->set_max_tokens(4000);
      request.mutable_stopping()->set_ignore_eos(true);
      owner->stub_->async()->Generate(&context, &request, this);
      StartRead(&response);
      StartCall();
    }
    void OnReadDone(bool ok) override {
      if (!ok) return;
      if (!std::exchange(begun, true)) owner->count(&owner->begun_);
      StartRead(&response);
    }
    void OnDone(const grpc::Status& status) override {
      end = {status.error_code(), status.error_message(), std::chrono::steady_clock::now()};
      owner->count(&owner->ended_);
    }
    OpenStreams* const owner;
    grpc::ClientContext context;
    v1::GenerateRequest request;
    v1::GenerateResponse response;
    bool begun = false;
    End end;
  };

  void count(size_t* what) {
    const std::lock_guard lock(mutex_);
    ++*what;
    changed_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  size_t begun_ = 0, ended_ = 0;
  std::unique_ptr<v1::InferenceService::Stub> stub_;
  std::vector<std::unique_ptr<Stream>> streams_;
};

}  // namespace octet
