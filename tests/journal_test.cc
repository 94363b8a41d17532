// The journal of a batch job, on a disk that crashes, fills up and lies.
#include "coordinator/batch/journal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <random>

#include "absl/strings/str_cat.h"
#include "tests/fake_disk.h"

namespace octet {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Pair;

JournalOptions options(Disk* disk) {
  return {.disk = disk, .directory = "job", .job_id = "j", .lines = 100, .segment_bytes = 4096, .writer = "a test"};
}

std::unique_ptr<Journal> open(Disk* disk) {
  absl::StatusOr<std::unique_ptr<Journal>> journal = Journal::open(options(disk));
  EXPECT_TRUE(journal.ok()) << journal.status();
  return journal.ok() ? *std::move(journal) : nullptr;
}

std::string text_of(int64_t line) { return absl::StrCat("answer ", line, " ", std::string(line % 50, 'x')); }

JournalAnswer answer(int64_t line) {
  return {.line = line,
          .failed = line % 7 == 0,
          .prompt_tokens = static_cast<uint32_t>(line),
          .completion_tokens = 2,
          .text = text_of(line)};
}

TEST(Journal, RemembersAnswersOverIncarnations) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    EXPECT_EQ(journal->epoch(), 1);
    for (int64_t line : {3, 1, 7}) journal->add_answer(answer(line));
    EXPECT_FALSE(journal->answered(3)) << "nobody has promised anything yet";
    ASSERT_TRUE(journal->commit().ok());
    EXPECT_TRUE(journal->answered(3));
  }
  const auto journal = open(&disk);
  EXPECT_EQ(journal->epoch(), 2);
  EXPECT_EQ(journal->answers(), 3);
  EXPECT_EQ(journal->failed(), 1);
  EXPECT_EQ(journal->prompt_tokens(), 11);
  EXPECT_EQ(journal->completion_tokens(), 6);
  EXPECT_FALSE(journal->answered(2));
  for (int64_t line : {1, 3, 7}) EXPECT_EQ(journal->read_answer(line)->text, text_of(line));
  EXPECT_TRUE(journal->read_answer(7)->failed);
}

TEST(Journal, FillsManySegments) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    for (int64_t line = 0; line < 100; ++line) {
      journal->add_answer({.line = line, .text = std::string(1000, static_cast<char>('a' + line % 26))});
      if (line % 9 == 0) {
        ASSERT_TRUE(journal->commit().ok());
      }
    }
    ASSERT_TRUE(journal->commit().ok());
  }
  EXPECT_GT(disk.list("job")->size(), 20u);
  const auto journal = open(&disk);
  EXPECT_EQ(journal->answers(), 100);
  EXPECT_EQ(journal->read_answer(99)->text[0], 'a' + 99 % 26);
}

TEST(Journal, TakesAnAnswerLargerThanASegment) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    journal->add_answer({.line = 1, .text = std::string(20'000, 'y')});
    journal->add_answer(answer(2));
    ASSERT_TRUE(journal->commit().ok());
  }
  const auto journal = open(&disk);
  EXPECT_EQ(journal->read_answer(1)->text.size(), 20'000u);
  EXPECT_EQ(journal->read_answer(2)->text, text_of(2));
}

TEST(Journal, IgnoresATornTail) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    journal->add_answer(answer(1));
    ASSERT_TRUE(journal->commit().ok());
    journal->add_answer(answer(2));
    disk.fail_at(1);
    EXPECT_FALSE(journal->flush().ok());  // half of it is written
  }
  const auto journal = open(&disk);
  EXPECT_TRUE(journal->answered(1));
  EXPECT_FALSE(journal->answered(2));
}

TEST(Journal, LosesNothingToAFailedSync) {
  FakeDisk disk;
  const auto journal = open(&disk);
  journal->add_answer(answer(1));
  disk.fail_at(2);  // the write is well, the sync is not
  EXPECT_FALSE(journal->commit().ok());
  EXPECT_FALSE(journal->answered(1));
  ASSERT_TRUE(journal->commit().ok());
  disk.crash();
  EXPECT_EQ(open(&disk)->read_answer(1)->text, text_of(1));
}

TEST(Journal, IgnoresAZombieOfAnEarlierIncarnation) {
  FakeDisk disk;
  const auto zombie = open(&disk);
  zombie->add_answer(answer(1));
  ASSERT_TRUE(zombie->commit().ok());
  EXPECT_TRUE(zombie->check_fence().ok());
  {
    const auto heir = open(&disk);
    zombie->add_answer(answer(2));
    ASSERT_TRUE(zombie->commit().ok());
    for (int64_t line = 10; line < 99; ++line) zombie->add_answer(answer(line));  // into segments of its own
    ASSERT_TRUE(zombie->commit().ok());
    EXPECT_TRUE(absl::IsAborted(zombie->check_fence()));
    EXPECT_THAT(std::string(zombie->check_fence().message()), HasSubstr("a test"));
    EXPECT_FALSE(heir->answered(2));
    heir->add_answer(answer(3));
    ASSERT_TRUE(heir->commit().ok());
  }
  const auto third = open(&disk);
  EXPECT_EQ(third->answers(), 2) << "1 and 3";
  EXPECT_TRUE(third->answered(1));
  EXPECT_TRUE(third->answered(3));
}

