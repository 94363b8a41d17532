// Tool calls in a Llama 3.x model's reply, in every spelling that its prompts ask for:
//   {"name": "f", "parameters": {"a": 1}}      JSON; "arguments" too; several with ; between
//   <function=f>{"a": 1}</function>            custom tool prompts; several in a row
//   [f(a=1), g(b="x")]                         Llama 3.2 and later: calls as Python writes them
//   brave_search.call(query="...")             a built-in tool, after <|python_tag|>
//   print(1)                                   anything else after <|python_tag|>: code for the code interpreter
#pragma once

#include <string_view>
#include <vector>

#include "coordinator/text/chat_format.h"

namespace octet {

// The calls that `reply` is made of; none when it is plain text, which it also is when any part of it is malformed.
// `python_tag`: the reply began with the token <|python_tag|>, which is not in its text (it may be, as its name).
// Arguments are JSON objects with their members in the reply's order. Pure; any text will do.
std::vector<ChatToolCall> parse_tool_calls(std::string_view reply, bool python_tag);

}  // namespace octet
