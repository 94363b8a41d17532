// ServedProcess: octet serve under real mpirun on a free port, as a user starts it, and octet generate asking it.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/process.h"

namespace octet {

inline const std::string kOctet = OCTET_BINARY;

inline std::string fresh_path(const std::string& name) {
  static int counter = 0;
  return absl::StrCat(testing::TempDir(), "octet_serve_", getpid(), "_", counter++, "_", name);
}

// A server on a free port, stopped when it goes out of scope.
class ServedProcess {
 public:
  explicit ServedProcess(const std::string& model, int ranks, const std::vector<std::string>& more = {})
      : address_file_(fresh_path("address")), process_(mpirun(ranks, command(model, more)), mpirun_environment()) {
    ready_ = wait_for_file(address_file_, process_, std::chrono::seconds(120));
    EXPECT_TRUE(ready_) << process_.err();
  }

  bool ready() const { return ready_; }
  Process& process() { return process_; }
  std::string address() const {
    std::ifstream file(address_file_);
    return nlohmann::json::parse(file).at("grpc");
  }

  Finished generate(const std::vector<std::string>& arguments) const {
    std::vector<std::string> argv = {kOctet, "generate", "--address-file", address_file_};
    argv.insert(argv.end(), arguments.begin(), arguments.end());
    return run_command(argv);
  }

  // What --json prints for greedy decoding after these tokens.
  nlohmann::json greedy(const std::vector<int32_t>& prompt, int max_tokens) const {
    const Finished run = generate({"--token-ids", absl::StrJoin(prompt, ","), "--max-tokens",
                                   std::to_string(max_tokens), "--temperature", "0", "--logprobs", "2", "--json"});
    EXPECT_EQ(run.status, 0) << run.err;
    return run.status == 0 ? nlohmann::json::parse(run.out) : nlohmann::json();
  }

  // Sends the signal to mpirun; its exit status.
  int stop(int signal) {
    process_.signal(signal);
    return process_.wait(std::chrono::seconds(30));
  }

 private:
  std::vector<std::string> command(const std::string& model, const std::vector<std::string>& more) const {
    std::vector<std::string> argv = {kOctet,        "serve",          "--model",     model,         "--address",
                                     "127.0.0.1:0", "--address-file", address_file_, "--kv-memory", "64MiB"};
    argv.insert(argv.end(), more.begin(), more.end());
    return argv;
  }

  const std::string address_file_;
  Process process_;
  bool ready_ = false;
};

}  // namespace octet
