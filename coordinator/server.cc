#include "coordinator/server.h"

#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <mutex>
#include <optional>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/connection_listener.h"
#include "coordinator/control_service.h"
#include "coordinator/listen_address.h"
#include "coordinator/rpc_status.h"
#include "grpc/health/v1/health.pb.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

constexpr char kUnixScheme[] = "unix:";
constexpr char kInferenceName[] = "octet.v1.InferenceService";
constexpr char kControlName[] = "octet.v1.ControlService";

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

// A socket that a killed server left behind is taken away; one that somebody listens at is not.
absl::Status check_socket_path(const std::string& path) {
  sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = {}};
  if (path.empty() || path[0] != '/' || path.size() >= sizeof address.sun_path) {
    return absl::InvalidArgumentError(absl::StrCat("--control-address unix:", path,
                                                   " must be an absolute path of at most ", sizeof address.sun_path - 1,
                                                   " bytes"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  struct stat facts = {};
  if (lstat(path.c_str(), &facts) != 0) return absl::OkStatus();
  if (!S_ISSOCK(facts.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat("--control-address unix:", path, " is a file: choose another path"));
  }
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const bool answered = connect(probe, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  close(probe);
  if (answered) {
    return absl::UnavailableError(absl::StrCat("--control-address unix:", path,
                                               " is in use: stop the server that has it, or choose another path"));
  }
  unlink(path.c_str());
  return absl::OkStatus();
}

// Readers find the whole file or none.
absl::Status write_address_file(const ServerOptions& options, const std::string& address) {
  const std::string& path = options.address_file;
  nlohmann::ordered_json content = {{"grpc", address}, {"pid", getpid()}};
  if (!options.job_id.empty()) content["job_id"] = options.job_id;
  if (options.job_end != absl::InfiniteFuture()) {
    content["job_end"] = absl::FormatTime(absl::RFC3339_sec, options.job_end, absl::UTCTimeZone());
  }
  const std::string temporary = absl::StrCat(path, ".", getpid(), ".tmp");
  std::ofstream file(temporary);
  file << content.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) << "\n";
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
  explicit Impl(const ServerOptions& options)
      : options(options),
        inference(options.streams, options.on_call_end),
        control({.abort = [this](const std::string& id) { return inference.abort(id); },
                 .drain =
                     [this] {
                       if (this->options.on_drain) this->options.on_drain();
                     },
                 .draining = [this] { return draining.load(); }}) {}

  absl::Status listen();
  absl::Status listen_for_control();

  // Each listener speaks for itself and for the services that it has.
  void set_serving(bool serving) {
    grpc::HealthCheckServiceInterface* health = server->GetHealthCheckService();
    for (const char* name : {"", kInferenceName}) health->SetServingStatus(name, serving);
    if (control_server != nullptr) {
      health = control_server->GetHealthCheckService();
      health->SetServingStatus("", serving);
    }
    health->SetServingStatus(kControlName, serving);
  }

  const ServerOptions options;
  std::string address, control_address;
  std::string control_socket;  // that was made here, and goes with the server
  InferenceService inference;
  ControlService control;
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> connections;  // into `server`
  std::unique_ptr<grpc::Server> server, control_server;
  std::unique_ptr<ConnectionListener> listener;  // of `server`; stops first
  std::mutex mutex;
  bool address_file_written = false;
  std::atomic<bool> draining = false;
};

absl::Status Server::Impl::listen() {
  absl::StatusOr<ListenAddress> parsed = parse_listen_address(options.address);
  if (!parsed.ok()) return parsed.status();
  absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials =
      make_server_credentials(options.access, *parsed);
  if (!credentials.ok()) return credentials.status();
  absl::StatusOr<std::unique_ptr<ConnectionListener>> listening = ConnectionListener::listen(*parsed, "--address");
  if (!listening.ok()) return listening.status();
  listener = *std::move(listening);
  grpc::ServerBuilder builder;
  connections = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD, *credentials);
  builder.RegisterService(inference.service());
  if (options.control_address.empty()) builder.RegisterService(control.service());
  set_limits(&builder);
  server = builder.BuildAndStart();
  if (server == nullptr) return absl::InternalError("gRPC did not start the server");
  listener->start([this](int from, int connection) {
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters parameters;
    parameters.listener_fd = from;
    parameters.fd = connection;
    connections->HandleNewConnection(&parameters);
  });
  parsed->host = advertised_host(options, *parsed);
  parsed->port = listener->port();
  address = parsed->to_string();
  return absl::OkStatus();
}

// A listener of its own, so that who may ask the model something need not be able to end the server.
absl::Status Server::Impl::listen_for_control() {
  control_address = address;
  if (options.control_address.empty()) return absl::OkStatus();
  grpc::ServerBuilder builder;
  builder.RegisterService(control.service());
  set_limits(&builder);
  int port = 0;
  std::optional<ListenAddress> parsed;
  if (absl::StartsWith(options.control_address, kUnixScheme)) {
    const std::string path = options.control_address.substr(std::strlen(kUnixScheme));
    if (absl::Status status = check_socket_path(path); !status.ok()) return status;
    builder.AddListeningPort(options.control_address, grpc::InsecureServerCredentials());
  } else {
    absl::StatusOr<ListenAddress> found = parse_listen_address(options.control_address);
    if (!found.ok()) return found.status();
    parsed = *found;
    absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> credentials =
        make_server_credentials(options.access, *parsed);
    if (!credentials.ok()) return credentials.status();
    if (absl::Status status = check_bindable(*parsed, "--control-address"); !status.ok()) return status;
    builder.AddListeningPort(parsed->to_string(), *credentials, &port);
  }
  // Nobody but its owner may connect, from the first moment on.
  const mode_t mask = umask(0177);
  control_server = builder.BuildAndStart();
  umask(mask);
  if (control_server == nullptr) {
    return absl::UnavailableError(absl::StrCat("cannot listen at --control-address ", options.control_address,
                                               ": its port or path was taken this very moment; try again"));
  }
  control_address = options.control_address;
  if (!parsed.has_value()) control_socket = control_address.substr(std::strlen(kUnixScheme));
  if (parsed.has_value()) {
    parsed->host = advertised_host(options, *parsed);
    parsed->port = port;
    control_address = parsed->to_string();
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Server>> Server::start(const ServerOptions& options) {
  raise_descriptor_limit();
  grpc::EnableDefaultHealthCheckService(true);
  // gRPC answers health without a descriptor; this links ours, so that reflection can tell what health is.
  google::protobuf::LinkMessageReflection<grpc::health::v1::HealthCheckRequest>();
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  if (options.channelz) grpc::channelz::experimental::InitChannelzService();
  std::unique_ptr<Server> server(new Server(std::make_unique<Impl>(options)));
  if (absl::Status status = server->impl_->listen(); !status.ok()) return status;
  if (absl::Status status = server->impl_->listen_for_control(); !status.ok()) return status;
  server->impl_->set_serving(false);
  return server;
}

Server::Server(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

Server::~Server() { shutdown(absl::UnavailableError("the server has shut down"), absl::ZeroDuration()); }

const std::string& Server::address() const { return impl_->address; }
const std::string& Server::control_address() const { return impl_->control_address; }

absl::Status Server::open(const ServerFacts& facts, std::shared_ptr<const ServedModel> model, Engine* engine) {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->draining) return absl::OkStatus();
  impl_->inference.open(model, engine);
  impl_->control.open(facts, std::move(model), engine);
  impl_->set_serving(true);
  if (impl_->options.address_file.empty()) return absl::OkStatus();
  absl::Status status = write_address_file(impl_->options, impl_->address);
  impl_->address_file_written = status.ok();
  return status;
}

void Server::drain() {
  const std::lock_guard lock(impl_->mutex);
  if (impl_->draining.exchange(true)) return;
  if (impl_->address_file_written) unlink(impl_->options.address_file.c_str());  // nobody shall come any more
  impl_->set_serving(false);
  impl_->inference.refuse(with_reason(
      absl::UnavailableError("the server is shutting down and takes no new requests: ask another one"), "DRAINING"));
}

void Server::shutdown(const absl::Status& cause, absl::Duration patience) {
  if (impl_->server == nullptr) return;
  drain();
  impl_->inference.end_all(absl::UnavailableError(cause.message()));
  const absl::Time deadline = absl::Now() + patience;
  while (impl_->inference.calls() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
  impl_->listener.reset();
  for (std::unique_ptr<grpc::Server>* server : {&impl_->server, &impl_->control_server}) {
    if (*server == nullptr) continue;
    (*server)->Shutdown(absl::ToChronoTime(absl::Now()));  // whoever watches health would stay for ever
    (*server)->Wait();
    server->reset();
  }
  if (!impl_->control_socket.empty()) unlink(impl_->control_socket.c_str());
}

}  // namespace octet