TEST(Journal, CountsTriesOfLinesThatWereInFlightWhenItMattered) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    for (int64_t line : {1, 2, 3}) journal->add_intent(line);
    ASSERT_TRUE(journal->flush().ok());
    journal->add_answer(answer(2));
    ASSERT_TRUE(journal->commit().ok());
  }
  {
    const auto journal = open(&disk);
    EXPECT_THAT(journal->unjudged(), ElementsAre(1));
    EXPECT_THAT(journal->in_flight(1), ElementsAre(1, 3));
    journal->judge(1, true, "rank 1: SIGSEGV");
    EXPECT_THAT(journal->tries(), ElementsAre(Pair(1, 1), Pair(3, 1)));
    journal->add_intent(3);
    ASSERT_TRUE(journal->flush().ok());
  }
  {
    const auto journal = open(&disk);
    EXPECT_THAT(journal->unjudged(), ElementsAre(2));
    journal->judge(2, false, "killed");
    journal->add_intent(3);
    ASSERT_TRUE(journal->flush().ok());
  }
  const auto journal = open(&disk);
  EXPECT_THAT(journal->unjudged(), ElementsAre(3));
  journal->judge(3, true, "rank 1: SIGSEGV");
  EXPECT_THAT(journal->tries(), ElementsAre(Pair(1, 1), Pair(3, 2)));
  journal->add_answer(answer(3));
  journal->add_answer(answer(1));
  ASSERT_TRUE(journal->commit().ok());
  EXPECT_THAT(journal->tries(), IsEmpty());
  EXPECT_THAT(journal->unjudged(), IsEmpty());
}

TEST(Journal, IsOneJobsOnly) {
  FakeDisk disk;
  {
    const auto journal = open(&disk);
    journal->add_answer(answer(1));
    ASSERT_TRUE(journal->commit().ok());
  }
  JournalOptions other = options(&disk);
  other.job_id = "another";
  EXPECT_EQ((*Journal::open(other))->answers(), 0);
}

TEST(Journal, NoticesAnAnswerThatWasDamagedSinceItWasRead) {
  FakeDisk disk;
  const auto journal = open(&disk);
  journal->add_answer(answer(1));
  ASSERT_TRUE(journal->commit().ok());
  disk.damage("job/seg-000001-00000", 85);
  EXPECT_TRUE(absl::IsDataLoss(journal->read_answer(1).status())) << journal->read_answer(1).status();
  EXPECT_EQ(open(&disk)->answers(), 0) << "its line is run again";
}

TEST(RemoveSegments, LeavesThoseOfLaterEpochs) {
  FakeDisk disk;
  const auto first = open(&disk), second = open(&disk);
  ASSERT_TRUE(remove_segments(&disk, "job", 2).ok());
  EXPECT_THAT(*disk.list("job"), ElementsAre("epoch-000001", "epoch-000002", "seg-000002-00000"));
}

// Every change of the disk fails once, alone or with all that follow for a while: what was acknowledged stays, what was
// not is written by a later call.
TEST(Journal, LosesNothingWhicheverCallFails) {
  for (const int64_t more : {0, 1, 5}) {
    for (int64_t n = 1; n <= 60; ++n) {
      FakeDisk disk(n);
      auto journal = open(&disk);
      disk.fail_at(n, more);
      for (int64_t line = 0; line < 100; ++line) {
        journal->add_intent(line);
        (void)journal->flush();
        journal->add_answer({.line = line, .text = std::string(300, static_cast<char>('a' + line % 26))});
        if (line % 5 == 0) (void)journal->commit();
      }
      for (int i = 0; i < 8 && journal->uncommitted() > 0; ++i) (void)journal->commit();
      ASSERT_EQ(journal->uncommitted(), 0) << n;
      disk.crash();
      journal = open(&disk);
      ASSERT_EQ(journal->answers(), 100) << n << "+" << more;
      EXPECT_EQ(journal->contradictions(), 0);
      for (int64_t line = 0; line < 100; ++line) {
        ASSERT_EQ(journal->read_answer(line)->text[0], 'a' + line % 26) << n;
      }
    }
  }
}

// A thousand jobs that lose power again and again, with failing disks in between, some of them beside a zombie.
TEST(Journal, KeepsEveryAcknowledgedAnswerOverAThousandCrashes) {
  int64_t crashes = 0, acknowledged = 0;
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    std::mt19937_64 random(seed);
    FakeDisk disk(seed);
    std::map<int64_t, std::string> promised;
    std::unique_ptr<Journal> zombie;
    for (int incarnation = 0; incarnation < 5; ++incarnation) {
      absl::StatusOr<std::unique_ptr<Journal>> opened = Journal::open(options(&disk));
      if (!opened.ok()) continue;  // a failure that was still due
      std::unique_ptr<Journal> journal = *std::move(opened);
      for (const auto& [line, text] : promised) {
        ASSERT_TRUE(journal->answered(line)) << "seed " << seed << " line " << line;
        ASSERT_EQ(journal->read_answer(line)->text, text) << "seed " << seed;
      }
      if (random() % 3 == 0) disk.fail_at(static_cast<int64_t>(random() % 30), static_cast<int64_t>(random() % 4));
      std::vector<int64_t> pending;
      for (int64_t i = random() % 40; i > 0; --i) {
        const auto line = static_cast<int64_t>(random() % 100);
        if (journal->answered(line)) continue;
        journal->add_answer(answer(line));
        pending.push_back(line);
        if (random() % 4 != 0) continue;
        if (zombie != nullptr) {
          zombie->add_answer({.line = line, .text = "a zombie's"});
          (void)zombie->commit();
        }
        if (journal->commit().ok()) {
          for (int64_t done : pending) promised.emplace(done, text_of(done));
          pending.clear();
        }
      }
      acknowledged = acknowledged + static_cast<int64_t>(promised.size());
      if (random() % 2 == 0) {
        disk.crash();
        ++crashes;
        zombie.reset();
      } else {
        zombie = std::move(journal);
      }
    }
  }
  std::printf("%d crashes, %d acknowledged answers looked for\n", static_cast<int>(crashes),
              static_cast<int>(acknowledged));
  EXPECT_GT(crashes, 1000);
}

}  // namespace
}  // namespace octet
