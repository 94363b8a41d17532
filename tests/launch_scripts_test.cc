// launch/mpirun: what its scripts make of signals and of octet's exit statuses.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/octet_server.h"
#include "tests/pretended_octet.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using std::chrono::seconds;

std::string script(const std::string& name) { return absl::StrCat(OCTET_LAUNCH_DIR, "/mpirun/", name); }

Process::Options with_variables(const std::map<std::string, std::string>& variables) {
  Process::Options options = mpirun_environment();
  options.environment.insert(variables.begin(), variables.end());
  return options;
}

Finished run_batch(const PretendedOctet& octet) {
  return run_command({script("batch")},
                     with_variables({{"OCTET", octet.path()},
                                     {"MODEL", "model"},
                                     {"INPUT", "requests"},
                                     {"OUTPUT", octet.output()},
                                     {"RANKS", "1"},
                                     {"OMPI_MCA_odls_base_sigkill_timeout", "0"}}));  // not two seconds after each
}

TEST(MpirunServe, DrainsOnSigtermLikeOnSigusr1) {
  for (int signal : {SIGTERM, SIGUSR1}) {
    const std::string address_file = fresh_path("address");
    Process process(
        {script("serve"), "--address", "127.0.0.1:0", "--address-file", address_file, "--kv-memory", "64MiB"},
        with_variables({{"OCTET", OCTET_BINARY}, {"MODEL", write_random_model({})}, {"RANKS", "1"}}));
    ASSERT_TRUE(wait_for_file(address_file, process, seconds(120))) << process.err();
    process.signal(signal);
    EXPECT_EQ(process.wait(seconds(60)), 0) << process.err();
    EXPECT_TRUE(absl::StrContains(process.err(), "drained")) << process.err();
  }
}

TEST(MpirunBatch, StartsAgainAsLongAsItMovesOn) {
  const PretendedOctet octet({{.lines = 0, .status = 75},
                              {.lines = 0, .status = 75},
                              {.lines = 1, .status = 137},
                              {.lines = 1, .status = 75},
                              {.lines = 1, .status = 75},
                              {.lines = 2, .status = 0}});
  const Finished run = run_batch(octet);
  EXPECT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(octet.starts(), 6) << run.err;
}

TEST(MpirunBatch, GivesUpWhenThreeMoreStartsBringNoLine) {
  const PretendedOctet octet({{.lines = 5, .status = 75}});
  const Finished run = run_batch(octet);
  EXPECT_EQ(run.status, 75) << run.err;
  EXPECT_EQ(octet.starts(), 4) << run.err;
  EXPECT_TRUE(absl::StrContains(run.err, "gives up")) << run.err;
}

TEST(MpirunBatch, DoesNotStartAgainWhatCannotWorkOrIsDone) {
  for (int status : {0, 1, 3, 78}) {
    const PretendedOctet octet({{.lines = 0, .status = status}});
    EXPECT_EQ(run_batch(octet).status, status);
    EXPECT_EQ(octet.starts(), 1) << "after status " << status;
  }
}

}  // namespace
}  // namespace octet
