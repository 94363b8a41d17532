// Tokenizer: the order of merges, the splits of each family, special tokens, broken text and broken files.
#include "coordinator/text/tokenizer.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <random>
#include <set>
#include <thread>

#include "coordinator/text/bpe.h"
#include "coordinator/text/pre_tokenizer.h"
#include "coordinator/text/utf8.h"
#include "gtest/gtest.h"
#include "tests/toy_tokenizer.h"

namespace octet {
namespace {

using nlohmann::json;
using Ids = std::vector<int32_t>;
using Strings = std::vector<std::string>;

Strings pieces(const json& pre_tokenizer, std::string_view text) {
  const absl::StatusOr<PreTokenizer> split = PreTokenizer::from_json(pre_tokenizer);
  EXPECT_TRUE(split.ok()) << split.status();
  PreTokenizer::Scratch scratch;
  Strings result;
  split->split(text, scratch, [&](std::string_view piece) { result.emplace_back(piece); });
  return result;
}

TEST(Tokenizer, MergesTheStrongestPairFirstAndTheLeftmostOnTies) {
  const Tokenizer tokenizer = parse_or_die(toy_tokenizer_json({{"b", "c"}, {"a", "b"}, {"a", "bc"}, {"x", "x"}}));
  EXPECT_EQ(tokenizer.encode("abc", false), (Ids{258}));  // b+c, then a+bc
  EXPECT_EQ(tokenizer.encode("ab", false), (Ids{257}));
  EXPECT_EQ(tokenizer.encode("xxx", false), (Ids{259, 'x'}));  // the left pair
}

TEST(Tokenizer, ReadsMergesAsStringsAndAsPairs) {
  json strings = toy_tokenizer_json({{"a", "b"}, {" ", "ab"}, {"c", " "}});
  json pairs = strings;
  for (json& merge : pairs["model"]["merges"]) {
    const std::string text = merge;
    merge = json::array({text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)});
  }
  const std::string text = "ab ab c abab";
  EXPECT_EQ(parse_or_die(strings).encode(text, false), (Ids{256, 257, ' ', 'c', 257, 256}));
  EXPECT_EQ(parse_or_die(pairs).encode(text, false), parse_or_die(strings).encode(text, false));
}

TEST(Tokenizer, IgnoreMergesTakesAWordThatMergesCannotReach) {
  json file = toy_tokenizer_json({{"a", "b"}, {"b", "c"}, {"c", "d"}, {"bc", "d"}, {"a", "bcd"}});
  EXPECT_EQ(parse_or_die(file).encode("abcd", false), (Ids{256, 258}));
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(parse_or_die(file).encode("abcd", false), (Ids{260}));
  EXPECT_EQ(parse_or_die(file).encode("abcde", false), (Ids{256, 258, 'e'}));
}

// A slow, obvious second implementation.
Ids merge_by_looking_everywhere(std::string_view word, const std::vector<Bpe::Merge>& merges) {
  Ids ids;
  for (const char c : word) ids.push_back(static_cast<unsigned char>(c));
  while (true) {
    size_t best = merges.size();
    size_t place = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t m = 0; m < best; ++m) {
        if (merges[m].left == ids[i] && merges[m].right == ids[i + 1]) {
          best = m;
          place = i;
        }
      }
    }
    if (best == merges.size()) return ids;
    ids[place] = merges[best].merged;
    ids.erase(ids.begin() + place + 1);
  }
}

TEST(Bpe, LongAndShortWordsMergeLikeTheObviousWay) {
  std::mt19937 random(7);
  std::vector<std::optional<std::string>> tokens(256);
  for (int i = 0; i < 256; ++i) tokens[i] = std::string(1, static_cast<char>(i));
  std::vector<Bpe::Merge> merges;
  std::set<std::string> known;
  while (merges.size() < 60) {
    const auto pick = [&] {
      return static_cast<int32_t>(random() % 3 ? 256 + random() % (tokens.size() - 255) - 1 : 'a' + random() % 3);
    };
    int32_t left = pick(), right = pick();
    if (left == 255) left = 'a';
    if (right == 255) right = 'b';
    const std::string both = *tokens[left] + *tokens[right];
    if (both.size() > 12 || !known.insert(both).second) continue;
    merges.push_back({left, right, static_cast<int32_t>(tokens.size())});
    tokens.emplace_back(both);
  }
  std::shuffle(merges.begin(), merges.end(), random);
  Vocabulary vocabulary(tokens);
  for (int32_t id = 0; id < vocabulary.size(); ++id) ASSERT_TRUE(vocabulary.index(id));
  const Bpe bpe(std::move(vocabulary), merges, {});
  Bpe::Scratch scratch;
  for (int round = 0; round < 400; ++round) {
    std::string word(1 + random() % (round % 2 ? 40 : 400), 'a');
    for (char& c : word) c = static_cast<char>('a' + random() % 3);
    Ids ids;
    bpe.encode(word, scratch, ids);
    ASSERT_EQ(ids, merge_by_looking_everywhere(word, merges)) << word;
  }
}

