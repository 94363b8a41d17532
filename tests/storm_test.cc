// Storms on a real server, driven by `octet bench serve`: many clients that come, cancel, stall and go must leave
// nothing behind and disturb nobody. What depends on this machine's speed is printed by the command, not asserted here.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/octet_server.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using nlohmann::json;

// So small that a step costs next to nothing and everything around it is what is tested.
std::string write_tiny_model() {
  return write_random_model({.format = RandomFormat::kBF16,
                             .hidden_size = 32,
                             .intermediate_size = 64,
                             .num_hidden_layers = 1,
                             .num_attention_heads = 2,
                             .num_key_value_heads = 2,
                             .head_dim = 16,
                             .vocab_size = 288});
}

// What `octet bench serve` found; its exit status must be 0: nothing failed, nothing leaked.
json bench(const Server& server, std::vector<std::string> options) {
  const std::string path = fresh_path("bench.json");
  options.insert(options.begin(), {"bench", "serve", "--json", path});
  const Finished run = server.run(options);
  EXPECT_EQ(run.status, 0) << run.out << run.err;
  std::ifstream file(path);
  return json::parse(file, nullptr, /*allow_exceptions=*/false);
}

// Bytes of a process that are in memory.
double resident_bytes(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  int64_t total = 0, resident = 0;
  file >> total >> resident;
  return static_cast<double>(resident * sysconf(_SC_PAGESIZE));
}

void expect_all_ended(const json& found, int requests) {
  ASSERT_TRUE(found.is_object());
  const json& summary = found.at("summary");
  EXPECT_EQ(summary.at("done").get<int>() + summary.at("cancelled").get<int>(), requests) << summary;
  EXPECT_TRUE(summary.at("failed").empty()) << summary;
  EXPECT_EQ(found.at("leaked_requests"), 0);
  EXPECT_EQ(found.at("leaked_blocks"), 0);
}

TEST(Storm, AThousandStreamsWithCancelsLeaveNoRequestNoBlockAndNoMemory) {
  // The queue must hold those who wait and those who have gone since the last step.
  // A cache so small that the first storm touches all of it: memory becomes resident when it is first used.
  Server server(write_tiny_model(), 2, {"--threads", "1", "--max-waiting", "4000", "--kv-memory", "2MiB"});
  ASSERT_TRUE(server.ready());
  const auto storm = [&](int seed) {
    const json found = bench(
        server, {"--concurrency", "1000", "--requests", "2000", "--warmup", "0", "--cancel-rate", "0.3",
                 "--prompt-tokens", "uniform:1-40", "--output-tokens", "uniform:1-30", "--seed", absl::StrCat(seed)});
    expect_all_ended(found, 2000);
    EXPECT_GT(found.at("summary").at("cancelled"), 200) << "too few cancels to mean anything";
  };
  // The allocator's pool and gRPC's buffers grow to the size of a storm once.
  for (int seed = 0; seed < 5; ++seed) storm(seed);
  const double before = resident_bytes(server.rank_0());
  for (int seed = 5; seed < 7; ++seed) storm(seed);
  const double drift = resident_bytes(server.rank_0()) / before - 1;
  std::printf("resident memory of rank 0: %.1f MiB, %+.2f %% after 4,000 more streams\n", before / (1 << 20),
              100 * drift);
  EXPECT_LT(drift, 0.02);
}

TEST(Storm, ReadersThatStallAreEndedAndTheOthersFinish) {
  Server server(write_tiny_model(), 2, {"--threads", "1", "--max-sequences", "256", "--stall-seconds", "2"});
  ASSERT_TRUE(server.ready());
  const json found = bench(server, {"--stalled", "200", "--stalled-tokens", "1500", "--concurrency", "50", "--requests",
                                    "500", "--stalled-seconds", "4", "--prompt-tokens", "16", "--output-tokens", "32"});
  expect_all_ended(found, 500);
  int streams = 0;
  for (const auto& [status, count] : found.at("stalled").items()) {
    EXPECT_NE(status, "OPEN") << count << " stalled streams have no end";
    EXPECT_NE(status, "OK") << count << " stalled streams were not given up on";
    streams += count.get<int>();
  }
  EXPECT_EQ(streams, 200);
  EXPECT_LT(resident_bytes(server.rank_0()), 1 << 30);
}

}  // namespace
}  // namespace octet
