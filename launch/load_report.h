// What a load came to: records of streams in, percentiles, tables and pictures out. Pure.
//
// What is measured, as a client sees it:
//   first token       from the moment a request was due until the first message with a token
//   between messages  the gap between consecutive messages with tokens. A message counts once, however many tokens the
//                     server put into it: a reader waits for messages, and spreading a gap over the tokens that came
//                     after it would hide the wait. Tokens per message stand beside it.
//   per token         of each stream, (last message - first message) / (tokens after the first message): the mean,
//   which
//                     does not depend on how tokens were put together
//   whole answer      from the moment a request was due until its last message, of streams that ended well
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "nlohmann/json.hpp"

namespace octet {

struct MessageRecord {
  double at = 0;  // seconds since the load began
  int32_t tokens = 0;
};

struct StreamRecord {
  double begin = 0, end = 0;            // seconds since the load began: due, and its status came
  std::vector<MessageRecord> messages;  // those with tokens
  int32_t prompt_tokens = 0, cached_tokens = 0;
  int32_t prefix_group = -1;    // -1: no shared prefix
  bool cancel_asked = false;    // by this side
  std::string status = "OPEN";  // gRPC's name of its code; OPEN: none came

  int64_t tokens() const;
  bool ok() const { return status == "OK"; }
};

struct LoadRecord {
  double seconds = 0;  // from the first start to the last end
  std::vector<StreamRecord> streams;
};

// The smallest of `sorted` (ascending) that at least `share` of them do not exceed; 0 when there are none.
// REQUIRES: 0 < share <= 1.
double percentile(const std::vector<double>& sorted, double share);
// The middle one, or the mean of the middle two; 0 when there are none.
double median(std::vector<double> values);

struct LoadSummary {
  int64_t done = 0, cancelled = 0;        // ended well; ended by this side's cancel
  std::map<std::string, int64_t> failed;  // by status
  double seconds = 0;
  double requests_per_second = 0, prompt_tokens_per_second = 0, tokens_per_second = 0;
  int64_t prompt_tokens = 0, cached_tokens = 0, tokens = 0, messages = 0;
  // Seconds, ascending.
  std::vector<double> first_token, between_messages, per_token, whole_answer;
  std::vector<double> tokens_per_second_over_time;  // of equal parts of `seconds`

  int64_t failures() const;
  double tokens_per_message() const { return messages == 0 ? 0.0 : static_cast<double>(tokens) / messages; }
};

LoadSummary summarize(const LoadRecord& record);

// What a shared prefix gains: seconds to the first token of each group's first request, and of those that came after
// that one had its first token (those in between may have found the prefix or not, and are left out).
struct PrefixGain {
  std::vector<double> cold, warm;  // ascending
  double ratio() const;            // of the medians; 0 without both
};
PrefixGain prefix_gain(const LoadRecord& record);

// What the server said of itself before and after.
struct ServerState {
  int32_t requests_waiting = 0, requests_running = 0;
  int32_t kv_blocks_total = 0, kv_blocks_free = 0;
  int64_t resident_bytes = 0;  // 0: it does not tell
  int32_t leaked_requests() const { return requests_waiting + requests_running; }
  int32_t leaked_blocks() const { return kv_blocks_total - kv_blocks_free; }
};

std::string to_text(const LoadSummary& summary);  // a table and a picture
std::string to_text(const PrefixGain& gain);      // two lines
std::string to_text(const ServerState& before, const ServerState& after);
nlohmann::json to_json(const LoadSummary& summary);
nlohmann::json to_json(const PrefixGain& gain);
nlohmann::json to_json(const ServerState& state);

// One value of a bar chart, and what stands behind its bar.
struct Bar {
  std::string name;
  double value = 0;
  std::string text;
};
std::string bars_text(const std::vector<Bar>& bars);

// SVG documents: a title, and a line below it that says what was measured. All plain text.
std::string load_svg(const std::string& title, const std::string& what, const LoadSummary& summary);
std::string bars_svg(const std::string& title, const std::string& what, const std::vector<Bar>& bars);

// "830 us", "12.3 ms", "4.56 s".
std::string human_seconds(double seconds);

}  // namespace octet
