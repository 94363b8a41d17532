// A real `octet serve` under mpirun, and the commands of the same binary that ask it. Needs OCTET_BINARY.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/process.h"

namespace octet {

inline std::string fresh_path(const std::string& name) {
  static int counter = 0;
  return absl::StrCat(testing::TempDir(), "octet_serve_", getpid(), "_", counter++, "_", name);
}

// A server on a free port, stopped when it goes out of scope.
class Server {
 public:
  explicit Server(const std::string& model, int ranks, const std::vector<std::string>& more = {})
      : address_file_(fresh_path("address")), process_(mpirun(ranks, command(model, more)), mpirun_environment()) {
    ready_ = wait_for_file(address_file_, process_, std::chrono::seconds(120));
    EXPECT_TRUE(ready_) << process_.err();
  }

  bool ready() const { return ready_; }
  Process& process() { return process_; }
  std::string address() const { return address_file().at("grpc"); }
  pid_t rank_0() const { return address_file().at("pid"); }

  // octet COMMAND... --address-file (of this server).
  Finished run(std::vector<std::string> command) const {
    command.insert(command.begin(), OCTET_BINARY);
    command.insert(command.end(), {"--address-file", address_file_});
    return run_command(command);
  }

  // Sends the signal to mpirun; its exit status.
  int stop(int signal) {
    process_.signal(signal);
    return process_.wait(std::chrono::seconds(30));
  }

 private:
  nlohmann::json address_file() const {
    std::ifstream file(address_file_);
    return nlohmann::json::parse(file);
  }

  std::vector<std::string> command(const std::string& model, const std::vector<std::string>& more) const {
    std::vector<std::string> argv = {OCTET_BINARY, "serve",       "--model",        model,
                                     "--address",  "127.0.0.1:0", "--address-file", address_file_};
    if (std::ranges::find(more, "--kv-memory") == more.end()) argv.insert(argv.end(), {"--kv-memory", "64MiB"});
    argv.insert(argv.end(), more.begin(), more.end());
    return argv;
  }

  const std::string address_file_;
  Process process_;
  bool ready_ = false;
};

}  // namespace octet
