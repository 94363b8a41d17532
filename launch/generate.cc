#include "launch/generate.h"

#include <grpcpp/grpcpp.h>
#include <signal.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "coordinator/text/utf8.h"
#include "launch/interrupt.h"
#include "nlohmann/json.hpp"
#include "octet/v1/inference_service.grpc.pb.h"

namespace octet {
namespace {

absl::Status generate(Connection& server, const GenerateOptions& options, const v1::GenerateRequest& request,
                      const std::function<void(const v1::GenerateResponse&)>& take) {
  auto stub = v1::InferenceService::NewStub(server.channel());
  const grpc::Status status = server.with_context(server.make_context(), [&](grpc::ClientContext* context) {
    if (options.timeout_seconds.has_value()) {
      context->set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(*options.timeout_seconds)));
    }
    auto reader = stub->Generate(context, request);
    for (v1::GenerateResponse response; reader->Read(&response);) take(response);
    return reader->Finish();
  });
  if (status.ok()) return absl::OkStatus();
  std::string message = status.error_message();
  if (status.error_code() == grpc::StatusCode::UNAUTHENTICATED) message += ": give it with --token-file FILE";
  if (status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED) message += " (--timeout)";
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), message);
}

absl::StatusOr<v1::GenerateRequest> make_request(const GenerateOptions& options) {
  const int inputs = options.prompt.has_value() + options.chat + !options.token_ids.empty();
  if (inputs != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("give one of --prompt TEXT, --chat MESSAGE and --token-ids 1,2,3; found ", inputs, " of them"));
  }
  if (options.chat != options.message.has_value()) {
    return absl::InvalidArgumentError(options.chat
                                          ? "--chat needs a MESSAGE: octet generate --chat \"Hello\""
                                          : "a MESSAGE goes with --chat; plain text is given as --prompt TEXT");
  }
  if (options.system.has_value() && !options.chat) return absl::InvalidArgumentError("--system goes with --chat");

  v1::GenerateRequest request;
  // protobuf strings must be UTF-8, command lines need not be.
  if (options.prompt.has_value()) request.set_prompt(to_valid_utf8(*options.prompt));
  for (int32_t id : options.token_ids) request.mutable_token_ids()->add_ids(id);
  const auto add_turn = [&](const char* role, const std::optional<std::string>& content) {
    if (!content.has_value()) return;
    v1::ChatMessage* message = request.mutable_chat()->add_messages();
    message->set_role(role);
    message->set_content(to_valid_utf8(*content));
  };
  add_turn("system", options.system);
  add_turn("user", options.message);

  v1::SamplingParams* sampling = request.mutable_sampling();
  if (options.temperature.has_value()) sampling->set_temperature(*options.temperature);
  if (options.top_p.has_value()) sampling->set_top_p(*options.top_p);
  if (options.top_k.has_value()) sampling->set_top_k(*options.top_k);
  if (options.min_p.has_value()) sampling->set_min_p(*options.min_p);
  if (options.seed.has_value()) sampling->set_seed(*options.seed);
  v1::StoppingParams* stopping = request.mutable_stopping();
  if (options.max_tokens.has_value()) stopping->set_max_tokens(*options.max_tokens);
  for (const std::string& stop : options.stop) stopping->add_stop(to_valid_utf8(stop));
  for (int32_t id : options.stop_token_ids) stopping->add_stop_token_ids(id);
  stopping->set_ignore_eos(options.ignore_eos);
  request.set_parse_special(options.parse_special);
  if (options.logprobs.has_value()) {
    request.set_logprobs(*options.logprobs);
  } else if (options.json) {
    request.set_logprobs(0);
  }
  return request;
}

// Text as it comes.
class TextOutput {
 public:
  void take(const v1::GenerateResponse& response) {
    if (response.text().empty()) return;
    std::fwrite(response.text().data(), 1, response.text().size(), stdout);
    std::fflush(stdout);
    last_ = response.text().back();
  }
  void end() {
    if (last_ != '\n' && last_ != '\0') std::fputc('\n', stdout);
    std::fflush(stdout);
  }

 private:
  char last_ = '\0';
};

// One object on one line when all has come. Numbers are written here: nine digits give a float32 back exactly, and JSON
// has no infinities.
class JsonOutput {
 public:
  void take(const v1::GenerateResponse& response) {
    all_.MergeFrom(response);  // strings: the last one; lists: all
    text_ += response.text();
  }
  void end() const { std::printf("%s\n", line().c_str()); }

 private:
  static std::string number(float value) { return std::isfinite(value) ? absl::StrFormat("%.9g", value) : "null"; }

  template <typename List, typename Write>
  static std::string list(const List& items, Write write) {
    std::string text = "[";
    for (const auto& item : items) absl::StrAppend(&text, text.size() == 1 ? "" : ", ", write(item));
    return text + "]";
  }

  static std::string top(const v1::TokenInfo& token) {
    return list(token.top(), [](const v1::TokenLogprob& other) {
      return absl::StrCat("{\"token_id\": ", other.token_id(), ", \"logprob\": ", number(other.logprob()), "}");
    });
  }

