// What a streamed token costs Octet's server in CPU time, everything above the workers: engine, scheduler, detokenizer,
// services, gRPC. A fake model's server (tests/tools/fake_server.cc) beside a bare gRPC server that streams as many
// tokens in as large messages (tests/tools/bare_server.cc), each a process of its own, in turns on the same machine.
// Bound by CPU: user and system time of the server's process over a load, divided by the tokens that clients got.
// Usage: stream_cost_bench [TOKENS [ROUNDS]]
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "kernels/check.h"
#include "launch/connection.h"
#include "launch/load_generator.h"
#include "launch/load_report.h"
#include "launch/load_shape.h"

namespace octet {
namespace {

constexpr int kStreams = 64;

// A server that prints its address and ends when its stdin does.
class ServerProcess {
 public:
  explicit ServerProcess(const std::vector<std::string>& argv) {
    int in[2], out[2];
    OCTET_CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0, "no pipe");
    std::vector<char*> arguments;
    for (const std::string& argument : argv) arguments.push_back(const_cast<char*>(argument.c_str()));
    arguments.push_back(nullptr);
    pid_ = fork();
    if (pid_ == 0) {
      dup2(in[0], STDIN_FILENO);
      dup2(out[1], STDOUT_FILENO);
      execv(arguments[0], arguments.data());
      _exit(127);
    }
    close(in[0]);
    close(out[1]);
    stdin_ = in[1];
    for (char c = 0; read(out[0], &c, 1) == 1 && c != '\n';) address_ += c;
    close(out[0]);
    OCTET_CHECK(!address_.empty(), "a server did not start");
  }
  ~ServerProcess() {
    close(stdin_);
    waitpid(pid_, nullptr, 0);
  }
  ServerProcess(const ServerProcess&) = delete;

  const std::string& address() const { return address_; }

  // User and system time so far.
  double cpu_seconds() const {
    std::ostringstream text;
    text << std::ifstream("/proc/" + std::to_string(pid_) + "/stat").rdbuf();
    std::istringstream fields(text.str().substr(text.str().rfind(')') + 1));
    std::string skipped;
    for (int i = 0; i < 11; ++i) fields >> skipped;
    double user = 0, system = 0;
    fields >> user >> system;
    return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
  }

 private:
  pid_t pid_ = -1;
  int stdin_ = -1;
  std::string address_;
};

struct Cost {
  double micros_per_token = 0, micros_per_message = 0, tokens_per_message = 0, tokens_per_second = 0;
};

Cost measure(const std::vector<std::string>& argv, int64_t tokens) {
  const ServerProcess server(argv);
  ConnectionOptions options;
  options.address = server.address();
  Connection connection(options);
  const absl::Status opened = connection.open();
  OCTET_CHECK(opened.ok(), opened.ToString());
  LoadSpec load;
  load.concurrency = kStreams;
  load.requests = kStreams;
  // The fake model's vocabulary and context.
  load.shape = {.prompt_tokens = *LengthDistribution::parse("1"),
                .output_tokens = *LengthDistribution::parse(std::to_string(tokens / kStreams)),
                .vocab_size = 263,
                .max_context = 4096};
  LoadGenerator generator(connection);
  LoadSpec warmup = load;
  warmup.shape.output_tokens = *LengthDistribution::parse("100");
  OCTET_CHECK(generator.warm_up(warmup, kStreams).ok(), "the warm-up failed");
  const double before = server.cpu_seconds();
  const absl::StatusOr<LoadRecord> record = generator.run(load);
  const double spent = server.cpu_seconds() - before;
  OCTET_CHECK(record.ok(), record.status().ToString());
  const LoadSummary summary = summarize(*record);
  OCTET_CHECK(summary.done == kStreams, to_text(summary));
  return {.micros_per_token = 1e6 * spent / static_cast<double>(summary.tokens),
          .micros_per_message = 1e6 * spent / static_cast<double>(summary.messages),
          .tokens_per_message = summary.tokens_per_message(),
          .tokens_per_second = summary.tokens_per_second};
}

Cost median_of(const std::vector<Cost>& costs) {
  const auto of = [&](double Cost::*field) {
    std::vector<double> values;
    for (const Cost& cost : costs) values.push_back(cost.*field);
    return median(values);
  };
  return {.micros_per_token = of(&Cost::micros_per_token),
          .micros_per_message = of(&Cost::micros_per_message),
          .tokens_per_message = of(&Cost::tokens_per_message),
          .tokens_per_second = of(&Cost::tokens_per_second)};
}

void print(const char* server, const char* pace, const Cost& cost) {
  std::printf("%-6s %-20s %14.2f %16.2f %15.2f %12.0f\n", server, pace, cost.micros_per_token, cost.micros_per_message,
              cost.tokens_per_message, cost.tokens_per_second);
}

// A row for each server: medians over the rounds, in each of which they take turns.
void compare(const char* pace, int step_us, int64_t tokens, int rounds) {
  std::vector<Cost> octets, bares;
  for (int round = 0; round < rounds; ++round) {
    octets.push_back(measure({OCTET_FAKE_SERVER, "--step-us", std::to_string(step_us)}, tokens));
    const long together = std::max(1L, std::lround(octets.back().tokens_per_message));
    bares.push_back(measure({OCTET_BARE_SERVER, std::to_string(step_us), std::to_string(together)}, tokens));
  }
  const Cost octet = median_of(octets), bare = median_of(bares);
  print("octet", pace, octet);
  print("bare", pace, bare);
  std::printf("%27s %14.2f us above bare gRPC: %.2f times its cost\n\n", "",
              octet.micros_per_token - bare.micros_per_token, octet.micros_per_token / bare.micros_per_token);
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  const int64_t tokens = argc > 1 ? std::atoll(argv[1]) : 200'000;
  const int rounds = argc > 2 ? std::atoi(argv[2]) : 3;
  std::printf("server CPU time per streamed token: %d streams, %lld tokens a round, medians of %d rounds\n\n",
              octet::kStreams, static_cast<long long>(tokens), rounds);
  std::printf("%-6s %-20s %14s %16s %15s %12s\n", "server", "pace", "us per token", "us per message", "tokens/message",
              "tokens/s");
  octet::compare("a step every 2 ms", 2000, tokens, rounds);
  octet::compare("a step every 200 us", 200, tokens, rounds);
  octet::compare("as fast as it can", 0, tokens, rounds);
}
