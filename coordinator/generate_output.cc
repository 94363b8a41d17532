#include "coordinator/generate_output.h"

#include <string>
#include <utility>

#include "kernels/check.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {

GenerateOutput::GenerateOutput(const AcceptedRequest& accepted, const Tokenizer& tokenizer)
    : prompt_(accepted.request.prompt),
      prompt_tokens_(static_cast<int32_t>(prompt_.size())),
      seed_(accepted.request.sampling.seed),
      logprobs_(accepted.logprobs),
      stop_(accepted.stop),
      detokenizer_(tokenizer),
      matcher_(accepted.stop, accepted.include_stop) {}

void GenerateOutput::absorb(const TokenEvent& event, v1::GenerateResponse* message) {
  OCTET_CHECK(!ended_, "an event after the end of its output");
  if (event.finish == FinishReason::kError || event.finish == FinishReason::kCancelled) {
    ended_ = true;
    status_ =
        absl::UnavailableError(event.finish == FinishReason::kError ? event.error : "the server is shutting down");
    return;
  }
  if (!prompt_.empty()) {
    message->mutable_prompt_token_ids()->Add(prompt_.begin(), prompt_.end());
    prompt_ = {};
  }
  message->set_output_index(event.output_index);
  if (event.token.has_value()) absorb_token(event, message);
  if (take_stop_match(message) || event.finish == FinishReason::kNone) return;
  finish_text(message);
  if (take_stop_match(message)) return;
  if (event.finish == FinishReason::kEndToken) {
    message->set_stop_token_id(event.token->token);
    end(v1::FINISH_REASON_STOP, message);
  } else {
    end(v1::FINISH_REASON_LENGTH, message);
  }
}

void GenerateOutput::absorb_token(const TokenEvent& event, v1::GenerateResponse* message) {
  ++completion_tokens_;
  v1::TokenInfo* info = message->add_tokens();
  info->set_token_id(event.token->token);
  if (logprobs_) {
    info->set_logprob(event.token->logprob);
    for (const TokenLogprob& other : event.top) {
      v1::TokenLogprob* to = info->add_top();
      to->set_token_id(other.token);
      to->set_logprob(other.logprob);
    }
  }
  // The token that ends an output is no part of its text, special or not.
  if (event.finish == FinishReason::kEndToken) return;
  message->mutable_text()->append(matcher_.push(detokenizer_.push(event.token->token)));
}

void GenerateOutput::finish_text(v1::GenerateResponse* message) {
  message->mutable_text()->append(matcher_.push(detokenizer_.flush()));
  if (!matcher_.matched().has_value()) message->mutable_text()->append(matcher_.flush());
}

bool GenerateOutput::take_stop_match(v1::GenerateResponse* message) {
  if (!matcher_.matched().has_value()) return false;
  message->set_stop_string(stop_[*matcher_.matched()]);
  end(v1::FINISH_REASON_STOP, message);
  return true;
}

void GenerateOutput::end(int finish_reason, v1::GenerateResponse* message) {
  message->set_finish_reason(static_cast<v1::FinishReason>(finish_reason));
  v1::Usage* usage = message->mutable_usage();
  usage->set_prompt_tokens(prompt_tokens_);
  usage->set_completion_tokens(completion_tokens_);
  usage->set_seed(seed_);
  ended_ = true;
}

}  // namespace octet
