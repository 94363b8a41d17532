// Scheduler: first come, first served, in chunks. Invariant between calls: each slot is free, running or finished; each
// block is in the pool, in a running sequence or in a finished one.
#include "coordinator/scheduler.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace octet {
namespace {

// REQUIRES: the prompt leaves room for a token.
int32_t max_tokens_of(const Request& request, const WorkerLimits& limits) {
  const int32_t rest_of_context = limits.max_context - static_cast<int32_t>(request.prompt.size());
  return std::min(request.max_tokens.value_or(rest_of_context), rest_of_context);
}

// The last token of an output is never run, so it needs no room in the cache.
int32_t blocks_needed(const Request& request, const WorkerLimits& limits) {
  const int64_t positions = static_cast<int64_t>(request.prompt.size()) + max_tokens_of(request, limits) - 1;
  return static_cast<int32_t>((positions + limits.block_tokens - 1) / limits.block_tokens);
}

absl::Status validate_tokens(const std::vector<int32_t>& tokens, const char* what, int32_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab_size) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(what, " ", i, " is ", tokens[i], ", but the model's token ids are 0 to ", vocab_size - 1));
  }
  return absl::OkStatus();
}

absl::Status validate_sampling(const SlotSampling& sampling, const WorkerLimits& limits) {
  // Written so that NaN is refused too.
  if (!(sampling.temperature >= 0.0f) || !std::isfinite(sampling.temperature)) {
    return absl::InvalidArgumentError(
        absl::StrCat("temperature is ", sampling.temperature, ": give 0 (greedy) or a positive number"));
  }
  if (sampling.top_k < 0) {
    return absl::InvalidArgumentError(absl::StrCat("top_k is ", sampling.top_k, ": give 0 (off) or a positive number"));
  }
  if (!(sampling.top_p > 0.0f && sampling.top_p <= 1.0f)) {
    return absl::InvalidArgumentError(
        absl::StrCat("top_p is ", sampling.top_p, ": give a number above 0 and up to 1 (off)"));
  }
  if (!(sampling.min_p >= 0.0f && sampling.min_p <= 1.0f)) {
    return absl::InvalidArgumentError(absl::StrCat("min_p is ", sampling.min_p, ": give a number from 0 (off) to 1"));
  }
  const int32_t most = std::min(kMaxTopLogprobs, limits.vocab_size);
  if (sampling.top_logprobs < 0 || sampling.top_logprobs > most) {
    return absl::InvalidArgumentError(
        absl::StrCat(sampling.top_logprobs, " alternatives were asked for each token: give a number from 0 to ", most));
  }
  return absl::OkStatus();
}

absl::Status validate_lengths(const Request& request, const WorkerLimits& limits) {
  if (request.max_tokens.has_value() && *request.max_tokens < 1) {
    return absl::InvalidArgumentError(absl::StrCat("max_tokens is ", *request.max_tokens,
                                                   ": give at least 1, or leave it out for the rest of the context"));
  }
  if (request.sampling.min_tokens < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("min_tokens is ", request.sampling.min_tokens, ": give 0 or a positive number"));
  }
  if (request.max_tokens.has_value() && request.sampling.min_tokens > *request.max_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("min_tokens is ", request.sampling.min_tokens,
                                                   ", more than max_tokens, which is ", *request.max_tokens,
                                                   ": lower the one or raise the other"));
  }
  const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
  if (prompt_tokens >= limits.max_context) {
    return absl::OutOfRangeError(absl::StrCat("the prompt has ", prompt_tokens, " tokens, but the context holds ",
                                              limits.max_context,
                                              " and one must be left for the answer: shorten the prompt to ",
                                              limits.max_context - 1, " tokens or raise --max-context"));
  }
  if (request.sampling.min_tokens > limits.max_context - prompt_tokens) {
    return absl::OutOfRangeError(
        absl::StrCat("min_tokens is ", request.sampling.min_tokens, ", but the context of ", limits.max_context,
                     " tokens has room for ", limits.max_context - prompt_tokens,
                     " after the prompt: lower min_tokens, shorten the prompt or raise --max-context"));
  }
  return absl::OkStatus();
}

absl::Status validate_blocks(const Request& request, const WorkerLimits& limits) {
  const int32_t needed = blocks_needed(request, limits);
  if (needed <= limits.blocks) return absl::OkStatus();
  const int64_t most_tokens =
      static_cast<int64_t>(limits.blocks) * limits.block_tokens + 1 - static_cast<int64_t>(request.prompt.size());
  const std::string remedy = most_tokens < 1                  ? "shorten the prompt"
                             : request.max_tokens.has_value() ? absl::StrCat("lower max_tokens to ", most_tokens)
                                                              : absl::StrCat("give max_tokens, up to ", most_tokens);
  return absl::OutOfRangeError(absl::StrCat(needed, " blocks of ", limits.block_tokens,
                                            " tokens needed for a prompt of ", request.prompt.size(),
                                            " and max_tokens ", max_tokens_of(request, limits), ", ", limits.blocks,
                                            " exist: ", remedy, " or raise --kv-memory"));
}