TEST(PreTokenizer, SplitsLikeLlama3) {
  const auto split = [](std::string_view text) { return pieces(llama3_pre_tokenizer(), text); };
  EXPECT_EQ(split("The year is 12345."), (Strings{"The", " year", " is", " ", "123", "45", "."}));
  EXPECT_EQ(split("  two spaces\n\n\n  x"), (Strings{" ", " two", " spaces", "\n\n\n", " ", " x"}));
  EXPECT_EQ(split("don't DON'T we'll"), (Strings{"don", "'t", " DON", "'T", " we", "'ll"}));
  EXPECT_EQ(split("x'\u017fy"), (Strings{"x", "'\u017f", "y"}));  // long s is an s without case
  EXPECT_EQ(split("tab\tx\r\ny"), (Strings{"tab", "\tx", "\r\n", "y"}));
  EXPECT_EQ(split("a...\n\nb (c)"), (Strings{"a", "...\n\n", "b", " (", "c", ")"}));
  EXPECT_EQ(split("end  "), (Strings{"end", "  "}));
}

TEST(PreTokenizer, SplitsLikeSmolLm2) {
  const auto split = [](std::string_view text) { return pieces(smollm2_pre_tokenizer(), text); };
  EXPECT_EQ(split("The year is 12345."), (Strings{"The", " year", " is", " ", "1", "2", "3", "4", "5", "."}));
  EXPECT_EQ(split("a  12 x"), (Strings{"a", "  ", "1", "2", " x"}));
  EXPECT_EQ(split("don't DON'T"), (Strings{"don", "'t", " DON", "'", "T"}));
  EXPECT_EQ(split("\u00bd\u2167\u0663"), (Strings{"\u00bd", "\u2167", "\u0663"}));  // No, Nl and Nd are all digits
  EXPECT_EQ(split("a\n\n b"), (Strings{"a", "\n\n", " b"}));
}

TEST(PreTokenizer, WhiteSpaceIsUnicodesAndNotTheMongolianSeparator) {
  const json pattern = {{"type", "Sequence"},
                        {"pretokenizers",
                         {{{"type", "Split"}, {"pattern", {{"Regex", R"(\s+|\S+|[\s]x)"}}}, {"behavior", "Isolated"}},
                          byte_level(false)}}};
  EXPECT_EQ(pieces(pattern, "a\u180eb"), (Strings{"a\u180eb"}));
  EXPECT_EQ(pieces(pattern, "a\u200bb"), (Strings{"a\u200bb"}));
  for (const char* space :
       {"\t", "\v", "\f", "\u0085", "\u00a0", "\u1680", "\u2003", "\u2028", "\u202f", "\u205f", "\u3000"}) {
    EXPECT_EQ(pieces(pattern, std::string("a") + space + "b"), (Strings{"a", space, "b"}));
  }
}

