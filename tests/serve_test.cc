// octet serve under real mpirun, from the command line as a user has it: the same answer on any number of ranks, and
// every mistake answered with a sentence and an exit status, on all ranks, in time.
#include <gtest/gtest.h>
#include <signal.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <random>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/http_get.h"
#include "tests/octet_server.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using nlohmann::json;
using std::chrono::seconds;

const std::string kOctet = OCTET_BINARY;

// What --json prints for greedy decoding after these tokens.
json greedy(const Server& server, const std::vector<int32_t>& prompt, int max_tokens) {
  const Finished run = server.run({"generate", "--token-ids", absl::StrJoin(prompt, ","), "--max-tokens",
                                   std::to_string(max_tokens), "--temperature", "0", "--logprobs", "2", "--json"});
  EXPECT_EQ(run.status, 0) << run.err;
  return run.status == 0 ? json::parse(run.out) : json();
}

std::vector<std::vector<int32_t>> prompts(int64_t vocab_size, const std::vector<int>& lengths) {
  std::mt19937_64 random(3);
  std::vector<std::vector<int32_t>> prompts;
  for (int length : lengths) {
    prompts.emplace_back(length);
    for (int32_t& token : prompts.back()) token = static_cast<int32_t>(random() % vocab_size);
  }
  return prompts;
}

struct Cell {
  int ranks;
  std::string nodes;
  int threads = 1;
};

// Token ids and logprob digits, as printed.
std::vector<std::string> answers(const std::string& model, const Cell& cell,
                                 const std::vector<std::vector<int32_t>>& prompts) {
  std::vector<std::string> more = {"--threads", std::to_string(cell.threads)};
  if (!cell.nodes.empty()) more.insert(more.end(), {"--pretend-nodes", cell.nodes});
  Server server(model, cell.ranks, more);
  std::vector<std::string> result;
  for (const auto& prompt : prompts) {
    if (!server.ready()) break;
    json line = greedy(server, prompt, 8);
    line.erase("usage");  // holds a random seed
    result.push_back(line.dump());
  }
  return result;
}

void expect_one_answer(const std::string& model, const std::vector<Cell>& cells,
                       const std::vector<std::vector<int32_t>>& prompts) {
  const std::vector<std::string> expected = answers(model, {.ranks = 1, .nodes = ""}, prompts);
  ASSERT_EQ(expected.size(), prompts.size());
  for (const Cell& cell : cells) {
    EXPECT_EQ(answers(model, cell, prompts), expected) << cell.ranks << " ranks, nodes " << cell.nodes;
  }
}

TEST(Serve, GivesOneAnswerOnAnyRanksAndNodesOfAnEightSliceModel) {
  const RandomModel model{.format = RandomFormat::kFbgemm};
  expect_one_answer(write_random_model(model),
                    {{2, ""}, {3, ""}, {3, "2+1"}, {5, ""}, {8, ""}, {8, "3+5"}, {8, "3+3+2"}, {2, "", 2}},
                    prompts(model.vocab_size, {1, 2, 17, 255, 256, 257, 1000, 2000}));
}

TEST(Serve, GivesOneAnswerOnAnyRanksAndNodesOfSmolLM2) {
  const char* model = std::getenv("OCTET_SMOLLM2_DIR");
  if (model == nullptr) GTEST_SKIP() << "SKIPPED: OCTET_SMOLLM2_DIR is not set, the model was not fetched";
  expect_one_answer(model, {{2, ""}, {3, ""}, {3, "2+1"}}, prompts(49152, {1, 5, 64, 300, 2000}));
}

TEST(Serve, DrainsAndEndsCleanlyWhenToldTo) {
  Server server(write_random_model({}), 2);
  ASSERT_TRUE(server.ready());
  greedy(server, {1, 2, 3}, 2);
  EXPECT_EQ(server.stop(SIGUSR1), 0) << server.process().err();
}

TEST(Serve, DrainsInsideTheTimeThatMpirunAllows) {
  Server server(write_random_model({}), 2);
  ASSERT_TRUE(server.ready());
  // mpirun itself then ends with 1, however cleanly its ranks ended.
  EXPECT_EQ(server.stop(SIGTERM), 1) << server.process().err();
  EXPECT_TRUE(absl::StrContains(server.process().err(), "drained")) << server.process().err();
}

