#include "launch/connection.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/token_auth.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

constexpr absl::Duration kPollInterval = absl::Milliseconds(100);

// The text of a PEM file, or none where none is named.
absl::StatusOr<std::string> read_pem(const char* flag, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  if (file && !text.str().empty()) return text.str();
  return absl::InvalidArgumentError(absl::StrCat(flag, " ", path, " cannot be read, or is empty"));
}

}  // namespace

Connection::Connection(const ConnectionOptions& options)
    : options_(options), give_up_(absl::Now() + absl::Seconds(options.wait_seconds)) {}

absl::Status Connection::open() {
  if (absl::Status status = read_credentials(); !status.ok()) return status;
  absl::StatusOr<std::string> address = find_address();
  if (!address.ok()) return address.status();
  address_ = *std::move(address);
  if (absl::Status status = wait_for_channel(); !status.ok()) return status;
  return wait_for_model();
}

absl::Status Connection::read_credentials() {
  if (!options_.token_file.empty()) {
    absl::StatusOr<std::string> token = read_token_file(options_.token_file);
    if (!token.ok()) return token.status();
    token_ = *std::move(token);
  }
  const absl::StatusOr<std::string> authority = read_pem("--tls-ca", options_.tls_ca);
  const absl::StatusOr<std::string> certificate = read_pem("--tls-cert", options_.tls_cert);
  const absl::StatusOr<std::string> key = read_pem("--tls-key", options_.tls_key);
  for (const auto* file : {&authority, &certificate, &key}) {
    if (!file->ok()) return file->status();
  }
  if (certificate->empty() != key->empty()) return absl::InvalidArgumentError("--tls-cert and --tls-key go together");
  const bool plain = authority->empty() && certificate->empty();
  credentials_ = plain ? grpc::InsecureChannelCredentials()
                       : grpc::SslCredentials(
                             {.pem_root_certs = *authority, .pem_private_key = *key, .pem_cert_chain = *certificate});
  return absl::OkStatus();
}

absl::StatusOr<std::string> Connection::find_address() {
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
    say(absl::StrCat("waiting for a server to write ", options_.address_file));
    if (!may_wait()) {
      return absl::UnavailableError(
          absl::StrCat("the address file ", options_.address_file,
                       " is not there: the server is not running or still loading; --wait SECONDS waits for it"));
    }
  }
}

std::shared_ptr<grpc::Channel> Connection::new_channel(grpc::ChannelArguments arguments) const {
  arguments.SetMaxReceiveMessageSize(64 << 20);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);  // finds a server that hangs
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);       // a proxy of the environment is not meant for this
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  // Channels that are equal would otherwise share one connection.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address_, credentials_, arguments);
}

absl::Status Connection::wait_for_channel() {
  channel_ = new_channel(grpc::ChannelArguments());
  const absl::Time patience = std::max(give_up_, absl::Now() + absl::Seconds(10));
  while (true) {
    const grpc_connectivity_state state = channel_->GetState(/*try_to_connect=*/true);
    if (state == GRPC_CHANNEL_READY) return absl::OkStatus();
    const bool refused = state == GRPC_CHANNEL_TRANSIENT_FAILURE;
    if (refused) say(absl::StrCat("waiting for a server at ", address_));
    if ((refused && !may_wait()) || absl::Now() >= patience) {
      return absl::UnavailableError(
          absl::StrCat("there is no server at ", address_,
                       ": start one with octet serve --model DIR, name the right one with --address "
                       "or --address-file, or wait for it with --wait SECONDS"));
    }
    if (!refused) channel_->WaitForStateChange(state, absl::ToChronoTime(absl::Now() + kPollInterval));
    if (cancelled()) return absl::CancelledError("interrupted");
  }
}

absl::Status Connection::wait_for_model() {
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
    say(absl::StrCat("waiting for the model that ", address_, " is loading"));
    if (!may_wait()) break;
  }
  return absl::OkStatus();
}

std::unique_ptr<grpc::ClientContext> Connection::make_context() const {
  auto context = std::make_unique<grpc::ClientContext>();
  if (!token_.empty()) context->AddMetadata("authorization", absl::StrCat("Bearer ", token_));
  return context;
}

void Connection::set_context(grpc::ClientContext* context) {
  const std::lock_guard lock(mutex_);
  context_ = context;
  if (cancelled_ && context_ != nullptr) context_->TryCancel();
}

void Connection::cancel() {
  const std::lock_guard lock(mutex_);
  cancelled_ = true;
  if (context_ != nullptr) context_->TryCancel();
}

bool Connection::cancelled() {
  const std::lock_guard lock(mutex_);
  return cancelled_;
}

// Sleeps a little; false when the time for waiting is over.
bool Connection::may_wait() {
  if (cancelled() || absl::Now() >= give_up_) return false;
  absl::SleepFor(kPollInterval);
  return true;
}

// Said once per phase of waiting, so that nobody looks at a silent terminal.
void Connection::say(const std::string& what) {
  if (what == said_) return;
  said_ = what;
  std::fprintf(stderr, "octet: %s\n", what.c_str());
}

void add_connection_options(CLI::App& command, ConnectionOptions* options) {
  CLI::Option* address =
      command.add_option("--address", options->address, "The server's HOST:PORT")->capture_default_str();
  command.add_option("--address-file", options->address_file, "The file that octet serve --address-file wrote")
      ->excludes(address);
  command.add_option("--token-file", options->token_file, "The server's token");
  command.add_option("--tls-ca", options->tls_ca, "PEM file with the authority of the server's certificate: TLS");
  command.add_option("--tls-cert", options->tls_cert, "PEM file with this client's certificate chain");
  command.add_option("--tls-key", options->tls_key, "PEM file with its private key");
  command.add_option("--wait", options->wait_seconds, "Wait this many seconds for a server that starts or loads")
      ->check(CLI::NonNegativeNumber);
}

}  // namespace octet
