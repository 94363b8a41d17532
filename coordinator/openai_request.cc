#include "coordinator/openai_request.h"

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "absl/strings/numbers.h"
#include "coordinator/rpc_status.h"
#include "coordinator/text/cat.h"
#include "coordinator/text/ordered_json.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.pb.h"

namespace octet {
namespace {

using Json = nlohmann::ordered_json;

// OpenAI's default for completions that do not say.
constexpr int32_t kCompletionTokens = 16;

// 8 or 8.0.
std::optional<int64_t> whole_number_in(const Json& value) {
  if (value.is_number_unsigned() && value.get<uint64_t>() > std::numeric_limits<int64_t>::max()) return std::nullopt;
  if (value.is_number_integer()) return value.get<int64_t>();
  if (!value.is_number_float()) return std::nullopt;
  const double number = value.get<double>();
  constexpr double kExact = 9007199254740992.0;  // 2^53: from here on a double is not one whole number only
  if (std::trunc(number) != number || std::abs(number) > kExact) return std::nullopt;
  return static_cast<int64_t>(number);
}

// An object of the body, read field by field. What is wrong is collected, so that a client hears of all of it at once.
class Fields {
 public:
  // `path` is what a message calls the object: "", or "messages[0].".
  Fields(const Json& object, std::string path, std::vector<FieldViolation>* violations)
      : object_(object), path_(std::move(path)), violations_(violations) {}

  void refuse(std::string_view field, std::string_view what) const {
    violations_->push_back({cat(path_, field), std::string(what)});
  }
  void expect(std::string_view field, std::string_view expected, const Json& found) const {
    refuse(field, cat("must be ", expected, ", found ", brief_json(found)));
  }

  // Null when the field is absent, or null.
  const Json* find(std::string_view field) const {
    const auto found = object_.find(field);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }

  // The fields' values; nothing when they are absent, and when they are of another type, which is noted.
  std::optional<bool> flag(std::string_view field) const {
    const Json* value = find_as(field, "true or false", [](const Json& v) { return v.is_boolean(); });
    return value == nullptr ? std::nullopt : std::optional<bool>(value->get<bool>());
  }
  std::optional<std::string> text(std::string_view field) const {
    const Json* value = find_as(field, "a text", [](const Json& v) { return v.is_string(); });
    return value == nullptr ? std::nullopt : std::optional<std::string>(value->get<std::string>());
  }
  std::optional<float> number(std::string_view field) const {
    const Json* value = find_as(field, "a number", is_float);
    return value == nullptr ? std::nullopt : std::optional<float>(value->get<float>());
  }
  std::optional<int32_t> whole(std::string_view field) const {
    const Json* value = find_as(field, kInt32, is_int32);
    return value == nullptr ? std::nullopt : std::optional<int32_t>(*whole_number_in(*value));
  }
  const Json* list(std::string_view field) const {
    return find_as(field, "a list", [](const Json& v) { return v.is_array(); });
  }
  const Json* object(std::string_view field) const {
    return find_as(field, "an object", [](const Json& v) { return v.is_object(); });
  }

  // Hands each item of a list to `take`; an absent list has none.
  void texts(std::string_view field, const std::function<void(const std::string&)>& take) const {
    if (const Json* items = list_of(field, "a text", [](const Json& v) { return v.is_string(); })) {
      for (const Json& item : *items) take(item.get_ref<const std::string&>());
    }
  }
  void wholes(std::string_view field, const std::function<void(int32_t)>& take) const {
    if (const Json* items = list_of(field, kInt32, is_int32)) {
      for (const Json& item : *items) take(static_cast<int32_t>(*whole_number_in(item)));
    }
  }
  // Hands each object of a list to `take`.
  void objects(std::string_view field, const std::function<void(const Fields&)>& take) const {
    if (const Json* items = list_of(field, "an object", [](const Json& v) { return v.is_object(); })) {
      for (size_t i = 0; i < items->size(); ++i)
        take(Fields((*items)[i], cat(path_, field, "[", i, "]."), violations_));
    }
  }
  // The fields of an object in this one, under its path. REQUIRES: object(field) is not null.
  Fields inside(std::string_view field) const { return Fields(*find(field), cat(path_, field, "."), violations_); }

