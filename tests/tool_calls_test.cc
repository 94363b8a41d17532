// Tool calls in replies, and replies that are none.
#include "coordinator/text/tool_calls.h"

#include <gtest/gtest.h>

#include <string>

namespace octet {
namespace {

// The calls of a reply as "name arguments", with | between.
std::string calls(std::string_view reply, bool python_tag = false) {
  std::string text;
  for (const ChatToolCall& call : parse_tool_calls(reply, python_tag)) {
    text += (text.empty() ? "" : " | ") + call.name + " " + call.arguments;
  }
  return text;
}

TEST(ToolCalls, AreJsonObjectsWithANameAndParameters) {
  EXPECT_EQ(calls(R"({"name": "f", "parameters": {"b": 1, "a": "10"}})"), R"(f {"b":1,"a":"10"})");
}

}  // namespace
}  // namespace octet
