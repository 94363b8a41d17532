#include "launch/svg.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"

namespace octet {
namespace {

constexpr int kWidth = 720, kPlotLeft = 90, kPlotWidth = 600, kPlotHeight = 150;

std::string plain_number(double value) { return absl::StrFormat("%.6g", value); }

}  // namespace

std::string svg_text(const std::string& text) {
  return absl::StrReplaceAll(text, {{"&", "&amp;"}, {"<", "&lt;"}, {">", "&gt;"}});
}

double svg_round_up(double value) {
  if (!(value > 0)) return 1.0;
  const double power = std::pow(10.0, std::floor(std::log10(value)));
  for (const double step : {1.0, 2.0, 3.0, 4.0, 6.0, 8.0}) {
    if (value <= step * power * (1 + 1e-9)) return step * power;
  }
  return 10.0 * power;
}

std::string svg_begin(int height, const std::string& title, const std::string& what) {
  return absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' font-family='sans-serif' font-size='12'>\n"
      "<rect width='100%%' height='100%%' fill='white'/>\n"
      "<text x='12' y='24' font-size='15'>%s</text>\n"
      "<text x='12' y='44' fill='#555'>%s</text>\n",
      kWidth, height, svg_text(title), svg_text(what));
}

std::string svg_frame(int top, const std::string& title, double most, const std::function<std::string(double)>& label,
                      const std::vector<std::pair<double, std::string>>& ticks) {
  std::string svg = absl::StrFormat("<text x='12' y='%d' font-weight='bold'>%s</text>\n", top, svg_text(title));
  const int plot = top + 14;
  for (int quarter = 0; quarter <= 4; ++quarter) {
    const int y = plot + kPlotHeight - quarter * kPlotHeight / 4;
    absl::StrAppendFormat(&svg,
                          "<line x1='%d' x2='%d' y1='%d' y2='%d' stroke='%s'/>"
                          "<text x='%d' y='%d' text-anchor='end' fill='#555'>%s</text>\n",
                          kPlotLeft, kPlotLeft + kPlotWidth, y, y, quarter == 0 ? "#555" : "#e4e4e4", kPlotLeft - 8,
                          y + 4, label(most * quarter / 4));
  }
  for (const auto& [share, text] : ticks) {
    const int x = kPlotLeft + static_cast<int>(share * kPlotWidth);
    absl::StrAppendFormat(&svg,
                          "<line x1='%d' x2='%d' y1='%d' y2='%d' stroke='#555'/>"
                          "<text x='%d' y='%d' text-anchor='middle' fill='#555'>%s</text>\n",
                          x, x, plot + kPlotHeight, plot + kPlotHeight + 4, x, plot + kPlotHeight + 18, text);
  }
  return svg;
}

std::string svg_curve(int top, const std::vector<std::pair<double, double>>& points, const char* colour) {
  std::string svg = absl::StrFormat("<polyline fill='none' stroke='%s' stroke-width='2' points='", colour);
  for (const auto& [x, y] : points) {
    absl::StrAppendFormat(&svg, "%.1f,%.1f ", kPlotLeft + x * kPlotWidth, top + 14 + (1 - y) * kPlotHeight);
  }
  return svg + "'/>\n";
}

std::string svg_steps(int top, const std::string& title, const std::vector<double>& values, double seconds) {
  const double most = svg_round_up(values.empty() ? 0.0 : *std::ranges::max_element(values));
  const auto count = static_cast<double>(values.size());
  std::vector<std::pair<double, double>> points;
  for (size_t i = 0; i < values.size(); ++i) {
    points.emplace_back(static_cast<double>(i) / count, values[i] / most);
    points.emplace_back(static_cast<double>(i + 1) / count, values[i] / most);
  }
  std::vector<std::pair<double, std::string>> ticks;
  for (const double share : {0.0, 0.25, 0.5, 0.75, 1.0}) {
    ticks.emplace_back(share, absl::StrFormat("%.3g s", share * seconds));
  }
  return svg_frame(top, title, most, plain_number, ticks) + svg_curve(top, points, kSvgBlue);
}

std::string svg_histogram(int top, const std::string& title, const std::map<uint32_t, int64_t>& counts) {
  constexpr int kColumns = 50;
  const double widest = svg_round_up(counts.empty() ? 0.0 : counts.rbegin()->first);
  std::vector<double> columns(kColumns, 0.0);
  for (const auto& [value, count] : counts) {
    columns[std::min(static_cast<size_t>(value / widest * kColumns), size_t{kColumns} - 1)] +=
        static_cast<double>(count);
  }
  const double most = svg_round_up(*std::ranges::max_element(columns));
  std::vector<std::pair<double, std::string>> ticks;
  for (const double share : {0.0, 0.25, 0.5, 0.75, 1.0}) ticks.emplace_back(share, plain_number(share * widest));
  std::string svg = svg_frame(top, title, most, plain_number, ticks);
  constexpr double kColumnWidth = static_cast<double>(kPlotWidth) / kColumns;
  for (int i = 0; i < kColumns; ++i) {
    const double height = columns[static_cast<size_t>(i)] / most * kPlotHeight;
    if (height == 0) continue;
    absl::StrAppendFormat(&svg, "<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f' fill='%s'/>\n",
                          kPlotLeft + i * kColumnWidth, top + 14 + kPlotHeight - height, kColumnWidth - 1, height,
                          kSvgOrange);
  }
  return svg;
}

}  // namespace octet
