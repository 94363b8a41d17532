// The load generator against a real port with a fake model behind it: it must ask for what it says and tell what came.
#include "launch/load_generator.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/fake_server.h"

namespace octet {
namespace {

LoadSpec small_load(int64_t requests) {
  LoadSpec load;
  load.requests = requests;
  load.shape = {.prompt_tokens = *LengthDistribution::parse("uniform:1-20"),
                .output_tokens = *LengthDistribution::parse("uniform:1-20"),
                .vocab_size = fake_limits().vocab_size,
                .max_context = fake_limits().max_context};
  return load;
}

class LoadGeneratorTest : public testing::Test {
 protected:
  void start(const ServerOptions& options = {}) {
    fake_ = std::make_unique<FakeServer>(options, "hello");
    ConnectionOptions connection;
    connection.address = fake_->server->address();
    connection_ = std::make_unique<Connection>(connection);
    ASSERT_TRUE(connection_->open().ok());
  }

  LoadRecord run(const LoadSpec& load) {
    LoadGenerator generator(*connection_);
    absl::StatusOr<LoadRecord> record = generator.run(load);
    EXPECT_TRUE(record.ok()) << record.status();
    return record.ok() ? *std::move(record) : LoadRecord();
  }

  void expect_quiet() {
    EXPECT_TRUE(fake_->wait_quiet());
    EXPECT_EQ(fake_->engine->stats().blocks_free, fake_->engine->stats().blocks_total);
  }

