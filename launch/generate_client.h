// GenerateClient: everything between octet generate's options and a call that can be made: address, token, TLS, waiting
// for a server that starts, deadlines, and the one call that a signal may have to cancel.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "launch/generate.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {

class GenerateClient {
 public:
  explicit GenerateClient(const GenerateOptions& options)
      : options_(options), give_up_(absl::Now() + absl::Seconds(options.wait_seconds)) {}

  // Until the server can be asked. UNAVAILABLE says what to do about it.
  absl::Status connect();
  absl::Status generate(const v1::GenerateRequest& request,
                        const std::function<void(const v1::GenerateResponse&)>& take);
  // Any thread: ends whatever is under way.
  void cancel();

 private:
  absl::StatusOr<std::string> find_address();
  absl::Status wait_for_channel(const std::string& address);
  absl::Status wait_for_model(const std::string& address);
  bool may_wait();
  void say_waiting(const std::string& what);
  absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> credentials() const;
  std::unique_ptr<grpc::ClientContext> make_context() const;
  template <typename Call>
  auto with_context(std::unique_ptr<grpc::ClientContext> context, Call call);

  const GenerateOptions& options_;
  const absl::Time give_up_;
  std::string token_;
  std::shared_ptr<grpc::Channel> channel_;
  std::string waiting_for_;  // what was said last

  std::mutex mutex_;
  bool cancelled_ = false;
  grpc::ClientContext* context_ = nullptr;  // of the call under way
};

}  // namespace octet
