// Tool calls in replies, and replies that are none.
#include "coordinator/text/tool_calls.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "coordinator/text/ordered_json.h"
#include "coordinator/text/tokenizer_json.h"
#include "coordinator/text/utf8.h"

namespace octet {
namespace {

// The calls of a reply as "name arguments", with " | " between; "" for plain text.
std::string calls(std::string_view reply, bool python_tag = false) {
  std::string text;
  for (const ChatToolCall& call : parse_tool_calls(reply, python_tag)) {
    text += (text.empty() ? "" : " | ") + call.name + " " + call.arguments;
  }
  return text;
}

TEST(ToolCalls, AreJsonObjectsWithParametersOrArgumentsInTheirOrder) {
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {"b": 1, "a": "10", "c": [1.5, null, {"d": true}]}})"),
            R"(f {"b":1,"a":"10","c":[1.5,null,{"d":true}]})");
  EXPECT_EQ(calls(R"( {"type": "function", "name": "f", "arguments": {}} )"), "f {}");
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {"city": "Köln"}})"), R"(f {"city":"Köln"})");
  for (const char* reply :
       {R"({"name": "f"})", R"({"name": "f", "parameters": "x"})", R"({"name": "f", "parameters": null})",
        R"({"name": "", "parameters": {}})", R"({"name": 1, "parameters": {}})", R"({"parameters": {}})",
        R"({"type": "object", "name": "f", "parameters": {}})", R"({"name": "f", "parameters": {}} and so on)",
        R"(I call {"name": "f", "parameters": {}})", R"({"name": "f", "parameters": {"a": 1)",
        R"({"name": "f", "parameters": {"a": 1, "a": 2}})", R"({'name': 'f', 'parameters': {}})", "{}", "{", ""}) {
    EXPECT_EQ(calls(reply), "") << reply;
  }
}

TEST(ToolCalls, StandSideBySideWithSemicolonsWhichStringsMayHoldAsWell) {
  EXPECT_EQ(
      calls(R"({"name": "f", "parameters": {"a": "x; }{ \" \\"}}; {"name": "g", "parameters": {"b": {"c": {}}}})"),
      R"(f {"a":"x; }{ \" \\"} | g {"b":{"c":{}}})");
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {}};)"), "f {}");
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {}}; {"name": "g"})"), "") << "all of it, or none";
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {}} {"name": "g", "parameters": {}})"), "");
  EXPECT_EQ(calls(";"), "");
}

TEST(ToolCalls, StandBetweenFunctionTags) {
  EXPECT_EQ(calls(R"(<function=get_weather>{"city": "</function>"}</function>)"),
            R"(get_weather {"city":"</function>"})");
  EXPECT_EQ(calls("<function=f>{}</function>\n<function=g>{\"a\": 1}</function>\n"), R"(f {} | g {"a":1})");
  for (const char* reply : {"<function=f>{}", "<function=f>[]</function>", "<function=>{}</function>", "<function=f",
                            "<function=f>{}</function> so", "<function=f>{}</functio"}) {
    EXPECT_EQ(calls(reply), "") << reply;
  }
}

