// Serves a fake model for clients that are not ours (tests/grpcio_client.py): prints its address, ends when stdin does.
// Usage: fake_server [TOKEN_FILE]
#include <cstdio>

#include "tests/fake_server.h"

int main(int argc, char** argv) {
  octet::ServerOptions options;
  if (argc > 1) options.access.token_file = argv[1];
  octet::FakeServer fake(options, "hello, w\u00f6rld");
  fake.group.set_step_time(std::chrono::milliseconds(5));
  std::printf("%s\n", fake.server->address().c_str());
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
}
