// octet serve and a gRPC client that is not Octet's: Debian's python3-grpcio, which learns the API from reflection.
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/octet_server.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

// Debian's own, whatever else is first in the path.
constexpr char kPython[] = "/usr/bin/python3";

bool has_grpcio() { return run_command({kPython, "-c", "import grpc, google.protobuf"}).status == 0; }

// Runs a script of this folder against the server and shows what it printed.
void expect_success(const std::string& script, const std::vector<std::string>& arguments) {
  std::vector<std::string> argv = {kPython, absl::StrCat(OCTET_TESTS_DIR, "/", script)};
  argv.insert(argv.end(), arguments.begin(), arguments.end());
  const Finished run = run_command(argv, {}, std::chrono::seconds(300));
  std::printf("%s\n", run.out.c_str());
  EXPECT_EQ(run.status, 0) << run.err;
}

#define SKIP_WITHOUT_GRPCIO() \
  if (!has_grpcio()) GTEST_SKIP() << "SKIPPED: " << kPython << " has no grpcio (Debian package python3-grpcio)"

TEST(ForeignClient, StreamsCancelsAndHearsEveryStatus) {
  SKIP_WITHOUT_GRPCIO();
  const std::string token_file = fresh_path("token");
  std::ofstream(token_file) << "s3cret\n";
  ASSERT_EQ(chmod(token_file.c_str(), 0600), 0);
  Server server(write_random_model({}), 2, {"--token-file", token_file});
  ASSERT_TRUE(server.ready());
  expect_success("grpcio_client.py", {server.address(), token_file, "--drain"});
  EXPECT_EQ(server.process().wait(std::chrono::seconds(30)), 0) << "drained by a call: " << server.process().err();
}

TEST(ForeignClient, TenThousandHostileRequestsChangeNothingForANeighbour) {
  SKIP_WITHOUT_GRPCIO();
  Server server(write_random_model({}), 2);
  ASSERT_TRUE(server.ready());
  expect_success("hostile_client.py", {server.address(), "--requests", "10000"});
  EXPECT_TRUE(server.process().running()) << server.process().err();
  EXPECT_EQ(server.stop(SIGUSR1), 0);
}

}  // namespace
}  // namespace octet
