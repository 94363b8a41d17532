// Serves a fake model, for clients that are not ours (tests/grpcio_client.py) and for what a token costs the server
// (tests/bench/stream_cost_bench.cc): prints its address, ends when stdin does.
// Usage: fake_server [--step-us MICROSECONDS] [TOKEN_FILE]
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "tests/fake_server.h"

int main(int argc, char** argv) {
  std::chrono::microseconds step(5000);
  if (argc > 2 && std::strcmp(argv[1], "--step-us") == 0) {
    step = std::chrono::microseconds(std::atoi(argv[2]));
    argc -= 2;
    argv += 2;
  }
  octet::ServerOptions options;
  if (argc > 1) options.token_file = argv[1];
  octet::FakeServer fake(options, "hello, w\u00f6rld");
  fake.group.set_step_time(step);
  std::printf("%s\n", fake.server->address().c_str());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
}
