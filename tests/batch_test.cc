// octet batch under real mpirun: whatever kills it, stops it or fills its disk, the output that it leaves at last is
// the one of an uninterrupted run.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <regex>
#include <sstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/process.h"
#include "tests/random_model.h"

namespace octet {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;
using std::chrono::seconds;
using testing::HasSubstr;

const std::string kOctet = OCTET_BINARY;
constexpr int kAllDone = 0, kDoneWithErrors = 3, kComeBack = 75, kRefused = 78;

std::string fresh_path(const std::string& name) {
  static int counter = 0;
  return absl::StrCat(testing::TempDir(), "octet_batch_", getpid(), "_", counter++, "_", name);
}

std::string read_file(const std::string& path) {
  std::ostringstream text;
  text << std::ifstream(path, std::ios::binary).rdbuf();
  return text.str();
}

std::string write_file(const std::string& name, const std::string& text) {
  const std::string path = fresh_path(name);
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

const std::string& model() {
  static const std::string kModel = write_random_model({.hidden_size = 64, .intermediate_size = 128});
  return kModel;
}

// The token of a letter in the random models' vocabulary.
int token_of(char letter) {
  const json vocabulary = json::parse(read_file(model() + "/tokenizer.json"))["model"]["vocab"];
  return vocabulary.at(std::string(1, letter));
}

json line_of(const std::string& id, json body) {
  return {{"custom_id", id}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", std::move(body)}};
}

// Lines of every kind that one wants to see come back the same: sampled and greedy, several outputs, logprobs, stops.
std::string mixed_lines(int count, int max_tokens = 40) {
  std::mt19937 random(7);
  std::string text;
  for (int i = 0; i < count; ++i) {
    json body = {{"prompt", absl::StrCat("Line ", i, std::string(random() % 60, 'a' + i % 26))},
                 {"max_tokens", 4 + random() % static_cast<unsigned>(max_tokens)},
                 {"ignore_eos", true}};
    if (i % 3 == 0) body["temperature"] = 0;
    if (i % 7 == 0) body["n"] = 2;
    if (i % 5 == 0) body["logprobs"] = 2;
    if (i % 11 == 0) body["stop"] = "e";
    if (i % 13 == 0) body["temperature"] = -1;  // an error
    absl::StrAppend(&text, line_of(absl::StrCat("r", i), body).dump(), "\n");
  }
  return text;
}

// The command without its launcher. Answers bear one date, so that outputs of several jobs can be compared.
std::vector<std::string> batch(const std::string& input, const std::string& output,
                               const std::vector<std::string>& more = {}) {
  std::vector<std::string> command = {
      kOctet,      "batch", "--model",     model(), "--input",         input, "--output", output,
      "--created", "1000",  "--kv-memory", "16MiB", "--max-sequences", "16"};
  if (std::ranges::find(more, "--journal-segment") == more.end()) {
    command.insert(command.end(), {"--journal-segment", "1MiB"});
  }
  command.insert(command.end(), more.begin(), more.end());
  return command;
}

// Further options of a job that a test wants to disturb: its steps take their time, however fast the machine is.
std::vector<std::string> slowly(std::vector<std::string> more = {}) {
  more.insert(more.end(), {"--inject-fault", "step=1,kind=slow"});
  return more;
}

Finished run(int ranks, const std::vector<std::string>& command) {
  return run_command(mpirun(ranks, command), mpirun_environment());
}

// The bytes of an uninterrupted run on one rank.
std::string uninterrupted(const std::string& input, int status) {
  const std::string output = fresh_path("whole.jsonl");
  const Finished whole = run(1, batch(input, output));
  EXPECT_EQ(whole.status, status) << whole.err;
  return read_file(output);
}

// Every process below `root`, itself included.
std::vector<pid_t> tree(pid_t root) {
  std::vector<pid_t> all = {root};
  for (size_t i = 0; i < all.size(); ++i) {
    std::istringstream children(read_file(absl::StrCat("/proc/", all[i], "/task/", all[i], "/children")));
    for (pid_t child; children >> child;) all.push_back(child);
  }
  return all;
}

// Waits until nothing of a killed job is left, and ends what does not end by itself: a rank whose mpirun is gone does.
void wait_for_end(const std::vector<pid_t>& pids) {
  for (int i = 0; i < 1200; ++i) {
    if (std::ranges::none_of(pids, alive)) return;
    std::this_thread::sleep_for(milliseconds(25));
  }
  ADD_FAILURE() << "a killed job is still there after 30 s";
  for (pid_t pid : pids) kill(pid, SIGKILL);
}

TEST(Batch, MakesTheSameBytesOnAnyRanksAndInShards) {
  const std::string input = write_file("in.jsonl", mixed_lines(60));
  const std::string expected = uninterrupted(input, kDoneWithErrors);
  EXPECT_EQ(std::ranges::count(expected, '\n'), 60);
  const std::string output = fresh_path("o.jsonl");
  EXPECT_EQ(run(3, batch(input, output, {"--pretend-nodes", "2+1"})).status, kDoneWithErrors);
  EXPECT_EQ(read_file(output), expected);

  std::vector<std::string> merge = {kOctet, "batch", "merge", "--output", fresh_path("merged.jsonl")};
  for (int shard = 0; shard < 3; ++shard) {
    merge.push_back(fresh_path(absl::StrCat("s", shard)));
    EXPECT_EQ(run(1, batch(input, merge.back(), {"--shard", absl::StrCat(shard, "/3")})).status, kDoneWithErrors);
  }
  const Finished merged = run_command(merge);
  EXPECT_EQ(merged.status, kDoneWithErrors) << merged.err;
  EXPECT_EQ(read_file(merge[4]), expected);
}

TEST(Batch, AnswersALineAsTheServerDoes) {
  const std::string input =
      write_file("in.jsonl",
                 line_of("a", {{"prompt", "abc"}, {"max_tokens", 5}, {"temperature", 0}, {"ignore_eos", true}}).dump());
  const std::string output = fresh_path("o.jsonl");
  const Finished done = run(2, batch(input, output));
  EXPECT_EQ(done.status, kAllDone) << done.err;
  const json answer = json::parse(read_file(output), nullptr, false);
  ASSERT_TRUE(answer.is_object()) << read_file(output);
  EXPECT_EQ(answer["custom_id"], "a");
  EXPECT_EQ(answer["response"]["body"]["usage"]["completion_tokens"], 5);
  EXPECT_EQ(answer["response"]["body"]["choices"][0]["finish_reason"], "length");
}

TEST(Batch, HasNothingToDoWhenItIsDone) {
  const std::string input = write_file("in.jsonl", mixed_lines(5)), output = fresh_path("o.jsonl");
  EXPECT_EQ(run(2, batch(input, output)).status, kDoneWithErrors);
  const std::string expected = read_file(output);
  const Finished again = run(2, batch(input, output));
  EXPECT_EQ(again.status, kDoneWithErrors) << again.err;
  EXPECT_THAT(again.err, HasSubstr("nothing to do"));
  EXPECT_FALSE(absl::StrContains(again.err, "Loading weights")) << again.err;
  EXPECT_EQ(read_file(output), expected);
}

TEST(Batch, RefusesWhatCannotWorkWithASentence) {
  const std::string input = write_file("in.jsonl", mixed_lines(4)), output = fresh_path("o.jsonl");
  EXPECT_EQ(run(1, batch(input, output)).status, kDoneWithErrors);
  struct Case {
    std::vector<std::string> command;
    std::string words;
  };
  const std::string twice = write_file("twice.jsonl", "{\"custom_id\": \"a\"}\n{\"custom_id\": \"a\"}\n");
  const Case cases[] = {
      {batch(input, output, {"--seed", "9"}), "began with seed 0, this run has 9"},
      {batch(input, write_file("taken.jsonl", "x")), "exists"},
      {batch(fresh_path("none.jsonl"), fresh_path("o")), "No such file"},
      {batch(twice, fresh_path("o")), "lines 1 and 2 have the same custom_id"},
      {batch(input, fresh_path("o"), {"--shard", "3/3"}), "shards are 0/N to N-1/N"},
      {batch(input, fresh_path("o"), {"--shard", "x"}), "--shard is I/N"},
  };
  for (const Case& c : cases) {
    const Finished refused = run(2, c.command);
    EXPECT_EQ(refused.status, kRefused) << refused.err;
    EXPECT_THAT(refused.err, HasSubstr(c.words));
  }
}

// What a line may look like, and what comes of it: the answer's status code and a part of its error's message.
struct Line {
  std::string text;
  std::string custom_id;  // empty: null
  int status_code = 200;
  std::string message = {};
};

TEST(Batch, HasADefinedAnswerForEveryKindOfLine) {
  const auto good = [](const std::string& id) {
    return line_of(id, {{"prompt", "abc"}, {"max_tokens", 2}, {"a_field_that_nobody_knows", {1, 2}}}).dump();
  };
  json wrong_url = line_of("url", {{"prompt", "x"}}), no_id = line_of("", {{"prompt", "x"}});
  wrong_url["url"] = "/v1/embeddings";
  no_id.erase("custom_id");
  json get = line_of("get", {{"prompt", "x"}});
  get["method"] = "GET";
  const std::vector<Line> lines = {
      {"\xEF\xBB\xBF" + good("first"), "first"},
      {good("crlf") + "\r", "crlf"},
      {"{\"custom_id\": \"\xff\"}", "", 400, "not valid UTF-8"},
      {std::string(64 << 20, 'x'), "", 400, "more than 16 MiB"},
      {R"({"custom_id": "huge", "body": {"prompt": ")" + std::string(17 << 20, 'y') + "\"}}", "huge", 400,
       "more than 16 MiB"},
      {"{\"custom_id\": \"torn\", \"body\": {", "torn", 400, "not valid JSON"},
      {"[1, 2]", "", 400, "not a JSON object"},
      {std::string(100'000, '['), "", 400, "nested deeper"},
      {wrong_url.dump(), "url", 400, "/v1/chat/completions"},
      {get.dump(), "get", 400, "POST"},
      {no_id.dump(), "", 400, "custom_id"},
      {line_of("model", {{"prompt", "x"}, {"model", "another"}}).dump(), "model", 404, "another"},
      {line_of("long", {{"prompt", std::string(100'000, 'y')}}).dump(), "long", 400, "context"},
      {line_of("format", {{"prompt", "x"}, {"response_format", {{"type", "json_object"}}}}).dump(), "format", 400,
       "response_format"},
      {line_of("range", {{"prompt", "x"}, {"temperature", -1}}).dump(), "range", 400, "temperature"},
      {line_of("type", {{"prompt", "x"}, {"max_tokens", "many"}}).dump(), "type", 400, "max_tokens"},
      {good("last"), "last"},  // without a line's end
  };
  std::string text = "\n \t\n";  // blank lines are no lines
  for (const Line& line : lines) absl::StrAppend(&text, line.text, &line == &lines.back() ? "" : "\n\n");
  const std::string input = write_file("in.jsonl", text), output = fresh_path("o.jsonl");
  const Finished done = run(2, batch(input, output));
  ASSERT_EQ(done.status, kDoneWithErrors) << done.err;
  std::ifstream file(output);
  for (const Line& line : lines) {
    std::string answer_text;
    ASSERT_TRUE(std::getline(file, answer_text)) << line.custom_id;
    const json answer = json::parse(answer_text, nullptr, /*allow_exceptions=*/false);
    ASSERT_TRUE(answer.is_object()) << answer_text;
    EXPECT_EQ(answer["custom_id"], line.custom_id.empty() ? json() : json(line.custom_id)) << answer_text;
    EXPECT_EQ(answer["response"]["status_code"], line.status_code) << answer_text;
    const json message = answer["response"]["body"].value("error", json::object()).value("message", "");
    EXPECT_THAT(message.get<std::string>(), HasSubstr(line.message)) << answer_text;
    const std::string said = message.get<std::string>();
    std::printf("%-8s %d %s\n", line.custom_id.c_str(), line.status_code, said.c_str());
  }
  std::string more;
  EXPECT_FALSE(std::getline(file, more)) << more;
}

TEST(Batch, DrainsWhenToldToAndGoesOnLater) {
  const std::string input = write_file("in.jsonl", mixed_lines(300)), output = fresh_path("o.jsonl");
  Process first(mpirun(2, batch(input, output, slowly({"--drain-seconds", "0.2"}))), mpirun_environment());
  ASSERT_TRUE(wait_for_file(output + ".octet/status.json", first, seconds(60)));
  std::this_thread::sleep_for(milliseconds(500));
  first.signal(SIGUSR1);
  EXPECT_EQ(first.wait(seconds(60)), kComeBack) << first.err();
  EXPECT_EQ(json::parse(read_file(output + ".octet/status.json"))["state"], "stopped");
  EXPECT_FALSE(std::filesystem::exists(output));
  const Finished second = run(2, batch(input, output));
  EXPECT_EQ(second.status, kDoneWithErrors) << second.err;
  EXPECT_EQ(read_file(output), uninterrupted(input, kDoneWithErrors));
}

TEST(Batch, StopsBeforeSlurmEndsTheJob) {
  const std::string input = write_file("in.jsonl", mixed_lines(4000, 60)), output = fresh_path("o.jsonl");
  Process::Options environment = mpirun_environment();
  // Ten seconds of them are kept for the finish.
  environment.environment["SLURM_JOB_END_TIME"] = absl::StrCat(time(nullptr) + 14);
  const Finished stopped = run_command(mpirun(2, batch(input, output, slowly())), environment, seconds(60));
  EXPECT_EQ(stopped.status, kComeBack) << stopped.err;
  EXPECT_THAT(stopped.err, HasSubstr("time ends"));
  EXPECT_GT(json::parse(read_file(output + ".octet/status.json"))["lines_done"], 0);
}

TEST(Batch, DrainsInsideTheTimeThatADyingMpirunAllows) {
  const std::string input = write_file("in.jsonl", mixed_lines(1200, 60)), output = fresh_path("o.jsonl");
  Process first(mpirun(2, batch(input, output, slowly())), mpirun_environment());
  ASSERT_TRUE(wait_for_file(output + ".octet/status.json", first, seconds(60)));
  std::this_thread::sleep_for(milliseconds(300));
  first.signal(SIGTERM);
  first.wait(seconds(30));  // mpirun's own word is 1 or 143, however its ranks ended
  EXPECT_EQ(json::parse(read_file(output + ".octet/status.json"))["state"], "stopped") << first.err();
  EXPECT_THAT(first.err(), HasSubstr("stopped: SIGCONT")) << "mpirun's first word is SIGCONT";
}

// Lines are answered, in this run and earlier ones, and in flight when the one before ended, as the log says.
struct Beginning {
  int answered = 0, in_flight = 0;
};
std::optional<Beginning> beginning_of(const std::string& log) {
  static const std::regex kLine(
      R"(job \w+: (\d+) of \d+ lines are answered, run \d+(?:; (\d+) lines were in flight)?)");
  std::smatch match;
  if (!std::regex_search(log, match, kLine)) return std::nullopt;
  return Beginning{std::stoi(match[1]), match[2].matched ? std::stoi(match[2]) : 0};
}

int kills() { return std::getenv("OCTET_LONG_TESTS") != nullptr ? 200 : 20; }

// Kills at random times, of any rank, of mpirun, of the script around it, and while the output is written.
TEST(Batch, SurvivesRandomKillsWithTheSameBytes) {
  std::mt19937 random(11);
  const std::string input = write_file("in.jsonl", mixed_lines(1200, 60));
  const std::string expected = uninterrupted(input, kDoneWithErrors);
  int killed = 0, finished = 0, in_finish = 0, recomputed = 0, counted = 0, most = 0;
  while (killed < kills()) {
    const std::string output = fresh_path("o.jsonl");
    std::vector<pid_t> orphans;
    while (true) {
      const int ranks = 1 + static_cast<int>(random() % 3);
      std::vector<std::string> command = mpirun(ranks, batch(input, output));
      const bool script = random() % 4 == 0;
      // `:` keeps the shell from becoming mpirun.
      if (script) command = {"sh", "-c", absl::StrCat("'", absl::StrJoin(command, "' '"), "'; r=$?; :; exit $r")};
      Process process(command, mpirun_environment());
      const bool at_finish = random() % 4 == 0;
      const auto deadline = std::chrono::steady_clock::now() + milliseconds(at_finish ? 60'000 : 300 + random() % 2500);
      bool finishing = false;
      while (process.running() && std::chrono::steady_clock::now() < deadline && !finishing) {
        if (at_finish) {
          for (const auto& entry : std::filesystem::directory_iterator(testing::TempDir())) {
            finishing |= entry.path().string().starts_with(output + ".part-");
          }
        }
        std::this_thread::sleep_for(milliseconds(1));
      }
      const std::vector<pid_t> pids = tree(process.pid());
      const bool ended = !process.running() || killed >= kills();
      if (!ended) {
        const pid_t victim = pids[random() % pids.size()];
        kill(victim, SIGKILL);
        ++killed;
        in_finish += finishing ? 1 : 0;
        // What a killed script has started goes on, and meets the next run.
        if (script && victim == process.pid()) {
          orphans.insert(orphans.end(), pids.begin(), pids.end());
        } else {
          wait_for_end(pids);
        }
      }
      const int status = process.wait(seconds(120));
      if (const std::optional<Beginning> began = beginning_of(process.err());
          began.has_value() && began->answered > 0) {
        recomputed += began->in_flight;
        most = std::max(most, began->in_flight);
        ++counted;
      }
      if (!ended || status != kDoneWithErrors) {
        ASSERT_FALSE(status == kRefused) << process.err();
        continue;
      }
      break;
    }
    ++finished;
    wait_for_end(orphans);
    const std::string bytes = read_file(output);
    ASSERT_EQ(std::ranges::count(bytes, '\n'), 1200);
    ASSERT_TRUE(bytes == expected) << "the output differs from an uninterrupted run's";
    std::filesystem::remove_all(output + ".octet");
    std::filesystem::remove(output);
  }
  std::printf(
      "%d kills (%d while the output was written) over %d jobs of 1200 lines: lines lost 0, duplicated 0, bytes "
      "equal; %.1f lines recomputed per kill, %d at most\n",
      killed, in_finish, finished, counted == 0 ? 0.0 : static_cast<double>(recomputed) / counted, most);
}

// A line whose prompt has a token that kills whoever computes it.
TEST(Batch, ClosesALineThatKillsTheEngineAndAnswersTheOthers) {
  std::string text;
  for (int i = 0; i < 60; ++i) {
    // The test's tokenizer has a token for each byte: "~" is the poison, and nobody else has it.
    const json body = {
        {"prompt", absl::StrCat("line ", i, i == 33 ? " ~" : "")}, {"max_tokens", 20}, {"ignore_eos", true}};
    absl::StrAppend(&text, line_of(absl::StrCat("r", i), body).dump(), "\n");
  }
  const std::string input = write_file("in.jsonl", text), output = fresh_path("o.jsonl");
  const std::vector<std::string> command =
      batch(input, output, {"--inject-fault", absl::StrCat("rank=1,kind=segv,token=", token_of('~'))});
  Finished finished;
  int runs = 0;
  do {
    finished = run(2, command);
    ASSERT_NE(finished.status, kRefused) << finished.err;
  } while (finished.status != kDoneWithErrors && ++runs < 10);
  EXPECT_EQ(runs, 3) << finished.err;
  std::ifstream file(output);
  std::string line;
  for (int i = 0; i < 60; ++i) {
    ASSERT_TRUE(std::getline(file, line));
    const json answer = json::parse(line);
    EXPECT_EQ(answer["custom_id"], absl::StrCat("r", i));
    if (i == 33) {
      EXPECT_EQ(answer["error"]["code"], "engine_crash") << line;
    } else {
      EXPECT_EQ(answer["response"]["status_code"], 200) << line;
    }
  }
}

TEST(Batch, LeavesNoDuplicateWhenAZombieWakesUp) {
  const std::string input = write_file("in.jsonl", mixed_lines(400)), output = fresh_path("o.jsonl");
  Process zombie(mpirun(2, batch(input, output, slowly())), mpirun_environment());
  ASSERT_TRUE(wait_for_file(output + ".octet/status.json", zombie, seconds(60)));
  std::this_thread::sleep_for(milliseconds(400));
  const std::vector<pid_t> pids = tree(zombie.pid());
  for (pid_t pid : pids) kill(pid, SIGSTOP);
  Process heir(mpirun(1, batch(input, output)), mpirun_environment());
  ASSERT_TRUE(wait_for_file(output + ".octet/seg-000002-00000", heir, seconds(60)));
  for (pid_t pid : pids) kill(pid, SIGCONT);
  EXPECT_EQ(zombie.wait(seconds(60)), kRefused) << zombie.err();
  EXPECT_THAT(zombie.err(), HasSubstr("has taken over"));
  EXPECT_EQ(heir.wait(seconds(120)), kDoneWithErrors) << heir.err();
  EXPECT_EQ(read_file(output), uninterrupted(input, kDoneWithErrors));
}

TEST(Batch, ComesBackWhenAFullDiskHasRoomAgain) {
  const std::string disk = fresh_path("disk");
  std::filesystem::create_directory(disk);
  if (run_command({"unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "none", disk}).status != 0) {
    GTEST_SKIP() << "SKIPPED: this user may not mount a small disk";
  }
  const std::string input = write_file("in.jsonl", mixed_lines(1200, 60)), output = disk + "/o.jsonl";
  const std::string copy = fresh_path("copy.jsonl");
  const std::string job = absl::StrCat(
      "'",
      absl::StrJoin(mpirun(2, batch(input, output, {"--journal-segment", "64KiB", "--disk-patience-seconds", "1"})),
                    "' '"),
      "'");
  const std::string script = absl::StrCat("mount -t tmpfs -o size=1m none ", disk, " || exit 1\n", job,
                                          "\necho first $?\nmount -o remount,size=64m ", disk, "\n", job,
                                          "\necho second $?\ncp ", output, " ", copy);
  const Finished both = run_command({"unshare", "-m", "sh", "-c", script}, mpirun_environment(), seconds(240));
  EXPECT_THAT(both.out, HasSubstr("first 75\n")) << both.err;
  EXPECT_THAT(both.out, HasSubstr("second 3\n")) << both.err;
  EXPECT_THAT(both.err, HasSubstr("No space left on device"));
  EXPECT_TRUE(read_file(copy) == uninterrupted(input, kDoneWithErrors));
}

}  // namespace
}  // namespace octet