TEST(PreTokenizer, RefusesPatternsThatMeanSomethingElseInPcre2) {
  for (const char* pattern :
       {R"(\w+)", R"(\h)", R"(\bx)", R"([\S])", R"([[a]])", R"([a&&b])", R"(^a)", R"(a$)", R"(\p{Han})", R"(\p{^L})",
        R"((*VERB)a)", R"((?P<n>a))", R"((?C1)a)", R"(\Qa\E)", R"(a{1,3}+)", R"([]a])", "\\"}) {
    const absl::StatusOr<std::string> rewritten = rewrite_pattern(pattern);
    EXPECT_EQ(rewritten.status().code(), absl::StatusCode::kInvalidArgument) << pattern;
  }
  EXPECT_TRUE(rewrite_pattern(kLlama3Pattern).ok());
  EXPECT_EQ(Regex::compile("a(").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(PreTokenizer, ARunawayPatternLeavesThePieceWholeInsteadOfHanging) {
  const json pattern = {{"type", "Sequence"},
                        {"pretokenizers",
                         {{{"type", "Split"}, {"pattern", {{"Regex", "(?:(?:a|aa)+)+b"}}}, {"behavior", "Isolated"}},
                          byte_level(false)}}};
  const std::string text(200, 'a');
  EXPECT_EQ(pieces(pattern, text + "c"), (Strings{text + "c"}));
  EXPECT_EQ(pieces(pattern, "aabc"), (Strings{"aab", "c"}));
}

TEST(Tokenizer, LongRunsOfOneCharacterComeBackWhole) {
  for (const json& kind : {llama3_pre_tokenizer(), smollm2_pre_tokenizer(), byte_level(true)}) {
    const Tokenizer tokenizer = parse_or_die(
        toy_tokenizer_json({{"a", "a"}, {"aa", "aa"}, {" ", " "}, {"  ", "  "}, {"\n", "\n"}}, {{"<|x|>"}}, kind));
    for (const char* unit : {" ", "a", "\n", "<", "1", " \n", "\u6f22", "'"}) {
      std::string text;
      while (text.size() < 400'000) text += unit;
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text, false, true)), text) << unit;
      EXPECT_EQ(tokenizer.decode(tokenizer.encode(text + "x", false)), text + "x") << unit;
    }
  }
}

TEST(Tokenizer, SpecialTokensInTextArePlainUnlessAsked) {
  const Tokenizer tokenizer = parse_or_die(toy_tokenizer_json({}, {{"<|end|>"}, {"<|end|>>"}, {"<tool>", false}}));
  EXPECT_EQ(tokenizer.encode("<|end|>", false), (Ids{'<', '|', 'e', 'n', 'd', '|', '>'}));
  EXPECT_EQ(tokenizer.encode("a<|end|>b", false, true), (Ids{'a', 256, 'b'}));
  EXPECT_EQ(tokenizer.encode("<|end|>>", false, true), (Ids{257}));       // the longest
  EXPECT_EQ(tokenizer.encode("<|end|<|end|>", false, true).back(), 256);  // a false start
  EXPECT_EQ(tokenizer.encode("<tool>", false), (Ids{258}));               // added but not special: part of the language
  EXPECT_TRUE(tokenizer.is_special(256));
  EXPECT_FALSE(tokenizer.is_special(258));
  EXPECT_FALSE(tokenizer.is_special(-1));
  EXPECT_EQ(tokenizer.special_id("<|end|>"), 256);
  EXPECT_EQ(tokenizer.special_id("<tool>"), std::nullopt);
  EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b'}), "ab");
  EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 'b'}, false), "a<|end|>b");
}

TEST(Tokenizer, ASpecialTokenOfTheVocabularyIsNotFoundAsAWord) {
  json file = toy_tokenizer_json({{"(", ")"}});
  file["model"]["ignore_merges"] = true;
  EXPECT_EQ(parse_or_die(file).encode("()", false), (Ids{256}));
  file["added_tokens"] = {{{"id", 256}, {"content", "()"}, {"special", true}}};
  file["model"]["merges"] = json::array();
  EXPECT_EQ(parse_or_die(file).encode("()", false), (Ids{'(', ')'}));
  EXPECT_EQ(parse_or_die(file).encode("()", false, true), (Ids{256}));
}

// "<s>" (id 256) before a text and "</s>" (id 257) after it.
json toy_with_post_processor() {
  json file = toy_tokenizer_json({}, {{"<s>"}, {"</s>"}});
  const auto special = [](const char* name) { return json{{"SpecialToken", {{"id", name}, {"type_id", 0}}}}; };
  file["post_processor"] = {
      {"type", "Sequence"},
      {"processors",
       {byte_level(true),
        {{"type", "TemplateProcessing"},
         {"single", {special("<s>"), {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}, special("</s>")}},
         {"special_tokens", {{"<s>", {{"id", "<s>"}, {"ids", {256}}}}, {"</s>", {{"id", "</s>"}, {"ids", {257}}}}}}}}}};
  return file;
}

