#include "launch/batch_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "launch/svg.h"

namespace octet {
namespace {

constexpr double kRecentSeconds = 10;
constexpr size_t kPictureParts = 60;
constexpr size_t kMaxSamples = 4096;

double rate(const BatchSample& from, const BatchSample& to) {
  const double seconds = to.seconds - from.seconds;
  return seconds > 0 ? static_cast<double>(to.generated_tokens - from.generated_tokens) / seconds : 0.0;
}

}  // namespace

std::string human_duration(double seconds) {
  if (seconds < 90) return absl::StrFormat("%.0f s", seconds);
  const auto minutes = static_cast<int64_t>(std::lround(seconds / 60));
  if (minutes < 90) return absl::StrFormat("%d min", minutes);
  return absl::StrFormat("%d h %d min", minutes / 60, minutes % 60);
}

void BatchReport::add(const BatchSample& sample) {
  // A long job keeps every second look, so that its picture stays whole.
  if (samples_.size() >= kMaxSamples) {
    for (size_t i = 0; 2 * i < samples_.size(); ++i) samples_[i] = samples_[2 * i];
    samples_.resize((samples_.size() + 1) / 2);
  }
  samples_.push_back(sample);
}

double BatchReport::tokens_per_second() const {
  if (samples_.empty()) return 0;
  const BatchSample& now = samples_.back();
  const auto from = std::ranges::find_if(
      samples_, [&](const BatchSample& sample) { return sample.seconds >= now.seconds - kRecentSeconds; });
  return rate(from == samples_.begin() ? BatchSample() : *from, now);
}

double BatchReport::seconds_left() const {
  if (samples_.empty()) return -1;
  const BatchSample& now = samples_.back();
  const int64_t own = now.state.answered.lines - now.state.answered_before;
  if (own <= 0) return -1;
  return static_cast<double>(now.state.lines - now.state.answered.lines) * now.seconds / static_cast<double>(own);
}

double BatchReport::share() const {
  if (samples_.empty()) return 0;
  const BatchState& state = samples_.back().state;
  return state.lines == 0 ? 1.0 : static_cast<double>(state.answered.lines) / static_cast<double>(state.lines);
}

std::string BatchReport::line() const {
  if (samples_.empty()) return "";
  const BatchState& state = samples_.back().state;
  // Rounded down: 100 % is all of them.
  std::string text =
      absl::StrFormat("%d of %d lines (%.1f %%)", state.answered.lines, state.lines, std::floor(share() * 1000) / 10);
  if (state.answered.failed > 0) absl::StrAppend(&text, ", ", state.answered.failed, " with errors");
  absl::StrAppendFormat(&text, ", %.0f tokens/s", tokens_per_second());
  if (seconds_left() >= 0) absl::StrAppend(&text, ", about ", human_duration(seconds_left()), " left");
  return text;
}

nlohmann::ordered_json BatchReport::status(const std::string& name) const {
  const BatchSample now = samples_.empty() ? BatchSample() : samples_.back();
  nlohmann::ordered_json status = {{"state", name},
                                   {"lines_total", now.state.lines},
                                   {"lines_done", now.state.answered.lines},
                                   {"lines_failed", now.state.answered.failed},
                                   {"lines_running", now.state.running},
                                   {"prompt_tokens", now.state.answered.prompt_tokens},
                                   {"completion_tokens", now.state.answered.completion_tokens},
                                   {"tokens_per_second", tokens_per_second()},
                                   {"seconds", now.seconds}};
  if (seconds_left() >= 0) status["seconds_left"] = seconds_left();
  return status;
}

std::string BatchReport::summary() const {
  const BatchSample now = samples_.empty() ? BatchSample() : samples_.back();
  const BatchTotals& all = now.state.answered;
  const double seconds = std::max(now.seconds, 1e-9);
  return absl::StrFormat(
      "%d of %d lines answered, %d of them with errors; %d prompt and %d completion tokens\n"
      "this run: %d lines in %s, %.1f lines/s, %.1f prompt tokens/s, %.1f generated tokens/s",
      all.lines, now.state.lines, all.failed, all.prompt_tokens, all.completion_tokens,
      all.lines - now.state.answered_before, human_duration(now.seconds),
      static_cast<double>(all.lines - now.state.answered_before) / seconds,
      static_cast<double>(now.prompt_tokens) / seconds, static_cast<double>(now.generated_tokens) / seconds);
}

// Generated tokens a second in equal parts of the run.
std::vector<double> BatchReport::rates(size_t parts) const {
  if (samples_.empty() || samples_.back().seconds <= 0) return {};
  std::vector<double> rates;
  const double part = samples_.back().seconds / static_cast<double>(parts);
  // Tokens by a time, between two looks as if they came evenly.
  size_t next = 0;
  const auto tokens_by = [&](double seconds) {
    while (next + 1 < samples_.size() && samples_[next].seconds < seconds) ++next;
    const BatchSample before = next == 0 ? BatchSample() : samples_[next - 1];
    const double share =
        std::clamp((seconds - before.seconds) / std::max(samples_[next].seconds - before.seconds, 1e-9), 0.0, 1.0);
    return static_cast<double>(before.generated_tokens) +
           share * static_cast<double>(samples_[next].generated_tokens - before.generated_tokens);
  };
  double before = 0;
  for (size_t i = 1; i <= parts; ++i) {
    const double now = tokens_by(static_cast<double>(i) * part);
    rates.push_back((now - before) / part);
    before = now;
  }
  return rates;
}

std::string BatchReport::svg(const std::string& title, const std::map<uint32_t, int64_t>& answer_tokens) const {
  const BatchSample now = samples_.empty() ? BatchSample() : samples_.back();
  const std::string what = absl::StrFormat("%d lines, %d with errors; %d prompt and %d completion tokens",
                                           now.state.answered.lines, now.state.answered.failed,
                                           now.state.answered.prompt_tokens, now.state.answered.completion_tokens);
  return absl::StrCat(svg_begin(60 + 2 * kSvgPanel, title, what),
                      svg_steps(76, "Generated tokens/s over this run", rates(kPictureParts), now.seconds),
                      svg_histogram(76 + kSvgPanel, "Answers by their completion tokens", answer_tokens), "</svg>\n");
}

}  // namespace octet
