// Pictures of measurements: the pieces of an SVG document, one panel below the other. Texts are plain.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace octet {

inline constexpr const char* kSvgBlue = "#3b6ea5";
inline constexpr const char* kSvgOrange = "#c77f2f";
inline constexpr int kSvgPanel = 230;  // a panel's height

// Text in an SVG document.
std::string svg_text(const std::string& text);

// The document's beginning: a title, and a line below it that says what was measured. It ends with "</svg>\n".
std::string svg_begin(int height, const std::string& title, const std::string& what);

// The smallest number of one digit and zeros that is not below `value` and whose quarters are short too.
double svg_round_up(double value);

// A panel's frame from `top` on: its title, grid lines with labels at quarters of `most`, and ticks on the x axis, each
// at its share of the width.
std::string svg_frame(int top, const std::string& title, double most, const std::function<std::string(double)>& label,
                      const std::vector<std::pair<double, std::string>>& ticks);

// A line in the panel at `top`. Points are shares of the plot's width and height.
std::string svg_curve(int top, const std::vector<std::pair<double, double>>& points, const char* colour);

// A whole panel of values that held for equal parts of `seconds`.
std::string svg_steps(int top, const std::string& title, const std::vector<double>& values, double seconds);

// A whole panel of how often values, which are not negative, were met.
std::string svg_histogram(int top, const std::string& title, const std::map<uint32_t, int64_t>& counts);

}  // namespace octet
