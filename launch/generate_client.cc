#include "launch/generate_client.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/token_auth.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {
namespace {

constexpr absl::Duration kPollInterval = absl::Milliseconds(100);

absl::StatusOr<std::string> read_pem(const char* flag, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (file && !text.str().empty()) return text.str();
  return absl::InvalidArgumentError(absl::StrCat(flag, " ", path, " cannot be read, or is empty"));
}

}  // namespace

// Said once per phase of waiting, so that nobody looks at a silent terminal.
void GenerateClient::say_waiting(const std::string& what) {
  if (what == waiting_for_) return;
  waiting_for_ = what;
  std::fprintf(stderr, "octet: %s\n", what.c_str());
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> GenerateClient::credentials() const {
  const absl::StatusOr<std::string> authority = read_pem("--tls-ca", options_.tls_ca);
  const absl::StatusOr<std::string> certificate = read_pem("--tls-cert", options_.tls_cert);
  const absl::StatusOr<std::string> key = read_pem("--tls-key", options_.tls_key);
  for (const auto* file : {&authority, &certificate, &key}) {
    if (!file->ok()) return file->status();
  }
  if (certificate->empty() != key->empty()) return absl::InvalidArgumentError("--tls-cert and --tls-key go together");
  if (authority->empty() && certificate->empty()) return grpc::InsecureChannelCredentials();
  return grpc::SslCredentials({.pem_root_certs = *authority, .pem_private_key = *key, .pem_cert_chain = *certificate});
}

void GenerateClient::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

// Sleeps a little; false when the time for waiting is over.
bool GenerateClient::may_wait() {
  {
    const std::lock_guard lock(mutex_);
    if (cancelled_) return false;
  }
  if (absl::Now() >= give_up_) return false;
  absl::SleepFor(kPollInterval);
  return true;
}

std::unique_ptr<grpc::ClientContext> GenerateClient::make_context() const {
  auto context = std::make_unique<grpc::ClientContext>();
  if (!options_.request_id.empty()) context->AddMetadata("x-request-id", options_.request_id);
  if (!token_.empty()) context->AddMetadata("authorization", absl::StrCat("Bearer ", token_));
  return context;
}

// Runs a call that a signal can cancel.
template <typename Call>
auto GenerateClient::with_context(std::unique_ptr<grpc::ClientContext> context, Call call) {
  {
    const std::lock_guard lock(mutex_);
    context_ = context.get();
    if (cancelled_) context_->TryCancel();
  }
  auto result = call(context.get());
  const std::lock_guard lock(mutex_);
  context_ = nullptr;
  return result;
}

absl::StatusOr<std::string> GenerateClient::find_address() {
  if (options_.address_file.empty()) return options_.address;
  while (true) {
    std::ifstream file(options_.address_file);
    if (file) {
      const nlohmann::json content = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
      if (content.is_object() && content.contains("grpc") && content["grpc"].is_string()) {
        return content["grpc"].get<std::string>();
      }
      return absl::InvalidArgumentError(
          absl::StrCat("the address file ", options_.address_file,
                       " is none: octet serve --address-file writes {\"grpc\": \"HOST:PORT\"}"));
    }
    say_waiting(absl::StrCat("waiting for a server to write ", options_.address_file));
    if (!may_wait()) {
      return absl::UnavailableError(
          absl::StrCat("the address file ", options_.address_file,
                       " is not there: the server is not running or still loading; --wait SECONDS waits for it"));
    }
  }
}

absl::Status GenerateClient::wait_for_channel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(64 << 20);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);  // finds a server that hangs
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);       // a proxy of the environment is not meant for this
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> channel_credentials = credentials();
  if (!channel_credentials.ok()) return channel_credentials.status();
  channel_ = grpc::CreateCustomChannel(address, *channel_credentials, arguments);
  const absl::Time patience = std::max(give_up_, absl::Now() + absl::Seconds(10));
  while (true) {
    const grpc_connectivity_state state = channel_->GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_READY) return absl::OkStatus();
    const bool refused = state == GRPC_CHANNEL_TRANSIENT_FAILURE;
    if (refused) say_waiting(absl::StrCat("waiting for a server at ", address));
    if ((refused && !may_wait()) || absl::Now() >= patience) {
      return absl::UnavailableError(
          absl::StrCat("there is no server at ", address,
                       ": start one with octet serve --model DIR, name the right one with --address "
                       "or --address-file, or wait for it with --wait SECONDS"));
    }
    if (!refused) channel_->WaitForStateChange(state, absl::ToChronoTime(absl::Now() + kPollInterval));
    const std::lock_guard lock(mutex_);
    if (cancelled_) return absl::CancelledError("interrupted");
  }
}

absl::Status GenerateClient::wait_for_model(const std::string& address) {
  using grpc::health::v1::HealthCheckResponse;
  auto stub = grpc::health::v1::Health::NewStub(channel_);
  while (absl::Now() < give_up_) {
    HealthCheckResponse response;
    const grpc::Status status = with_context(make_context(), [&](grpc::ClientContext* context) {
      context->set_deadline(absl::ToChronoTime(give_up_));
      return stub->Check(context, grpc::health::v1::HealthCheckRequest(), &response);
    });
    const bool loading = status.ok() && response.status() == HealthCheckResponse::NOT_SERVING;
    if (!loading) return absl::OkStatus();  // whatever else it is, the call itself says it best
    say_waiting(absl::StrCat("waiting for the model that ", address, " is loading"));
    if (!may_wait()) break;
  }
  return absl::OkStatus();
}

absl::Status GenerateClient::connect() {
  if (!options_.token_file.empty()) {
    absl::StatusOr<std::string> token = read_token_file(options_.token_file);
    if (!token.ok()) return token.status();
    token_ = *std::move(token);
  }
  absl::StatusOr<std::string> address = find_address();
  if (!address.ok()) return address.status();
  if (absl::Status status = wait_for_channel(*address); !status.ok()) return status;
  return wait_for_model(*address);
}

absl::Status GenerateClient::generate(const v1::GenerateRequest& request,
                                      const std::function<void(const v1::GenerateResponse&)>& take) {
  auto stub = v1::InferenceService::NewStub(channel_);
  const grpc::Status status = with_context(make_context(), [&](grpc::ClientContext* context) {
    if (options_.timeout_seconds.has_value()) {
      context->set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(*options_.timeout_seconds)));
    }
    auto reader = stub->Generate(context, request);
    for (v1::GenerateResponse response; reader->Read(&response);) take(response);
    return reader->Finish();
  });
  if (status.ok()) return absl::OkStatus();
  std::string message = status.error_message();
  if (status.error_code() == grpc::StatusCode::UNAUTHENTICATED) message += ": give it with --token-file FILE";
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) message += " (--timeout)";
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), message);
}

}  // namespace octet
