// GenerateOutputs: a request's token events become response messages: whole characters, nothing of a stop string, token
// infos, and exactly one end for each output. What a client has not read yet grows into few large messages.
// Invariant: after an output's terminal message nothing more comes of it. One thread at a time.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/generate_request.h"
#include "coordinator/request.h"
#include "coordinator/text/detokenizer.h"

namespace octet::v1 {
class GenerateResponse;
}

namespace octet {

class GenerateOutputs {
 public:
  // `accepted` is read once.
  GenerateOutputs(const AcceptedRequest& accepted, const Tokenizer& tokenizer);
  ~GenerateOutputs();

  // Adds what the event says to the messages that wait. Returns whether the output has ended by it although the engine
  // does not know: at a stop string. Events of an ended output say nothing any more.
  bool absorb(const TokenEvent& event);

  // The next message to send, in *message; false when none waits. The request's last one has its usage.
  bool take(v1::GenerateResponse* message);
  // Tokens in messages that wait.
  int64_t unread_tokens() const { return unread_tokens_; }

  // All outputs have ended: take() may have messages still.
  bool ended() const { return outputs_left_ == 0 || !status_.ok(); }
  // Of the ended request: OK, or what the call ends with instead of its messages.
  const absl::Status& status() const { return status_; }

  int32_t prompt_tokens() const { return prompt_tokens_; }
  int32_t cached_tokens() const { return cached_tokens_; }
  int32_t completion_tokens() const { return completion_tokens_; }

 private:
  struct Output;

  v1::GenerateResponse* message_of(Output* output);
  void begin_prompt_logprobs(v1::GenerateResponse* message);
  void add_prompt_logprobs(const TokenEvent& event, v1::GenerateResponse* message);
  void add_token(const TokenEvent& event, Output* output, v1::GenerateResponse* message);
  bool take_stop_match(Output* output, v1::GenerateResponse* message);
  void finish_text(Output* output, v1::GenerateResponse* message);
  void end(int finish_reason, Output* output, v1::GenerateResponse* message);

  std::vector<int32_t> prompt_;  // until the first message has it
  const int32_t first_prompt_token_;
  const int32_t prompt_tokens_;
  const uint64_t seed_;
  const bool logprobs_, include_stop_, prompt_logprobs_;
  const std::vector<std::string> stop_;
  const std::optional<std::string> echo_;
  std::vector<std::unique_ptr<Output>> outputs_;
  size_t outputs_left_;
  std::deque<Output*> waiting_;  // once for each of their messages, in the order in which these began
  int64_t unread_tokens_ = 0;
  bool prompt_logprobs_began_ = false;
  int32_t cached_tokens_ = 0;
  int32_t completion_tokens_ = 0;
  absl::Status status_;
};

}  // namespace octet
