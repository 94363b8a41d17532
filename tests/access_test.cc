// Who may talk to the server, through which listener, and who cannot: TLS, client certificates, tokens over TLS, and
// ControlService on an address of its own.
#include <arpa/inet.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "coordinator/server.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "tests/service_house.h"

namespace octet {
namespace {

std::string tls_file(const std::string& name) { return absl::StrCat(OCTET_TLS_DIR, "/", name); }

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

AccessOptions tls_access() { return {.tls_cert = tls_file("server.pem"), .tls_key = tls_file("server.key")}; }

// A channel to localhost at the server's port, with these files; empty names: none.
std::shared_ptr<grpc::Channel> tls_channel(const std::string& address, const std::string& ca,
                                           const std::string& client = "") {
  grpc::SslCredentialsOptions options;
  if (!ca.empty()) options.pem_root_certs = read_file(tls_file(ca));
  if (!client.empty()) {
    options.pem_cert_chain = read_file(tls_file(client + ".pem"));
    options.pem_private_key = read_file(tls_file(client + ".key"));
  }
  return grpc::CreateChannel(absl::StrCat("localhost", address.substr(address.rfind(':'))),
                             grpc::SslCredentials(options));
}

// The status of a GetLoad call.
grpc::Status get_load(const std::shared_ptr<grpc::Channel>& channel, const std::string& token = "") {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  if (!token.empty()) context.AddMetadata("authorization", "Bearer " + token);
  v1::GetLoadResponse response;
  return v1::ControlService::NewStub(channel)->GetLoad(&context, {}, &response);
}

TEST(Tls, ServesWhoTrustsItsCertificateAndNobodyInPlainText) {
  Service service({.access = tls_access()});
  const std::string address = service.server->address();
  EXPECT_TRUE(get_load(tls_channel(address, "ca.pem")).ok());
  EXPECT_EQ(get_load(tls_channel(address, "stranger_ca.pem")).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_FALSE(get_load(service.channel).ok()) << "that channel speaks plain text";
}

TEST(Tls, AsksForClientCertificatesOfItsAuthority) {
  AccessOptions access = tls_access();
  access.tls_client_ca = tls_file("ca.pem");
  Service service({.access = access});
  const std::string address = service.server->address();
  EXPECT_TRUE(get_load(tls_channel(address, "ca.pem", "client")).ok());
  EXPECT_FALSE(get_load(tls_channel(address, "ca.pem")).ok());
  EXPECT_FALSE(get_load(tls_channel(address, "ca.pem", "stranger")).ok());
}

TEST(Tls, ChecksTheTokenToo) {
  TemporaryDirectory directory;
  AccessOptions access = tls_access();
  access.token_file = directory.write("token", "s3cret\n");
  Service service({.access = access});
  const auto channel = tls_channel(service.server->address(), "ca.pem");
  EXPECT_TRUE(get_load(channel, "s3cret").ok());
  EXPECT_EQ(get_load(channel, "secret").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(get_load(channel).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  grpc::ClientContext twice;
  twice.AddMetadata("authorization", "Bearer s3cret");
  twice.AddMetadata("authorization", "Bearer s3cret");
  v1::GetLoadResponse response;
  EXPECT_EQ(v1::ControlService::NewStub(channel)->GetLoad(&twice, {}, &response).error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
}

TEST(Tls, NamesTheFileThatIsWrong) {
  TemporaryDirectory directory;
  const auto refusal = [](const AccessOptions& access) {
    return std::string(Server::start({.address = "127.0.0.1:0", .access = access}).status().message());
  };
  AccessOptions access = tls_access();
  access.tls_key = "/nowhere/server.key";
  EXPECT_TRUE(absl::StrContains(refusal(access), "--tls-key /nowhere/server.key cannot be read")) << refusal(access);
  access.tls_key = tls_file("server.pem");
  EXPECT_TRUE(absl::StrContains(refusal(access), "holds no PRIVATE KEY in PEM form")) << refusal(access);
  access.tls_key = tls_file("client.key");
  EXPECT_TRUE(absl::StrContains(refusal(access), "client.key is not the key of --tls-cert")) << refusal(access);
  access = tls_access();
  access.tls_cert = directory.write("empty.pem", "");
  EXPECT_TRUE(absl::StrContains(refusal(access), "empty.pem holds no CERTIFICATE")) << refusal(access);
  access = {.tls_client_ca = tls_file("ca.pem")};
  EXPECT_TRUE(absl::StrContains(refusal(access), "needs both --tls-cert and --tls-key")) << refusal(access);
}

TEST(Tls, ClientCertificatesAreEnoughForAnAddressBeyondThisMachine) {
  AccessOptions access = tls_access();
  const auto start = [&access] { return Server::start({.address = "0.0.0.0:0", .access = access}).status(); };
  EXPECT_TRUE(absl::StrContains(start().message(), "--tls-client-ca")) << "encryption alone lets anybody in";
  access.tls_client_ca = tls_file("ca.pem");
  EXPECT_TRUE(start().ok()) << start();
}

// ---- Connections

// Opens connections that say nothing, as many as the process may; returns their descriptors.
std::vector<int> idle_connections(const std::string& address, int count) {
  sockaddr_in server = {.sin_family = AF_INET,
                        .sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1)))),
                        .sin_addr = {htonl(INADDR_LOOPBACK)},
                        .sin_zero = {}};
  std::vector<int> connections;
  for (int i = 0; i < count; ++i) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) break;
    if (connect(fd, reinterpret_cast<const sockaddr*>(&server), sizeof server) != 0) {
      close(fd);
      break;
    }
    connections.push_back(fd);
  }
  return connections;
}

