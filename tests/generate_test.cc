// octet generate against a real port: what it prints, what it returns, and that the server hears of it when it stops
// early.
#include "launch/generate.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/fake_server.h"

namespace octet {
namespace {

struct Ran {
  int exit_code = 0;
  std::string out, err;
};

Ran run(const GenerateOptions& options) {
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  Ran ran;
  ran.exit_code = run_generate(options);
  ran.out = testing::internal::GetCapturedStdout();
  ran.err = testing::internal::GetCapturedStderr();
  return ran;
}

// As from a command line.
GenerateOptions parse(std::vector<std::string> arguments) {
  CLI::App app;
  GenerateOptions options;
  add_generate_command(app, &options);
  std::reverse(arguments.begin(), arguments.end());  // as CLI11 wants it
  arguments.push_back("generate");
  app.parse(arguments);
  return options;
}

GenerateOptions parse_for(const FakeServer& fake, std::vector<std::string> arguments) {
  GenerateOptions options = parse(std::move(arguments));
  options.address = fake.server->address();
  return options;
}

TEST(GenerateCommand, StreamsTheTextOfAPromptAndOfAChat) {
  FakeServer fake({}, "hello, w\u00f6rld");
  Ran answer = run(parse_for(fake, {"--prompt", "hi"}));
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  EXPECT_EQ(answer.out, "hello, w\u00f6rld\n");
  answer = run(parse_for(fake, {"--chat", "--system", "be brief", "--stop", "zebra", "--stop", ", w", "hi there"}));
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  EXPECT_EQ(answer.out, "hello\n");
  EXPECT_EQ(answer.err, "");
}

TEST(GenerateCommand, PrintsOneLineOfJson) {
  FakeServer fake({}, "hello");
  Ran answer =
      run(parse_for(fake, {"--json", "--token-ids", "7,8,9", "--seed", "18446744073709551615", "--temperature", "0"}));
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  EXPECT_EQ(std::count(answer.out.begin(), answer.out.end(), '\n'), 1);
  const nlohmann::json line = nlohmann::json::parse(answer.out);
  EXPECT_EQ(line["prompt_token_ids"], nlohmann::json({7, 8, 9}));
  EXPECT_EQ(line["token_ids"], nlohmann::json(fake.script("hello")));
  EXPECT_EQ(line["logprobs"].size(), line["token_ids"].size());
  EXPECT_EQ(line["logprobs"][1], -0.125);
  EXPECT_FALSE(line.contains("top_logprobs"));
  EXPECT_EQ(line["text"], "hello");
  EXPECT_EQ(line["finish_reason"], "stop");
  EXPECT_EQ(line["stop_token_id"], kFakeImEnd);
  EXPECT_EQ(line["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(line["usage"]["completion_tokens"], line["token_ids"].size());
  EXPECT_EQ(line["usage"]["seed"], 18446744073709551615u);

  answer = run(parse_for(fake, {"--json", "--prompt", "x", "--logprobs", "2", "--max-tokens", "1"}));
  const nlohmann::json alternatives = nlohmann::json::parse(answer.out);
  EXPECT_EQ(alternatives["finish_reason"], "length");
  ASSERT_EQ(alternatives["top_logprobs"].size(), 1u);
  EXPECT_EQ(alternatives["top_logprobs"][0][1]["token_id"], 1);
  EXPECT_EQ(alternatives["top_logprobs"][0][1]["logprob"], -2.0);
}

TEST(GenerateCommand, RepairsACommandLineThatIsNotUtf8) {
  FakeServer fake({}, "hello");
  const Ran answer = run(parse_for(fake, {"--json", "--prompt", "a\xff\xc3z"}));
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  EXPECT_EQ(nlohmann::json::parse(answer.out)["prompt_token_ids"],
            nlohmann::json(fake.tokenizer.encode("a\uFFFD\uFFFDz", true)));
}

TEST(GenerateCommand, SaysWhatIsWrongAndReturnsOne) {
  FakeServer fake({}, "hello");
  const auto expect = [&](const std::vector<std::string>& arguments, const std::string& sentence) {
    const Ran answer = run(parse_for(fake, arguments));
    EXPECT_EQ(answer.exit_code, 1);
    EXPECT_TRUE(absl::StrContains(answer.err, sentence)) << answer.err;
  };
  expect({}, "give one of --prompt TEXT, --chat MESSAGE and --token-ids");
  expect({"--prompt", "x", "--chat", "y"}, "found 2");
  expect({"--chat"}, "needs a MESSAGE");
  expect({"x"}, "give one of");
  expect({"--prompt", "x", "y"}, "a MESSAGE goes with --chat");
  expect({"--prompt", "x", "--system", "y"}, "--system goes with --chat");
  expect({"--prompt", "x", "--temperature", "-1"},
         "sampling.temperature must be 0 (greedy) or a positive number, found -1");
  expect({"--prompt", "x", "--temperature", "nan"}, "sampling.temperature");
  expect({"--token-ids", "1,5000"}, "token_ids.ids[1]");
  fake.server->drain();
  expect({"--prompt", "x"}, "shutting down");
}

TEST(GenerateCommand, SaysWhereItFoundNoServer) {
  Ran answer = run(parse({"--address", "127.0.0.1:1", "--prompt", "x"}));
  EXPECT_EQ(answer.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(answer.err, "no server at 127.0.0.1:1")) << answer.err;
  EXPECT_TRUE(absl::StrContains(answer.err, "octet serve")) << answer.err;
  answer = run(parse({"--address-file", "/nonexistent/octet.json", "--prompt", "x"}));
  EXPECT_EQ(answer.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(answer.err, "/nonexistent/octet.json")) << answer.err;
}

TEST(GenerateCommand, WaitsForTheAddressFileAndForTheModel) {
  const std::string path = absl::StrCat(testing::TempDir(), "octet_generate_", getpid(), ".json");
  ServerOptions options;
  options.address = "127.0.0.1:0";
  absl::StatusOr<std::unique_ptr<Server>> server = Server::start(options);
  ASSERT_TRUE(server.ok()) << server.status();
  auto model = std::make_shared<ServedModel>(fake_model());
  FakeWorkerGroup group({100, kFakeImEnd});
  Engine engine({.limits = model->limits, .max_waiting = 4}, &group, [](const absl::Status&) {});
  std::thread loading([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    std::ofstream(absl::StrCat(path, ".tmp")) << "{\"grpc\": \"" << (*server)->address() << "\"}";
    std::rename(absl::StrCat(path, ".tmp").c_str(), path.c_str());
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    EXPECT_TRUE((*server)->open({}, model, &engine).ok());
  });
  const Ran answer = run(parse({"--address-file", path, "--wait", "60", "--prompt", "x"}));
  loading.join();
  EXPECT_EQ(answer.exit_code, 0) << answer.err;
  EXPECT_TRUE(absl::StrContains(answer.err, "waiting for a server to write")) << answer.err;
  EXPECT_TRUE(absl::StrContains(answer.err, "is loading")) << answer.err;
  server->reset();
  unlink(path.c_str());
}

TEST(GenerateCommand, ShowsTheTokenOfItsFile) {
  const std::string path = absl::StrCat(testing::TempDir(), "octet_token_", getpid());
  std::ofstream(path) << "s3cret\n";
  chmod(path.c_str(), 0600);
  ServerOptions options;
  options.access.token_file = path;
  FakeServer fake(options, "hello");
  EXPECT_EQ(run(parse_for(fake, {"--prompt", "x", "--token-file", path})).out, "hello\n");
  EXPECT_EQ(run(parse_for(fake, {"--prompt", "x", "--token-file", path, "--wait", "5"})).out, "hello\n");
  const Ran refused = run(parse_for(fake, {"--prompt", "x", "--wait", "5"}));
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(refused.err, "--token-file")) << refused.err;
  unlink(path.c_str());
}

TEST(GenerateCommand, CancelsOnTheServerAtCtrlCAndAtItsTimeout) {
  FakeServer fake({}, "hello");
  fake.group.set_step_time(std::chrono::milliseconds(2));
  std::thread user([&] {
    while (fake.engine->stats().generated_tokens < 5) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    kill(getpid(), SIGINT);
  });
  Ran answer = run(parse_for(fake, {"--prompt", "x", "--ignore-eos"}));
  user.join();
  EXPECT_EQ(answer.exit_code, 130);
  EXPECT_TRUE(absl::StartsWith(answer.out, "hello")) << answer.out;
  EXPECT_TRUE(fake.wait_quiet());
  EXPECT_LT(fake.engine->stats().generated_tokens, 4000u);

  answer = run(parse_for(fake, {"--prompt", "x", "--ignore-eos", "--timeout", "0.05"}));
  EXPECT_EQ(answer.exit_code, 1);
  EXPECT_TRUE(absl::StrContains(answer.err, "--timeout")) << answer.err;
  EXPECT_TRUE(fake.wait_quiet());
  EXPECT_LT(fake.engine->stats().generated_tokens, 8000u);
}

}  // namespace
}  // namespace octet
