#include "launch/log.h"

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <memory>

#include "absl/strings/str_cat.h"

namespace octet {
namespace {

LogFormat the_format = LogFormat::kText;

// Bytes that are no UTF-8 become U+FFFD, line ends and other controls are escaped: one line stays one line.
std::string dump(const nlohmann::ordered_json& value) {
  return value.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
}

spdlog::logger& logger() {
  static const std::shared_ptr<spdlog::logger> kLogger = [] {
    auto logger = std::make_shared<spdlog::logger>("octet", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    logger->set_pattern("octet: %v");
    logger->flush_on(spdlog::level::info);
    return logger;
  }();
  return *kLogger;
}

std::string as_text(const std::string& message, const nlohmann::ordered_json& fields) {
  std::string line = message;
  for (const auto& [key, value] : fields.items()) absl::StrAppend(&line, " ", key, "=", dump(value));
  return line;
}

std::string as_json(const std::string& message, const nlohmann::ordered_json& fields) {
  nlohmann::ordered_json all = {{"message", message}};
  all.update(fields);
  const std::string object = dump(all);
  return object.substr(1, object.size() - 2);  // the pattern has the rest of the object
}

}  // namespace

void start_log(LogFormat format, int rank) {
  the_format = format;
  logger().set_pattern(format == LogFormat::kText
                           ? absl::StrCat("octet: %Y-%m-%dT%H:%M:%S.%e %l rank ", rank, ": %v")
                           : absl::StrCat(R"({"time":"%Y-%m-%dT%H:%M:%S.%e%z","level":"%l","rank":)", rank, ",%v}"));
}

void log_line(LogLevel level, const std::string& message, const nlohmann::ordered_json& fields) {
  constexpr spdlog::level::level_enum kLevels[] = {spdlog::level::info, spdlog::level::warn, spdlog::level::err};
  logger().log(kLevels[static_cast<int>(level)], "{}",
               the_format == LogFormat::kText ? as_text(message, fields) : as_json(message, fields));
}

}  // namespace octet
