#include "coordinator/text/detokenizer.h"

#include <algorithm>
#include <utility>

namespace octet {

std::string Detokenizer::push(int32_t id) {
  if (skip_special_ && tokenizer_.is_special(id)) return "";
  return stream_.push(tokenizer_.bytes_of(id));
}

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop) : include_stop_(include_stop) {
  for (std::string& text : stops) {
    Stop stop;
    stop.text = std::move(text);
    stop.fallback.assign(stop.text.size() + 1, 0);
    for (size_t i = 1; i < stop.text.size(); ++i) {
      stop.progress = advance(stop, stop.text[i]);
      stop.fallback[i + 1] = stop.progress;
    }
    stop.progress = 0;
    stops_.push_back(std::move(stop));
  }
}

uint32_t StopMatcher::advance(const Stop& stop, char byte) {
  uint32_t progress = stop.progress;
  while (progress > 0 && stop.text[progress] != byte) progress = stop.fallback[progress];
  return stop.text[progress] == byte ? progress + 1 : 0;
}

std::string StopMatcher::push(std::string_view text) {
  if (matched_.has_value()) return "";
  size_t stop_bytes = 0;
  size_t at = held_.size();
  held_.append(text);
  for (; at < held_.size() && !matched_.has_value(); ++at) {
    for (size_t i = 0; i < stops_.size(); ++i) {
      Stop& stop = stops_[i];
      if (stop.text.empty()) continue;
      stop.progress = advance(stop, held_[at]);
      if (stop.progress == stop.text.size() && stop.progress > stop_bytes) {
        matched_ = static_cast<int32_t>(i);
        stop_bytes = stop.progress;
      }
    }
  }
  if (matched_.has_value()) return std::exchange(held_, "").substr(0, include_stop_ ? at : at - stop_bytes);
  size_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max<size_t>(keep, stop.progress);
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, held_.size() - keep);
  return shown;
}

std::string StopMatcher::flush() { return matched_.has_value() ? "" : std::exchange(held_, ""); }

}  // namespace octet
