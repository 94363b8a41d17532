// A public server of a fake model and a client of it: what every test of the services starts from.
#pragma once

#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/text/utf8.h"
#include "octet/v1/control_service.grpc.pb.h"
#include "octet/v1/inference_service.grpc.pb.h"
#include "tests/fake_server.h"

namespace octet {

// What a client saw of one Generate call.
struct Heard {
  grpc::Status status;
  std::vector<v1::GenerateResponse> messages;

  std::string text() const {
    std::string text;
    for (const auto& message : messages) text += message.text();
    return text;
  }
  std::vector<int32_t> token_ids() const {
    std::vector<int32_t> ids;
    for (const auto& message : messages) {
      for (const auto& token : message.tokens()) ids.push_back(token.token_id());
    }
    return ids;
  }
  const v1::GenerateResponse& last() const { return messages.back(); }
};

struct Service : FakeServer {
  explicit Service(ServerOptions options = {}, const std::string& answer = "hello, world",
                   ServedModel model = fake_model())
      : FakeServer(std::move(options), answer, std::move(model)),
        channel(grpc::CreateChannel(server->address(), grpc::InsecureChannelCredentials())),
        inference(v1::InferenceService::NewStub(channel)),
        control(v1::ControlService::NewStub(channel)) {}

  Heard generate(const v1::GenerateRequest& request, grpc::ClientContext* context = nullptr) {
    grpc::ClientContext own;
    if (context == nullptr) context = &own;
    Heard heard;
    auto reader = inference->Generate(context, request);
    for (v1::GenerateResponse message; reader->Read(&message);) heard.messages.push_back(message);
    heard.status = reader->Finish();
    return heard;
  }

  // Nothing is left of any request.
  void expect_quiet() {
    EXPECT_TRUE(wait_quiet());
    const EngineStats stats = engine->stats();
    EXPECT_EQ(stats.blocks_free, stats.blocks_total);
    EXPECT_EQ(stats.waiting + stats.running, 0);
  }

  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::InferenceService::Stub> inference;
  std::unique_ptr<v1::ControlService::Stub> control;
};

inline v1::GenerateRequest prompt(const std::string& text) {
  v1::GenerateRequest request;
  request.set_prompt(text);
  return request;
}

// The rules of every stream that ends well: one terminal message, the last; prompt ids in the first and usage in the
// last only.
inline void expect_well_formed(const Heard& heard) {
  ASSERT_TRUE(heard.status.ok()) << heard.status.error_message();
  ASSERT_FALSE(heard.messages.empty());
  for (size_t i = 0; i < heard.messages.size(); ++i) {
    const v1::GenerateResponse& message = heard.messages[i];
    const bool last = i + 1 == heard.messages.size();
    EXPECT_EQ(message.finish_reason() != v1::FINISH_REASON_UNSPECIFIED, last);
    EXPECT_EQ(message.has_usage(), last);
    EXPECT_EQ(message.prompt_token_ids().empty(), i != 0);
    EXPECT_TRUE(is_valid_utf8(message.text()));
  }
  EXPECT_EQ(heard.last().usage().completion_tokens(), static_cast<int32_t>(heard.token_ids().size()));
}

class TemporaryDirectory {
 public:
  TemporaryDirectory() {
    path_ = testing::TempDir() + "octet_services_XXXXXX";
    if (mkdtemp(path_.data()) == nullptr) ADD_FAILURE() << path_;
  }
  ~TemporaryDirectory() { EXPECT_EQ(std::system(absl::StrCat("rm -rf ", path_).c_str()), 0); }
  std::string write(const std::string& name, const std::string& text, mode_t mode = 0600) const {
    const std::string path = absl::StrCat(path_, "/", name);
    std::ofstream(path) << text;
    chmod(path.c_str(), mode);
    return path;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

}  // namespace octet