TEST(Tokenizer, PutsWhatThePostProcessorSaysAroundAText) {
  const json file = toy_with_post_processor();
  const Tokenizer tokenizer = parse_or_die(file);
  EXPECT_EQ(tokenizer.encode("a", true), (Ids{256, 'a', 257}));
  EXPECT_EQ(tokenizer.encode("", true), (Ids{256, 257}));
  EXPECT_EQ(tokenizer.encode("a", false), (Ids{'a'}));
  EXPECT_EQ(tokenizer.bos_token_id(), 256);
  EXPECT_EQ(parse_or_die(file, R"({"bos_token": {"content": "</s>"}})").bos_token_id(), 257);
  EXPECT_EQ(parse_or_die(toy_tokenizer_json()).bos_token_id(), std::nullopt);
}

TEST(Tokenizer, InvalidUtf8BecomesReplacementCharacters) {
  const Tokenizer tokenizer = parse_or_die(toy_tokenizer_json());
  EXPECT_EQ(tokenizer.encode("a\xff\xe2\x82z", false), tokenizer.encode("a\uFFFD\uFFFDz", false));
  EXPECT_EQ(tokenizer.encode("\xf0\x9f\x98", false), tokenizer.encode("\uFFFD", false));
}

TEST(Tokenizer, BytesWithoutATokenVanishOrBecomeTheUnknownToken) {
  json file = toy_tokenizer_json({{"a", "c"}});
  file["model"]["vocab"].erase("b");
  EXPECT_EQ(parse_or_die(file).encode("abcb", false), (Ids{256}));  // as in the reference: a and c become neighbours
  file["model"]["unk_token"] = "?";
  EXPECT_EQ(parse_or_die(file).encode("abbc", false), (Ids{'a', '?', '?', 'c'}));
  file["model"]["fuse_unk"] = true;
  EXPECT_EQ(parse_or_die(file).encode("abbcb", false), (Ids{'a', '?', 'c', '?'}));
}

std::string random_text(std::mt19937& random) {
  std::string text;
  for (int i = random() % 40; i > 0; --i) {
    char32_t c = 0;
    do {
      c = random() % 2 ? random() % 0x80 : random() % 0x110000;
    } while (c >= 0xD800 && c < 0xE000);
    if (c < 0x80) {
      text.push_back(static_cast<char>(c));
    } else if (c < 0x800) {
      text += {static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))};
    } else if (c < 0x10000) {
      text += {static_cast<char>(0xE0 | c >> 12), static_cast<char>(0x80 | (c >> 6 & 0x3F)),
               static_cast<char>(0x80 | (c & 0x3F))};
    } else {
      text += {static_cast<char>(0xF0 | c >> 18), static_cast<char>(0x80 | (c >> 12 & 0x3F)),
               static_cast<char>(0x80 | (c >> 6 & 0x3F)), static_cast<char>(0x80 | (c & 0x3F))};
    }
  }
  return text;
}

TEST(Tokenizer, DecodingGivesTheTextBack) {
  std::mt19937 random(3);
  for (const json& kind : {llama3_pre_tokenizer(), smollm2_pre_tokenizer(), byte_level(true)}) {
    const Tokenizer tokenizer =
        parse_or_die(toy_tokenizer_json({{"\xc3", "\xa9"}, {" ", "t"}, {"h", "e"}, {" t", "he"}}, {}, kind));
    for (int i = 0; i < 1000; ++i) {
      const std::string text = random_text(random);
      ASSERT_TRUE(is_valid_utf8(text));
      ASSERT_EQ(tokenizer.decode(tokenizer.encode(text, false)), text);
    }
  }
}

TEST(Tokenizer, IdsOutsideTheVocabularyAndHolesReadAsNothing) {
  json file = toy_tokenizer_json({}, {{"<|x|>"}});
  file["added_tokens"][0]["id"] = 300;
  const Tokenizer tokenizer = parse_or_die(file);
  EXPECT_EQ(tokenizer.vocab_size(), 301);
  EXPECT_EQ(tokenizer.decode(Ids{'a', 256, 299, 301, -5, 1'000'000, 'b'}), "ab");
  EXPECT_EQ(tokenizer.bytes_of(300), "<|x|>");
}

TEST(Tokenizer, ThreadsShareOne) {
  const Tokenizer tokenizer = parse_or_die(toy_tokenizer_json({{"a", "b"}, {" ", "ab"}}, {}, llama3_pre_tokenizer()));
  const std::string text = "ab ab 123 \u6f22 ab";
  const Ids expected = tokenizer.encode(text, false);
  std::vector<std::thread> threads;
  std::vector<int> equal(4, 0);
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 200; ++i) equal[t] += tokenizer.encode(text, false) == expected;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(equal, (std::vector<int>{200, 200, 200, 200}));
}

