// The lines of a batch job through an engine whose workers are fake and a disk that fails when it is told to.
#include "coordinator/batch/batch_runner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "tests/fake_disk.h"
#include "tests/fake_model.h"

namespace octet {
namespace {

using nlohmann::json;
using testing::HasSubstr;

std::string write_lines(int count) {
  static int counter = 0;
  const std::string path = absl::StrCat(testing::TempDir(), "octet_runner_", getpid(), "_", counter++, ".jsonl");
  std::ofstream file(path);
  for (int i = 0; i < count; ++i) {
    json body = {{"prompt", absl::StrCat("line ", i)}, {"max_tokens", 1 + i % 9}};
    if (i % 10 == 3) body["max_tokens"] = "many";
    if (i % 10 == 4) body["n"] = 3;
    if (i % 10 == 5) body["stop"] = "lo";
    if (i % 10 == 6) body["prompt"] = {"several", "prompts"};
    file << json{{"custom_id", absl::StrCat("r", i)}, {"method", "POST"}, {"url", "/v1/completions"}, {"body", body}}
         << "\n";
  }
  return path;
}

// How many sequences each step had.
class Steps final : public EngineObserver {
 public:
  void on_step(const StepReport& report) override { sequences.push_back(report.sequences); }
  void on_first_token(double) override {}
  void on_token(double) override {}
  void on_output_end(const OutputReport&) override {}
  std::vector<int32_t> sequences;
};

// One run of a job, as launch puts it together.
struct OneRun {
  OneRun(Disk* disk, const std::string& input, BatchRunnerOptions options = {},
         std::chrono::microseconds step_time = {})
      : model(fake_model()), workers({72, 101, 108, 108, 111}) {
    workers.set_step_time(step_time);
    absl::StatusOr<std::unique_ptr<BatchJob>> opened = BatchJob::open(disk, {.input = input,
                                                                             .output = "out/o",
                                                                             .identity = {{"model", "fake"}},
                                                                             .created = 7,
                                                                             .writer = "a test",
                                                                             .segment_bytes = 4096});
    EXPECT_TRUE(opened.ok()) << opened.status();
    job = *std::move(opened);
    facts = {.job_id = job->id(), .created = 7, .system_fingerprint = "fake", .chat_date = "1 Jan 1970"};
    engine.emplace(EngineOptions{.limits = model.limits, .max_waiting = 1 << 20, .observer = &steps}, &workers,
                   [](const absl::Status&) {});
    runner.emplace(options, job.get(), &facts, &model, &*engine);
  }

  ServedModel model;
  FakeWorkerGroup workers;
  Steps steps;
  std::unique_ptr<BatchJob> job;
  BatchFacts facts;
  std::optional<Engine> engine;
  std::optional<BatchRunner> runner;
};

std::string uninterrupted(const std::string& input) {
  FakeDisk disk;
  OneRun whole(&disk, input);
  EXPECT_TRUE(whole.runner->run().ok());
  EXPECT_TRUE(whole.job->finish(nullptr).ok());
  return *disk.read("out/o");
}

TEST(BatchRunner, AnswersEveryLineInTheOrderOfTheInput) {
  const std::vector<std::string> lines = absl::StrSplit(uninterrupted(write_lines(300)), '\n', absl::SkipEmpty());
  ASSERT_EQ(lines.size(), 300u);
  for (size_t i = 0; i < lines.size(); ++i) {
    const json line = json::parse(lines[i]);
    EXPECT_EQ(line["custom_id"], absl::StrCat("r", i));
    EXPECT_EQ(line["response"]["status_code"], i % 10 == 3 ? 400 : 200) << lines[i];
    const size_t choices = i % 10 == 3 ? 0 : i % 10 == 4 ? 3 : i % 10 == 6 ? 2 : 1;
    EXPECT_EQ(choices == 0 ? 0 : line["response"]["body"]["choices"].size(), choices);
  }
}

TEST(BatchRunner, KeepsTheEngineFullAndNoFuller) {
  FakeDisk disk;
  OneRun run(&disk, write_lines(300), {.outputs_in_flight = 8});
  ASSERT_TRUE(run.runner->run().ok());
  // The last line to be started may have several outputs.
  EXPECT_LE(*std::ranges::max_element(run.steps.sequences), 8 + 2);
  EXPECT_GE(*std::ranges::max_element(run.steps.sequences), 8);
}

TEST(BatchRunner, GoesOnWhereAnotherRunWasStopped) {
  const std::string input = write_lines(400);
  FakeDisk disk;
  {
    OneRun first(&disk, input, {}, std::chrono::milliseconds(1));
    std::thread other([&] {
      while (first.runner->state().answered.lines < 20) absl::SleepFor(absl::Milliseconds(1));
      first.runner->stop(absl::Now(), "SIGUSR1");
    });
    const absl::Status status = first.runner->run();
    other.join();
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("SIGUSR1"));
    EXPECT_LT(first.job->journal().answers(), 400);
  }
  OneRun second(&disk, input);
  EXPECT_GE(second.runner->state().answered_before, 20);
  ASSERT_TRUE(second.runner->run().ok());
  ASSERT_TRUE(second.job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), uninterrupted(input));
}

TEST(BatchRunner, LetsLinesUnderWayEndWhenThereIsTime) {
  FakeDisk disk;
  OneRun run(&disk, write_lines(400), {}, std::chrono::milliseconds(1));
  std::thread other([&] {
    while (run.runner->state().running < 20) absl::SleepFor(absl::Milliseconds(1));
    run.runner->stop(absl::Now() + absl::Seconds(60), "SIGUSR1");
  });
  EXPECT_TRUE(absl::IsUnavailable(run.runner->run()));
  other.join();
  EXPECT_EQ(run.runner->state().running, 0);
  EXPECT_EQ(run.engine->stats().running + run.engine->stats().waiting, 0) << "nothing was cancelled";
}

