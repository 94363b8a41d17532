// tokenizer_cli DIR MODE < lines: prints what Octet's tokenizer makes of each line, for comparison with other
// tokenizers.
//   encode, encode-special   a JSON string a line  -> ids, separated by spaces
//   decode                   a JSON list of ids    -> the text, as a JSON string
//   chat                     a JSON chat request   -> ids, or "error: ..."; tools and arguments are strings that hold JSON
//   bench                    any text, all of it   -> load seconds, encode MB/s
#include <chrono>
#include <iostream>
#include <iterator>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "coordinator/text/chat_format.h"
#include "coordinator/text/tokenizer.h"
#include "nlohmann/json.hpp"

namespace octet {
namespace {

using nlohmann::ordered_json;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

ChatRequest read_request(const ordered_json& line) {
  ChatRequest request;
  for (const ordered_json& message : line.at("messages")) {
    ChatMessage& turn = request.messages.emplace_back();
    turn.role = message.at("role").get<std::string>();
    if (message.contains("content") && message["content"].is_string())
      turn.content = message["content"].get<std::string>();
    for (const ordered_json& call : message.value("tool_calls", ordered_json::array())) {
      turn.tool_calls.push_back(
          {call.at("function").at("name").get<std::string>(), call["function"].at("arguments").get<std::string>()});
    }
  }
  request.tools = line.value("tools", std::vector<std::string>());
  request.builtin_tools = line.value("builtin_tools", std::vector<std::string>());
  request.tools_in_user_message = line.value("tools_in_user_message", true);
  request.date = line.value("date_string", "");
  request.add_generation_prompt = line.value("add_generation_prompt", true);
  return request;
}

std::string chat(const Tokenizer& tokenizer, const ordered_json& line) {
  const absl::StatusOr<ChatFormat> format = ChatFormat::detect(tokenizer);
  if (!format.ok()) return absl::StrCat("error: ", format.status().message());
  const absl::StatusOr<std::vector<int32_t>> ids = format->render(tokenizer, read_request(line));
  return ids.ok() ? absl::StrJoin(*ids, " ") : absl::StrCat("error: ", ids.status().message());
}

int bench(const std::string& directory) {
  const std::string text((std::istreambuf_iterator<char>(std::cin)), std::istreambuf_iterator<char>());
  auto start = std::chrono::steady_clock::now();
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::load(directory);
  if (!tokenizer.ok()) return 1;
  const double load_seconds = seconds_since(start);
  start = std::chrono::steady_clock::now();
  const size_t tokens = tokenizer->encode(text, false).size();
  const double encode_seconds = seconds_since(start);
  std::cout << absl::StrCat("load ", load_seconds, " s, ", text.size(), " bytes, ", tokens, " tokens, ", encode_seconds,
                            " s, ", text.size() / encode_seconds / 1e6, " MB/s\n");
  return 0;
}

int run(const std::string& directory, const std::string& mode) {
  if (mode == "bench") return bench(directory);
  const absl::StatusOr<Tokenizer> tokenizer = Tokenizer::load(directory);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status() << "\n";
    return 1;
  }
  for (std::string line; std::getline(std::cin, line);) {
    const ordered_json value = ordered_json::parse(line);
    if (mode == "decode") {
      std::cout << ordered_json(tokenizer->decode(value.get<std::vector<int32_t>>(), /*skip_special=*/false)).dump()
                << "\n";
    } else if (mode == "chat") {
      std::cout << chat(*tokenizer, value) << "\n";
    } else {
      std::cout << absl::StrJoin(tokenizer->encode(value.get<std::string>(), false, mode == "encode-special"), " ")
                << "\n";
    }
  }
  return 0;
}

}  // namespace
}  // namespace octet

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: tokenizer_cli MODEL_DIRECTORY encode|encode-special|decode|chat|bench < lines\n";
    return 2;
  }
  return octet::run(argv[1], argv[2]);
}
