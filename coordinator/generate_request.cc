#include "coordinator/generate_request.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "coordinator/rpc_status.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {
namespace {

constexpr int kMaxStopStrings = 16;
constexpr size_t kMaxStopBytes = 1024;
constexpr int kMaxStopTokenIds = 64;
constexpr int kMaxBiases = 1024;
constexpr float kMaxBias = 100.0f;
constexpr float kMaxPenalty = 2.0f;
constexpr float kMaxRepetitionPenalty = 100.0f;
constexpr int kMaxBadWords = 256;
constexpr size_t kMaxBadWordBytes = 256;
constexpr size_t kMaxSaltBytes = 256;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxDateBytes = 64;

// Collects what is wrong, so that a client hears of all of it at once.
class Door {
 public:
  explicit Door(const ServedModel& model) : model_(model) {}

  void expect(bool good, absl::string_view field, absl::string_view expected, const absl::AlphaNum& found) {
    if (good) return;
    violations_.push_back({std::string(field), absl::StrCat("must be ", expected, ", found ", found)});
  }

  void expect_token_id(int32_t id, absl::string_view field, int index) {
    if (id >= 0 && id < model_.limits.vocab_size) return;
    expect(false, absl::StrCat(field, "[", index, "]"),
           absl::StrCat("a token id of this model, 0 to ", model_.limits.vocab_size - 1), id);
  }

  absl::Status status() const { return violations_.empty() ? absl::OkStatus() : bad_request(violations_); }