TEST(BatchRunner, WaitsForADiskThatIsFullForAWhile) {
  const std::string input = write_lines(300);
  FakeDisk disk;
  OneRun run(&disk, input,
             {.commit_answers = 16, .disk_patience = absl::Seconds(30), .disk_pause = absl::Milliseconds(10)});
  disk.fail_at(12, 6);
  ASSERT_TRUE(run.runner->run().ok());
  ASSERT_TRUE(run.job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), uninterrupted(input));
}

TEST(BatchRunner, ComesBackLaterToADiskThatStaysFull) {
  const std::string input = write_lines(300);
  FakeDisk disk;
  {
    OneRun run(&disk, input,
               {.commit_answers = 16, .disk_patience = absl::Milliseconds(40), .disk_pause = absl::Milliseconds(10)});
    disk.fail_at(12, 1'000'000);
    const absl::Status status = run.runner->run();
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("no space left"));
  }
  disk.fail_at(INT32_MAX);
  OneRun second(&disk, input);
  ASSERT_TRUE(second.runner->run().ok());
  ASSERT_TRUE(second.job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), uninterrupted(input));
}

TEST(BatchRunner, StartsNoLineThatWouldNotEndInTime) {
  FakeDisk disk;
  OneRun run(&disk, write_lines(3000), {.end = absl::Now() + absl::Milliseconds(300)}, std::chrono::milliseconds(1));
  const absl::Status status = run.runner->run();
  EXPECT_TRUE(absl::IsUnavailable(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("the job's time ends"));
  EXPECT_GT(run.job->journal().answers(), 0);
  EXPECT_LT(run.job->journal().answers(), 3000);
}

TEST(BatchRunner, KeepsWhatIsDoneWhenTheWorkersFail) {
  const std::string input = write_lines(400);
  FakeDisk disk;
  {
    OneRun run(&disk, input, {}, std::chrono::milliseconds(1));
    std::thread other([&] {
      while (run.runner->state().answered.lines < 20) absl::SleepFor(absl::Milliseconds(1));
      run.workers.fail(absl::UnavailableError("rank 2 is lost"));
    });
    const absl::Status status = run.runner->run();
    other.join();
    EXPECT_TRUE(absl::IsUnavailable(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("rank 2 is lost"));
  }
  OneRun second(&disk, input);
  EXPECT_GE(second.runner->state().answered_before, 20);
  ASSERT_TRUE(second.runner->run().ok());
  ASSERT_TRUE(second.job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), uninterrupted(input));
}

TEST(BatchRunner, EndsWhenALaterRunHasTakenOver) {
  const std::string input = write_lines(400);
  FakeDisk disk;
  OneRun zombie(&disk, input, {.commit_answers = 4});
  OneRun heir(&disk, input);
  EXPECT_TRUE(absl::IsAborted(zombie.runner->run()));
  EXPECT_TRUE(heir.runner->run().ok());
}

// Incarnations that died with these lines in flight, through their own fault or not.
void die(Disk* disk, const std::string& input, const std::vector<int64_t>& lines, bool counts) {
  int epoch = 0;
  {
    OneRun run(disk, input);
    epoch = run.job->journal().epoch();
    for (const int64_t line : lines) run.job->journal().add_intent(line);
    ASSERT_TRUE(run.job->journal().flush().ok());
  }
  OneRun next(disk, input);
  ASSERT_THAT(next.job->journal().unjudged(), testing::Contains(epoch));
  next.job->journal().judge(epoch, counts, "rank 1: SIGSEGV");
  ASSERT_TRUE(next.job->journal().commit().ok());
}

TEST(BatchRunner, RunsSuspectsAloneAndFirst) {
  const std::string input = write_lines(100);
  FakeDisk disk;
  die(&disk, input, {1, 2, 7, 8}, true);
  die(&disk, input, {7, 8, 11}, true);
  OneRun run(&disk, input);
  ASSERT_TRUE(run.runner->run().ok());
  // Lines 7 and 8 ask for 8 and 9 tokens, one output each: as many steps have one sequence, whatever comes then.
  ASSERT_GT(run.steps.sequences.size(), 18u);
  for (int i = 0; i < 16; ++i) EXPECT_LE(run.steps.sequences[static_cast<size_t>(i)], 1) << i;
  EXPECT_GT(*std::ranges::max_element(run.steps.sequences), 20);
  ASSERT_TRUE(run.job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), uninterrupted(input)) << "the innocent are answered as ever";
}

TEST(BatchRunner, ClosesALineThatKilledTheEngineThreeTimes) {
  const std::string input = write_lines(100);
  FakeDisk disk;
  die(&disk, input, {7, 8}, true);
  die(&disk, input, {7}, true);
  die(&disk, input, {7}, false);  // a lost node: not counted
  die(&disk, input, {7}, true);
  OneRun run(&disk, input);
  ASSERT_TRUE(run.runner->run().ok());
  ASSERT_TRUE(run.job->finish(nullptr).ok());
  const std::vector<std::string> lines = absl::StrSplit(*disk.read("out/o"), '\n', absl::SkipEmpty());
  const json closed = json::parse(lines[7]);
  EXPECT_EQ(closed["custom_id"], "r7");
  EXPECT_TRUE(closed["response"].is_null());
  EXPECT_EQ(closed["error"]["code"], "engine_crash");
  EXPECT_EQ(json::parse(lines[8])["response"]["status_code"], 200);
  EXPECT_EQ(run.job->done()->failed, 11) << "and ten with max_tokens that is no number";
}

}  // namespace
}  // namespace octet
