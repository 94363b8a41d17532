// Scheduler: see the header. Invariants between calls (check() walks them): a sequence that has not ended is running,
// waiting or parked; each slot is free, of a running sequence, or ended; a block's references are the running sequences
// that hold it, and the ended ones until their slots are closed.
#include "coordinator/scheduler.h"

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/check.h"

namespace octet {
namespace {

void clear(StepPlan* plan) {
  plan->close.clear();
  plan->open.clear();
  plan->blocks.clear();
  plan->copies.clear();
  plan->masks.clear();
  plan->run.clear();
  plan->stop = false;
}

}  // namespace

Scheduler::Scheduler(const SchedulerOptions& options)
    : options_(options),
      limits_(options_.limits),
      index_(options.limits.blocks, options.limits.block_tokens, options.prefix_secret),
      pool_(options.limits.blocks, [this](int32_t block) { index_.remove(block); }) {
  OCTET_CHECK(limits_.slots > 0 && limits_.max_step_tokens > 0 && limits_.vocab_size > 0,
              "a limit of the workers is not positive");
  OCTET_CHECK(limits_.max_context >= 2, "a context has room for a prompt token and an answer token");
  for (int32_t slot = limits_.slots - 1; slot >= 0; --slot) free_slots_.push_back(slot);
}

Scheduler::~Scheduler() = default;

bool Scheduler::RanksEarlier::operator()(const Sequence* a, const Sequence* b) const {
  const auto rank = [](const Sequence* s) {
    return std::tuple(s->family->rank_ms, s->family->request.id, s->output_index);
  };
  return rank(a) < rank(b);
}

// ---- Requests come and go

void Scheduler::add(Request request, int64_t now_ms) {
  auto family = std::make_unique<Family>();
  family->request = std::move(request);
  Request& kept = family->request;
  // Sorted, because every sampled token is looked up in it.
  std::sort(kept.sampling.end_token_ids.begin(), kept.sampling.end_token_ids.end());
  family->rank_ms = now_ms + kept.priority * kAgingMs;
  family->max_tokens = max_tokens_of(kept, limits_);
  family->unfinished = kept.outputs;
  family->sequences.resize(static_cast<size_t>(kept.outputs));
  for (size_t i = 0; i < family->sequences.size(); ++i) {
    Sequence& sequence = family->sequences[i];
    sequence.family = family.get();
    sequence.output_index = static_cast<uint32_t>(i);
    if (kept.constraint != nullptr) sequence.constraint = kept.constraint->clone();
    waiting_.insert(&sequence);
    ++waiting_count_;
  }
  earliest_deadline_ms_ = std::min(earliest_deadline_ms_, kept.deadline_ms);
  const RequestId id = kept.id;
  families_.emplace(id, std::move(family));
}

void Scheduler::cancel(RequestId id) {
  const auto found = families_.find(id);
  if (found != families_.end()) end_family(found->second.get(), FinishReason::kCancelled, "", &events_);
}

void Scheduler::stop(RequestId id, uint32_t output_index) {
  const auto found = families_.find(id);
  if (found == families_.end() || output_index >= found->second->sequences.size()) return;
  Sequence& sequence = found->second->sequences[output_index];
  if (!sequence.ended) end(&sequence, FinishReason::kStopped, &events_);
  retire_if_done(found->second.get());
}

void Scheduler::expire(int64_t now_ms) {
  if (now_ms < earliest_deadline_ms_) return;
  std::vector<Family*> late;
  earliest_deadline_ms_ = kNoDeadline;
  for (const auto& [id, family] : families_) {
    const int64_t deadline = family->unfinished > 0 ? family->request.deadline_ms : kNoDeadline;
    if (deadline <= now_ms) {
      late.push_back(family.get());
    } else {
      earliest_deadline_ms_ = std::min(earliest_deadline_ms_, deadline);
    }
  }
  std::ranges::sort(late, {}, [](const Family* family) { return family->request.id; });
  for (Family* family : late) end_family(family, FinishReason::kDeadline, "", &events_);
}

void Scheduler::end_family(Family* family, FinishReason finish, const std::string& error,
                           std::vector<TokenEvent>* events) {
  for (Sequence& sequence : family->sequences) {
    if (sequence.ended) continue;
    end(&sequence, finish, events);
    events->back().error = error;
  }
  retire_if_done(family);
}

// ---- Reading a sequence

int32_t Scheduler::prompt_tokens(const Sequence& sequence) {
  return static_cast<int32_t>(sequence.family->request.prompt.size());
}

int32_t Scheduler::known(const Sequence& sequence) {
  return prompt_tokens(sequence) + static_cast<int32_t>(sequence.completion.size());
}

int32_t Scheduler::length(const Sequence& sequence) { return known(sequence) + sequence.samples_in_flight; }

int32_t Scheduler::to_run(const Sequence& sequence) {
  // The last token that an output may have is never run.
  if (length(sequence) - prompt_tokens(sequence) == sequence.family->max_tokens) return 0;
  // What may come next depends on a token that is not known yet.
  if (sequence.constraint != nullptr && sequence.samples_in_flight > 0) return 0;
  return length(sequence) - sequence.planned;
}

void Scheduler::copy_tokens(const Sequence& sequence, int32_t begin, int32_t end, std::vector<int32_t>* to) {
  const std::vector<int32_t>& prompt = sequence.family->request.prompt;
  const int32_t split = prompt_tokens(sequence);
  to->clear();
  if (begin < split) to->assign(prompt.begin() + begin, prompt.begin() + std::min(end, split));
  const auto completion = sequence.completion.begin();
  if (end > split) to->insert(to->end(), completion + std::max(begin - split, 0), completion + (end - split));
}

std::span<const int32_t> Scheduler::tokens_of_block(const Sequence& sequence, int32_t block) const {
  copy_tokens(sequence, block * limits_.block_tokens, (block + 1) * limits_.block_tokens, &block_tokens_);
  return block_tokens_;
}

int32_t Scheduler::blocks_for(int32_t positions) const {
  return (positions + limits_.block_tokens - 1) / limits_.block_tokens;
}

// ---- Making a plan

bool Scheduler::plan(int64_t now_ms, StepPlan* plan) {
  OCTET_CHECK(flights_out_ < kMaxStepsInFlight, "a step was planned before one of those in flight was applied");
  clear(plan);
  admitted_.clear();
  flights_[flights_out_].chunks.clear();
  expire(now_ms);
  unpark_ready();
  close_ended(plan);

  int32_t budget = limits_.max_step_tokens;
  const uint64_t preemptions = counts_.preemptions;
  // The oldest first: it may preempt anybody, also those that rank before it, who must not have run by then.
  Sequence* oldest = oldest_admitted();
  if (oldest != nullptr) decode(oldest, plan, &budget);
  // Preemption takes from the end, where nobody has run yet.
  for (size_t i = 0; i < running_.size(); ++i) {
    if (running_[i] != oldest) decode(running_[i], plan, &budget);
  }
  for (Sequence* sequence : running_) {
    if (budget > 0 && sequence->last_step <= step_ && to_run(*sequence) > 0) {
      run_chunk(sequence, to_run(*sequence), plan, &budget);
    }
  }
  // Who has just made room must not see it taken by the next in the queue.
  if (counts_.preemptions == preemptions) {
    while (budget > 0 && admit_next(plan, &budget)) {
    }
  }

  if (plan->close.empty() && plan->run.empty()) return false;
  // Only now: what this plan writes can be read by the next one.
  for (const Chunk& chunk : flights_[flights_out_].chunks) index_full_blocks(chunk.sequence);
  plan->step = ++step_;
  flights_[flights_out_++].step = step_;
  return true;
}

// The leaders of these have run their prompts in an earlier plan: what they computed is there to be shared.
void Scheduler::unpark_ready() {
  for (Family* family : prompt_ready_) unpark(family);
  prompt_ready_.clear();
}

void Scheduler::unpark(Family* family) {
  family->leader = nullptr;
  waiting_.insert(family->parked.begin(), family->parked.end());
  family->parked.clear();
}

void Scheduler::close_ended(StepPlan* plan) {
  // Workers close before they open, so what is closed here may be opened again by this very plan.
  plan->close.assign(ended_slots_.begin(), ended_slots_.end());
  free_slots_.insert(free_slots_.end(), ended_slots_.begin(), ended_slots_.end());
  pool_.give_back(ended_blocks_);
  ended_slots_.clear();
  ended_blocks_.clear();
}

Scheduler::Sequence* Scheduler::oldest_admitted() const {
  const auto oldest = std::ranges::min_element(running_, {}, &Sequence::admission);
  return oldest == running_.end() ? nullptr : *oldest;
}

// There are never more running sequences than tokens in a step, so that each one that decodes gets its token.
void Scheduler::decode(Sequence* sequence, StepPlan* plan, int32_t* budget) {
  if (sequence->planned < prompt_tokens(*sequence) || to_run(*sequence) != 1) return;
  if (has_block_for_next(sequence, plan)) run_chunk(sequence, 1, plan, budget);
}

bool Scheduler::has_block_for_next(Sequence* sequence, StepPlan* plan) {
  if (static_cast<int32_t>(sequence->blocks.size()) >= blocks_for(sequence->planned + 1)) return true;
  while (!pool_.take(1, &sequence->blocks)) {
    Sequence* last = last_preemptable();
    OCTET_CHECK(last != nullptr, "the oldest sequence alone needs more blocks than there are");
    preempt(last, plan);
    if (last == sequence) return false;
  }
  return true;
}

Scheduler::Sequence* Scheduler::last_preemptable() const {
  const Sequence* oldest = oldest_admitted();
  for (size_t i = running_.size(); i-- > 0;) {
    if (running_[i] != oldest) return running_[i];
  }
  return nullptr;
}

void Scheduler::preempt(Sequence* sequence, StepPlan* plan) {
  index_full_blocks(sequence);
  plan->close.push_back(sequence->slot);
  free_slots_.push_back(sequence->slot);
  pool_.give_back(sequence->blocks);
  sequence->blocks.clear();
  sequence->slot = -1;
  std::erase(running_, sequence);
  waiting_.insert(sequence);
  ++waiting_count_;
  ++counts_.preemptions;
  if (sequence->family->leader == sequence) unpark(sequence->family);
}

bool Scheduler::admit_next(StepPlan* plan, int32_t* budget) {
  if (waiting_.empty() || running() == std::min(limits_.slots, limits_.max_step_tokens)) return false;
  Sequence* next = *waiting_.begin();
  Family* family = next->family;
  // It was preempted at least one plan ago, and no more than that are in flight.
  OCTET_CHECK(next->samples_in_flight == 0, "a sequence is admitted whose last token is not known");
  if (family->leader != nullptr) {
    waiting_.erase(waiting_.begin());
    family->parked.push_back(next);
    return true;
  }
  if (!take_blocks(next, plan)) return false;
  waiting_.erase(waiting_.begin());
  --waiting_count_;
  open_slot(next, plan);
  running_.insert(std::ranges::upper_bound(running_, next, RanksEarlier()), next);
  const bool has_prompt_to_run = next->planned < prompt_tokens(*next) - 1;
  if (has_prompt_to_run && family->unfinished > 1) family->leader = next;
  run_chunk(next, to_run(*next), plan, budget);
  return true;
}

// Gives the sequence the blocks of all its tokens, those that are there already among them. At least its last token is
// left to be run. One block for each running sequence is left over, for it will soon want one.
bool Scheduler::take_blocks(Sequence* sequence, StepPlan* plan) {
  if (sequence == blocked_ && pool_.free() <= blocked_free_) return false;
  const Sequence* donor = donor_for(*sequence);
  int32_t copy_from = -1;
  if (donor != nullptr) {
    const int32_t last = prompt_tokens(*sequence) - 1;
    const int32_t whole = last / limits_.block_tokens;
    sequence->blocks.assign(donor->blocks.begin(), donor->blocks.begin() + whole);
    sequence->planned = last;
    sequence->prefix = index_.root(sequence->family->request.cache_salt);
    sequence->indexed_blocks = 0;
    if (last % limits_.block_tokens > 0) copy_from = donor->blocks[whole];
  } else {
    sequence->planned = share_cached_blocks(sequence);
  }

  const auto shared = static_cast<int32_t>(sequence->blocks.size());
  const auto idle = std::ranges::count_if(sequence->blocks, [this](int32_t b) { return pool_.references(b) == 0; });
  const int32_t needed = blocks_for(length(*sequence)) - shared;
  if (pool_.free() - static_cast<int32_t>(idle) < needed + running()) {
    sequence->blocks.clear();
    blocked_ = sequence;
    blocked_free_ = pool_.free();
    return false;
  }
  blocked_ = nullptr;
  for (const int32_t block : sequence->blocks) pool_.share(block);
  pool_.take(needed, &sequence->blocks);
  if (copy_from >= 0) plan->copies.push_back({.from = copy_from, .to = sequence->blocks[shared]});
  if (donor == nullptr && sequence->admission == 0) sequence->cached_tokens = sequence->planned;
  return true;
}

// A sequence of the same request that has run the prompt in an earlier plan.
const Scheduler::Sequence* Scheduler::donor_for(const Sequence& sequence) const {
  if (!sequence.completion.empty()) return nullptr;
  const int32_t last = prompt_tokens(sequence) - 1;
  if (last == 0) return nullptr;
  for (const Sequence& other : sequence.family->sequences) {
    if (other.slot >= 0 && (other.last_step > step_ ? other.planned_earlier : other.planned) > last) return &other;
  }
  return nullptr;
}

// Appends the blocks that the index has of the sequence's beginning, without holding them yet; returns the positions.
int32_t Scheduler::share_cached_blocks(Sequence* sequence) {
  const Family& family = *sequence->family;
  sequence->prefix = index_.root(family.request.cache_salt);
  sequence->indexed_blocks = 0;
  // Logprobs of the prompt come from running it.
  if (!options_.prefix_cache || has_scores_due(*sequence)) return 0;
  const int32_t most = (length(*sequence) - 1) / limits_.block_tokens;
  while (sequence->indexed_blocks < most) {
    const int32_t block = index_.find(tokens_of_block(*sequence, sequence->indexed_blocks), &sequence->prefix);
    if (block < 0) break;
    sequence->blocks.push_back(block);
    ++sequence->indexed_blocks;
  }
  return sequence->indexed_blocks * limits_.block_tokens;
}

void Scheduler::open_slot(Sequence* sequence, StepPlan* plan) {
  const Request& request = sequence->family->request;
  sequence->slot = free_slots_.back();
  free_slots_.pop_back();
  sequence->blocks_told = 0;
  sequence->slot_sampled = false;
  if (sequence->admission == 0) {
    // All that it can come to, so that it grows without asking the heap.
    sequence->completion.reserve(static_cast<size_t>(sequence->family->max_tokens));
    sequence->blocks.reserve(static_cast<size_t>(blocks_for(prompt_tokens(*sequence) + sequence->family->max_tokens)));
    sequence->admission = ++admission_number_;
    admitted_.push_back({.request = request.id, .output_index = sequence->output_index});
    counts_.prompt_tokens += request.prompt.size();
    counts_.cached_prompt_tokens += static_cast<uint64_t>(sequence->cached_tokens);
  }
  SlotOpen& open = plan->open.emplace_back();
  open.slot = sequence->slot;
  open.sampling = request.sampling;
  open.sampling.output_index = sequence->output_index;
  if (open.sampling.min_tokens == 0) open.sampling.end_token_ids.clear();  // nothing for the worker to do
  open.prompt_tokens = prompt_tokens(*sequence);
  open.position = sequence->planned;
  if (open.sampling.reads_history()) copy_tokens(*sequence, 0, sequence->planned, &open.history);
}

// Plans the next tokens of a sequence: the one that its slot sampled last, or as many as the budget allows.
void Scheduler::run_chunk(Sequence* sequence, int32_t tokens, StepPlan* plan, int32_t* budget) {
  tokens = up_to_unscored(*sequence, std::min(tokens, *budget));
  *budget -= tokens;
  SlotTokens& run = plan->run.emplace_back();
  run.slot = sequence->slot;
  run.position = sequence->planned;
  run.from_last_sample = sequence->slot_sampled;
  if (!run.from_last_sample) {
    copy_tokens(*sequence, sequence->planned, sequence->planned + tokens, &run.tokens);
    mark_scores(sequence, &run);
  }
  run.sample = sequence->planned + tokens == length(*sequence);
  if (run.sample && sequence->constraint != nullptr) {
    SlotMask& mask = plan->masks.emplace_back();
    mask.slot = sequence->slot;
    mask.words.assign(static_cast<size_t>(limits_.vocab_size + 31) / 32, 0);
    sequence->constraint->allow(mask.words);
  }

  sequence->planned_earlier = sequence->planned;
  sequence->planned += tokens;
  sequence->last_step = step_ + 1;
  sequence->slot_sampled = run.sample;
  sequence->samples_in_flight += run.sample;
  ++sequence->chunks_in_flight;
  flights_[flights_out_].chunks.push_back(
      {.sequence = sequence, .slot = run.slot, .sample = run.sample, .scores = run.scores()});
  for (; sequence->blocks_told < blocks_for(sequence->planned); ++sequence->blocks_told) {
    plan->blocks.push_back({.slot = run.slot, .block = sequence->blocks[sequence->blocks_told]});
  }
  Family* family = sequence->family;
  if (family->leader == sequence && sequence->planned >= prompt_tokens(*sequence) &&
      std::ranges::find(prompt_ready_, family) == prompt_ready_.end()) {
    prompt_ready_.push_back(family);
  }
}

// Whether logprobs of its prompt are still to be computed: output 0 does that for all.
bool Scheduler::has_scores_due(const Sequence& sequence) {
  return sequence.output_index == 0 && sequence.family->request.prompt_logprobs.has_value() &&
         sequence.family->scored < prompt_tokens(sequence) - 1;
}

// A chunk does not mix prompt tokens whose logprobs were reported before a preemption with those that are still due.
int32_t Scheduler::up_to_unscored(const Sequence& sequence, int32_t tokens) {
  const int32_t scored = sequence.family->scored;
  return has_scores_due(sequence) && sequence.planned < scored ? std::min(tokens, scored - sequence.planned) : tokens;
}

void Scheduler::mark_scores(Sequence* sequence, SlotTokens* run) {
  Family& family = *sequence->family;
  const std::vector<int32_t>& prompt = family.request.prompt;
  const int32_t last = prompt_tokens(*sequence) - 1;
  if (!has_scores_due(*sequence) || run->position < family.scored) return;
  const int32_t end = run->position + run->count();
  run->score = true;
  run->score_top = *family.request.prompt_logprobs;
  run->next_token = end <= last ? prompt[static_cast<size_t>(end)] : -1;
  family.scored = std::min(end, last);
}

// Enters the sequence's full blocks, as far as their tokens are known and planned, where others will find them.
void Scheduler::index_full_blocks(Sequence* sequence) {
  if (!options_.prefix_cache || sequence->slot < 0) return;
  const int32_t full = std::min(sequence->planned, known(*sequence)) / limits_.block_tokens;
  for (int32_t& i = sequence->indexed_blocks; i < full; ++i) {
    const int32_t block = sequence->blocks[i];
    if (index_.add(tokens_of_block(*sequence, i), block, &sequence->prefix) == block) pool_.keep(block);
  }
}

// ---- Taking in results

void Scheduler::apply(const StepResult& result, std::vector<TokenEvent>* events) {
  OCTET_CHECK(flights_out_ > 0 && result.step == flights_[0].step,
              "a result was applied that is not the oldest plan's");
  OCTET_CHECK(result.error.empty(), "a failed step was applied");
  take_events(events);
  auto sampled = result.sampled.begin();
  std::span<const SampledToken> scored = result.scored;
  for (const Chunk& chunk : flights_[0].chunks) {
    Sequence* sequence = chunk.sequence;
    OCTET_CHECK(scored.size() >= static_cast<size_t>(chunk.scores), "a result lacks logprobs that its plan asked for");
    if (chunk.scores > 0) take_scores(*sequence, scored.first(static_cast<size_t>(chunk.scores)), events);
    scored = scored.subspan(static_cast<size_t>(chunk.scores));
    if (chunk.sample) {
      OCTET_CHECK(sampled != result.sampled.end() && sampled->slot == chunk.slot,
                  "a result does not have the samples that its plan asked for");
      --sequence->samples_in_flight;
      take_token(sequence, *sampled++, events);
    }
    --sequence->chunks_in_flight;
    retire_if_done(sequence->family);
  }
  OCTET_CHECK(sampled == result.sampled.end() && scored.empty(), "a result has tokens that its plan did not ask for");
  std::rotate(flights_.begin(), flights_.begin() + 1, flights_.end());
  --flights_out_;
}

void Scheduler::take_scores(const Sequence& sequence, std::span<const SampledToken> scored,
                            std::vector<TokenEvent>* events) {
  if (sequence.ended) return;
  TokenEvent& event = events->emplace_back(event_of(sequence));
  event.prompt_logprobs.assign(scored.begin(), scored.end());
}

void Scheduler::take_token(Sequence* sequence, const SampledToken& sampled, std::vector<TokenEvent>* events) {
  // Its end was not known when the step was planned.
  if (sequence->ended) return;
  const SlotSampling& sampling = sequence->family->request.sampling;
  sequence->completion.push_back(sampled.chosen.token);
  if (sequence->constraint != nullptr) sequence->constraint->advance(sampled.chosen.token);
  const auto count = static_cast<int32_t>(sequence->completion.size());
  const bool ends =
      count > sampling.min_tokens && std::ranges::binary_search(sampling.end_token_ids, sampled.chosen.token);
  if (ends) {
    end(sequence, FinishReason::kEndToken, events);
  } else if (count == sequence->family->max_tokens) {
    end(sequence, FinishReason::kLength, events);
  } else {
    events->push_back(event_of(*sequence));
  }
  events->back().token = sampled.chosen;
  events->back().top = sampled.top;
}

TokenEvent Scheduler::event_of(const Sequence& sequence) {
  TokenEvent event;
  event.request = sequence.family->request.id;
  event.output_index = sequence.output_index;
  return event;
}

TokenEvent Scheduler::terminal_event(const Sequence& sequence, FinishReason finish) {
  TokenEvent event = event_of(sequence);
  event.finish = finish;
  event.prompt_tokens = prompt_tokens(sequence);
  event.cached_tokens = sequence.cached_tokens;
  event.completion_tokens = static_cast<int32_t>(sequence.completion.size());
  return event;
}

void Scheduler::end(Sequence* sequence, FinishReason finish, std::vector<TokenEvent>* events) {
  events->push_back(terminal_event(*sequence, finish));
  leave(sequence);
}

// The slot and its blocks stay out of reach until the next plan closes the slot.
void Scheduler::leave(Sequence* sequence) {
  Family* family = sequence->family;
  if (sequence->slot >= 0) {
    index_full_blocks(sequence);
    ended_slots_.push_back(sequence->slot);
    ended_blocks_.insert(ended_blocks_.end(), sequence->blocks.begin(), sequence->blocks.end());
    sequence->blocks.clear();
    sequence->slot = -1;
    std::erase(running_, sequence);
  } else {
    if (waiting_.erase(sequence) == 0) std::erase(family->parked, sequence);
    --waiting_count_;
    if (blocked_ == sequence) blocked_ = nullptr;
  }
  sequence->ended = true;
  --family->unfinished;
  if (family->leader == sequence) unpark(family);
}

void Scheduler::retire_if_done(Family* family) {
  const auto busy = [](const Sequence& sequence) { return !sequence.ended || sequence.chunks_in_flight > 0; };
  if (family->unfinished > 0 || std::ranges::any_of(family->sequences, busy)) return;
  std::erase(prompt_ready_, family);
  families_.erase(family->request.id);
}

void Scheduler::take_events(std::vector<TokenEvent>* events) {
  for (TokenEvent& event : events_) events->push_back(std::move(event));
  events_.clear();
}

void Scheduler::end_all(FinishReason finish, const std::string& error, std::vector<TokenEvent>* events) {
  take_events(events);
  std::vector<Family*> families;
  for (const auto& [id, family] : families_) families.push_back(family.get());
  std::ranges::sort(families, {}, [](const Family* family) { return family->request.id; });
  for (Family* family : families) end_family(family, finish, error, events);
}

bool Scheduler::idle() const {
  return families_.empty() && flights_out_ == 0 && ended_slots_.empty() && events_.empty();
}

void Scheduler::check() const {
  std::map<int32_t, int32_t> references;
  for (const int32_t block : ended_blocks_) ++references[block];
  size_t waiting = 0, parked = 0;
  for (const auto& [id, family] : families_) {
    parked += family->parked.size();
    OCTET_CHECK(family->parked.empty() || family->leader != nullptr, "sequences are parked behind nobody");
    for (const Sequence& sequence : family->sequences) {
      for (const int32_t block : sequence.blocks) ++references[block];
      const bool runs = std::ranges::count(running_, &sequence) == 1;
      OCTET_CHECK(runs == (sequence.slot >= 0), "a sequence has a slot and does not run, or runs without");
      OCTET_CHECK(!runs || !sequence.ended, "an ended sequence runs");
      OCTET_CHECK(runs || sequence.blocks.empty(), "a sequence that does not run holds blocks");
      waiting += !runs && !sequence.ended;
    }
  }
  OCTET_CHECK(waiting == waiting_.size() + parked && static_cast<int32_t>(waiting) == waiting_count_,
              "a sequence is neither running, waiting nor parked, or twice so");
  OCTET_CHECK(free_slots_.size() + ended_slots_.size() + running_.size() == static_cast<size_t>(limits_.slots),
              "slots are not conserved");
  for (int32_t block = 0; block < pool_.total(); ++block) {
    const auto found = references.find(block);
    OCTET_CHECK(pool_.references(block) == (found == references.end() ? 0 : found->second),
                absl::StrCat("block ", block, " has other references than it is said to have"));
  }
  pool_.check();
}

}  // namespace octet
