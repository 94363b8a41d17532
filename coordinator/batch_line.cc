#include "coordinator/batch_line.h"

#include <sodium/crypto_generichash.h>
#include <sodium/crypto_shorthash.h>

#include <utility>

#include "absl/strings/escaping.h"
#include "coordinator/rpc_status.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/ordered_json.h"
#include "coordinator/text/utf8.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.pb.h"

namespace octet {
namespace {

using Json = nlohmann::ordered_json;

// ASCII only: programs that take U+2028 for the end of a line find none.
std::string print(const Json& value) {
  return value.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
}

std::optional<std::string> text_in(const Json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_string()) return std::nullopt;
  return found->get<std::string>();
}

// Errors name the line by its number: without an id there is nothing else to find it by.
absl::StatusOr<Json> read_line(std::string_view text, int64_t number) {
  const std::string name = cat("line ", number);
  consume_suffix(text, "\r");
  if (static_cast<int64_t>(text.size()) > kMaxBatchLineBytes) {
    return absl::InvalidArgumentError(cat(name, " has more than ", kMaxBatchLineBytes >> 20, " MiB: split it"));
  }
  if (!is_valid_utf8(text)) return absl::InvalidArgumentError(cat(name, " is not valid UTF-8"));
  absl::StatusOr<Json> line = read_ordered_json(text, name);
  if (line.ok() && !line->is_object()) return absl::InvalidArgumentError(cat(name, " is not a JSON object"));
  return line;
}

absl::Status wrong(const char* field, std::string_view expected, const Json& line) {
  const auto found = line.find(field);
  return bad_request(
      {{field, cat("must be ", expected, ", found ", found == line.end() ? "none" : brief_json(*found))}});
}

absl::StatusOr<OpenAiEndpoint> endpoint_of(const Json& line) {
  const std::optional<std::string> url = text_in(line, "url");
  if (url == "/v1/chat/completions") return OpenAiEndpoint::kChatCompletions;
  if (url == "/v1/completions") return OpenAiEndpoint::kCompletions;
  return wrong("url", "\"/v1/chat/completions\" or \"/v1/completions\"", line);
}

}  // namespace

BatchLine BatchLine::read(std::string_view text, int64_t number, const BatchFacts& facts, const ServedModel& model) {
  BatchLine line(number, facts, model);
  absl::StatusOr<Json> json = read_line(text, number);
  if (!json.ok()) {
    // Whoever looks for this line's answer by its id should find it, if the id can be read at all.
    line.custom_id_ = custom_id_of(text);
    line.fail(json.status(), "invalid_json_line");
    return line;
  }
  line.custom_id_ = text_in(*json, "custom_id");
  if (absl::Status status = line.accept(*json); !status.ok()) line.fail(status);
  return line;
}

absl::Status BatchLine::accept(const Json& line) {
  if (!custom_id_.has_value()) {
    return bad_request({{"custom_id", cat("of line ", number_, " must be there, and a text")}});
  }
  if (text_in(line, "method") != "POST") return wrong("method", "\"POST\"", line);
  const absl::StatusOr<OpenAiEndpoint> endpoint = endpoint_of(line);
  if (!endpoint.ok()) return endpoint.status();
  if (!line.contains("body")) return wrong("body", "an object", line);
  absl::StatusOr<OpenAiRequest> request = read_openai_request(*endpoint, line["body"], facts_->defaults, *model_);
  if (!request.ok()) return request.status();

  const size_t prompts = request->prompts.size();
  for (size_t i = 0; i < prompts; ++i) {
    v1::GenerateRequest& prompt = request->prompts[i];
    if (!prompt.sampling().has_seed()) prompt.mutable_sampling()->set_seed(seed_of(i));
    if (prompt.has_chat() && model_->chat.ok() && model_->chat->uses_today()) {
      prompt.mutable_chat()->set_date(facts_->chat_date);
    }
    absl::StatusOr<AcceptedRequest> accepted = accept_request(prompt, *model_);
    if (!accepted.ok()) return in_openai_names(accepted.status(), *endpoint, i, prompts);
    requests_.push_back(*std::move(accepted));
  }
  answer_ = OpenAiAnswer({.endpoint = *endpoint,
                          .prompts = prompts,
                          .outputs = static_cast<size_t>(requests_[0].request.outputs),
                          .tools = request->tools,
                          .logprobs = requests_[0].logprobs});
  return absl::OkStatus();
}

// Keyed, so that lines of two jobs with other seeds have nothing to do with each other.
uint64_t BatchLine::seed_of(size_t prompt) const {
  unsigned char key[crypto_shorthash_KEYBYTES] = {};
  for (size_t i = 0; i < sizeof facts_->seed; ++i) key[i] = static_cast<unsigned char>(facts_->seed >> (8 * i));
  const std::string place = cat(number_, ":", prompt);
  unsigned char hash[crypto_shorthash_BYTES];
  static_assert(sizeof hash == sizeof(uint64_t));
  crypto_shorthash(hash, reinterpret_cast<const unsigned char*>(place.data()), place.size(), key);
  uint64_t seed = 0;
  for (size_t i = 0; i < sizeof hash; ++i) seed |= uint64_t{hash[i]} << (8 * i);
  return seed;
}

// 32 hex digits that nothing else of any job has.
std::string BatchLine::hash_of(std::string_view what) const {
  const std::string name = cat(what, ":", number_, ":", facts_->job_id);
  unsigned char hash[crypto_generichash_BYTES_MIN];
  static_assert(sizeof hash == 16);
  crypto_generichash(hash, sizeof hash, reinterpret_cast<const unsigned char*>(name.data()), name.size(), nullptr, 0);
  return absl::BytesToHexString({reinterpret_cast<const char*>(hash), sizeof hash});
}

std::string BatchLine::line_of(const Json& response, const Json& error) const {
  return print({{"id", cat("batch_req_", hash_of("line"))},
                {"custom_id", custom_id_.has_value() ? Json(*custom_id_) : Json()},
                {"response", response},
                {"error", error}});
}

void BatchLine::fail(const absl::Status& status, std::string_view code) {
  if (failed()) return;
  OpenAiError error = openai_error_of(status);
  if (!code.empty()) error.code = std::string(code);
  const std::string message(status.message());
  requests_.clear();
  if (error.http_status >= 500) {
    error_ = line_of(nullptr, {{"code", error.code}, {"message", message}});
    return;
  }
  const std::vector<FieldViolation> violations = violations_of(status);
  const Json body = {{"error",
                      {{"message", message},
                       {"type", error.type},
                       {"param", violations.empty() ? Json() : Json(violations[0].field)},
                       {"code", error.code}}}};
  error_ = line_of({{"status_code", error.http_status}, {"request_id", hash_of("request")}, {"body", body}}, nullptr);
}

std::string BatchLine::answer() const {
  if (failed()) return error_;
  const Json body = answer_.body(
      {.key = hash_of("answer"), .created = facts_->created, .system_fingerprint = facts_->system_fingerprint},
      *model_);
  return line_of({{"status_code", 200}, {"request_id", hash_of("request")}, {"body", body}}, nullptr);
}

}  // namespace octet
