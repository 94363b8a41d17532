// Scheduler: which sequences run in the next step, with which tokens and which cache blocks. Pure: no clock, thread,
// socket, device or MPI; the engine feeds it and a test can be its whole world. Only the engine thread calls these.
//
// A request is a family of sequences, one for each output. Every step mixes decodes and prompt chunks under a token
// budget: running sequences first (someone is watching their tokens arrive), then waiting ones. Whoever waits is ranked
// by arrival, a priority class counting as kAgingMs of waiting: so a class ages by one in that time, first come is
// first served within a class, nobody overtakes the first in the queue, and nobody starves.
//
// A sequence takes at admission the blocks of the tokens that it has, less what the cache holds of them already, and
// one block at a time as it grows. When there is none, the sequence that ranks last is preempted: it gives all blocks
// back and waits again, to run its tokens once more. The oldest admitted one never is, so that somebody always
// finishes.
//
// Up to kMaxStepsInFlight plans may be out at once. The later one is made without the tokens of the earlier one: it
// names them by slot, and what turns out to have ended ran once in vain. Plans run in order, so a slot and its blocks,
// closed by one plan, may be used by the same plan and all later ones.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "coordinator/block_pool.h"
#include "coordinator/prefix_index.h"
#include "coordinator/request.h"
#include "worker/step_plan.h"

namespace octet {

constexpr int kMaxStepsInFlight = 2;

struct SchedulerOptions {
  WorkerLimits limits;
  bool prefix_cache = true;
  PrefixSecret prefix_secret = {};  // random, unless a test wants the same run twice
};

// Counted since the scheduler was made.
struct SchedulerCounts {
  uint64_t prompt_tokens = 0;         // of requests that were admitted for the first time, those of the cache included
  uint64_t cached_prompt_tokens = 0;  // of them, found in the prefix cache
  uint64_t preemptions = 0;
};

class Scheduler {
 public:
  // REQUIRES: every limit is positive and max_context is at least 2.
  explicit Scheduler(const SchedulerOptions& options);
  ~Scheduler();

  // Queues a request. REQUIRES: validate_request() accepts it, its id is new, and now_ms never falls from call to call.
  void add(Request request, int64_t now_ms);

  // Ends a request (kCancelled), or one output of it (kStopped); unknown or finished ones are ignored. The terminal
  // event comes from the next take_events() or apply(). May be called while steps are in flight: what they sample for
  // it is dropped.
  void cancel(RequestId id);
  void stop(RequestId id, uint32_t output_index);

  // The next step, or false when there is nothing to run and nothing to close: because all is done, or because what is
  // in flight must come back first. Requests whose deadline has passed end here (kDeadline). REQUIRES: fewer than
  // kMaxStepsInFlight plans have not been applied. *plan is overwritten; giving the same one again saves allocations: a
  // step that only decodes then makes none, here and in apply(). `run` is empty when slots are only to be closed.
  bool plan(int64_t now_ms, StepPlan* plan);

  // Takes in what the oldest step in flight gave; appends its events, in the order of the plan's `run`.
  // REQUIRES: result is that step's, and without error.
  void apply(const StepResult& result, std::vector<TokenEvent>* events);

  // Appends the events that did not need a step (cancels, deadlines).
  void take_events(std::vector<TokenEvent>* events);

  // Ends every request with this reason, for good: the scheduler is not used any more. `error` goes with kError.
  void end_all(FinishReason finish, const std::string& error, std::vector<TokenEvent>* events);

  // Nothing waiting, running, in flight or to be closed, no event to be taken.
  bool idle() const;
  int steps_in_flight() const { return flights_out_; }
  int32_t waiting() const { return waiting_count_; }  // outputs
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  const BlockPool& blocks() const { return pool_; }
  const SchedulerCounts& counts() const { return counts_; }
  // Outputs that the last plan admitted for the first time.
  struct Admission {
    RequestId request = 0;
    uint32_t output_index = 0;
  };
  const std::vector<Admission>& admitted() const { return admitted_; }

  // Walks everything and asserts that references, slots and lists agree: for tests.
  void check() const;

 private:
  struct Family;

  // One output. Of its positions [0, planned) the cache holds keys and values once all plans have run.
  struct Sequence {
    Family* family = nullptr;
    uint32_t output_index = 0;
    std::vector<int32_t> completion;  // as far as it is known
    int32_t samples_in_flight = 0;    // tokens after those, which a step in flight chooses
    int32_t chunks_in_flight = 0;
    int32_t cached_tokens = 0;
    uint64_t admission = 0;  // order of first admission; 0: never admitted
    bool ended = false;
    std::unique_ptr<TokenConstraint> constraint;

    // While it runs.
    int32_t slot = -1;
    std::vector<int32_t> blocks;
    int32_t blocks_told = 0;  // the first of them, which its slot on the workers has
    int32_t planned = 0;
    int32_t planned_earlier = 0;  // by plans before the one of last_step
    uint64_t last_step = 0;       // that runs tokens of it
    bool slot_sampled = false;    // the slot's last run chose the token at `planned`
    PrefixPoint prefix;           // what the index holds of it
    int32_t indexed_blocks = 0;
  };