struct BadFile {
  const char* what;  // must appear in the message
  std::function<void(json&)> spoil;
};

void expect_refused(const std::vector<BadFile>& files, absl::StatusCode code) {
  for (const BadFile& bad : files) {
    json file = toy_tokenizer_json({{"a", "b"}}, {{"<|x|>"}});
    bad.spoil(file);
    const absl::Status status = Tokenizer::parse(file.dump()).status();
    EXPECT_EQ(status.code(), code) << bad.what << ": " << status;
    EXPECT_NE(std::string(status.message()).find(bad.what), std::string::npos) << bad.what << ": " << status;
  }
}

TEST(Tokenizer, RefusesFilesThatContradictThemselves) {
  expect_refused({{"\"model\" is missing", [](json& f) { f.erase("model"); }},
                  {"\"model\" is missing", [](json& f) { f["model"] = 3; }},
                  {"model.vocab is missing", [](json& f) { f["model"].erase("vocab"); }},
                  {"model.vocab is missing", [](json& f) { f["model"]["vocab"] = json::object(); }},
                  {"ids must be below", [](json& f) { f["model"]["vocab"]["zz"] = 5'000'000; }},
                  {"id of token 'zz'", [](json& f) { f["model"]["vocab"]["zz"] = -1; }},
                  {"id of token 'zz'", [](json& f) { f["model"]["vocab"]["zz"] = 1.5; }},
                  {"id of token 'zz'", [](json& f) { f["model"]["vocab"]["zz"] = "a"; }},
                  {"inside model.vocab", [](json& f) { f["model"]["vocab"]["zz"] = json::array(); }},
                  {"inside model.vocab", [](json& f) { f["model"]["vocab"]["zz"] = json::object(); }},
                  {"id 97 appears twice", [](json& f) { f["model"]["vocab"]["zz"] = 97; }},
                  {"needs token 'q\u0120'",
                   [](json& f) {
                     f["model"]["merges"].push_back({"q\u0120", "b"});
                   }},
                  {"needs token 'ba'", [](json& f) { f["model"]["merges"].push_back("b a"); }},
                  {"not two tokens", [](json& f) { f["model"]["merges"].push_back("ab"); }},
                  {"not two tokens", [](json& f) { f["model"]["merges"].push_back("a b c"); }},
                  {"not a pair", [](json& f) { f["model"]["merges"].push_back({"a"}); }},
                  {"not a pair", [](json& f) { f["model"]["merges"].push_back(json::array()); }},
                  {"more than two",
                   [](json& f) {
                     f["model"]["merges"].push_back({"a", "b", "c"});
                   }},
                  {"a merge that is neither", [](json& f) { f["model"]["merges"].push_back(7); }},
                  {"a merge that is neither",
                   [](json& f) {
                     f["model"]["merges"].push_back({"a", 7});
                   }},
                  {"model.unk_token", [](json& f) { f["model"]["unk_token"] = "nowhere"; }},
                  {"added_tokens is not a list", [](json& f) { f["added_tokens"] = 1; }},
                  {"added_tokens lacks",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 9}});
                   }},
                  {"added_tokens lacks",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", -9}, {"content", "y"}});
                   }},
                  {"ids must be below",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 1u << 30}, {"content", "y"}});
                   }},
                  {"has no content",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 999}, {"content", ""}});
                   }},
                  {"belongs to",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 97}, {"content", "<y>"}});
                   }},
                  {"but id 97",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 999}, {"content", "a"}});
                   }},
                  {"appears twice",
                   [](json& f) {
                     f["added_tokens"].push_back({{"id", 999}, {"content", "<|x|>"}});
                   }},
                  {"needed", [](json& f) { f["pre_tokenizer"] = nullptr; }},
                  {"must be a list",
                   [](json& f) {
                     f["pre_tokenizer"] = {{"type", "Sequence"}};
                   }},
                  {"is not a boolean", [](json& f) { f["model"]["ignore_merges"] = 1; }},
                  {"not a token id",
                   [](json& f) {
                     f["post_processor"] = {
                         {"type", "TemplateProcessing"},
                         {"single", {{{"SpecialToken", {{"id", "z"}}}}, {{"Sequence", {{"id", "A"}}}}}},
                         {"special_tokens", {{"z", {{"ids", {100'000}}}}}}};
                   }},
                  {"not listed",
                   [](json& f) {
                     f["post_processor"] = {{"type", "TemplateProcessing"},
                                            {"single", {{{"SpecialToken", {{"id", "z"}}}}}},
                                            {"special_tokens", json::object()}};
                   }}},
                 absl::StatusCode::kInvalidArgument);
}

TEST(Tokenizer, RefusesOtherKindsByName) {
  expect_refused(
      {{"Unigram", [](json& f) { f["model"]["type"] = "Unigram"; }},
       {"byte_fallback", [](json& f) { f["model"]["byte_fallback"] = true; }},
       {"dropout", [](json& f) { f["model"]["dropout"] = 0.1; }},
       {"end_of_word_suffix", [](json& f) { f["model"]["end_of_word_suffix"] = "</w>"; }},
       {"NFC",
        [](json& f) {
          f["normalizer"] = {{"type", "NFC"}};
        }},
       {"Metaspace",
        [](json& f) {
          f["pre_tokenizer"] = {{"type", "Metaspace"}};
        }},
       {"BertPreTokenizer",
        [](json& f) {
          f["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
        }},
       {"add_prefix_space", [](json& f) { f["pre_tokenizer"]["add_prefix_space"] = true; }},
       {"must be the last step",
        [](json& f) {
          f["pre_tokenizer"] = {{"type", "Digits"}};
        }},
       {"MergedWithPrevious",
        [](json& f) {
          f["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "a"}}}, {"behavior", "MergedWithPrevious"}};
        }},
       {"Regex",
        [](json& f) {
          f["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"String", "a"}}}, {"behavior", "Isolated"}};
        }},
       {"RobertaProcessing",
        [](json& f) {
          f["post_processor"] = {{"type", "RobertaProcessing"}};
        }},
       {"decoder",
        [](json& f) {
          f["decoder"] = {{"type", "WordPiece"}};
        }},
       {"lstrip", [](json& f) { f["added_tokens"][0]["lstrip"] = true; }}},
      absl::StatusCode::kUnimplemented);
}

TEST(Tokenizer, RefusesBrokenJsonAndDeepNesting) {
  const std::string good = toy_tokenizer_json({{"a", "b"}}).dump();
  for (size_t length = 0; length < good.size(); length += 1 + length / 7) {
    EXPECT_EQ(Tokenizer::parse(good.substr(0, length)).status().code(), absl::StatusCode::kInvalidArgument) << length;
  }
  const std::string deep = "{\"a\":" + std::string(100'000, '[') + std::string(100'000, ']') + "}";
  const absl::Status status = Tokenizer::parse(deep).status();
  EXPECT_NE(std::string(status.message()).find("nested deeper than 64"), std::string::npos) << status;
  for (const char* text :
       {"[]", "3", "null", "\"model\"", "{\"model\":{\"vocab\":{\"\xff\":1}}}", "{\"a\":1,\"a\":2}"}) {
    EXPECT_EQ(Tokenizer::parse(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(Tokenizer, SurvivesRandomDamageToAFile) {
  std::mt19937 random(11);
  json whole = toy_with_post_processor();
  whole["pre_tokenizer"] = llama3_pre_tokenizer();
  const std::string good = whole.dump();
  const std::string vocabulary = whole["model"]["vocab"].dump();
  const size_t dull = good.find(vocabulary);  // most of the file, and all alike: hit it less often
  int accepted = 0;
  for (int round = 0; round < 6000; ++round) {
    std::string bad = good;
    for (int i = 1 + random() % 3; i > 0; --i) {
      size_t at = random() % (good.size() - vocabulary.size() + 20);
      if (at > dull + 20) at += vocabulary.size() - 20;
      bad[at] = "\"{}[]:,0a\\\xff "[random() % 12];
    }
    const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::parse(bad);
    if (!tokenizer.ok()) continue;
    ++accepted;
    tokenizer->encode("abc <s> 12 \u6f22", true, true);
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 6000);
}

// Each value of the file in turn becomes another kind of value: no reader may take a kind for granted.
TEST(Tokenizer, SurvivesValuesOfTheWrongKindAnywhere) {
  json whole = toy_with_post_processor();
  whole["pre_tokenizer"] = llama3_pre_tokenizer();
  int refused = 0;
  const json flat = whole.flatten();
  for (const auto& [path, old_value] : flat.items()) {
    if (path.find("/model/vocab/") == 0 && path != "/model/vocab/a") continue;
    for (json::json_pointer place(path); !place.empty(); place.pop_back()) {
      for (const json& value : {json(), json(true), json(3), json(-1), json(2.5), json("x"), json::array(),
                                json::object(), json::array({json::object()}), json{{"type", "Sequence"}}}) {
        json bad = whole;
        bad[place] = value;
        refused += !Tokenizer::parse(bad.dump(), bad.dump()).ok();
      }
    }
  }
  EXPECT_GT(refused, 500);
}

class ModelDirectory {
 public:
  ModelDirectory()
      : path_(std::filesystem::path(testing::TempDir()) /
              testing::UnitTest::GetInstance()->current_test_info()->name()) {
    std::filesystem::remove_all(path_);
    std::filesystem::create_directories(path_);
  }
  ~ModelDirectory() { std::filesystem::remove_all(path_); }
  void write(const char* name, std::string_view text) const { std::ofstream(path_ / name, std::ios::binary) << text; }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

TEST(Tokenizer, LoadsADirectoryAndPrefersTheTemplateFile) {
  const ModelDirectory directory;
  EXPECT_EQ(Tokenizer::load(directory.path()).status().code(), absl::StatusCode::kNotFound);
  directory.write("tokenizer.model", "x");
  EXPECT_EQ(Tokenizer::load(directory.path()).status().code(), absl::StatusCode::kFailedPrecondition);
  directory.write("tokenizer.json", toy_tokenizer_json().dump());
  EXPECT_EQ(Tokenizer::load(directory.path())->chat_template(), "");
  directory.write("tokenizer_config.json",
                  R"({"chat_template": [{"name": "x", "template": "no"}, {"name": "default", "template": "yes"}]})");
  EXPECT_EQ(Tokenizer::load(directory.path())->chat_template(), "yes");
  directory.write("chat_template.jinja", "from the file");
  EXPECT_EQ(Tokenizer::load(directory.path())->chat_template(), "from the file");
  directory.write("tokenizer_config.json", "{");
  const absl::Status status = Tokenizer::load(directory.path()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(std::string(status.message()).find("tokenizer_config.json"), std::string::npos) << status;
}

// golden/smollm2_tokenizer.bin, written by golden/make_tokenizer_goldens.py: numbers in LEB128.
class GoldenReader {
 public:
  explicit GoldenReader(std::string bytes) : bytes_(std::move(bytes)) {}
  bool done() const { return at_ >= bytes_.size(); }
  uint32_t number() {
    uint32_t value = 0;
    for (int shift = 0;; shift += 7) {
      const uint8_t byte = static_cast<uint8_t>(bytes_.at(at_++));
      value |= static_cast<uint32_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
  }
  std::string text() {
    const uint32_t length = number();
    at_ += length;
    return bytes_.substr(at_ - length, length);
  }

 private:
  std::string bytes_;
  size_t at_ = 0;
};

TEST(Tokenizer, SmolLm2EqualsHuggingFaceOnEveryGoldenString) {
  const char* directory = std::getenv("OCTET_SMOLLM2_DIR");
  if (directory == nullptr || !std::filesystem::exists(std::filesystem::path(directory) / "tokenizer.json")) {
    GTEST_SKIP() << "SKIPPED: OCTET_SMOLLM2_DIR does not name a converted SmolLM2 directory; the tokenizer is not "
                    "compared with the reference";
  }
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::load(directory);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  std::ifstream file(std::string(OCTET_GOLDEN_DIR) + "/smollm2_tokenizer.bin", std::ios::binary);
  GoldenReader golden{std::string(std::istreambuf_iterator<char>(file), {})};
  int strings = 0;
  int mismatches = 0;
  for (; !golden.done(); ++strings) {
    const std::string text = golden.text();
    Ids expected(golden.number());
    for (int32_t& id : expected) id = static_cast<int32_t>(golden.number());
    if (tokenizer->encode(text, false) == expected) continue;
    if (++mismatches <= 5) ADD_FAILURE() << "differs on: " << text;
  }
  std::printf("SmolLM2 tokenizer: %d mismatches of %d strings\n", mismatches, strings);
  EXPECT_EQ(mismatches, 0);
  EXPECT_GE(strings, 10'000);
}

}  // namespace
}  // namespace octet
