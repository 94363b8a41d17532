#include "launch/load_report.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/check.h"
#include "launch/svg.h"

namespace octet {
namespace {

constexpr int kParts = 60;  // of a load's time
constexpr int kCells = 40;  // of a bar on a terminal

void take_stream(const StreamRecord& stream, LoadSummary* summary) {
  if (stream.ok()) {
    ++summary->done;
    summary->prompt_tokens += stream.prompt_tokens;
    summary->cached_tokens += stream.cached_tokens;
  } else if (stream.cancel_asked && stream.status == "CANCELLED") {
    ++summary->cancelled;
  } else {
    ++summary->failed[stream.status];
  }
  summary->tokens += stream.tokens();
  summary->messages += static_cast<int64_t>(stream.messages.size());
  if (stream.messages.empty()) return;

  const MessageRecord& first = stream.messages.front();
  const MessageRecord& last = stream.messages.back();
  summary->first_token.push_back(first.at - stream.begin);
  for (size_t i = 1; i < stream.messages.size(); ++i) {
    summary->between_messages.push_back(stream.messages[i].at - stream.messages[i - 1].at);
  }
  const int64_t later_tokens = stream.tokens() - first.tokens;
  if (later_tokens > 0) summary->per_token.push_back((last.at - first.at) / static_cast<double>(later_tokens));
  if (stream.ok()) summary->whole_answer.push_back(last.at - stream.begin);
}

std::vector<double> rate_over_time(const LoadRecord& record) {
  std::vector<double> rates(kParts, 0.0);
  if (record.seconds <= 0) return rates;
  for (const StreamRecord& stream : record.streams) {
    for (const MessageRecord& message : stream.messages) {
      const int part = static_cast<int>(message.at / record.seconds * kParts);
      rates[std::clamp(part, 0, kParts - 1)] += message.tokens * kParts / record.seconds;
    }
  }
  return rates;
}

std::string table_row(const char* name, const std::vector<double>& sorted, const std::string& note) {
  const auto cell = [&](double share) { return sorted.empty() ? "-" : human_seconds(percentile(sorted, share)); };
  return absl::StrFormat("%-18s %9s %9s %9s %9s   %s\n", name, cell(0.5), cell(0.9), cell(0.99), cell(1.0), note);
}

std::string cells(double share) {
  const int filled = std::clamp(static_cast<int>(std::lround(share * kCells)), 0, kCells);
  return std::string(filled, '#') + std::string(kCells - filled, '.');
}

// The percentiles of one quantity as bars, the longest of which is the maximum.
std::string picture(const char* name, const std::vector<double>& sorted) {
  if (sorted.empty()) return "";
  std::string text = absl::StrCat("\n", name, "\n");
  for (const auto& [label, share] : std::vector<std::pair<const char*, double>>{
           {"p10", 0.1}, {"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"max", 1.0}}) {
    const double value = percentile(sorted, share);
    absl::StrAppendFormat(&text, "  %-4s %s %s\n", label, cells(value / std::max(sorted.back(), 1e-9)),
                          human_seconds(value));
  }
  return text;
}

// Throughput over time: a column for each part of the load, four rows high.
std::string time_picture(const LoadSummary& summary) {
  constexpr int kRows = 4;
  const std::vector<double>& rates = summary.tokens_per_second_over_time;
  const double most = rates.empty() ? 0.0 : *std::max_element(rates.begin(), rates.end());
  if (most <= 0) return "";
  std::string text = absl::StrFormat("\ntokens/s over %s, up to %.0f\n", human_seconds(summary.seconds), most);
  for (int row = kRows; row > 0; --row) {
    absl::StrAppend(&text, "  |");
    for (const double rate : rates) text += rate > most * (row - 0.5) / kRows ? '#' : ' ';
    absl::StrAppend(&text, "\n");
  }
  return absl::StrCat(text, "  +", std::string(rates.size(), '-'), "\n");
}

// Percentiles from 0 to 99.9; each nine takes as much room as the one before it, as tails deserve.
std::string percentile_panel(int top, const std::string& title, const std::vector<double>& sorted, const char* colour) {
  constexpr double kNines = 3.0;
  const auto place = [](double share) { return -std::log10(1 - share) / kNines; };
  const double most = svg_round_up(sorted.empty() ? 0.0 : percentile(sorted, 0.999));
  std::vector<std::pair<double, double>> points;
  for (int i = 0; !sorted.empty() && i <= 120; ++i) {
    const double x = i / 120.0;
    const double share = std::max(1e-9, 1 - std::pow(10.0, -kNines * x));
    points.emplace_back(x, percentile(sorted, share) / most);
  }
  std::vector<std::pair<double, std::string>> ticks = {{0.0, "min"}};
  for (const auto& [share, name] :
       std::vector<std::pair<double, const char*>>{{0.5, "p50"}, {0.9, "p90"}, {0.99, "p99"}, {0.999, "p99.9"}}) {
    ticks.emplace_back(place(share), name);
  }
  return svg_frame(top, title, most, human_seconds, ticks) + svg_curve(top, points, colour);
}

std::string time_panel(int top, const LoadSummary& summary) {
  return svg_steps(top, absl::StrFormat("Generated tokens/s over time: %.0f on average", summary.tokens_per_second),
                   summary.tokens_per_second_over_time, summary.seconds);
}

nlohmann::json percentiles_json(const std::vector<double>& sorted) {
  return {{"count", sorted.size()},
          {"p50", percentile(sorted, 0.5)},
          {"p90", percentile(sorted, 0.9)},
          {"p99", percentile(sorted, 0.99)},
          {"max", percentile(sorted, 1.0)}};
}

}  // namespace

int64_t StreamRecord::tokens() const {
  int64_t sum = 0;
  for (const MessageRecord& message : messages) sum += message.tokens;
  return sum;
}

double percentile(const std::vector<double>& sorted, double share) {
  OCTET_CHECK(share > 0 && share <= 1, "a percentile is a share of the values");
  if (sorted.empty()) return 0.0;
  // Less a little: 0.9 * 10 is not quite 9, and its ceiling would be one too many.
  const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(sorted.size()) - 1e-9));
  return sorted[std::max<size_t>(rank, 1) - 1];
}

double median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  return (values[(values.size() - 1) / 2] + values[values.size() / 2]) / 2;
}