TokenEvent terminal_event(const Request& request, FinishReason finish, int32_t completion_tokens) {
  TokenEvent event;
  event.request = request.id;
  event.output_index = request.sampling.output_index;
  event.finish = finish;
  event.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  event.completion_tokens = completion_tokens;
  return event;
}

void clear(StepPlan* plan) {
  plan->close.clear();
  plan->open.clear();
  plan->blocks.clear();
  plan->run.clear();
  plan->stop = false;
}

}  // namespace

Scheduler::Scheduler(const WorkerLimits& limits) : limits_(limits), pool_(limits.blocks) {
  OCTET_CHECK(limits.slots > 0 && limits.block_tokens > 0 && limits.max_step_tokens > 0 && limits.vocab_size > 0,
              "a limit of the workers is not positive");
  OCTET_CHECK(limits.max_context >= 2, "a context has room for a prompt token and an answer token");
  slots_.resize(static_cast<size_t>(limits.slots));
  for (int32_t slot = limits.slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

absl::Status Scheduler::validate(const Request& request, const WorkerLimits& limits) {
  if (request.prompt.empty()) {
    return absl::InvalidArgumentError("the prompt is empty: give at least one token");
  }
  // Lengths first: a prompt that is far too long is refused before its tokens are read.
  if (absl::Status status = validate_lengths(request, limits); !status.ok()) return status;
  if (absl::Status status = validate_tokens(request.prompt, "prompt token", limits.vocab_size); !status.ok())
    return status;
  if (absl::Status status = validate_tokens(request.sampling.end_token_ids, "end token", limits.vocab_size); !status.ok()) {
    return status;
  }
  if (absl::Status status = validate_sampling(request.sampling, limits); !status.ok()) return status;
  return validate_blocks(request, limits);
}

void Scheduler::add(Request request) {
  // Sorted, because every sampled token is looked up in it.
  std::sort(request.sampling.end_token_ids.begin(), request.sampling.end_token_ids.end());
  waiting_.push_back(std::move(request));
}

void Scheduler::cancel(RequestId id) {
  const auto queued = std::find_if(waiting_.begin(), waiting_.end(), [id](const Request& r) { return r.id == id; });
  if (queued != waiting_.end()) {
    events_.push_back(terminal_event(*queued, FinishReason::kCancelled, 0));
    waiting_.erase(queued);
    return;
  }
  const auto running = std::find_if(running_.begin(), running_.end(),
                                    [this, id](int32_t slot) { return slots_[slot]->request.id == id; });
  if (running == running_.end()) return;
  const Sequence& sequence = *slots_[*running];
  events_.push_back(terminal_event(sequence.request, FinishReason::kCancelled, sequence.completion_tokens));
  finish(*running);
}

bool Scheduler::plan(StepPlan* plan) {
  OCTET_CHECK(!step_in_flight_, "a step was planned before the one in flight was applied");
  clear(plan);
  in_flight_.clear();
  close_finished(plan);

  int32_t budget = limits_.max_step_tokens;
  for (const int32_t slot : running_) {
    if (slots_[slot]->completion_tokens > 0) run_chunk(slot, &budget, plan);
  }
  for (const int32_t slot : running_) {
    if (budget > 0 && slots_[slot]->completion_tokens == 0) run_chunk(slot, &budget, plan);
  }
  while (budget > 0 && admit_next(plan)) run_chunk(running_.back(), &budget, plan);

  step_in_flight_ = !plan->close.empty() || !plan->run.empty();
  if (step_in_flight_) plan->step = ++step_;
  return step_in_flight_;
}

void Scheduler::close_finished(StepPlan* plan) {
  // Workers close before they open, so what is closed here may be opened again by this very plan.
  for (const Finished& finished : finished_) {
    plan->close.push_back(finished.slot);
    free_slots_.push_back(finished.slot);
    pool_.give_back(finished.blocks);
  }
  finished_.clear();
}

bool Scheduler::admit_next(StepPlan* plan) {
  // Only asked while the budget has tokens left, after everybody that runs got one: so there are never more sequences
  // than tokens in a step, and each that decodes gets its token in every step.
  if (waiting_.empty() || running() == limits_.slots) return false;
  auto sequence = std::make_unique<Sequence>();
  if (!pool_.take(blocks_needed(waiting_.front(), limits_), &sequence->blocks)) return false;
  sequence->request = std::move(waiting_.front());
  waiting_.pop_front();
  sequence->max_tokens = max_tokens_of(sequence->request, limits_);

  const int32_t slot = free_slots_.back();
  free_slots_.pop_back();
  plan->open.push_back({.slot = slot, .sampling = sequence->request.sampling});
  slots_[slot] = std::move(sequence);
  running_.push_back(slot);
  return true;
}

// Plans the slot's next tokens: the one that it sampled last, or as much of its prompt as the budget allows.
void Scheduler::run_chunk(int32_t slot, int32_t* budget, StepPlan* plan) {
  Sequence& sequence = *slots_[slot];
  const std::vector<int32_t>& prompt = sequence.request.prompt;
  const bool decodes = sequence.completion_tokens > 0;
  const int32_t remaining = decodes ? 1 : static_cast<int32_t>(prompt.size()) - sequence.computed;
  const int32_t tokens = std::min(remaining, *budget);
  OCTET_CHECK(tokens > 0, "a sequence was planned with no token to run");
  *budget -= tokens;

  SlotTokens& run = plan->run.emplace_back();
  run.slot = slot;
  run.position = sequence.computed;
  run.from_last_sample = decodes;
  run.sample = tokens == remaining;
  if (!decodes) run.tokens.assign(prompt.begin() + sequence.computed, prompt.begin() + sequence.computed + tokens);
  in_flight_.push_back({.slot = slot, .tokens = tokens, .sample = run.sample});

  const int32_t blocks = (sequence.computed + tokens + limits_.block_tokens - 1) / limits_.block_tokens;
  if (blocks > sequence.blocks_told) {
    for (; sequence.blocks_told < blocks; ++sequence.blocks_told) {
      plan->blocks.push_back({.slot = slot, .block = sequence.blocks[sequence.blocks_told]});
    }
  }
}

void Scheduler::apply(const StepResult& result, std::vector<TokenEvent>* events) {
  OCTET_CHECK(step_in_flight_ && result.step == step_, "a result was applied that is not the last plan's");
  OCTET_CHECK(result.error.empty(), "a failed step was applied");
  step_in_flight_ = false;
  take_events(events);
  auto sampled = result.sampled.begin();
  for (const Chunk& chunk : in_flight_) {
    OCTET_CHECK(!chunk.sample || (sampled != result.sampled.end() && sampled->slot == chunk.slot),
                "a result does not have the samples that its plan asked for");
    // A slot is empty here when its request was cancelled while the step ran.
    if (slots_[chunk.slot] != nullptr) {
      slots_[chunk.slot]->computed += chunk.tokens;
      if (chunk.sample) events->push_back(take_token(chunk.slot, *sampled));
    }
    if (chunk.sample) ++sampled;
  }
  OCTET_CHECK(sampled == result.sampled.end(), "a result has samples that its plan did not ask for");
}

TokenEvent Scheduler::take_token(int32_t slot, const SampledToken& sampled) {
  Sequence& sequence = *slots_[slot];
  const Request& request = sequence.request;
  ++sequence.completion_tokens;

  const bool ends =
      sequence.completion_tokens > request.sampling.min_tokens &&
      std::binary_search(request.sampling.end_token_ids.begin(), request.sampling.end_token_ids.end(), sampled.chosen.token);
  const FinishReason reason = ends                                                ? FinishReason::kEndToken
                              : sequence.completion_tokens == sequence.max_tokens ? FinishReason::kLength
                                                                                  : FinishReason::kNone;
  TokenEvent event;
  if (reason == FinishReason::kNone) {
    event.request = request.id;
    event.output_index = request.sampling.output_index;
  } else {
    event = terminal_event(request, reason, sequence.completion_tokens);
    finish(slot);
  }
  event.token = sampled.chosen;
  event.top = sampled.top;
  return event;
}

// The slot and its blocks stay out of reach until the next plan closes the slot.
void Scheduler::finish(int32_t slot) {
  finished_.push_back({.slot = slot, .blocks = std::move(slots_[slot]->blocks)});
  slots_[slot].reset();
  std::erase(running_, slot);
}

void Scheduler::take_events(std::vector<TokenEvent>* events) {
  for (TokenEvent& event : events_) events->push_back(std::move(event));
  events_.clear();
}

void Scheduler::end_all(FinishReason finish_reason, const std::string& error, std::vector<TokenEvent>* events) {
  take_events(events);
  const size_t first = events->size();
  for (const int32_t slot : running_) {
    const Sequence& sequence = *slots_[slot];
    events->push_back(terminal_event(sequence.request, finish_reason, sequence.completion_tokens));
  }
  while (!running_.empty()) finish(running_.back());
  for (const Request& request : waiting_) events->push_back(terminal_event(request, finish_reason, 0));
  waiting_.clear();
  for (size_t i = first; i < events->size(); ++i) (*events)[i].error = error;
}

bool Scheduler::idle() const { return waiting_.empty() && running_.empty() && finished_.empty() && events_.empty(); }

}  // namespace octet
