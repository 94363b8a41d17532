// What a batch job says of itself.
#include "launch/batch_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace octet {
namespace {

using testing::HasSubstr;
using testing::Not;

BatchSample sample(double seconds, int64_t lines, int64_t tokens) {
  return {
      .seconds = seconds,
      .state = {.answered = {.lines = lines, .failed = lines / 100, .prompt_tokens = 7, .completion_tokens = tokens},
                .lines = 1000,
                .running = 8,
                .answered_before = 100},
      .prompt_tokens = 2 * tokens,
      .generated_tokens = tokens};
}

TEST(BatchReport, TellsLinesSpeedAndTimeLeft) {
  BatchReport report;
  report.add(sample(0, 100, 0));
  EXPECT_EQ(report.line(), "100 of 1000 lines (10.0 %), 1 with errors, 0 tokens/s") << "nobody knows how long";
  for (int second = 1; second <= 100; ++second) report.add(sample(second, 100 + 3 * second, 50 * second));
  EXPECT_EQ(report.line(), "400 of 1000 lines (40.0 %), 4 with errors, 50 tokens/s, about 3 min left");
  EXPECT_DOUBLE_EQ(report.seconds_left(), 200);
}

TEST(BatchReport, LooksAtTheLastSecondsForItsSpeed) {
  BatchReport report;
  report.add(sample(0, 100, 0));
  report.add(sample(100, 200, 100'000));
  report.add(sample(110, 210, 100'100));
  EXPECT_DOUBLE_EQ(report.tokens_per_second(), 10);
}

TEST(BatchReport, NeverSaysThatAllIsDoneBeforeItIs) {
  BatchReport report;
  report.add(sample(10, 999, 500));
  EXPECT_THAT(report.line(), HasSubstr("(99.9 %)"));
  report.add(sample(11, 1000, 501));
  EXPECT_THAT(report.line(), HasSubstr("(100.0 %)"));
}

TEST(BatchReport, GivesOthersItsStatus) {
  BatchReport report;
  report.add(sample(10, 200, 500));
  const nlohmann::ordered_json status = report.status("running");
  EXPECT_EQ(status["state"], "running");
  EXPECT_EQ(status["lines_total"], 1000);
  EXPECT_EQ(status["lines_done"], 200);
  EXPECT_EQ(status["lines_failed"], 2);
  EXPECT_EQ(status["tokens_per_second"], 50.0);
  EXPECT_EQ(status["seconds_left"], 80.0);
  EXPECT_FALSE(BatchReport().status("running").contains("seconds_left"));
}

TEST(BatchReport, SumsUpTheJobAndThisRun) {
  BatchReport report;
  report.add(sample(100, 1000, 5000));
  EXPECT_THAT(report.summary(), HasSubstr("1000 of 1000 lines answered, 10 of them with errors"));
  EXPECT_THAT(report.summary(),
              HasSubstr("this run: 900 lines in 2 min, 9.0 lines/s, 100.0 prompt tokens/s, 50.0 generated"));
}

// The heights of the throughput curve's points, from 0 to 1.
std::vector<double> curve_heights(const std::string& svg) {
  std::vector<double> heights;
  const size_t begin = svg.find("points='") + 8;
  std::istringstream points(svg.substr(begin, svg.find('\'', begin) - begin));
  for (std::string point; points >> point;)
    heights.push_back((240.0 - std::stod(point.substr(point.find(',') + 1))) / 150);
  return heights;
}

TEST(BatchReport, DrawsThroughputOverTheRunHoweverLongItWas) {
  BatchReport report;
  // Twice as fast in the second half; more looks than are kept.
  for (int i = 0; i <= 20'000; ++i) report.add(sample(i, 100, i <= 10'000 ? 10 * i : 100'000 + 20 * (i - 10'000)));
  const std::string svg = report.svg("out", {{5, 3}, {100, 7}});
  const std::vector<double> heights = curve_heights(svg);
  ASSERT_EQ(heights.size(), 120u);
  for (size_t i = 0; i < heights.size(); ++i) {
    if (i > 57 && i < 62) continue;  // where it changes
    EXPECT_NEAR(heights[i], i < 60 ? 0.5 : 1.0, 0.02) << i;
  }
  EXPECT_THAT(svg, HasSubstr("Answers by their completion tokens"));
  EXPECT_THAT(svg, Not(HasSubstr("nan")));
}

TEST(BatchReport, DrawsAJobThatHadNothingToDo) { EXPECT_THAT(BatchReport().svg("out", {}), Not(HasSubstr("nan"))); }

TEST(HumanDuration, IsShort) {
  EXPECT_EQ(human_duration(0), "0 s");
  EXPECT_EQ(human_duration(89), "89 s");
  EXPECT_EQ(human_duration(100), "2 min");
  EXPECT_EQ(human_duration(3600 * 3.5), "3 h 30 min");
}

}  // namespace
}  // namespace octet