 private:
  const ServedModel& model_;
  std::vector<FieldViolation> violations_;
};

// The request's value, else the model's default, else Octet's.
template <typename T>
T choose(bool has, T given, const std::optional<T>& model_default, T otherwise) {
  return has ? given : model_default.value_or(otherwise);
}

SlotSampling sampling_of(const v1::GenerateRequest& request, const ServedModel& model) {
  const v1::SamplingParams& given = request.sampling();
  const GenerationConfig& config = model.generation_config;
  // A model that says do_sample: false wants greedy decoding, whatever temperature stands beside it.
  const std::optional<float> default_temperature = config.do_sample == false ? 0.0f : config.temperature;
  return {.repetition_penalty =
              choose(given.has_repetition_penalty(), given.repetition_penalty(), config.repetition_penalty, 1.0f),
          .presence_penalty = given.presence_penalty(),
          .frequency_penalty = given.frequency_penalty(),
          .temperature = choose(given.has_temperature(), given.temperature(), default_temperature, 1.0f),
          .top_k = choose(given.has_top_k(), given.top_k(), config.top_k, 0),
          .top_p = choose(given.has_top_p(), given.top_p(), config.top_p, 1.0f),
          .min_p = given.min_p(),
          .seed = given.seed(),
          .top_logprobs = request.logprobs()};
}

// Bans a word as it is written and as it stands after a space, which are other tokens.
void add_bad_word(const std::string& word, const ServedModel& model, SlotSampling* sampling) {
  for (const std::string& form : {word, " " + word}) {
    std::vector<int32_t> ids = model.tokenizer.encode(form, /*add_special=*/false);
    if (!ids.empty()) sampling->bad_words.push_back(std::move(ids));
  }
}

// REQUIRES: check_fields() found nothing.
void add_adjustments(const v1::SamplingParams& given, const ServedModel& model, SlotSampling* sampling) {
  for (const auto& [token, bias] : given.logit_bias()) sampling->logit_bias.push_back({.token = token, .bias = bias});
  std::ranges::sort(sampling->logit_bias, {}, &TokenBias::token);  // a map has no order, a request's bits must have
  sampling->allowed_token_ids.assign(given.allowed_token_ids().begin(), given.allowed_token_ids().end());
  for (const std::string& word : given.bad_words()) add_bad_word(word, model, sampling);
}

void check_sampling(const SlotSampling& sampling, Door* door) {
  // Written so that NaN is refused.
  door->expect(sampling.temperature >= 0.0f && std::isfinite(sampling.temperature), "sampling.temperature",
               "0 (greedy) or a positive number", sampling.temperature);
  door->expect(sampling.top_p > 0.0f && sampling.top_p <= 1.0f, "sampling.top_p", "above 0 and at most 1 (off)",
               sampling.top_p);
  door->expect(sampling.top_k >= 0, "sampling.top_k", "0 (off) or more", sampling.top_k);
  door->expect(sampling.min_p >= 0.0f && sampling.min_p <= 1.0f, "sampling.min_p", "from 0 (off) to 1", sampling.min_p);
  door->expect(sampling.repetition_penalty > 0.0f && sampling.repetition_penalty <= kMaxRepetitionPenalty,
               "sampling.repetition_penalty", absl::StrCat("above 0 and at most ", kMaxRepetitionPenalty, ", 1 is off"),
               sampling.repetition_penalty);
  const auto expect_penalty = [door](const char* field, float value) {
    door->expect(std::abs(value) <= kMaxPenalty, field, absl::StrCat("from -", kMaxPenalty, " to ", kMaxPenalty),
                 value);
  };
  expect_penalty("sampling.presence_penalty", sampling.presence_penalty);
  expect_penalty("sampling.frequency_penalty", sampling.frequency_penalty);
}

void check_adjustments(const v1::SamplingParams& given, const ServedModel& model, Door* door) {
  door->expect(given.logit_bias_size() <= kMaxBiases, "sampling.logit_bias",
               absl::StrCat("at most ", kMaxBiases, " entries"), given.logit_bias_size());
  for (const auto& [token, bias] : given.logit_bias()) {
    const std::string field = absl::StrCat("sampling.logit_bias[", token, "]");
    door->expect(token >= 0 && token < model.limits.vocab_size, field,
                 absl::StrCat("for a token id of this model, 0 to ", model.limits.vocab_size - 1), token);
    door->expect(std::abs(bias) <= kMaxBias, field, absl::StrCat("from -", kMaxBias, " to ", kMaxBias), bias);
  }
  door->expect(given.allowed_token_ids_size() <= model.limits.vocab_size, "sampling.allowed_token_ids",
               "at most as many ids as the model has", given.allowed_token_ids_size());
  for (int i = 0; i < std::min(given.allowed_token_ids_size(), model.limits.vocab_size); ++i) {
    door->expect_token_id(given.allowed_token_ids(i), "sampling.allowed_token_ids", i);
  }
  door->expect(given.bad_words_size() <= kMaxBadWords, "sampling.bad_words",
               absl::StrCat("at most ", kMaxBadWords, " words"), given.bad_words_size());
  for (int i = 0; i < std::min(given.bad_words_size(), kMaxBadWords); ++i) {
    const size_t bytes = given.bad_words(i).size();
    door->expect(bytes >= 1 && bytes <= kMaxBadWordBytes, absl::StrCat("sampling.bad_words[", i, "]"),
                 absl::StrCat("1 to ", kMaxBadWordBytes, " bytes long"), bytes);
  }
  if (given.has_n()) {
    door->expect(given.n() >= 1 && given.n() <= kMaxOutputs, "sampling.n", absl::StrCat("1 to ", kMaxOutputs),
                 given.n());
  }
}

void check_service(const v1::GenerateRequest& request, Door* door) {
  door->expect(request.logprobs() >= 0 && request.logprobs() <= kMaxTopLogprobs, "logprobs",
               absl::StrCat("0 to ", kMaxTopLogprobs), request.logprobs());
  door->expect(request.prompt_logprobs() >= 0 && request.prompt_logprobs() <= kMaxTopLogprobs, "prompt_logprobs",
               absl::StrCat("0 to ", kMaxTopLogprobs), request.prompt_logprobs());
  door->expect(request.request_id().size() <= kMaxRequestIdBytes, "request_id",
               absl::StrCat("at most ", kMaxRequestIdBytes, " bytes"), request.request_id().size());
  door->expect(!request.has_priority() || (request.priority() >= 0 && request.priority() <= kLowestPriority),
               "priority", absl::StrCat("0, the most urgent, to ", kLowestPriority), request.priority());
  door->expect(request.cache_salt().size() <= kMaxSaltBytes, "cache_salt",
               absl::StrCat("at most ", kMaxSaltBytes, " bytes"), request.cache_salt().size());
  door->expect(!request.echo() || !request.has_chat(), "echo", "unset for a chat, whose prompt prompt_token_ids tells",
               "true");
}

void check_stopping(const v1::StoppingParams& stopping, const ServedModel& model, Door* door) {
  const int32_t context = model.limits.max_context;
  if (stopping.has_max_tokens()) {
    door->expect(stopping.max_tokens() >= 1 && stopping.max_tokens() <= context, "stopping.max_tokens",
                 absl::StrCat("1 to ", context, ", the context (leave it out for all that fits)"),
                 stopping.max_tokens());
  }
  const int32_t most = stopping.has_max_tokens() ? stopping.max_tokens() : context;
  door->expect(stopping.min_tokens() >= 0 && (stopping.min_tokens() == 0 || stopping.min_tokens() <= most),
               "stopping.min_tokens", absl::StrCat("0 to ", most, ", the most tokens there may be"),
               stopping.min_tokens());
  door->expect(stopping.stop_size() <= kMaxStopStrings, "stopping.stop",
               absl::StrCat("at most ", kMaxStopStrings, " strings"), stopping.stop_size());
  for (int i = 0; i < std::min(stopping.stop_size(), kMaxStopStrings); ++i) {
    const size_t bytes = stopping.stop(i).size();
    door->expect(bytes >= 1 && bytes <= kMaxStopBytes, absl::StrCat("stopping.stop[", i, "]"),
                 absl::StrCat("1 to ", kMaxStopBytes, " bytes long"), bytes);
  }
  door->expect(stopping.stop_token_ids_size() <= kMaxStopTokenIds, "stopping.stop_token_ids",
               absl::StrCat("at most ", kMaxStopTokenIds, " ids"), stopping.stop_token_ids_size());
  for (int i = 0; i < std::min(stopping.stop_token_ids_size(), kMaxStopTokenIds); ++i) {
    door->expect_token_id(stopping.stop_token_ids(i), "stopping.stop_token_ids", i);
  }
}

void check_input(const v1::GenerateRequest& request, const ServedModel& model, Door* door) {
  switch (request.input_case()) {
    case v1::GenerateRequest::kPrompt:
      door->expect(!request.prompt().empty(), "prompt", "at least one character", "none");
      return;
    case v1::GenerateRequest::kTokenIds: {
      const auto& ids = request.token_ids().ids();
      door->expect(!ids.empty(), "token_ids.ids", "at least one token id", "none");
      // Ids that do not fit the context are the engine's to refuse, with its numbers.
      for (int i = 0; i < std::min(ids.size(), model.limits.max_context); ++i) {
        door->expect_token_id(ids[i], "token_ids.ids", i);
      }
      return;
    }
    case v1::GenerateRequest::kChat:
      door->expect(!request.chat().messages().empty(), "chat.messages", "at least one message", "none");
      door->expect(request.chat().date().size() <= kMaxDateBytes, "chat.date",
                   absl::StrCat("at most ", kMaxDateBytes, " bytes"), request.chat().date().size());
      return;
    case v1::GenerateRequest::INPUT_NOT_SET:
      door->expect(false, "input", "one of prompt, token_ids and chat", "none");
  }
}

absl::Status check_fields(const v1::GenerateRequest& request, const SlotSampling& sampling, const ServedModel& model) {
  Door door(model);
  check_input(request, model, &door);
  check_sampling(sampling, &door);
  check_adjustments(request.sampling(), model, &door);
  check_stopping(request.stopping(), model, &door);
  check_service(request, &door);
  return door.status();
}

absl::StatusOr<std::vector<int32_t>> render_chat(const v1::ChatPrompt& chat, const ServedModel& model) {
  if (!model.chat.ok()) return model.chat.status();
  ChatRequest request;
  for (const v1::ChatMessage& from : chat.messages()) {
    ChatMessage& to = request.messages.emplace_back();
    to.role = from.role();
    if (from.has_content()) to.content = from.content();
    for (const v1::ToolCall& call : from.tool_calls()) to.tool_calls.push_back({call.name(), call.arguments_json()});
  }
  request.tools.assign(chat.tools_json().begin(), chat.tools_json().end());
  request.date = chat.date();
  if (!chat.has_date() && model.chat->uses_today()) request.date = chat_date_today();
  return model.chat->render(model.tokenizer, request);
}

absl::StatusOr<std::vector<int32_t>> prompt_ids(const v1::GenerateRequest& request, const ServedModel& model) {
  if (request.has_chat()) return render_chat(request.chat(), model);
  if (request.has_prompt()) {
    return model.tokenizer.encode(request.prompt(), /*add_special=*/true, request.parse_special());
  }
  const auto& ids = request.token_ids().ids();
  return std::vector<int32_t>(ids.begin(), ids.end());
}

std::vector<int32_t> end_token_ids(const v1::GenerateRequest& request, const ServedModel& model) {
  std::vector<int32_t> ids(request.stopping().stop_token_ids().begin(), request.stopping().stop_token_ids().end());
  if (!request.stopping().ignore_eos()) {
    ids.insert(ids.end(), model.eos_token_ids.begin(), model.eos_token_ids.end());
    if (request.has_chat() && model.chat.ok()) {
      const std::vector<int32_t>& turn_ends = model.chat->stop_token_ids();
      ids.insert(ids.end(), turn_ends.begin(), turn_ends.end());
    }
  }
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  return ids;
}

uint64_t fresh_seed() {
  std::random_device source;
  return (uint64_t{source()} << 32) | source();
}

}  // namespace

