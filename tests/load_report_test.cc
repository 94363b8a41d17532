// What octet bench serve asks for and what it makes of the answers, without a server.
#include "launch/load_report.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "launch/load_shape.h"

namespace octet {
namespace {

LengthDistribution lengths(const std::string& text) {
  absl::StatusOr<LengthDistribution> parsed = LengthDistribution::parse(text);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return *parsed;
}

LoadShape shape() {
  return {.prompt_tokens = lengths("uniform:1-50"),
          .output_tokens = lengths("uniform:1-50"),
          .seed = 7,
          .vocab_size = 300,
          .max_context = 256};
}

std::vector<int32_t> draws(const LengthDistribution& distribution, int count, int32_t least, int32_t most) {
  LoadRandom random(1);
  std::vector<int32_t> values(count);
  for (int32_t& value : values) value = distribution.draw(&random, least, most);
  return values;
}

double mean(const std::vector<int32_t>& values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

// ---- The load

TEST(LengthDistribution, DrawsWhatItsTextSays) {
  for (const int32_t value : draws(lengths("128"), 10, 1, 1000)) EXPECT_EQ(value, 128);
  const std::vector<int32_t> uniform = draws(lengths("uniform:16-19"), 4000, 1, 1000);
  EXPECT_EQ(std::set<int32_t>(uniform.begin(), uniform.end()), (std::set<int32_t>{16, 17, 18, 19}));
  EXPECT_NEAR(mean(uniform), 17.5, 0.1);
  const std::vector<int32_t> lognormal = draws(lengths("lognormal:300:0.5"), 20000, 1, 1 << 30);
  EXPECT_NEAR(mean(lognormal), 300, 5);
  std::vector<double> logs(lognormal.begin(), lognormal.end());
  for (double& value : logs) value = std::log(value);
  EXPECT_NEAR(median(logs), std::log(300) - 0.125, 0.02);
}

TEST(LengthDistribution, KeepsToTheRoomThereIs) {
  for (const char* text : {"500", "uniform:1-1000", "lognormal:100:2"}) {
    for (const int32_t value : draws(lengths(text), 2000, 10, 64)) {
      EXPECT_GE(value, 10) << text;
      EXPECT_LE(value, 64) << text;
    }
  }
}

TEST(LengthDistribution, RefusesOtherTextWithASentence) {
  for (const char* text : {"", "x", "0", "-5", "1.5", "99999999999", "uniform:", "uniform:5", "uniform:0-4",
                           "uniform:9-4", "uniform:1-2-3", "lognormal:100", "lognormal:0:1", "lognormal:10:-1",
                           "lognormal:nan:1", "lognormal:10:nan", "lognormal:10:1:1", "normal:10:1"}) {
    const absl::StatusOr<LengthDistribution> parsed = LengthDistribution::parse(text);
    ASSERT_FALSE(parsed.ok()) << text;
    EXPECT_TRUE(absl::StrContains(parsed.status().message(), "uniform:16-256")) << parsed.status();
    EXPECT_TRUE(absl::StrContains(parsed.status().message(), absl::StrCat("\"", text, "\""))) << parsed.status();
  }
}

TEST(LoadRandom, GapsBetweenArrivalsHaveThePoissonMeanAndDeviation) {
  LoadRandom random(3);
  double sum = 0, squares = 0;
  constexpr int kDraws = 100000;
  for (int i = 0; i < kDraws; ++i) {
    const double gap = random.exponential(0.25);
    ASSERT_GE(gap, 0);
    sum += gap;
    squares += gap * gap;
  }
  EXPECT_NEAR(sum / kDraws, 0.25, 0.005);
  EXPECT_NEAR(std::sqrt(squares / kDraws - 0.0625), 0.25, 0.01);
}

TEST(LoadShape, RequestsAreTheSameInEveryRunAndOtherwiseDifferent) {
  for (int64_t i = 0; i < 50; ++i) {
    const LoadRequest one = make_request(shape(), i), again = make_request(shape(), i);
    EXPECT_EQ(one.prompt, again.prompt);
    EXPECT_EQ(one.output_tokens, again.output_tokens);
    EXPECT_NE(one.prompt, make_request(shape(), i + 1).prompt);
    EXPECT_NE(one.prompt, make_warmup_request(shape(), i).prompt);
    LoadShape other = shape();
    other.seed = 8;
    EXPECT_NE(one.prompt, make_request(other, i).prompt);
  }
}

TEST(LoadShape, RequestsFitTheModelWhateverIsAskedFor) {
  LoadShape tight = shape();
  tight.prompt_tokens = lengths("lognormal:200:1");
  tight.output_tokens = lengths("1000000");
  tight.shared_prefix = 100;
  for (int64_t i = 0; i < 500; ++i) {
    const LoadRequest request = make_request(tight, i);
    EXPECT_GT(request.prompt.size(), 100u);
    EXPECT_GE(request.output_tokens, 1);
    EXPECT_EQ(static_cast<int32_t>(request.prompt.size()) + request.output_tokens, tight.max_context);
    for (const int32_t token : request.prompt) {
      EXPECT_GE(token, 0);
      EXPECT_LT(token, tight.vocab_size);
    }
  }
}

TEST(LoadShape, RefusesAPrefixThatFillsTheContext) {
  LoadShape tight = shape();
  tight.shared_prefix = 254;
  EXPECT_TRUE(check_shape(tight).ok());
  tight.shared_prefix = 255;
  EXPECT_TRUE(absl::StrContains(check_shape(tight).message(), "lower --shared-prefix"));
}

TEST(LoadShape, AGroupSharesItsPrefixAndNothingElse) {
  LoadShape grouped = shape();
  grouped.shared_prefix = 20;
  grouped.prefix_groups = 3;
  const auto prefix = [](const LoadRequest& r) { return std::vector(r.prompt.begin(), r.prompt.begin() + 20); };
  std::map<int32_t, std::set<std::vector<int32_t>>> prefixes;
  std::set<std::vector<int32_t>> prompts;
  for (int64_t i = 0; i < 100; ++i) {
    const LoadRequest request = make_request(grouped, i);
    prefixes[request.prefix_group].insert(prefix(request));
    prompts.insert(request.prompt);
  }
  EXPECT_EQ(prompts.size(), 100u);
  ASSERT_EQ(prefixes.size(), 3u);
  std::set<std::vector<int32_t>> all;
  for (const auto& [group, own] : prefixes) {
    EXPECT_EQ(own.size(), 1u) << group;
    all.insert(own.begin(), own.end());
  }
  EXPECT_EQ(all.size(), 3u);
}

TEST(LoadShape, CancelsItsShareOfRequestsAtMomentsAllOverTheirLives) {
  LoadShape some = shape();
  some.output_tokens = lengths("40");
  some.cancel_rate = 0.3;
  int cancelled = 0, early = 0;
  std::set<int32_t> moments;
  for (int64_t i = 0; i < 4000; ++i) {
    const LoadRequest request = make_request(some, i);
    // Another rate leaves all else as it is.
    EXPECT_EQ(request.prompt, [&] {
      LoadShape none = some;
      none.cancel_rate = 0;
      return make_request(none, i).prompt;
    }());
    if (!request.cancel.has_value()) continue;
    ++cancelled;
    early += request.cancel->tokens == 0;
    moments.insert(request.cancel->tokens);
    EXPECT_LT(request.cancel->tokens, 40);
    EXPECT_GE(request.cancel->first_token_share, 0);
    EXPECT_LT(request.cancel->first_token_share, 1);
  }
  EXPECT_NEAR(cancelled / 4000.0, 0.3, 0.03);
  EXPECT_GT(early, cancelled / 6);
  EXPECT_EQ(moments.size(), 40u);
}

// ---- The report

TEST(Percentile, IsTheSmallestValueThatEnoughOfThemDoNotExceed) {
  LoadRandom random(5);
  for (const int count : {1, 2, 3, 10, 99, 100, 101, 1000}) {
    std::vector<double> values(count);
    for (double& value : values) value = random.uniform();
    std::sort(values.begin(), values.end());
    for (const double share : {0.01, 0.1, 0.5, 0.9, 0.99, 0.999, 1.0}) {
      const double found = percentile(values, share);
      const auto not_above = [&](double limit) {
        return std::count_if(values.begin(), values.end(), [&](double v) { return v <= limit; });
      };
      EXPECT_GE(not_above(found), share * count - 1e-6) << share << " of " << count;
      EXPECT_LT(not_above(std::nextafter(found, -1)), share * count) << share << " of " << count;
    }
  }
  EXPECT_EQ(percentile({}, 0.5), 0);
}

TEST(Median, IsBetweenTheMiddleTwo) {
  EXPECT_EQ(median({3, 1, 2}), 2);
  EXPECT_EQ(median({4, 1, 2, 3}), 2.5);
  EXPECT_EQ(median({}), 0);
}

// Begins at 1 s; messages of 1, 2 and 1 tokens.
StreamRecord answered() {
  return {.begin = 1.0,
          .end = 2.1,
          .messages = {{1.5, 1}, {1.6, 2}, {2.0, 1}},
          .prompt_tokens = 10,
          .cached_tokens = 4,
          .status = "OK"};
}

TEST(LoadSummary, MeasuresWhatAClientSees) {
  const LoadSummary summary = summarize({.seconds = 4, .streams = {answered()}});
  EXPECT_EQ(summary.done, 1);
  EXPECT_DOUBLE_EQ(summary.requests_per_second, 0.25);
  EXPECT_DOUBLE_EQ(summary.tokens_per_second, 1.0);
  EXPECT_DOUBLE_EQ(summary.prompt_tokens_per_second, 2.5);
  EXPECT_EQ(summary.cached_tokens, 4);
  EXPECT_DOUBLE_EQ(summary.tokens_per_message(), 4.0 / 3);
  ASSERT_EQ(summary.first_token.size(), 1u);
  EXPECT_NEAR(summary.first_token[0], 0.5, 1e-9);
  ASSERT_EQ(summary.between_messages.size(), 2u);  // one for each gap, however many tokens follow it
  EXPECT_NEAR(summary.between_messages[0], 0.1, 1e-9);
  EXPECT_NEAR(summary.between_messages[1], 0.4, 1e-9);
  EXPECT_NEAR(summary.per_token.at(0), 0.5 / 3, 1e-9);
  EXPECT_NEAR(summary.whole_answer.at(0), 1.0, 1e-9);
  double tokens = 0;
  for (const double rate : summary.tokens_per_second_over_time) {
    tokens += rate * 4 / static_cast<double>(summary.tokens_per_second_over_time.size());
  }
  EXPECT_NEAR(tokens, 4, 1e-9);
}

TEST(LoadSummary, TellsCancelsThatWereAskedForFromFailures) {
  StreamRecord asked = answered(), not_asked = answered(), refused = answered(), too_late = answered();
  asked.status = not_asked.status = "CANCELLED";
  asked.cancel_asked = too_late.cancel_asked = true;
  refused.status = "RESOURCE_EXHAUSTED";
  refused.messages.clear();
  const LoadSummary summary = summarize({.seconds = 4, .streams = {asked, not_asked, refused, too_late}});
  EXPECT_EQ(summary.done, 1);
  EXPECT_EQ(summary.cancelled, 1);
  EXPECT_EQ(summary.failed, (std::map<std::string, int64_t>{{"CANCELLED", 1}, {"RESOURCE_EXHAUSTED", 1}}));
  EXPECT_EQ(summary.failures(), 2);
  EXPECT_EQ(summary.first_token.size(), 3u);
  EXPECT_EQ(summary.whole_answer.size(), 1u);
  EXPECT_TRUE(absl::StrContains(to_text(summary), "1 ended RESOURCE_EXHAUSTED"));
}

TEST(LoadSummary, OfNothingIsPrintedAndDrawnToo) {
  const LoadSummary summary = summarize({});
  EXPECT_TRUE(absl::StrContains(to_text(summary), "0 done"));
  EXPECT_TRUE(absl::StrContains(load_svg("t", "w", summary), "</svg>"));
  EXPECT_FALSE(absl::StrContains(load_svg("t", "w", summary), "nan"));
}

TEST(PrefixGain, ComparesTheFirstOfAGroupWithThoseAfterItsFirstToken) {
  const auto stream = [](int group, double begin, double first) {
    StreamRecord record{.begin = begin, .end = first, .messages = {{first, 1}}, .status = "OK"};
    record.prefix_group = group;
    return record;
  };
  LoadRecord record;
  record.streams = {stream(0, 1.5, 1.9),  // while the first was still cold: neither
                    stream(0, 3.0, 3.1),  // warm
                    stream(0, 1.0, 2.0),  // cold
                    stream(1, 5.0, 8.0),  // cold
                    stream(1, 8.0, 8.2),  // warm
                    stream(-1, 9.0, 9.1)};
  const PrefixGain gain = prefix_gain(record);
  ASSERT_EQ(gain.cold.size(), 2u);
  ASSERT_EQ(gain.warm.size(), 2u);
  EXPECT_NEAR(gain.cold[0], 1.0, 1e-9);
  EXPECT_NEAR(gain.cold[1], 3.0, 1e-9);
  EXPECT_NEAR(gain.ratio(), 2.0 / 0.15, 1e-6);
  EXPECT_EQ(prefix_gain({}).ratio(), 0);
}

TEST(ServerState, CountsWhatIsLeft) {
  const ServerState state{.requests_waiting = 1, .requests_running = 2, .kv_blocks_total = 64, .kv_blocks_free = 60};
  EXPECT_EQ(state.leaked_requests(), 3);
  EXPECT_EQ(state.leaked_blocks(), 4);
}

TEST(Pictures, EscapeWhatTheyAreGiven) {
  const std::string svg = bars_svg("a < b & c", "what", {{.name = "<x>", .value = 1, .text = "1 > 0"}});
  EXPECT_TRUE(absl::StrContains(svg, "a &lt; b &amp; c"));
  EXPECT_TRUE(absl::StrContains(svg, "&lt;x&gt;"));
  EXPECT_FALSE(absl::StrContains(svg, "<x>"));
}

TEST(Pictures, MakeBarsAsLongAsTheirValues) {
  EXPECT_EQ(bars_text({{.name = "a", .value = 4, .text = "four"}, {.name = "bb", .value = 1, .text = "one"}}),
            "a  ######################################## four\nbb ##########.............................. one\n");
}

}  // namespace
}  // namespace octet