TEST(Serve, DrainsBeforeSlurmEndsTheJob) {
  const std::string model = write_random_model({});
  Process::Options environment = mpirun_environment();
  environment.environment["SLURM_JOB_END_TIME"] = absl::StrCat(time(nullptr) + 12);
  const Finished server = run_command(mpirun(2, {kOctet, "serve", "--model", model, "--address", "127.0.0.1:0",
                                                 "--drain-seconds", "1", "--kv-memory", "64MiB"}),
                                      environment, seconds(60));
  EXPECT_EQ(server.status, 0) << server.err;
  EXPECT_TRUE(absl::StrContains(server.err, "draining: the job's time ends")) << server.err;
}

TEST(Serve, RefusesASecondServerOnItsPort) {
  const std::string model = write_random_model({});
  Server first(model, 1);
  ASSERT_TRUE(first.ready());
  const Finished second =
      run_command(mpirun(1, {kOctet, "serve", "--model", model, "--address", first.address()}), mpirun_environment());
  EXPECT_NE(second.status, 0);
  EXPECT_TRUE(absl::StrContains(second.err, "in use")) << second.err;
  EXPECT_EQ(greedy(first, {5}, 1)["finish_reason"], "length");
}

TEST(Serve, ShowsItsMetrics) {
  Server server(write_random_model({}), 2, {"--metrics-address", "127.0.0.1:0", "--metrics-compat", "vllm"});
  ASSERT_TRUE(server.ready());
  const std::string err = server.process().err(), intro = "metrics at http://";
  ASSERT_TRUE(absl::StrContains(err, intro)) << err;
  const size_t begin = err.find(intro) + intro.size();
  const std::string address = err.substr(begin, err.find("/metrics", begin) - begin);
  greedy(server, {1, 2, 3}, 4);
  const std::string page = http_get(address, "/metrics").body;
  for (const char* line :
       {"\noctet_serving 1\n", "\noctet_prompt_tokens_total 3\n", "\noctet_generated_tokens_total 4\n",
        "stage=\"collective\"", "vllm:num_requests_running{model_name="}) {
    EXPECT_TRUE(absl::StrContains(page, line)) << line << "is not in\n" << page;
  }
  EXPECT_EQ(server.stop(SIGUSR1), 0) << server.process().err();
}