int64_t LoadSummary::failures() const {
  int64_t sum = 0;
  for (const auto& [status, count] : failed) sum += count;
  return sum;
}

LoadSummary summarize(const LoadRecord& record) {
  LoadSummary summary{.seconds = record.seconds};
  for (const StreamRecord& stream : record.streams) take_stream(stream, &summary);
  for (std::vector<double>* values :
       {&summary.first_token, &summary.between_messages, &summary.per_token, &summary.whole_answer}) {
    std::sort(values->begin(), values->end());
  }
  if (record.seconds > 0) {
    summary.requests_per_second = static_cast<double>(summary.done) / record.seconds;
    summary.prompt_tokens_per_second = static_cast<double>(summary.prompt_tokens) / record.seconds;
    summary.tokens_per_second = static_cast<double>(summary.tokens) / record.seconds;
  }
  summary.tokens_per_second_over_time = rate_over_time(record);
  return summary;
}

double PrefixGain::ratio() const {
  return cold.empty() || warm.empty() ? 0.0 : median(cold) / std::max(median(warm), 1e-9);
}

PrefixGain prefix_gain(const LoadRecord& record) {
  std::map<int32_t, const StreamRecord*> first;  // by group
  for (const StreamRecord& stream : record.streams) {
    if (stream.prefix_group < 0) continue;
    const StreamRecord*& known = first[stream.prefix_group];
    if (known == nullptr || stream.begin < known->begin) known = &stream;
  }
  PrefixGain gain;
  for (const StreamRecord& stream : record.streams) {
    if (stream.prefix_group < 0 || stream.messages.empty()) continue;
    const StreamRecord& opener = *first[stream.prefix_group];
    const double seconds = stream.messages.front().at - stream.begin;
    if (&stream == &opener) {
      gain.cold.push_back(seconds);
    } else if (!opener.messages.empty() && stream.begin >= opener.messages.front().at) {
      gain.warm.push_back(seconds);
    }
  }
  std::sort(gain.cold.begin(), gain.cold.end());
  std::sort(gain.warm.begin(), gain.warm.end());
  return gain;
}

std::string human_seconds(double seconds) {
  if (seconds == 0) return "0";
  if (seconds < 1e-3) return absl::StrFormat("%.3g us", seconds * 1e6);
  if (seconds < 1.0) return absl::StrFormat("%.3g ms", seconds * 1e3);
  return absl::StrFormat("%.4g s", seconds);
}

std::string to_text(const LoadSummary& s) {
  std::string text = absl::StrFormat("requests    %d done, %d cancelled, %d failed in %s\n", s.done, s.cancelled,
                                     s.failures(), human_seconds(s.seconds));
  for (const auto& [status, count] : s.failed) absl::StrAppendFormat(&text, "            %d ended %s\n", count, status);
  absl::StrAppendFormat(&text,
                        "throughput  %.2f requests/s, %.1f prompt tokens/s, %.1f generated tokens/s; "
                        "%d of %d prompt tokens from the cache\n\n",
                        s.requests_per_second, s.prompt_tokens_per_second, s.tokens_per_second, s.cached_tokens,
                        s.prompt_tokens);
  absl::StrAppendFormat(&text, "%-18s %9s %9s %9s %9s\n", "", "p50", "p90", "p99", "max");
  text += table_row("first token", s.first_token, "");
  text += table_row("between messages", s.between_messages,
                    absl::StrFormat("%.2f tokens in a message", s.tokens_per_message()));
  text += table_row("per token", s.per_token, "mean of each stream");
  text += table_row("whole answer", s.whole_answer, "");
  return absl::StrCat(text, picture("first token", s.first_token), picture("between messages", s.between_messages),
                      time_picture(s));
}

