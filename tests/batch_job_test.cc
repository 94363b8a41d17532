// A batch job on disk: its input, its identity, and an output that is the same whatever failed on the way.
#include "coordinator/batch/batch_job.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/fake_disk.h"

namespace octet {
namespace {

using nlohmann::ordered_json;
using testing::AllOf;
using testing::HasSubstr;

std::string write_input(const std::string& text) {
  static int counter = 0;
  const std::string path = absl::StrCat(testing::TempDir(), "octet_input_", getpid(), "_", counter++, ".jsonl");
  std::ofstream(path, std::ios::binary) << text;
  return path;
}

std::string lines_with_ids(int count) {
  std::string text;
  for (int i = 0; i < count; ++i) absl::StrAppend(&text, R"({"custom_id": "r)", i, R"("})", "\n");
  return text;
}

BatchInput input_of(const std::string& text) {
  const std::string path = write_input(text);
  absl::StatusOr<InputIndex> index = index_input(path, nullptr);
  EXPECT_TRUE(index.ok()) << index.status();
  return *BatchInput::open(path, *index);
}

// ---- Input

TEST(BatchInput, CountsLinesThatAreNotBlank) {
  struct Case {
    std::string text;
    std::vector<std::pair<int64_t, std::string>> lines;  // number and text
  };
  const Case cases[] = {
      {"", {}},
      {"\n\n", {}},
      {"a\nb\n", {{1, "a"}, {2, "b"}}},
      {"a\nb", {{1, "a"}, {2, "b"}}},
      {"\na\n \t\r\n\nb\r\n", {{2, "a"}, {5, "b\r"}}},
  };
  for (const Case& c : cases) {
    BatchInput input = input_of(c.text);
    ASSERT_EQ(input.index().lines, static_cast<int64_t>(c.lines.size())) << c.text;
    for (size_t i = 0; i < c.lines.size(); ++i) {
      const absl::StatusOr<BatchInput::Line> line = input.read(static_cast<int64_t>(i));
      ASSERT_TRUE(line.ok());
      EXPECT_EQ(line->number, c.lines[i].first);
      EXPECT_EQ(line->text, c.lines[i].second);
    }
  }
}

TEST(BatchInput, ReadsAnyLineOfAFileLongerThanItsBuffer) {
  std::string text;
  std::vector<std::string> lines;
  std::mt19937_64 random(5);
  for (int i = 0; i < 6000; ++i) {
    lines.push_back(absl::StrCat(i, std::string(random() % 1500, 'x')));
    absl::StrAppend(&text, i % 13 == 0 ? "\n" : "", lines.back(), "\n");
  }
  BatchInput input = input_of(text);
  ASSERT_EQ(input.index().lines, 6000);
  for (int i = 0; i < 6000; ++i) ASSERT_EQ(input.read(i)->text, lines[static_cast<size_t>(i)]);
  for (int i = 0; i < 200; ++i) {
    const int64_t line = static_cast<int64_t>(random() % 6000);
    ASSERT_EQ(input.read(line)->text, lines[static_cast<size_t>(line)]) << line;
  }
}

TEST(BatchInput, HoldsNoMoreOfALongLineThanItMust) {
  BatchInput input = input_of("a\n" + std::string(64 << 20, 'x') + "\nb\n");
  const absl::StatusOr<BatchInput::Line> line = input.read(1);
  ASSERT_TRUE(line.ok());
  EXPECT_EQ(line->bytes, 64 << 20);
  EXPECT_EQ(line->text.size(), static_cast<size_t>(kMaxBatchLineBytes) + 1);
  EXPECT_EQ(input.read(2)->text, "b");
}

TEST(BatchInput, KeepsItsIndexAsText) {
  BatchInput input = input_of(lines_with_ids(3000));
  const absl::StatusOr<InputIndex> again = InputIndex::from_json(input.index().to_json());
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->marks.size(), 3u);
  EXPECT_EQ(again->sha256, input.index().sha256);
  EXPECT_TRUE(absl::IsDataLoss(InputIndex::from_json("{\"bytes\": 1").status()));
  EXPECT_TRUE(absl::IsDataLoss(InputIndex::from_json("{\"bytes\": \"1\"}").status()));
}

TEST(BatchInput, RefusesTwoLinesWithOneId) {
  const std::string path =
      write_input("{\"custom_id\": \"a\"}\n\n{\"custom_id\": \"b\"}\n{\"x\": 1, \"custom_id\": \"a\"}\n");
  const absl::Status status = index_input(path, nullptr).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("lines 1 and 4 have the same custom_id \"a\""));
}