// Serves with few descriptors while another process takes more connections than those; 0 if a client is served
// afterwards.
int serve_after_a_flood() {
  const rlimit few = {.rlim_cur = 160, .rlim_max = 160};
  if (setrlimit(RLIMIT_NOFILE, &few) != 0) return 2;
  Service service;
  const pid_t flood = fork();  // the other end of a connection is a descriptor too
  if (flood == 0) {
    close_range(3, ~0U, 0);  // what it has of its parent
    const std::vector<int> connections = idle_connections(service.server->address(), 150);
    usleep(300'000);
    std::_Exit(connections.size() < 100 ? 1 : 0);
  }
  int flooded = 0;
  waitpid(flood, &flooded, 0);
  if (flooded != 0) return 3;
  const Heard heard = service.generate(prompt("hi"));
  std::fprintf(stderr, "after the flood: %d %s\n", heard.status.error_code(), heard.status.error_message().c_str());
  return heard.status.ok() ? 0 : 4;
}

TEST(Connections, MoreThanThereAreDescriptorsForDoNotWedgeTheServer) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  // In a process of its own, whose limit is its own.
  EXPECT_EXIT(std::_Exit(serve_after_a_flood()), testing::ExitedWithCode(0), "after the flood: 0");
}

// ---- ControlService on its own

TEST(ControlAddress, TakesControlAwayFromThePublicPort) {
  Service service({.control_address = "127.0.0.1:0"});
  EXPECT_EQ(get_load(service.channel).error_code(), grpc::StatusCode::UNIMPLEMENTED);
  expect_well_formed(service.generate(prompt("hi")));
  const auto control = grpc::CreateChannel(service.server->control_address(), grpc::InsecureChannelCredentials());
  EXPECT_TRUE(get_load(control).ok());
  grpc::ClientContext context;
  auto reader = v1::InferenceService::NewStub(control)->Generate(&context, prompt("hi"));
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::UNIMPLEMENTED);
}

TEST(ControlAddress, EachListenerSaysHowItsOwnServicesAre) {
  Service service({.control_address = "127.0.0.1:0"});
  const auto control = grpc::CreateChannel(service.server->control_address(), grpc::InsecureChannelCredentials());
  const auto health = [](const std::shared_ptr<grpc::Channel>& channel, const std::string& name) {
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(name);
    grpc::health::v1::HealthCheckResponse response;
    grpc::ClientContext context;
    const grpc::Status status = grpc::health::v1::Health::NewStub(channel)->Check(&context, request, &response);
    return status.ok() ? static_cast<int>(response.status()) : -static_cast<int>(status.error_code());
  };
  constexpr int kServing = 1, kNotServing = 2, kNotFound = -5;
  EXPECT_EQ(health(service.channel, "octet.v1.InferenceService"), kServing);
  EXPECT_EQ(health(service.channel, "octet.v1.ControlService"), kNotFound);
  EXPECT_EQ(health(control, "octet.v1.ControlService"), kServing);
  EXPECT_EQ(health(control, "octet.v1.InferenceService"), kNotFound);
  service.server->drain();
  EXPECT_EQ(health(service.channel, ""), kNotServing);
  EXPECT_EQ(health(control, ""), kNotServing);
}

TEST(ControlAddress, AsksForTheTokenThereToo) {
  TemporaryDirectory directory;
  Service service({.control_address = "127.0.0.1:0", .access = {.token_file = directory.write("token", "s3cret\n")}});
  const auto control = grpc::CreateChannel(service.server->control_address(), grpc::InsecureChannelCredentials());
  EXPECT_EQ(get_load(control).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(get_load(control, "s3cret").ok());
}

TEST(ControlAddress, MayBeAUnixSocketOfItsOwnerAlone) {
  TemporaryDirectory directory;
  const std::string path = directory.path() + "/control.sock";
  {
    Service service({.control_address = "unix:" + path});
    struct stat facts = {};
    ASSERT_EQ(stat(path.c_str(), &facts), 0);
    EXPECT_EQ(facts.st_mode & 0777, 0600u);
    EXPECT_TRUE(get_load(grpc::CreateChannel("unix:" + path, grpc::InsecureChannelCredentials())).ok());
    const absl::Status second = Server::start({.address = "127.0.0.1:0", .control_address = "unix:" + path}).status();
    EXPECT_TRUE(absl::StrContains(second.message(), "is in use")) << second;
  }
  EXPECT_NE(access(path.c_str(), F_OK), 0) << "the socket goes with its server";
}

TEST(ControlAddress, RefusesPathsThatCannotBeSockets) {
  TemporaryDirectory directory;
  const auto refusal = [](const std::string& address) {
    return std::string(Server::start({.address = "127.0.0.1:0", .control_address = address}).status().message());
  };
  EXPECT_TRUE(absl::StrContains(refusal("unix:relative.sock"), "must be an absolute path"));
  EXPECT_TRUE(absl::StrContains(refusal("unix:/" + std::string(200, 'x')), "at most 107 bytes"));
  const std::string file = directory.write("file", "precious");
  EXPECT_TRUE(absl::StrContains(refusal("unix:" + file), "is a file"));
  EXPECT_EQ(read_file(file), "precious");
  EXPECT_TRUE(absl::StrContains(refusal("0.0.0.0:0"), "can be reached from other machines"));
}

}  // namespace
}  // namespace octet
