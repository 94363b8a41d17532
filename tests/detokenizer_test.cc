// Detokenizer and StopMatcher: whatever the tokens and however the text is cut, only whole characters and nothing of a
// stop.
#include "coordinator/text/detokenizer.h"

#include <random>

#include "gtest/gtest.h"
#include "tests/toy_tokenizer.h"

namespace octet {
namespace {

using Ids = std::vector<int32_t>;
using Strings = std::vector<std::string>;

TEST(Utf8, ReplacesMaximalIllFormedPartsAsTheUnicodeStandardShows) {
  const std::string r(kReplacementCharacter);
  EXPECT_EQ(to_valid_utf8("\xC0\xAF\xE0\x80\xBF\xF0\x81\x82\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(to_valid_utf8("\xED\xA0\x80\xED\xBF\xBF\xED\xAF\x41"), r + r + r + r + r + r + r + r + "A");
  EXPECT_EQ(to_valid_utf8("\xF4\x91\x92\x93\xFF\x41\x80\xBF\x42"), r + r + r + r + r + "A" + r + r + "B");
  EXPECT_EQ(to_valid_utf8("\xE1\x80\xE2\xF0\x91\x92\xF1\xBF\x41"), r + r + r + r + "A");
  EXPECT_EQ(to_valid_utf8("\xF0\x9F\x98"), r);
  EXPECT_EQ(to_valid_utf8("\xF4\x8F\xBF\xBF\xC2\x80\xE0\xA0\x80"), "\xF4\x8F\xBF\xBF\xC2\x80\xE0\xA0\x80");
}

TEST(Utf8, TrimsWhatPythonTrims) {
  EXPECT_EQ(trim_as_python(" \t\n\x1c\u0085\u00a0\u3000x y\u2028\x1f "), "x y");
  EXPECT_EQ(trim_as_python("\u200bx\u180e"), "\u200bx\u180e");
  EXPECT_EQ(trim_as_python(" \u3000 "), "");
  EXPECT_EQ(trim_as_python("\x80 x \x80"), "\x80 x \x80");
}

TEST(Detokenizer, HoldsACharacterUntilItIsWhole) {
  Detokenizer detokenizer(parse_or_die(toy_tokenizer_json()));
  EXPECT_EQ(detokenizer.push('a'), "a");
  EXPECT_EQ(detokenizer.push(0xF0), "");
  EXPECT_EQ(detokenizer.push(0x9F), "");
  EXPECT_EQ(detokenizer.push(0x98), "");
  EXPECT_EQ(detokenizer.push(0x80), "\U0001F600");
  EXPECT_EQ(detokenizer.push(0xE6), "");
  EXPECT_EQ(detokenizer.push('b'), "\uFFFDb");  // can never become a character any more
  EXPECT_EQ(detokenizer.push(0xFF), "\uFFFD");
  EXPECT_EQ(detokenizer.push(0xC3), "");
  EXPECT_EQ(detokenizer.flush(), "\uFFFD");
  EXPECT_EQ(detokenizer.flush(), "");
}

TEST(Detokenizer, SkipsSpecialTokensUnlessAskedForAndKeepsTheOthers) {
  const Tokenizer tokenizer = parse_or_die(toy_tokenizer_json({}, {{"<|x|>"}, {"<t>", false}}));
  Detokenizer skipping(tokenizer);
  EXPECT_EQ(skipping.push(256), "");
  EXPECT_EQ(skipping.push(257), "<t>");
  EXPECT_EQ(skipping.push(9999), "");
  EXPECT_EQ(Detokenizer(tokenizer, /*skip_special=*/false).push(256), "<|x|>");
}

TEST(Detokenizer, AnyTokensStreamToWhatDecodeSays) {
  const Tokenizer tokenizer =
      parse_or_die(toy_tokenizer_json({{"\xF0", "\x9F"}, {"\x98", "\x80"}, {"a", "\xC3"}}, {{"<|x|>"}}));
  std::mt19937 random(5);
  const Ids interesting = {'a', 0x80, 0x9F, 0xA0, 0xBF, 0xC3, 0xE0, 0xED, 0xF0, 0xF4, 0xFF, 256, 257, 258, 259};
  for (int round = 0; round < 3000; ++round) {
    Ids ids(random() % 12);
    for (int32_t& id : ids)
      id = random() % 4 ? interesting[random() % interesting.size()] : static_cast<int32_t>(random() % 260);
    Detokenizer detokenizer(tokenizer);
    std::string text;
    for (const int32_t id : ids) {
      const std::string part = detokenizer.push(id);
      ASSERT_TRUE(is_valid_utf8(part));
      text += part;
    }
    ASSERT_EQ(text + detokenizer.flush(), tokenizer.decode(ids));
  }
}

TEST(StopMatcher, StopsBeforeTheStringAndSaysWhich) {
  StopMatcher matcher({"END", "\n\n"});
  EXPECT_EQ(matcher.push("some E"), "some ");
  EXPECT_EQ(matcher.push("N"), "");
  EXPECT_EQ(matcher.matched(), std::nullopt);
  EXPECT_EQ(matcher.push("Dless"), "");
  EXPECT_EQ(matcher.matched(), 0);
  EXPECT_EQ(matcher.push("more"), "");
  EXPECT_EQ(matcher.flush(), "");
}

TEST(StopMatcher, GivesBackWhatOnlyLookedLikeAStop) {
  StopMatcher matcher({"END"});
  EXPECT_EQ(matcher.push("EN"), "");
  EXPECT_EQ(matcher.push("E"), "EN");
  EXPECT_EQ(matcher.push("x"), "Ex");
  EXPECT_EQ(matcher.push("EN"), "");
  EXPECT_EQ(matcher.flush(), "EN");
}

TEST(StopMatcher, FindsAStringThatOverlapsItsOwnBeginning) {
  StopMatcher matcher({"aab"});
  EXPECT_EQ(matcher.push("aaa"), "a");
  EXPECT_EQ(matcher.push("ab!"), "a");
  EXPECT_EQ(matcher.matched(), 0);
}

TEST(StopMatcher, TakesTheFirstToEndAndTheLongestOfThose) {
  StopMatcher longest({"b", "ab", "xyz"});
  EXPECT_EQ(longest.push("1ab2"), "1");
  EXPECT_EQ(longest.matched(), 1);
  StopMatcher first({"abcd", "bc"});
  EXPECT_EQ(first.push("abcd"), "a");
  EXPECT_EQ(first.matched(), 1);
}

TEST(StopMatcher, IncludesTheStringWhenAsked) {
  StopMatcher matcher({"END"}, /*include_stop=*/true);
  EXPECT_EQ(matcher.push("a E"), "a ");
  EXPECT_EQ(matcher.push("ND b"), "END");
}

TEST(StopMatcher, WithoutStopsOrWithEmptyOnesTextPassesThrough) {
  StopMatcher none({});
  EXPECT_EQ(none.push("abc"), "abc");
  StopMatcher empty({""});
  EXPECT_EQ(empty.push("abc"), "abc");
  EXPECT_EQ(empty.matched(), std::nullopt);
}

// Earliest end, then longest, by trying every place.
std::string text_before_stop(const std::string& text, const Strings& stops, int* which) {
  *which = -1;
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t length = 0;
    for (size_t i = 0; i < stops.size(); ++i) {
      const std::string& stop = stops[i];
      if (stop.size() > length && stop.size() <= end && text.compare(end - stop.size(), stop.size(), stop) == 0) {
        length = stop.size();
        *which = static_cast<int>(i);
      }
    }
    if (*which >= 0) return text.substr(0, end - length);
  }
  return text;
}

TEST(StopMatcher, TheAnswerDoesNotDependOnHowTheTextIsCut) {
  std::mt19937 random(9);
  const auto word = [&](int longest) {
    std::string text(random() % (longest + 1), 'a');
    for (char& c : text) c = static_cast<char>('a' + random() % 2);
    return text;
  };
  int stopped = 0;
  for (int round = 0; round < 5000; ++round) {
    Strings stops;
    size_t longest = 1;
    for (int i = random() % 4; i > 0; --i) longest = std::max(longest, stops.emplace_back(word(6)).size());
    const std::string text = word(30);
    int expected_match = -1;
    const std::string expected = text_before_stop(text, stops, &expected_match);
    StopMatcher matcher(stops);
    std::string shown;
    size_t at = 0;
    while (at < text.size()) {
      const size_t length = 1 + random() % 4;
      shown += matcher.push(text.substr(at, length));
      at += std::min(length, text.size() - at);
      if (!matcher.matched().has_value()) {
        ASSERT_LE(at - shown.size(), longest - 1);
      }
    }
    shown += matcher.flush();
    ASSERT_EQ(shown, expected) << text;
    ASSERT_EQ(matcher.matched().value_or(-1), expected_match) << text;
    stopped += expected_match >= 0;
  }
  EXPECT_GT(stopped, 1000);
}

TEST(StopMatcher, NeverCutsACharacterInTwo) {
  StopMatcher matcher({"\u00e9\u00e8"});
  EXPECT_EQ(matcher.push("x\u00e9"), "x");
  EXPECT_EQ(matcher.push("\u00ea"), "\u00e9\u00ea");
}

}  // namespace
}  // namespace octet
