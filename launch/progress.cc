#include "launch/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <utility>

namespace octet {
namespace {

constexpr auto kTerminalInterval = std::chrono::milliseconds(100);
constexpr auto kLogInterval = std::chrono::seconds(5);
constexpr int kBarCells = 30;

}  // namespace

Progress::Progress(std::string label, std::function<std::string(int64_t)> amount)
    : label_(std::move(label)),
      amount_(std::move(amount)),
      terminal_(isatty(STDERR_FILENO)),
      begin_(std::chrono::steady_clock::now()),
      shown_(begin_) {}

double Progress::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
}

void Progress::update(int64_t done, int64_t total) {
  const auto now = std::chrono::steady_clock::now();
  if (now - shown_ < (terminal_ ? std::chrono::steady_clock::duration(kTerminalInterval) : kLogInterval)) return;
  shown_ = now;
  const double share = total > 0 ? std::clamp(static_cast<double>(done) / static_cast<double>(total), 0.0, 1.0) : 0.0;
  if (terminal_) {
    const int cells = static_cast<int>(share * kBarCells);
    std::fprintf(stderr, "\r%s [%s%s] %3.0f%% of %s ", label_.c_str(), std::string(cells, '#').c_str(),
                 std::string(kBarCells - cells, '.').c_str(), 100 * share, amount_(total).c_str());
  } else {
    std::fprintf(stderr, "%s: %.0f%% of %s after %.0f s\n", label_.c_str(), 100 * share, amount_(total).c_str(),
                 seconds());
  }
}

void Progress::finish(int64_t total) {
  const double took = seconds();
  std::fprintf(stderr, "%s%s: %s in %.2f s (%.2f GB/s)%s\n", terminal_ ? "\r" : "", label_.c_str(),
               human_bytes(total).c_str(), took, static_cast<double>(total) / 1e9 / std::max(took, 1e-9),
               terminal_ ? std::string(30, ' ').c_str() : "");
}

void Progress::clear() {
  if (terminal_) std::fprintf(stderr, "\r\033[K");
}

}  // namespace octet