std::string to_text(const PrefixGain& gain) {
  if (gain.ratio() == 0) return "prefix cache: no request came after the first of its group, so nothing to compare\n";
  return absl::StrFormat(
      "prefix cache: first token after %s for the first request of a group (median of %d), %s for later ones (of %d): "
      "%.1f times faster\n",
      human_seconds(median(gain.cold)), gain.cold.size(), human_seconds(median(gain.warm)), gain.warm.size(),
      gain.ratio());
}

std::string to_text(const ServerState& before, const ServerState& after) {
  std::string text = absl::StrFormat(
      "afterwards the server has %d requests running, %d waiting (leaked: %d); %d of %d KV blocks free (leaked: %d)\n",
      after.requests_running, after.requests_waiting, after.leaked_requests(), after.kv_blocks_free,
      after.kv_blocks_total, after.leaked_blocks());
  if (before.resident_bytes > 0 && after.resident_bytes > 0) {
    const double mib = 1024.0 * 1024.0;
    absl::StrAppendFormat(&text, "and %.1f MiB resident on rank 0, %.1f MiB before (%+.2f %%)\n",
                          after.resident_bytes / mib, before.resident_bytes / mib,
                          100.0 * (after.resident_bytes - before.resident_bytes) / before.resident_bytes);
  }
  return text;
}

nlohmann::json to_json(const LoadSummary& s) {
  return {{"done", s.done},
          {"cancelled", s.cancelled},
          {"failed", s.failed},
          {"seconds", s.seconds},
          {"requests_per_second", s.requests_per_second},
          {"prompt_tokens_per_second", s.prompt_tokens_per_second},
          {"tokens_per_second", s.tokens_per_second},
          {"prompt_tokens", s.prompt_tokens},
          {"cached_prompt_tokens", s.cached_tokens},
          {"tokens", s.tokens},
          {"tokens_per_message", s.tokens_per_message()},
          {"first_token_seconds", percentiles_json(s.first_token)},
          {"between_messages_seconds", percentiles_json(s.between_messages)},
          {"per_token_seconds", percentiles_json(s.per_token)},
          {"whole_answer_seconds", percentiles_json(s.whole_answer)}};
}

nlohmann::json to_json(const PrefixGain& gain) {
  return {{"cold_first_token_seconds", percentiles_json(gain.cold)},
          {"warm_first_token_seconds", percentiles_json(gain.warm)},
          {"ratio", gain.ratio()}};
}

nlohmann::json to_json(const ServerState& state) {
  return {{"requests_waiting", state.requests_waiting},
          {"requests_running", state.requests_running},
          {"kv_blocks_total", state.kv_blocks_total},
          {"kv_blocks_free", state.kv_blocks_free},
          {"resident_bytes", state.resident_bytes}};
}

std::string bars_text(const std::vector<Bar>& bars) {
  double most = 1e-9;
  size_t width = 0;
  for (const Bar& bar : bars) {
    most = std::max(most, bar.value);
    width = std::max(width, bar.name.size());
  }
  std::string text;
  for (const Bar& bar : bars) {
    absl::StrAppendFormat(&text, "%-*s %s %s\n", static_cast<int>(width), bar.name, cells(bar.value / most), bar.text);
  }
  return text;
}

std::string load_svg(const std::string& title, const std::string& what, const LoadSummary& s) {
  const auto with_max = [](const char* name, const std::vector<double>& sorted) {
    return absl::StrCat(name, " by percentile, up to ", human_seconds(percentile(sorted, 1.0)));
  };
  return absl::StrCat(svg_begin(60 + 3 * kSvgPanel, title, what),
                      percentile_panel(76, with_max("Time to the first token", s.first_token), s.first_token, kSvgBlue),
                      percentile_panel(76 + kSvgPanel, with_max("Time between messages", s.between_messages),
                                       s.between_messages, kSvgOrange),
                      time_panel(76 + 2 * kSvgPanel, s), "</svg>\n");
}

std::string bars_svg(const std::string& title, const std::string& what, const std::vector<Bar>& bars) {
  constexpr int kBarHeight = 22, kLeft = 170, kBarWidth = 290;
  double most = 1e-9;
  for (const Bar& bar : bars) most = std::max(most, bar.value);
  std::string svg = svg_begin(76 + static_cast<int>(bars.size()) * (kBarHeight + 8), title, what);
  int y = 60;
  for (const Bar& bar : bars) {
    absl::StrAppendFormat(&svg,
                          "<text x='12' y='%d'>%s</text><rect x='%d' y='%d' width='%d' height='%d' fill='%s'/>"
                          "<text x='%d' y='%d'>%s</text>\n",
                          y + 16, svg_text(bar.name), kLeft, y, static_cast<int>(bar.value / most * kBarWidth),
                          kBarHeight, kSvgBlue, kLeft + static_cast<int>(bar.value / most * kBarWidth) + 8, y + 16,
                          svg_text(bar.text));
    y += kBarHeight + 8;
  }
  return svg + "</svg>\n";
}

}  // namespace octet