  // Outputs of one request, and what they share.
  struct Family {
    Request request;
    int64_t rank_ms = 0;  // arrival and class as one number: smaller is earlier
    int32_t max_tokens = 0;
    int32_t scored = 0;               // prompt tokens whose logprobs were planned
    int32_t unfinished = 0;           // outputs
    std::vector<Sequence> sequences;  // by output_index, never resized
    // The prompt is run once: while this one runs it, the others are parked. They fork from whoever has it.
    Sequence* leader = nullptr;
    std::vector<Sequence*> parked;
  };

  struct RanksEarlier {
    bool operator()(const Sequence* a, const Sequence* b) const;
  };

  // What a plan in flight runs, in its order.
  struct Chunk {
    Sequence* sequence = nullptr;
    int32_t slot = 0;
    bool sample = false;
    int32_t scores = 0;
  };
  struct Flight {
    uint64_t step = 0;
    std::vector<Chunk> chunks;
  };

  // ---- Reading a sequence
  static int32_t prompt_tokens(const Sequence& sequence);
  static int32_t known(const Sequence& sequence);   // tokens whose ids are known
  static int32_t length(const Sequence& sequence);  // all of them
  static int32_t to_run(const Sequence& sequence);  // tokens that may be planned now
  static void copy_tokens(const Sequence& sequence, int32_t begin, int32_t end, std::vector<int32_t>* to);
  std::span<const int32_t> tokens_of_block(const Sequence& sequence, int32_t block) const;
  int32_t blocks_for(int32_t positions) const;

  // ---- Making a plan
  void expire(int64_t now_ms);
  void unpark_ready();
  void close_ended(StepPlan* plan);
  void decode(Sequence* sequence, StepPlan* plan, int32_t* budget);
  bool has_block_for_next(Sequence* sequence, StepPlan* plan);
  void preempt(Sequence* sequence, StepPlan* plan);
  Sequence* last_preemptable() const;
  Sequence* oldest_admitted() const;
  bool admit_next(StepPlan* plan, int32_t* budget);
  bool take_blocks(Sequence* sequence, StepPlan* plan);
  const Sequence* donor_for(const Sequence& sequence) const;
  int32_t share_cached_blocks(Sequence* sequence);
  void open_slot(Sequence* sequence, StepPlan* plan);
  void run_chunk(Sequence* sequence, int32_t tokens, StepPlan* plan, int32_t* budget);
  static bool has_scores_due(const Sequence& sequence);
  static int32_t up_to_unscored(const Sequence& sequence, int32_t tokens);
  static void mark_scores(Sequence* sequence, SlotTokens* run);
  void index_full_blocks(Sequence* sequence);

  // ---- Taking in results
  void take_scores(const Sequence& sequence, std::span<const SampledToken> scored, std::vector<TokenEvent>* events);
  void take_token(Sequence* sequence, const SampledToken& sampled, std::vector<TokenEvent>* events);
  static TokenEvent event_of(const Sequence& sequence);
  static TokenEvent terminal_event(const Sequence& sequence, FinishReason finish);
  void end(Sequence* sequence, FinishReason finish, std::vector<TokenEvent>* events);
  void leave(Sequence* sequence);
  void end_family(Family* family, FinishReason finish, const std::string& error, std::vector<TokenEvent>* events);
  void unpark(Family* family);
  void retire_if_done(Family* family);

  const SchedulerOptions options_;
  const WorkerLimits& limits_;
  PrefixIndex index_;
  BlockPool pool_;
  std::unordered_map<RequestId, std::unique_ptr<Family>> families_;
  std::set<Sequence*, RanksEarlier> waiting_;
  int32_t waiting_count_ = 0;          // with those that are parked
  std::vector<Sequence*> running_;     // in the order of their ranks
  std::vector<Family*> prompt_ready_;  // their parked sequences wait for the next plan
  std::vector<int32_t> free_slots_;
  std::vector<int32_t> ended_slots_;   // to be closed by the next plan
  std::vector<int32_t> ended_blocks_;  // and these come back then
  std::vector<TokenEvent> events_;     // not taken yet
  std::array<Flight, kMaxStepsInFlight> flights_;
  int flights_out_ = 0;  // the first of flights_ are not applied
  int64_t earliest_deadline_ms_ = kNoDeadline;
  uint64_t step_ = 0;
  uint64_t admission_number_ = 0;
  std::vector<Admission> admitted_;
  SchedulerCounts counts_;
  // The first in the queue was last seen to need more blocks than these; it need not be looked at again before.
  const Sequence* blocked_ = nullptr;
  int32_t blocked_free_ = 0;
  mutable std::vector<int32_t> block_tokens_;  // scratch: one block's
};

}  // namespace octet
