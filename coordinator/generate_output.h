// GenerateOutput: one output's token events become response messages: whole characters, nothing of a stop string, token
// infos, and exactly one end. Invariant: after ended() nothing is added to any message. One thread at a time.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/generate_request.h"
#include "coordinator/request.h"
#include "coordinator/text/detokenizer.h"

namespace octet::v1 {
class GenerateResponse;
}

namespace octet {

class GenerateOutput {
 public:
  // `accepted` is read once.
  GenerateOutput(const AcceptedRequest& accepted, const Tokenizer& tokenizer);

  // Adds what the event says to *message, which may hold what earlier events said. REQUIRES: !ended().
  void absorb(const TokenEvent& event, v1::GenerateResponse* message);

  bool ended() const { return ended_; }
  // Of the ended output: OK, or what the stream ends with (UNAVAILABLE).
  const absl::Status& status() const { return status_; }

 private:
  void absorb_token(const TokenEvent& event, v1::GenerateResponse* message);
  void finish_text(v1::GenerateResponse* message);
  void end(int finish_reason, v1::GenerateResponse* message);
  bool take_stop_match(v1::GenerateResponse* message);

  std::vector<int32_t> prompt_;  // until the first message has it
  int32_t prompt_tokens_;
  uint64_t seed_;
  bool logprobs_;
  std::vector<std::string> stop_;
  Detokenizer detokenizer_;
  StopMatcher matcher_;
  int32_t completion_tokens_ = 0;
  bool ended_ = false;
  absl::Status status_;
};

}  // namespace octet