  std::unique_ptr<FakeServer> fake_;
  std::unique_ptr<Connection> connection_;
};

int most_at_once(const LoadRecord& record) {
  int most = 0;
  for (const StreamRecord& at : record.streams) {
    most = std::max(most, static_cast<int>(std::count_if(record.streams.begin(), record.streams.end(),
                                                         [&](const StreamRecord& other) {
                                                           return other.begin <= at.begin && at.begin < other.end;
                                                         })));
  }
  return most;
}

TEST_F(LoadGeneratorTest, AClosedLoopRunsAsManyAtOnceAsItSaysAndAllThatItSays) {
  start();
  fake_->group.set_step_time(std::chrono::microseconds(500));
  LoadSpec load = small_load(60);
  load.concurrency = 7;
  const LoadRecord record = run(load);
  ASSERT_EQ(record.streams.size(), 60u);
  int64_t expected = 0, found = 0;
  for (int64_t i = 0; i < 60; ++i) expected += make_request(load.shape, i).output_tokens;
  for (const StreamRecord& stream : record.streams) {
    EXPECT_EQ(stream.status, "OK");
    EXPECT_LE(stream.end, record.seconds);
    found += stream.tokens();
  }
  EXPECT_EQ(found, expected);
  EXPECT_EQ(most_at_once(record), 7);
  expect_quiet();
}

TEST_F(LoadGeneratorTest, PoissonArrivalsWaitForNobody) {
  start();
  fake_->group.set_step_time(std::chrono::milliseconds(5));
  LoadSpec load = small_load(50);
  load.rate = 500;  // far above what this server can do
  const LoadRecord record = run(load);
  ASSERT_EQ(record.streams.size(), 50u);
  std::vector<double> begins;
  for (const StreamRecord& stream : record.streams) {
    EXPECT_EQ(stream.status, "OK");
    begins.push_back(stream.begin);
  }
  std::sort(begins.begin(), begins.end());
  EXPECT_GT(begins.front(), 0);
  // Due times, not times of starting: the same in every run, however slow this machine is.
  const LoadRecord again = run(load);
  std::vector<double> begins_again;
  for (const StreamRecord& stream : again.streams) begins_again.push_back(stream.begin);
  std::sort(begins_again.begin(), begins_again.end());
  EXPECT_EQ(begins, begins_again);
}

TEST_F(LoadGeneratorTest, StopsStartingWhenTheTimeIsUp) {
  start();
  fake_->group.set_step_time(std::chrono::milliseconds(1));
  LoadSpec load = small_load(0);
  load.seconds = 0.2;
  const LoadRecord record = run(load);
  EXPECT_GT(record.streams.size(), 0u);
  for (const StreamRecord& stream : record.streams) {
    EXPECT_LT(stream.begin, 0.2);
    EXPECT_EQ(stream.status, "OK");
  }
}

TEST_F(LoadGeneratorTest, CancelsItsShareEarlyAndLateAndLeavesNothing) {
  start();
  fake_->group.set_step_time(std::chrono::milliseconds(2));
  LoadSpec load = small_load(300);
  load.shape.output_tokens = *LengthDistribution::parse("30");
  load.shape.cancel_rate = 0.5;
  load.concurrency = 100;
  const LoadRecord record = run(load);
  int early = 0, middle = 0;
  for (const StreamRecord& stream : record.streams) {
    if (stream.status == "CANCELLED") {
      EXPECT_TRUE(stream.cancel_asked);
      EXPECT_LE(stream.tokens(), 30);
      ++(stream.messages.empty() ? early : middle);
    } else {
      EXPECT_EQ(stream.status, "OK");
      EXPECT_EQ(stream.tokens(), 30);
    }
  }
  EXPECT_GT(early, 5);
  EXPECT_GT(middle, 50);
  expect_quiet();
}

TEST_F(LoadGeneratorTest, TellsByWhichStatusRequestsFailed) {
  const std::string path = absl::StrCat(testing::TempDir(), "octet_load_token_", getpid());
  std::ofstream(path) << "secret\n";
  std::filesystem::permissions(path, std::filesystem::perms::owner_read);
  start({.token_file = path});
  const LoadRecord record = run(small_load(5));
  ASSERT_EQ(record.streams.size(), 5u);
  for (const StreamRecord& stream : record.streams) EXPECT_EQ(stream.status, "UNAUTHENTICATED");
  std::filesystem::remove(path);
}

TEST_F(LoadGeneratorTest, WarmsUpWithoutCountingOrCancelling) {
  start();
  LoadSpec load = small_load(10);
  load.shape.cancel_rate = 1;
  LoadGenerator generator(*connection_);
  EXPECT_TRUE(generator.warm_up(load, 20).ok());
  expect_quiet();
  EXPECT_GT(fake_->engine->stats().generated_tokens, 20u);
}

TEST_F(LoadGeneratorTest, CancelEndsARunAndItsStreams) {
  start();
  fake_->group.set_step_time(std::chrono::milliseconds(2));
  LoadSpec load = small_load(1'000'000);
  load.shape.output_tokens = *LengthDistribution::parse("2000");
  load.concurrency = 20;
  LoadGenerator generator(*connection_);
  std::thread canceller([&] {
    while (fake_->engine->stats().generated_tokens == 0) absl::SleepFor(absl::Milliseconds(1));
    generator.cancel();
  });
  EXPECT_EQ(generator.run(load).status().code(), absl::StatusCode::kCancelled);
  canceller.join();
  expect_quiet();
  EXPECT_EQ(generator.run(load).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(LoadGeneratorTest, StalledStreamsTakeOneMessageUntilTheyReadOn) {
  start();
  fake_->group.set_step_time(std::chrono::microseconds(100));
  StalledStreams stalled(*connection_, {.streams = 4, .output_tokens = 2500, .shape = small_load(1).shape});
  ASSERT_TRUE(stalled.wait_stalled(absl::Now() + absl::Seconds(30)));
  expect_quiet();  // all tokens are made, and wait
  for (const StreamRecord& record : stalled.records()) EXPECT_EQ(record.status, "OPEN");
  ASSERT_TRUE(stalled.read_on(absl::Now() + absl::Seconds(30)));
  for (const StreamRecord& record : stalled.records()) {
    EXPECT_EQ(record.status, "OK");
    EXPECT_EQ(record.tokens(), 2500);
    EXPECT_LT(record.messages.at(0).tokens, 2500);
  }
}

TEST_F(LoadGeneratorTest, StalledStreamsFindOutThatTheServerHasGivenUpOnThem) {
  start({.streams = {.stall = absl::Milliseconds(300)}});
  fake_->group.set_step_time(std::chrono::milliseconds(1));
  StalledStreams stalled(*connection_, {.streams = 4, .output_tokens = 4000, .shape = small_load(1).shape});
  ASSERT_TRUE(stalled.wait_stalled(absl::Now() + absl::Seconds(30)));
  // Their outputs are more than flow control lets through unread.
  expect_quiet();
  ASSERT_TRUE(stalled.read_on(absl::Now() + absl::Seconds(30)));
  for (const StreamRecord& record : stalled.records()) {
    EXPECT_NE(record.status, "OK");
    EXPECT_LT(record.tokens(), 4000);
  }
}

TEST_F(LoadGeneratorTest, StalledStreamsGoWithTheirOwner) {
  start();
  fake_->group.set_step_time(std::chrono::milliseconds(1));
  {
    StalledStreams stalled(*connection_, {.streams = 4, .output_tokens = 2500, .shape = small_load(1).shape});
    ASSERT_TRUE(stalled.wait_stalled(absl::Now() + absl::Seconds(30)));
    EXPECT_EQ(stalled.records().at(0).status, "OPEN");
  }
  expect_quiet();
}

}  // namespace
}  // namespace octet