  std::string line() const {
    const auto id = [](int32_t id) { return absl::StrCat(id); };
    const bool has_top = !all_.tokens().empty() && !all_.tokens(0).top().empty();
    std::string line = absl::StrCat(
        "{\"prompt_token_ids\": ", list(all_.prompt_token_ids(), id), ", \"token_ids\": ",
        list(all_.tokens(), [](const v1::TokenInfo& token) { return absl::StrCat(token.token_id()); }),
        ", \"logprobs\": ", list(all_.tokens(), [](const v1::TokenInfo& token) { return number(token.logprob()); }));
    if (has_top) absl::StrAppend(&line, ", \"top_logprobs\": ", list(all_.tokens(), top));
    absl::StrAppend(&line, ", \"text\": ", quoted(text_), ", \"finish_reason\": ", quoted(finish_reason()));
    if (all_.has_stop_token_id()) absl::StrAppend(&line, ", \"stop_token_id\": ", all_.stop_token_id());
    if (all_.has_stop_string()) absl::StrAppend(&line, ", \"stop_string\": ", quoted(all_.stop_string()));
    absl::StrAppend(&line, ", \"usage\": {\"prompt_tokens\": ", all_.usage().prompt_tokens(),
                    ", \"completion_tokens\": ", all_.usage().completion_tokens(), ", \"seed\": ", all_.usage().seed(),
                    "}}");
    return line;
  }

  static std::string quoted(const std::string& text) { return nlohmann::json(text).dump(); }

  std::string finish_reason() const {
    switch (all_.finish_reason()) {
      case v1::FINISH_REASON_STOP:
        return "stop";
      case v1::FINISH_REASON_LENGTH:
        return "length";
      case v1::FINISH_REASON_CANCELLED:
        return "cancelled";
      default:
        return "";
    }
  }

  v1::GenerateResponse all_;
  std::string text_;
};

absl::Status ask(const GenerateOptions& options, Connection& server) {
  absl::StatusOr<v1::GenerateRequest> request = make_request(options);
  if (!request.ok()) return request.status();
  if (absl::Status status = server.open(); !status.ok()) return status;
  if (options.json) {
    JsonOutput output;
    absl::Status status =
        generate(server, options, *request, [&](const v1::GenerateResponse& response) { output.take(response); });
    if (status.ok()) output.end();
    return status;
  }
  TextOutput output;
  absl::Status status =
      generate(server, options, *request, [&](const v1::GenerateResponse& response) { output.take(response); });
  output.end();
  return status;
}

}  // namespace

CLI::App* add_generate_command(CLI::App& app, GenerateOptions* options) {
  CLI::App* command = app.add_subcommand("generate", "Ask a server and stream its answer to stdout");
  command->footer(
      "Examples:\n"
      "  octet generate --chat \"What is the capital of France?\"\n"
      "  octet generate --prompt \"Once upon a time\" --max-tokens 50 --temperature 0\n"
      "  octet generate --address-file /tmp/octet.json --wait 600 --json --chat --system \"Be brief.\" Hello\n"
      "Ctrl-C stops the server's work on the answer too. Exit codes: 0, 1 after an error, 130 after Ctrl-C.");
  add_connection_options(*command, options);
  command->add_option("--timeout", options->timeout_seconds, "Give up on the answer after this many seconds")
      ->check(CLI::PositiveNumber);

  command->add_option("--prompt", options->prompt, "Text to go on with, as it is")->group("Input (one of)");
  command->add_flag("--chat", options->chat, "Ask MESSAGE in the model's chat format")->group("Input (one of)");
  command->add_option("--token-ids", options->token_ids, "Token ids to go on with: 1,2,3")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->group("Input (one of)");
  command->add_option("MESSAGE", options->message, "With --chat: what the user says");
  command->add_option("--system", options->system, "With --chat: what the system says first");
  command->add_flag("--parse-special", options->parse_special, "Names of special tokens in --prompt mean those tokens");

  const char* sampling = "Sampling (default: the model's own)";
  command->add_option("--temperature", options->temperature, "0 is greedy")->group(sampling);
  command->add_option("--top-p", options->top_p, "In (0, 1]; 1 is off")->group(sampling);
  command->add_option("--top-k", options->top_k, "0 is off")->group(sampling);
  command->add_option("--min-p", options->min_p, "In [0, 1]; 0 is off")->group(sampling);
  command->add_option("--seed", options->seed, "The same seed, the same answer; default: a random one")
      ->group(sampling);

  const char* ending = "Where to stop";
  command->add_option("--max-tokens", options->max_tokens, "Default: the rest of the context")->group(ending);
  // One value each time, so that a MESSAGE after it is a message.
  command->add_option("--stop", options->stop, "Stop before this text; may be given several times")
      ->allow_extra_args(false)
      ->group(ending);
  command->add_option("--stop-token-id", options->stop_token_ids, "Stop at this token; may be given several times")
      ->allow_extra_args(false)
      ->group(ending);
  command->add_flag("--ignore-eos", options->ignore_eos, "Go on after the end-of-sequence token")->group(ending);

  command->add_option("--logprobs", options->logprobs, "With --json: this many alternatives for each token")
      ->group("Output");
  command->add_flag("--json", options->json, "Print one JSON object on one line: token ids, logprobs, text, usage")
      ->group("Output");
  return command;
}

int run_generate(const GenerateOptions& options) {
  Connection server(options);
  Interrupt interrupt([&] { server.cancel(); });
  const absl::Status status = ask(options, server);
  if (interrupt.signal() != 0) return 128 + interrupt.signal();
  if (status.ok()) return 0;
  std::fprintf(stderr, "octet generate: %s\n", std::string(status.message()).c_str());
  return 1;
}

}  // namespace octet