TEST(CustomId, IsTheTopLevelStringOfThatName) {
  EXPECT_EQ(custom_id_of(R"({"custom_id": "a", )"), "a") << "what comes behind does not matter here";
  EXPECT_EQ(custom_id_of(R"({"body": {"custom_id": "inner", "x": [{"custom_id": "y"}]}, "custom_id": "a"})"), "a");
  EXPECT_EQ(custom_id_of(R"({"custom_id": 7})"), std::nullopt);
  EXPECT_EQ(custom_id_of(R"({"custom_id": {"custom_id": "a"}})"), std::nullopt);
  EXPECT_EQ(custom_id_of(R"([{"custom_id": "a"}])"), std::nullopt);
  EXPECT_EQ(custom_id_of("custom_id"), std::nullopt);
  EXPECT_EQ(custom_id_of(std::string(100'000, '[')), std::nullopt);
}

// ---- Job

BatchJobOptions options(const std::string& input) {
  return {.input = input,
          .output = "out/o",
          .identity = {{"seed", 1}},
          .created = 5,
          .writer = "a test",
          .segment_bytes = 4096};
}

std::unique_ptr<BatchJob> open(Disk* disk, const BatchJobOptions& options) {
  absl::StatusOr<std::unique_ptr<BatchJob>> job = BatchJob::open(disk, options);
  EXPECT_TRUE(job.ok()) << job.status();
  return job.ok() ? *std::move(job) : nullptr;
}

// Answers what is left; `commit_every` lines at a time.
absl::Status answer_all(BatchJob* job, int64_t commit_every = 7) {
  Journal& journal = job->journal();
  for (int64_t line = job->first_line(); line < job->first_line() + job->lines(); ++line) {
    if (journal.answered(line)) continue;
    journal.add_answer({.line = line,
                        .failed = line % 10 == 3,
                        .prompt_tokens = 2,
                        .completion_tokens = 3,
                        .text = absl::StrCat("answer to line ", line)});
    if (journal.uncommitted_answers() < commit_every) continue;
    if (absl::Status status = journal.commit(); !status.ok()) return status;
  }
  return journal.commit();
}

std::string expected_output(int64_t first, int64_t lines) {
  std::string text;
  for (int64_t i = first; i < first + lines; ++i) absl::StrAppend(&text, "answer to line ", i, "\n");
  return text;
}

TEST(BatchJob, WritesItsOutputInTheOrderOfItsInput) {
  FakeDisk disk;
  const BatchJobOptions o = options(write_input(lines_with_ids(50)));
  const auto job = open(&disk, o);
  ASSERT_TRUE(answer_all(job.get()).ok());
  ASSERT_TRUE(job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), expected_output(0, 50));
  const auto again = open(&disk, o);
  ASSERT_TRUE(again->done().has_value());
  EXPECT_EQ(again->done()->lines, 50);
  EXPECT_EQ(again->done()->failed, 5);
  EXPECT_EQ(again->done()->completion_tokens, 150);
}

TEST(BatchJob, OfAnEmptyInputIsAnEmptyOutput) {
  FakeDisk disk;
  const auto job = open(&disk, options(write_input("\n\n")));
  ASSERT_TRUE(job->finish(nullptr).ok());
  EXPECT_EQ(*disk.read("out/o"), "");
}

TEST(BatchJob, RefusesWhatWouldGiveOtherAnswers) {
  FakeDisk disk;
  const std::string input = write_input(lines_with_ids(5));
  open(&disk, options(input));
  const auto expect_refused = [&](const BatchJobOptions& changed, const std::string& words) {
    const absl::Status status = BatchJob::open(&disk, changed).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  };
  BatchJobOptions changed = options(input);
  changed.identity["seed"] = 2;
  expect_refused(changed, "began with seed 1, this run has 2");
  changed = options(input);
  changed.shards = 2;
  expect_refused(changed, "began with count 1, this run has 2");
  changed = options(input);
  changed.created = 6;
  expect_refused(changed, "began with created 5, this run has 6");
  expect_refused(options(write_input(lines_with_ids(6))), "has changed");
}

TEST(BatchJob, GoesOnWithAnInputThatWasOnlyTouched) {
  FakeDisk disk;
  const std::string input = write_input(lines_with_ids(5));
  const std::string id = open(&disk, options(input))->id();
  BatchJobOptions moved = options(write_input(lines_with_ids(5)));
  moved.created.reset();
  EXPECT_EQ(open(&disk, moved)->id(), id);
}

TEST(BatchJob, LeavesAFileAloneThatItHasNotMade) {
  FakeDisk disk;
  ASSERT_TRUE(disk.replace("out/o", "somebody's").ok());
  const absl::Status status = BatchJob::open(&disk, options(write_input(lines_with_ids(5)))).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(*disk.read("out/o"), "somebody's");
}

// One change of the disk fails, wherever it is; the job then says so, and later runs bring it to its end with the bytes
// of an uninterrupted one. So they do after a crash at that place.
TEST(BatchJob, EndsWithTheSameBytesWhicheverCallFails) {
  const BatchJobOptions o = options(write_input(lines_with_ids(40)));
  int failures = 0, runs = 0;
  for (const bool crash : {false, true}) {
    for (int64_t n = 1; n <= 80; ++n) {
      FakeDisk disk(static_cast<uint64_t>(n));
      disk.fail_at(n, n % 3);
      bool finished = false;
      for (int run = 0; run < 10 && !finished; ++run, ++runs) {
        absl::StatusOr<std::unique_ptr<BatchJob>> job = BatchJob::open(&disk, o);
        absl::Status status = job.status();
        if (job.ok() && !(*job)->done().has_value()) {
          status = answer_all(job->get());
          if (status.ok()) status = (*job)->finish(nullptr);
        }
        finished = status.ok();
        if (finished) break;
        ++failures;
        ASSERT_TRUE(absl::IsUnavailable(status)) << n << ": " << status;
        if (crash) disk.crash();
      }
      ASSERT_TRUE(finished) << n;
      ASSERT_EQ(*disk.read("out/o"), expected_output(0, 40)) << n;
    }
  }
  std::printf("%d failures in %d runs\n", failures, runs);
  EXPECT_GT(failures, 100);
}

TEST(BatchJob, EndsOnceAlthoughAZombieEndsItToo) {
  FakeDisk disk;
  const BatchJobOptions o = options(write_input(lines_with_ids(20)));
  const auto zombie = open(&disk, o);
  ASSERT_TRUE(answer_all(zombie.get()).ok());
  const auto heir = open(&disk, o);
  EXPECT_TRUE(absl::IsAborted(zombie->finish(nullptr)));
  // A zombie that looked before its heir came, and was stopped there, finishes under it.
  ASSERT_TRUE(remove_segments(&disk, "out/o.octet", 3).ok());
  ASSERT_TRUE(disk.replace("out/o", expected_output(0, 20)).ok());
  ASSERT_TRUE(disk.replace("out/o.octet/done.json",
                           R"({"lines": 20, "failed": 2, "prompt_tokens": 40, "completion_tokens": 60})")
                  .ok());
  EXPECT_TRUE(heir->finish(nullptr).ok());
  EXPECT_EQ(heir->done()->lines, 20);
}

// ---- Shards

TEST(BatchJob, InShardsMakesTheOutputOfTheWhole) {
  const std::string input = write_input(lines_with_ids(50));
  FakeDisk disk;
  std::vector<std::string> outputs;
  std::string whole_id = open(&disk, options(input))->id();
  for (int shard : {2, 0, 1}) {
    BatchJobOptions o = options(input);
    o.output = absl::StrCat("out/s", shard);
    o.shard = shard;
    o.shards = 3;
    const auto job = open(&disk, o);
    EXPECT_EQ(job->id(), whole_id);
    ASSERT_TRUE(answer_all(job.get()).ok());
    ASSERT_TRUE(job->finish(nullptr).ok());
    outputs.push_back(o.output);
  }
  const absl::StatusOr<BatchTotals> totals = merge_batch(&disk, "out/merged", outputs, nullptr);
  ASSERT_TRUE(totals.ok()) << totals.status();
  EXPECT_EQ(totals->lines, 50);
  EXPECT_EQ(totals->failed, 5);
  EXPECT_EQ(*disk.read("out/merged"), expected_output(0, 50));
  EXPECT_TRUE(merge_batch(&disk, "out/merged", outputs, nullptr).ok()) << "again is no mistake";

  const auto expect_refused = [&](const std::vector<std::string>& shards, const std::string& words) {
    const absl::Status status = merge_batch(&disk, "out/other", shards, nullptr).status();
    EXPECT_THAT(status, testing::Property(&absl::Status::message, HasSubstr(words)));
  };
  expect_refused({"out/s0", "out/s1"}, "3 shards, 2 are given");
  expect_refused({"out/s0", "out/s1", "out/s1"}, "there twice");
  expect_refused({"out/s0", "out/s1", "out/none"}, "not a finished job's output");
  disk.damage("out/s1", 3);
  expect_refused({"out/s0", "out/s1", "out/s2"}, "out/s1 has changed");
}

}  // namespace
}  // namespace octet
