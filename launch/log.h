// The log of a serving rank: lines on standard error, as text for people or as JSON for machines, each with the time,
// the level and the rank. What clients send appears in fields only, escaped; what they say or are told appears nowhere.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"

namespace octet {

enum class LogFormat { kText, kJson };
enum class LogLevel { kInfo, kWarning, kError };

// Before the first line; until then lines are text without a rank.
void start_log(LogFormat format, int rank);

// Any thread. `fields` is an object; text shows it as key=value.
void log_line(LogLevel level, const std::string& message,
              const nlohmann::ordered_json& fields = nlohmann::ordered_json::object());
inline void log(const std::string& message) { log_line(LogLevel::kInfo, message); }

}  // namespace octet
