#include "launch/generate.h"

#include <grpcpp/grpcpp.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <functional>
#include <memory>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "coordinator/text/utf8.h"
#include "launch/generate_print.h"
#include "launch/interrupt.h"
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

void add_adjustments(const GenerateOptions& options, v1::SamplingParams* sampling) {
  if (options.presence_penalty.has_value()) sampling->set_presence_penalty(*options.presence_penalty);
  if (options.frequency_penalty.has_value()) sampling->set_frequency_penalty(*options.frequency_penalty);
  if (options.repetition_penalty.has_value()) sampling->set_repetition_penalty(*options.repetition_penalty);
  if (options.n.has_value()) sampling->set_n(*options.n);
  for (int32_t id : options.allowed_token_ids) sampling->add_allowed_token_ids(id);
  for (const std::string& word : options.bad_words) sampling->add_bad_words(to_valid_utf8(word));
}

absl::Status add_biases(const GenerateOptions& options, v1::SamplingParams* sampling) {
  for (const std::string& text : options.logit_bias) {
    const std::vector<std::string> parts = absl::StrSplit(text, absl::MaxSplits(':', 1));
    int32_t id = 0;
    float bias = 0;
    if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &id) || !absl::SimpleAtof(parts[1], &bias)) {
      return absl::InvalidArgumentError(absl::StrCat("--logit-bias takes ID:BIAS, as in 42:-100; found ", text));
    }
    (*sampling->mutable_logit_bias())[id] = bias;
  }
  return absl::OkStatus();
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
  add_adjustments(options, sampling);
  if (absl::Status status = add_biases(options, sampling); !status.ok()) return status;
  v1::StoppingParams* stopping = request.mutable_stopping();
  if (options.max_tokens.has_value()) stopping->set_max_tokens(*options.max_tokens);
  if (options.min_tokens.has_value()) stopping->set_min_tokens(*options.min_tokens);
  stopping->set_include_stop(options.include_stop);
  for (const std::string& stop : options.stop) stopping->add_stop(to_valid_utf8(stop));
  for (int32_t id : options.stop_token_ids) stopping->add_stop_token_ids(id);
  stopping->set_ignore_eos(options.ignore_eos);
  request.set_parse_special(options.parse_special);
  request.set_echo(options.echo);
  if (options.prompt_logprobs.has_value()) request.set_prompt_logprobs(*options.prompt_logprobs);
  if (!options.request_id.empty()) request.set_request_id(options.request_id);
  if (options.priority.has_value()) request.set_priority(*options.priority);
  if (!options.cache_salt.empty()) request.set_cache_salt(to_valid_utf8(options.cache_salt));
  if (options.logprobs.has_value()) {
    request.set_logprobs(*options.logprobs);
  } else if (options.json) {
    request.set_logprobs(0);
  }
  return request;
}

absl::Status ask(const GenerateOptions& options, Connection& server) {
  absl::StatusOr<v1::GenerateRequest> request = make_request(options);
  if (!request.ok()) return request.status();
  if (absl::Status status = server.open(); !status.ok()) return status;
  const std::unique_ptr<AnswerPrinter> printer =
      options.json ? make_json_printer() : make_text_printer(options.n.value_or(1) > 1);
  absl::Status status =
      generate(server, options, *request, [&](const v1::GenerateResponse& response) { printer->take(response); });
  printer->end(status.ok());
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
  command->add_option("--request-id", options->request_id, "Name of this request in the server's log, and for Abort");
  command->add_option("--priority", options->priority, "0, the most urgent, to 9");
  command->add_option("--cache-salt", options->cache_salt,
                      "Share cached prefixes only with requests that say the same");
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
  command->add_option("--presence-penalty", options->presence_penalty, "-2 to 2, for tokens that the answer has")
      ->group(sampling);
  command->add_option("--frequency-penalty", options->frequency_penalty, "-2 to 2, for each time that it has them")
      ->group(sampling);
  command
      ->add_option("--repetition-penalty", options->repetition_penalty,
                   "Above 0, for tokens that prompt or answer have; 1 is off")
      ->group(sampling);
  command->add_option("--logit-bias", options->logit_bias, "ID:BIAS; may be given several times")
      ->allow_extra_args(false)
      ->group(sampling);
  command->add_option("--allowed-token-ids", options->allowed_token_ids, "Choose among these only: 1,2,3")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->group(sampling);
  command->add_option("--bad-word", options->bad_words, "Never say this; may be given several times")
      ->allow_extra_args(false)
      ->group(sampling);
  command->add_option("--n", options->n, "Outputs [1]")->group(sampling);
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
  command->add_option("--min-tokens", options->min_tokens, "Do not end before so many")->group(ending);
  command->add_flag("--include-stop", options->include_stop, "Show what was stopped at")->group(ending);
  command->add_flag("--ignore-eos", options->ignore_eos, "Go on after the end-of-sequence token")->group(ending);

  command->add_option("--logprobs", options->logprobs, "With --json: this many alternatives for each token")
      ->group("Output");
  command
      ->add_option("--prompt-logprobs", options->prompt_logprobs,
                   "With --json: logprobs of the prompt's tokens, and this many alternatives")
      ->group("Output");
  command->add_flag("--echo", options->echo, "Begin with the prompt")->group("Output");
  command
      ->add_flag("--json", options->json,
                 "Print one JSON object on one line for each output: token ids, logprobs, text, usage")
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
