// octet generate: asks a server and streams the answer to stdout. The reference client: whatever it can do, any gRPC
// client can. Invariant: when it ends early (Ctrl-C, --timeout, a broken pipe) the server is told to stop too.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "launch/connection.h"

namespace CLI {
class App;
}

namespace octet {

struct GenerateOptions : ConnectionOptions {
  std::string request_id;
  std::optional<int32_t> priority;
  std::string cache_salt;
  std::optional<double> timeout_seconds;  // for the whole answer

  // Exactly one input.
  std::optional<std::string> prompt;
  bool chat = false;
  std::optional<std::string> message;  // with chat
  std::optional<std::string> system;   // with chat
  std::vector<int32_t> token_ids;

  // Absent: the server's defaults, which are the model's.
  std::optional<int32_t> max_tokens, min_tokens, top_k, logprobs, prompt_logprobs, n;
  std::optional<float> temperature, top_p, min_p, presence_penalty, frequency_penalty, repetition_penalty;
  std::optional<uint64_t> seed;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_token_ids;
  std::vector<std::string> logit_bias;  // "ID:BIAS"
  std::vector<int32_t> allowed_token_ids;
  std::vector<std::string> bad_words;
  bool ignore_eos = false;
  bool include_stop = false;
  bool echo = false;
  bool parse_special = false;

  bool json = false;
};

// Adds the sub-command; parsing fills *options, which outlives the app.
CLI::App* add_generate_command(CLI::App& app, GenerateOptions* options);

// Returns the exit code: 0, 1 after a sentence on stderr, 130 after Ctrl-C (143 after SIGTERM). Not for two threads at
// once.
int run_generate(const GenerateOptions& options);

}  // namespace octet