  static bool is_float(const Json& value) { return value.is_number() && std::abs(value.get<double>()) <= FLT_MAX; }
  static bool is_int32(const Json& value) {
    const std::optional<int64_t> number = whole_number_in(value);
    return number.has_value() && *number == static_cast<int32_t>(*number);
  }

 private:
  static constexpr char kInt32[] = "a whole number of 32 bits";

  const Json* find_as(std::string_view field, std::string_view expected, bool (*fits)(const Json&)) const {
    const Json* value = find(field);
    if (value == nullptr || fits(*value)) return value;
    expect(field, expected, *value);
    return nullptr;
  }
  const Json* list_of(std::string_view field, std::string_view expected, bool (*fits)(const Json&)) const {
    const Json* items = list(field);
    if (items == nullptr) return nullptr;
    for (size_t i = 0; i < items->size(); ++i) {
      if (fits((*items)[i])) continue;
      expect(cat(field, "[", i, "]"), expected, (*items)[i]);
      return nullptr;
    }
    return items;
  }

  const Json& object_;
  const std::string path_;
  std::vector<FieldViolation>* const violations_;
};

// ---- What is not there

struct Unsupported {
  std::string field;
  Json harmless;  // the value, beside null, that asks for nothing
  std::string why;
};

constexpr char kNoConstraints[] = "constrained output does not exist yet";
constexpr char kOwnTemplate[] = "a chat is rendered in the model's own format";
constexpr char kTextOnly[] = "text is all that the model reads and writes";

const std::vector<Unsupported>& unsupported(OpenAiEndpoint endpoint) {
  static const std::vector<Unsupported> both = {
      {"stream", false, "a batch has no streams"},
      {"response_format", {{"type", "text"}}, kNoConstraints},
      {"structured_outputs", nullptr, kNoConstraints},
      {"guided_json", nullptr, kNoConstraints},
      {"guided_regex", nullptr, kNoConstraints},
      {"guided_choice", nullptr, kNoConstraints},
      {"guided_grammar", nullptr, kNoConstraints},
      {"use_beam_search", false, "outputs are sampled"},
      {"truncate_prompt_tokens", nullptr, "prompts are not cut"},
      {"skip_special_tokens", true, "special tokens are no text"},
      {"prompt_logprobs", nullptr, "echo with logprobs, for completions, gives them"},
  };
  static const std::vector<Unsupported> chat = [] {
    std::vector<Unsupported> fields = both;
    fields.insert(fields.end(), {{"chat_template", nullptr, kOwnTemplate},
                                 {"chat_template_kwargs", Json::object(), kOwnTemplate},
                                 {"documents", Json::array(), kOwnTemplate},
                                 {"add_special_tokens", false, kOwnTemplate},
                                 {"add_generation_prompt", true, "an answer is the assistant's next turn"},
                                 {"continue_final_message", false, "an answer is the assistant's next turn"},
                                 {"echo", false, "an answer is the assistant's next turn"},
                                 {"functions", Json::array(), "tools are its successor"},
                                 {"modalities", Json::array({"text"}), kTextOnly},
                                 {"audio", nullptr, kTextOnly}});
    return fields;
  }();
  static const std::vector<Unsupported> completions = [] {
    std::vector<Unsupported> fields = both;
    fields.insert(fields.end(), {{"suffix", "", "text is only ever continued"},
                                 {"add_special_tokens", true, "a prompt of token ids is taken as it is"},
                                 {"prompt_embeds", nullptr, kTextOnly}});
    return fields;
  }();
  return endpoint == OpenAiEndpoint::kChatCompletions ? chat : completions;
}

void refuse_unsupported(OpenAiEndpoint endpoint, const Fields& body) {
  for (const Unsupported& option : unsupported(endpoint)) {
    const Json* value = body.find(option.field);
    if (value == nullptr || *value == option.harmless) continue;
    const std::string expected =
        option.harmless.is_null() ? "absent" : cat("absent or ", compact_json(option.harmless));
    body.refuse(option.field, cat("must be ", expected, ": ", option.why));
  }
}

// ---- Sampling and stopping

// Negative seeds are as good as any.
std::optional<uint64_t> read_seed(const Fields& body) {
  const Json* value = body.find("seed");
  if (value == nullptr) return std::nullopt;
  if (value->is_number_unsigned()) return value->get<uint64_t>();
  const std::optional<int64_t> seed = whole_number_in(*value);
  if (!seed.has_value()) body.expect("seed", "a whole number of 64 bits", *value);
  return static_cast<uint64_t>(seed.value_or(0));
}

void read_logit_bias(const Fields& body, v1::SamplingParams* sampling) {
  const Json* biases = body.object("logit_bias");
  if (biases == nullptr) return;
  for (const auto& [key, bias] : biases->items()) {
    int32_t token = 0;
    if (!absl::SimpleAtoi(key, &token)) {
      return body.refuse("logit_bias", cat("must have token ids as its keys, found ", brief_json(key)));
    }
    if (!Fields::is_float(bias)) return body.expect(cat("logit_bias.", key), "a number", bias);
    (*sampling->mutable_logit_bias())[token] = bias.get<float>();
  }
}

void read_sampling(const Fields& body, const SamplingDefaults& defaults, v1::SamplingParams* sampling) {
  const auto given_or = [](auto given, const auto& otherwise) { return given.has_value() ? given : otherwise; };
  if (const auto x = given_or(body.number("temperature"), defaults.temperature)) sampling->set_temperature(*x);
  if (const auto x = given_or(body.number("top_p"), defaults.top_p)) sampling->set_top_p(*x);
  // vLLM's "all" is -1.
  if (const auto x = given_or(body.whole("top_k"), defaults.top_k)) sampling->set_top_k(*x == -1 ? 0 : *x);
  if (const auto x = body.number("min_p")) sampling->set_min_p(*x);
  if (const auto x = body.number("presence_penalty")) sampling->set_presence_penalty(*x);
  if (const auto x = body.number("frequency_penalty")) sampling->set_frequency_penalty(*x);
  if (const auto x = body.number("repetition_penalty")) sampling->set_repetition_penalty(*x);
  if (const auto x = read_seed(body)) sampling->set_seed(*x);
  if (const auto x = body.whole("n")) sampling->set_n(*x);
  read_logit_bias(body, sampling);
  body.texts("bad_words", [&](const std::string& word) { sampling->add_bad_words(word); });
  body.wholes("allowed_token_ids", [&](int32_t id) { sampling->add_allowed_token_ids(id); });
}

void read_stopping(const Fields& body, v1::StoppingParams* stopping) {
  if (const Json* stop = body.find("stop"); stop != nullptr && stop->is_string()) {
    stopping->add_stop(stop->get<std::string>());
  } else {
    body.texts("stop", [&](const std::string& text) { stopping->add_stop(text); });
  }
  body.wholes("stop_token_ids", [&](int32_t id) { stopping->add_stop_token_ids(id); });
  if (const auto x = body.whole("min_tokens")) stopping->set_min_tokens(*x);
  if (const auto x = body.flag("ignore_eos")) stopping->set_ignore_eos(*x);
  if (const auto x = body.flag("include_stop_str_in_output")) stopping->set_include_stop(*x);
}

// ---- Chat

// The text of a message: a string, or parts of which only texts are read; several stand on lines of their own.
std::optional<std::string> read_content(const Fields& message) {
  const Json* content = message.find("content");
  if (content == nullptr) return std::nullopt;
  if (content->is_string()) return content->get<std::string>();
  if (!content->is_array()) {
    message.expect("content", "a text or a list of parts", *content);
    return std::nullopt;
  }
  std::optional<std::string> joined;
  message.objects("content", [&](const Fields& part) {
    const std::string type = part.text("type").value_or("");
    if (type != "text") return part.refuse("type", cat("must be \"text\", found ", brief_json(type)));
    const std::optional<std::string> text = part.text("text");
    if (!text.has_value()) return part.refuse("text", "is missing");
    joined = joined.has_value() ? cat(*joined, "\n", *text) : *text;
  });
  return joined.value_or("");
}

void read_tool_call(const Fields& call, v1::ChatMessage* message) {
  if (call.object("function") == nullptr) return call.refuse("function", "is missing");
  const Fields function = call.inside("function");
  const std::optional<std::string> name = function.text("name");
  if (!name.has_value()) return function.refuse("name", "is missing");
  const std::string arguments = function.text("arguments").value_or("");
  v1::ToolCall* to = message->add_tool_calls();
  to->set_name(*name);
  to->set_arguments_json(arguments.empty() ? "{}" : arguments);  // as clients say that there are none
}

void read_message(const Fields& from, v1::ChatMessage* message) {
  const std::string role = from.text("role").value_or("");
  if (role.empty()) from.refuse("role", "is missing");
  message->set_role(role == "developer" ? "system" : role);  // OpenAI's newer name for it
  if (const auto content = read_content(from)) message->set_content(*content);
  from.objects("tool_calls", [&](const Fields& call) { read_tool_call(call, message); });
}

// Whether the answer may be tool calls.
bool read_tools(const Fields& body, const Json* tools, v1::ChatPrompt* chat) {
  const Json* choice = body.find("tool_choice");
  const bool none = choice != nullptr && *choice == "none";
  if (choice != nullptr && !none && *choice != "auto") {
    body.refuse("tool_choice", cat("must be \"auto\" or \"none\": ", kNoConstraints));
  }
  body.objects("tools", [&](const Fields& tool) {
    const std::string type = tool.text("type").value_or("");
    if (type != "function") return tool.refuse("type", cat("must be \"function\", found ", brief_json(type)));
    if (tool.object("function") == nullptr) return tool.refuse("function", "is missing");
  });
  if (tools == nullptr || !tools->is_array() || none) return false;
  for (const Json& tool : *tools) {
    chat->add_tools_json(compact_json(tool));
  }
  return chat->tools_json_size() > 0;
}

void read_chat(const Fields& body, OpenAiRequest* to) {
  v1::GenerateRequest* request = &to->prompts[0];
  v1::ChatPrompt* chat = request->mutable_chat();
  if (body.find("messages") == nullptr) body.refuse("messages", "is missing");
  body.objects("messages", [&](const Fields& message) { read_message(message, chat->add_messages()); });
  to->tools = read_tools(body, body.find("tools"), chat);
  const bool logprobs = body.flag("logprobs").value_or(false);
  const int32_t top = body.whole("top_logprobs").value_or(0);
  if (logprobs) request->set_logprobs(top);
  if (!logprobs && top != 0) body.refuse("top_logprobs", "needs logprobs to be true");
}

// ---- Completions

void read_token_ids(const Json& ids, v1::GenerateRequest* request) {
  v1::TokenIds* to = request->mutable_token_ids();
  for (const Json& id : ids) to->add_ids(static_cast<int32_t>(*whole_number_in(id)));
}

// A prompt is a text or a list of token ids. False when it is neither.
bool read_prompt(const Json& prompt, v1::GenerateRequest* request) {
  if (prompt.is_string()) {
    request->set_prompt(prompt.get<std::string>());
    return true;
  }
  if (!prompt.is_array() || !std::all_of(prompt.begin(), prompt.end(), Fields::is_int32)) return false;
  read_token_ids(prompt, request);
  return true;
}

// prompts[0] is what all of them have in common.
void read_prompts(const Fields& body, OpenAiRequest* to) {
  const Json* prompt = body.find("prompt");
  if (prompt == nullptr) return body.refuse("prompt", "is missing");
  if (prompt->empty()) return body.refuse("prompt", "must not be empty");
  if (read_prompt(*prompt, &to->prompts[0])) return;
  if (!prompt->is_array()) return body.expect("prompt", "a text, a list of token ids, or a list of those", *prompt);
  if (prompt->size() > kMaxOpenAiPrompts) {
    return body.refuse("prompt", cat("must be at most ", kMaxOpenAiPrompts, " prompts, found ", prompt->size()));
  }
  to->prompts.resize(prompt->size(), to->prompts[0]);
  for (size_t i = 0; i < prompt->size(); ++i) {
    if (read_prompt((*prompt)[i], &to->prompts[i])) continue;
    return body.expect(cat("prompt[", i, "]"), "a text or a list of token ids", (*prompt)[i]);
  }
}

void read_completion(const Fields& body, OpenAiRequest* to) {
  v1::GenerateRequest* request = &to->prompts[0];
  const bool echo = body.flag("echo").value_or(false);
  if (echo) request->set_echo(true);
  if (const auto logprobs = body.whole("logprobs")) {
    request->set_logprobs(*logprobs);
    if (echo) request->set_prompt_logprobs(*logprobs);
  }
  const int32_t n = request->sampling().has_n() ? request->sampling().n() : 1;
  if (const auto best_of = body.whole("best_of"); best_of.value_or(n) != n) {
    body.refuse("best_of", cat("must be absent or n, ", n, ": every output is given, none is chosen"));
  }
  read_prompts(body, to);
}

std::string openai_name(std::string_view field, OpenAiEndpoint endpoint, std::string_view prompt_name) {
  if (field == "logprobs" || field == "prompt_logprobs") {
    return endpoint == OpenAiEndpoint::kChatCompletions ? "top_logprobs" : "logprobs";
  }
  if (consume_prefix(field, "token_ids.ids") || consume_prefix(field, "prompt")) return cat(prompt_name, field);
  for (const std::string_view group : {"sampling.", "stopping.", "chat."}) {
    if (consume_prefix(field, group)) break;
  }
  return std::string(field);
}

absl::Status check_model(const Fields& body, const ServedModel& model) {
  const std::optional<std::string> name = body.text("model");
  if (!name.has_value() || *name == model.name) return absl::OkStatus();
  return absl::NotFoundError(
      cat("model ", brief_json(*name), " is not here: this is ", brief_json(model.name), " (or leave the field out)"));
}

}  // namespace

absl::StatusOr<OpenAiRequest> read_openai_request(OpenAiEndpoint endpoint, const Json& json,
                                                  const SamplingDefaults& defaults, const ServedModel& model) {
  if (!json.is_object()) return bad_request({{"body", cat("must be an object, found ", brief_json(json))}});
  std::vector<FieldViolation> violations;
  const Fields body(json, "", &violations);
  if (absl::Status status = check_model(body, model); !status.ok()) return status;
  refuse_unsupported(endpoint, body);

  const bool chat = endpoint == OpenAiEndpoint::kChatCompletions;
  OpenAiRequest to{.prompts = std::vector<v1::GenerateRequest>(1)};
  v1::StoppingParams* stopping = to.prompts[0].mutable_stopping();
  read_sampling(body, defaults, to.prompts[0].mutable_sampling());
  read_stopping(body, stopping);
  std::optional<int32_t> max_tokens = chat ? body.whole("max_completion_tokens") : std::nullopt;
  if (!max_tokens.has_value()) max_tokens = body.whole("max_tokens");
  if (!max_tokens.has_value()) max_tokens = defaults.max_tokens;
  if (!max_tokens.has_value() && !chat) max_tokens = kCompletionTokens;
  if (max_tokens.has_value()) stopping->set_max_tokens(*max_tokens);
  if (chat) {
    read_chat(body, &to);
  } else {
    read_completion(body, &to);
  }
  if (!violations.empty()) return bad_request(violations);
  return to;
}

absl::Status in_openai_names(const absl::Status& status, OpenAiEndpoint endpoint, size_t prompt, size_t prompts) {
  const std::string prompt_name = prompts > 1 ? cat("prompt[", prompt, "]") : "prompt";
  std::vector<FieldViolation> renamed;
  for (const FieldViolation& violation : violations_of(status)) {
    const std::string name = openai_name(violation.field, endpoint, prompt_name);
    // One logprobs of a completion is two of a GenerateRequest.
    const bool known = std::ranges::find(renamed, name, &FieldViolation::field) != renamed.end();
    if (!known) renamed.push_back({name, violation.description});
  }
  return renamed.empty() ? status : bad_request(renamed);
}

}  // namespace octet