TEST(ToolCalls, StandInAListAsPythonWritesThem) {
  EXPECT_EQ(calls(R"([f(a=1), g(b="x")])"), R"(f {"a":1} | g {"b":"x"})");
  EXPECT_EQ(calls(R"([ a.b_2( x = -1.5e3 , y=[1, 'it\'s', []], z={"k": None, 'l': (True)} ) ])"), "");
  EXPECT_EQ(calls(R"([ a.b_2( x = -1.5e3 , y=[1, 'it\'s "so"', []], z={"k": None, 'l': True, "m": False} ) ])"),
            R"(a.b_2 {"x":-1500.0,"y":[1,"it's \"so\"",[]],"z":{"k":null,"l":true,"m":false}})");
  EXPECT_EQ(calls("[f()]"), "f {}");
  EXPECT_EQ(calls(R"([f(a="[g(b=1)]; \n é")])"), R"(f {"a":"[g(b=1)]; \n é"})");
  for (const char* reply : {"[]", "[1, 2]", "[f(1)]", "[f(a=b)]", "[f(a=1)", "[f(a=1)] so", "[f(a=1, a=2)]", "[f(a=)]",
                            "[f(a=1 b=2)]", "[f(a='x)]", "[f(a=1.)]", "[f(a=00)]", "[1f()]", "[f(a={b: 1})]",
                            "[f(a={'b': 1, 'b': 2})]", "[f(a='\\x41')]", "[see note]", "["}) {
    EXPECT_EQ(calls(reply), "") << reply;
  }
}

TEST(ToolCalls, AfterThePythonTagAreBuiltInToolsOrCode) {
  EXPECT_EQ(calls(R"(brave_search.call(query="weather in Menlo Park"))", true),
            R"(brave_search {"query":"weather in Menlo Park"})");
  EXPECT_EQ(calls(R"(<|python_tag|>wolfram_alpha.call(query="1;2"))"), R"(wolfram_alpha {"query":"1;2"})");
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {}}; {"name": "g", "parameters": {}})", true), "f {} | g {}");
  EXPECT_EQ(calls("print(\"a\")\nx.call(1)\n", true), R"~(code_interpreter {"code":"print(\"a\")\nx.call(1)"})~");
  EXPECT_EQ(calls("[f(a=1)]", true), R"(code_interpreter {"code":"[f(a=1)]"})");
  EXPECT_EQ(calls(R"({"name": "f", "para)", true), "") << "a call that was cut short is no code";
  EXPECT_EQ(calls(" ", true), "");
  EXPECT_EQ(calls(R"(brave_search.call(query="x"))"), "") << "without the tag it is text";
}

TEST(ToolCalls, ReadNestingAsDeepAsAnyOtherJsonAndNoDeeper) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  const std::string json = R"({"name": "f", "parameters": {"a": )";
  EXPECT_NE(calls(json + nested(kMaxJsonDepth - 2) + "}}"), "");
  EXPECT_EQ(calls(json + nested(kMaxJsonDepth - 1) + "}}"), "");
  EXPECT_EQ(calls(json + nested(1'000'000) + "}}"), "");
  EXPECT_EQ(calls(json + std::string(1'000'000, '[')), "");
  EXPECT_NE(calls("[f(a=" + nested(kMaxJsonDepth) + ")]"), "");
  EXPECT_EQ(calls("[f(a=" + nested(kMaxJsonDepth + 1) + ")]"), "");
  EXPECT_EQ(calls("[f(a=" + std::string(1'000'000, '[')), "");
}

// Whatever a model says, what comes of it is text or calls that hold JSON objects.
TEST(ToolCalls, AreJsonObjectsOrNothingForAnyText) {
  const std::string seeds[] = {R"({"name": "f", "parameters": {"a": "é;"}}; {"name": "g", "arguments": {}})",
                               R"(<function=f>{"a": [1, 2]}</function>)", R"([f(a=1, b='x\'', c={"k": [None]}), g()])",
                               R"(<|python_tag|>brave_search.call(query="x"))"};
  const std::string letters = "{}[]()<>\"'\\;:,=. \nafn1-é|\xff";
  std::mt19937 random(1);
  int found = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string text = seeds[random() % std::size(seeds)];
    for (uint32_t edits = random() % 4; edits > 0; --edits) {
      const size_t at = random() % text.size();
      if (random() % 2 == 0) {
        text[at] = letters[random() % letters.size()];
      } else {
        text.insert(at, 1, letters[random() % letters.size()]);
      }
    }
    if (random() % 4 == 0) text.resize(random() % text.size());
    for (const ChatToolCall& call : parse_tool_calls(text, random() % 2 == 0)) {
      ++found;
      const auto arguments = read_ordered_json(call.arguments, "arguments");
      ASSERT_TRUE(arguments.ok() && arguments->is_object()) << text;
      EXPECT_FALSE(call.name.empty()) << text;
    }
  }
  EXPECT_GT(found, 5000);
}

}  // namespace
}  // namespace octet