TEST(Serve, LogsOneObjectALine) {
  Server server(write_random_model({}), 2, {"--log-format", "json"});
  ASSERT_TRUE(server.ready());
  greedy(server, {1, 2, 3}, 4);
  EXPECT_EQ(server.run({"generate", "--token-ids", "99999", "--request-id", "the \"bad\" one"}).status, 1);
  EXPECT_EQ(server.stop(SIGUSR1), 0);
  int lines = 0, calls = 0;
  bool bad_seen = false;
  std::istringstream log(server.process().err());
  for (std::string text; std::getline(log, text); ++lines) {
    if (text.starts_with("mpirun: ")) continue;
    const json line = json::parse(text, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(line.is_object()) << text;
    for (const char* key : {"time", "level", "rank", "message"}) EXPECT_TRUE(line.contains(key)) << key << ": " << text;
    if (line.at("message") != "call ended") continue;
    ++calls;
    bad_seen |= line.at("request_id") == "the \"bad\" one" && line.at("status") == "INVALID_ARGUMENT";
    EXPECT_FALSE(absl::StrContains(text, "99999")) << "what a client sent is nobody else's to read";
  }
  EXPECT_GT(lines, 3);
  EXPECT_EQ(calls, 2);
  EXPECT_TRUE(bad_seen);
}

// A start that must fail: what is started, and what its message must hold.
struct BadStart {
  std::string name;
  int ranks;
  std::vector<std::string> arguments;
  std::string message;
  std::map<std::string, std::string> environment = {};
};

void expect_refused(const BadStart& bad, const std::vector<std::string>& argv) {
  Process::Options options = mpirun_environment();
  options.environment.insert(bad.environment.begin(), bad.environment.end());
  const Finished run = run_command(argv, options, seconds(60));
  EXPECT_GT(run.status, 0) << bad.name << (run.status < 0 ? ": hangs" : ": starts") << "\n" << run.err;
  EXPECT_LT(run.status, 128) << bad.name << ": crashed\n" << run.err;
  EXPECT_TRUE(absl::StrContains(run.err, bad.message)) << bad.name << " says\n" << run.err;
}

TEST(Serve, RefusesBadStartsWithASentence) {
  const std::string good = write_random_model({});
  const std::string truncated = write_random_model({});
  std::filesystem::resize_file(truncated + "/model.safetensors",
                               std::filesystem::file_size(truncated + "/model.safetensors") - 100);
  const std::string no_config = write_random_model({});
  std::filesystem::remove(no_config + "/config.json");
  const std::vector<BadStart> cases = {
      {"no such model", 2, {"--model", "/nonexistent/model"}, "/nonexistent/model"},
      {"no config.json", 2, {"--model", no_config}, "config.json"},
      {"truncated file", 3, {"--model", truncated}, "model.safetensors"},
      {"more ranks than slices", 9, {"--model", good}, "start 1 to 8 ranks"},
      {"context longer than the model's", 2, {"--model", good, "--max-context", "1000000"}, "--max-context"},
      {"cache too small for the context",
       2,
       {"--model", good, "--kv-memory", "1MiB", "--max-context", "4096"},
       "--kv-memory"},
      {"cache larger than memory", 2, {"--model", good, "--kv-memory", "100000GiB"}, "--kv-memory"},
      {"open to the network", 1, {"--model", good, "--address", "0.0.0.0:0"}, "--token-file"},
      {"bad address", 1, {"--model", good, "--address", "nonsense"}, "nonsense"},
      {"metrics at an address of others",
       2,
       {"--model", good, "--metrics-address", "192.0.2.1:0"},
       "--metrics-address"},
      {"names of metrics without an address", 1, {"--model", good, "--metrics-compat", "vllm"}, "--metrics-address"},
      {"pretended nodes that do not add up", 3, {"--model", good, "--pretend-nodes", "2+2"}, "2+2"},
      {"no rank's share of threads", 1, {"--model", good, "--threads", "0"}, "--threads"},
  };
  for (const BadStart& bad : cases) {
    std::vector<std::string> command = {kOctet, "serve"};
    command.insert(command.end(), bad.arguments.begin(), bad.arguments.end());
    if (bad.name != "open to the network" && bad.name != "bad address") {
      command.insert(command.end(), {"--address", "127.0.0.1:0"});
    }
    expect_refused(bad, mpirun(bad.ranks, command));
  }
}

TEST(Serve, RefusesOneRankWhereTheLauncherMeantSeveral) {
  const std::vector<std::string> command = {kOctet,      "serve",      "--model", write_random_model({}),
                                            "--address", "127.0.0.1:0"};
  expect_refused({"slurm", 1, {}, "srun --mpi=pmix", {{"SLURM_NTASKS", "4"}, {"SLURM_PROCID", "0"}}}, command);
}

TEST(Serve, RefusesRanksThatSeeDifferentModels) {
  const std::string one = write_random_model({.seed = 1}),
                    other = write_random_model({.seed = 1, .num_hidden_layers = 3});
  std::vector<std::string> argv = mpirun(1, {kOctet, "serve", "--model", one, "--address", "127.0.0.1:0"});
  argv.insert(argv.end(), {":", "-np", "1", kOctet, "serve", "--model", other, "--address", "127.0.0.1:0"});
  expect_refused({"different models", 2, {}, "rank 1"}, argv);
}

TEST(Serve, EndsEveryRankWhenOneIsKilled) {
  Server server(write_random_model({}), 3);
  ASSERT_TRUE(server.ready());
  const std::vector<pid_t> ranks = server.process().children();
  ASSERT_EQ(ranks.size(), 3u);
  kill(ranks[1], SIGKILL);
  EXPECT_GT(server.process().wait(seconds(20)), 0) << "the other ranks hang";
  for (pid_t rank : ranks) EXPECT_FALSE(alive(rank)) << "process " << rank << " is left";
}

}  // namespace
}  // namespace octet
