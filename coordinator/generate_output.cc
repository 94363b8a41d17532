#include "coordinator/generate_output.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {

struct GenerateOutputs::Output {
  Output(const AcceptedRequest& accepted, const Tokenizer& tokenizer)
      : detokenizer(tokenizer), matcher(accepted.stop, accepted.include_stop) {}

  Detokenizer detokenizer;
  StopMatcher matcher;
  bool began = false;
  bool ended = false;
  std::deque<v1::GenerateResponse> messages;  // that wait
};

namespace {

// Tokens of one message, so that no client's limit is met: a few hundred KiB with all their alternatives.
constexpr int kMaxMessageTokens = 1024;

void add_info(const TokenLogprob& chosen, const std::vector<TokenLogprob>& top, v1::TokenInfo* info) {
  info->set_token_id(chosen.token);
  info->set_logprob(chosen.logprob);
  for (const TokenLogprob& other : top) {
    v1::TokenLogprob* to = info->add_top();
    to->set_token_id(other.token);
    to->set_logprob(other.logprob);
  }
}

// What a request that did not come to its end is answered with.
absl::Status status_of(const TokenEvent& event) {
  switch (event.finish) {
    case FinishReason::kError:
      return absl::UnavailableError(event.error);
    case FinishReason::kCancelled:
      return absl::UnavailableError("the server is shutting down");
    case FinishReason::kDeadline:
      return absl::DeadlineExceededError(absl::StrCat("the call's deadline passed after ", event.completion_tokens,
                                                      " tokens: allow more time or ask for fewer tokens"));
    default:
      return absl::OkStatus();
  }
}

}  // namespace

GenerateOutputs::GenerateOutputs(const AcceptedRequest& accepted, const Tokenizer& tokenizer)
    : prompt_(accepted.request.prompt),
      first_prompt_token_(prompt_.front()),
      prompt_tokens_(static_cast<int32_t>(prompt_.size())),
      seed_(accepted.request.sampling.seed),
      logprobs_(accepted.logprobs),
      include_stop_(accepted.include_stop),
      prompt_logprobs_(accepted.request.prompt_logprobs.has_value()),
      stop_(accepted.stop),
      echo_(accepted.echo),
      outputs_left_(static_cast<size_t>(accepted.request.outputs)) {
  for (int32_t i = 0; i < accepted.request.outputs; ++i) {
    outputs_.push_back(std::make_unique<Output>(accepted, tokenizer));
  }
}

GenerateOutputs::~GenerateOutputs() = default;

bool GenerateOutputs::absorb(const TokenEvent& event) {
  OCTET_CHECK(event.output_index < outputs_.size(), "an event of an output that nobody asked for");
  Output* output = outputs_[event.output_index].get();
  if (output->ended || !status_.ok()) return false;
  if (status_ = status_of(event); !status_.ok()) return false;
  v1::GenerateResponse* message = message_of(output);
  if (!event.prompt_logprobs.empty()) add_prompt_logprobs(event, message);
  if (event.token.has_value()) add_token(event, output, message);
  if (event.finish == FinishReason::kNone) return take_stop_match(output, message);

  cached_tokens_ = std::max(cached_tokens_, event.cached_tokens);
  if (!take_stop_match(output, message)) finish_text(output, message);
  if (!output->ended && !take_stop_match(output, message)) {
    if (event.finish == FinishReason::kEndToken) message->set_stop_token_id(event.token->token);
    end(event.finish == FinishReason::kEndToken ? v1::FINISH_REASON_STOP : v1::FINISH_REASON_LENGTH, output, message);
  }
  return false;
}

v1::GenerateResponse* GenerateOutputs::message_of(Output* output) {
  std::deque<v1::GenerateResponse>& messages = output->messages;
  if (messages.empty() || messages.back().tokens_size() + messages.back().prompt_tokens_size() >= kMaxMessageTokens) {
    messages.emplace_back();
    const auto own = std::ranges::find(outputs_, output, &std::unique_ptr<Output>::get);
    messages.back().set_output_index(static_cast<uint32_t>(own - outputs_.begin()));
    waiting_.push_back(output);
  }
  v1::GenerateResponse* message = &messages.back();
  if (!prompt_.empty()) {
    message->mutable_prompt_token_ids()->Add(prompt_.begin(), prompt_.end());
    prompt_ = {};
  }
  if (!std::exchange(output->began, true) && echo_.has_value()) message->set_text(*echo_);
  return message;
}

// The prompt's first token follows nothing and has no logprob.
void GenerateOutputs::begin_prompt_logprobs(v1::GenerateResponse* message) {
  if (std::exchange(prompt_logprobs_began_, true)) return;
  message->add_prompt_tokens()->set_token_id(first_prompt_token_);
  ++unread_tokens_;
}

void GenerateOutputs::add_prompt_logprobs(const TokenEvent& event, v1::GenerateResponse* message) {
  begin_prompt_logprobs(message);
  for (const SampledToken& token : event.prompt_logprobs)
    add_info(token.chosen, token.top, message->add_prompt_tokens());
  unread_tokens_ += static_cast<int64_t>(event.prompt_logprobs.size());
}

void GenerateOutputs::add_token(const TokenEvent& event, Output* output, v1::GenerateResponse* message) {
  ++completion_tokens_;
  ++unread_tokens_;
  if (prompt_logprobs_) begin_prompt_logprobs(message);  // a prompt of one token has nothing to score, but is told
  v1::TokenInfo* info = message->add_tokens();
  if (logprobs_) {
    add_info(*event.token, event.top, info);
  } else {
    info->set_token_id(event.token->token);
  }
  // The token that ends an output is no part of its text, special or not, unless it is asked for.
  if (event.finish == FinishReason::kEndToken && !include_stop_) return;
  message->mutable_text()->append(output->matcher.push(output->detokenizer.push(event.token->token)));
}

void GenerateOutputs::finish_text(Output* output, v1::GenerateResponse* message) {
  message->mutable_text()->append(output->matcher.push(output->detokenizer.flush()));
  if (!output->matcher.matched().has_value()) message->mutable_text()->append(output->matcher.flush());
}

bool GenerateOutputs::take_stop_match(Output* output, v1::GenerateResponse* message) {
  if (!output->matcher.matched().has_value()) return false;
  message->set_stop_string(stop_[static_cast<size_t>(*output->matcher.matched())]);
  end(v1::FINISH_REASON_STOP, output, message);
  return true;
}

void GenerateOutputs::end(int finish_reason, Output* output, v1::GenerateResponse* message) {
  message->set_finish_reason(static_cast<v1::FinishReason>(finish_reason));
  output->ended = true;
  --outputs_left_;
}

bool GenerateOutputs::take(v1::GenerateResponse* message) {
  if (waiting_.empty()) return false;
  Output* output = waiting_.front();
  waiting_.pop_front();
  message->Swap(&output->messages.front());
  output->messages.pop_front();
  unread_tokens_ -= message->tokens_size() + message->prompt_tokens_size();
  if (outputs_left_ == 0 && waiting_.empty()) {
    v1::Usage* usage = message->mutable_usage();
    usage->set_prompt_tokens(prompt_tokens_);
    usage->set_cached_tokens(cached_tokens_);
    usage->set_completion_tokens(completion_tokens_);
    usage->set_seed(seed_);
  }
  return true;
}

}  // namespace octet