absl::StatusOr<AcceptedRequest> accept_request(const v1::GenerateRequest& request, const ServedModel& model) {
  AcceptedRequest accepted;
  SlotSampling& sampling = accepted.request.sampling;
  sampling = sampling_of(request, model);
  if (!request.sampling().has_seed()) sampling.seed = fresh_seed();
  if (absl::Status status = check_fields(request, sampling, model); !status.ok()) return status;

  absl::StatusOr<std::vector<int32_t>> ids = prompt_ids(request, model);
  if (!ids.ok()) return ids.status();
  accepted.request.prompt = *std::move(ids);
  add_adjustments(request.sampling(), model, &sampling);
  if (request.sampling().has_n()) accepted.request.outputs = request.sampling().n();
  if (request.has_prompt_logprobs()) accepted.request.prompt_logprobs = request.prompt_logprobs();
  if (request.has_priority()) accepted.request.priority = request.priority();
  accepted.request.cache_salt = request.cache_salt();
  if (request.echo()) {
    accepted.echo = request.has_prompt() ? request.prompt()
                                         : model.tokenizer.decode(accepted.request.prompt, /*skip_special=*/true);
  }
  const v1::StoppingParams& stopping = request.stopping();
  if (stopping.has_max_tokens()) accepted.request.max_tokens = stopping.max_tokens();
  sampling.min_tokens = stopping.min_tokens();
  sampling.end_token_ids = end_token_ids(request, model);
  accepted.stop.assign(stopping.stop().begin(), stopping.stop().end());
  accepted.include_stop = stopping.include_stop();
  accepted.logprobs = request.has_logprobs();
  return accepted;
}

v1::GenerateRequest as_generate_request(const v1::ChatRequest& request) {
  v1::GenerateRequest generate;
  *generate.mutable_chat() = request.chat();
  *generate.mutable_sampling() = request.sampling();
  *generate.mutable_stopping() = request.stopping();
  if (request.has_logprobs()) generate.set_logprobs(request.logprobs());
  if (request.has_request_id()) generate.set_request_id(request.request_id());
  if (request.has_priority()) generate.set_priority(request.priority());
  if (request.has_cache_salt()) generate.set_cache_salt(request.cache_salt());
  return generate;
}

}  // namespace octet
