#include "coordinator/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/control_service.h"
#include "coordinator/listen_address.h"
#include "coordinator/token_auth.h"
#include "grpc/health/v1/health.pb.h"

namespace octet {
namespace {

constexpr const char* kServices[] = {"", "octet.v1.InferenceService", "octet.v1.ControlService"};

// A listener out of file descriptors is wedged for good in this generation of gRPC, so it gets all that it may have.
void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

void set_limits(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(4 << 20);  // a prompt
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, 16 << 10);
  builder->AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, 1000);
  // A small message must not unpack to a large one.
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_DEFLATE, false);
  builder->SetCompressionAlgorithmSupportStatus(GRPC_COMPRESS_GZIP, false);
  // gRPC would share a port with another server silently.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Clients that vanish without a word are found within a minute; clients may ping every 10 s, idle or not, as gateways
  // do.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 9'000);
}

std::string advertised_host(const ServerOptions& options, const ListenAddress& address) {
  if (!address.wildcard) return address.host;
  if (!options.advertise_host.empty()) return options.advertise_host;
  char name[HOST_NAME_MAX + 1] = {};
  return gethostname(name, sizeof(name) - 1) == 0 && name[0] != '\0' ? name : "localhost";
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials_for(const ServerOptions& options,
                                                                         const ListenAddress& address) {
  if (!options.token_file.empty()) {
    absl::StatusOr<std::string> token = read_token_file(options.token_file);
    if (!token.ok()) return token.status();
    return token_server_credentials(*token);
  }
  if (!address.loopback && !options.insecure) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the address ", address.to_string(),
        " can be reached from other machines: give --token-file FILE, so that clients must show its token, or "
        "--insecure if anyone there may use this server"));
  }
  return grpc::InsecureServerCredentials();
}

// Readers find the whole file or none.
absl::Status write_address_file(const std::string& path, const std::string& address) {
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(temporary);
  file << "{\"grpc\": \"" << address << "\", \"pid\": " << getpid() << "}\n";
  file.close();
  if (!file.fail() && std::rename(temporary.c_str(), path.c_str()) == 0) return absl::OkStatus();
  const int error = errno;
  unlink(temporary.c_str());
  return absl::FailedPreconditionError(absl::StrCat("the address file ", path,
                                                    " cannot be written: ", std::strerror(error),
                                                    "; --address-file takes a path in a directory "
                                                    "that exists and may be written"));
}

}  // namespace

struct Server::Impl {
  explicit Impl(const ServerOptions& options) : options(options), inference(options.streams) {}

  void set_serving(bool serving) {
    for (const char* name : kServices) server->GetHealthCheckService()->SetServingStatus(name, serving);
  }

  const ServerOptions options;
  std::string address;
  InferenceService inference;
  ControlService control;
  std::unique_ptr<grpc::Server> server;
  std::mutex mutex;
  bool address_file_written = false;
  bool draining = false;
};

absl::StatusOr<std::unique_ptr<Server>> Server::start(const ServerOptions& options) {
  absl::StatusOr<ListenAddress> address = parse_listen_address(options.address);
  if (!address.ok()) return address.status();
  absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials = credentials_for(options, *address);
  if (!credentials.ok()) return credentials.status();
  if (absl::Status status = check_bindable(*address); !status.ok()) return status;
  raise_descriptor_limit();

  grpc::EnableDefaultHealthCheckService(true);
  // gRPC answers health without a descriptor; this links ours, so that reflection can tell what health is.
  google::protobuf::LinkMessageReflection<grpc::health::v1::HealthCheckRequest>();
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  std::unique_ptr<Server> server(new Server(std::make_unique<Impl>(options)));
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address->to_string(), *credentials, &port);
  builder.RegisterService(server->impl_->inference.service());
  builder.RegisterService(server->impl_->control.service());
  set_limits(&builder);
  server->impl_->server = builder.BuildAndStart();
  if (server->impl_->server == nullptr || port == 0) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen at ", address->to_string(), ": its port was taken this very moment; try again"));
  }
  server->impl_->set_serving(false);
  address->host = advertised_host(options, *address);
  address->port = port;
  server->impl_->address = address->to_string();
  return server;
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { shutdown(absl::UnavailableError("the server has shut down"), absl::ZeroDuration()); }

const std::string& Server::address() const { return impl_->address; }

absl::Status Server::open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, Engine* engine) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->draining) return absl::OkStatus();
  impl_->inference.open(model, engine);
  impl_->control.open(facts, std::move(model), engine);
  impl_->set_serving(true);
  if (impl_->options.address_file.empty()) return absl::OkStatus();
  absl::Status status = write_address_file(impl_->options.address_file, impl_->address);
  impl_->address_file_written = status.ok();
  return status;
}

void Server::drain() {
  const std::lock_guard lock(impl_->mutex);
  if (std::exchange(impl_->draining, true)) return;
  impl_->set_serving(false);
  impl_->inference.refuse(
      absl::UnavailableError("the server is shutting down and takes no new requests: ask another one"));
}

void Server::shutdown(const absl::Status& cause, absl::Duration patience) {
  if (impl_->server == nullptr) return;
  drain();
  if (impl_->address_file_written) unlink(impl_->options.address_file.c_str());
  impl_->inference.end_all(cause);
  const absl::Time deadline = absl::Now() + patience;
  while (impl_->inference.calls() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
  impl_->server->Shutdown(absl::ToChronoTime(absl::Now()));  // whoever watches health would stay for ever
  impl_->server->Wait();
  impl_->server.reset();
}

}  // namespace octet
