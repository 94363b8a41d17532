#include "coordinator/batch/batch_runner.h"

#include <algorithm>
#include <condition_variable>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "coordinator/generate_output.h"
#include "octet/v1/inference_service.pb.h"

namespace octet {
namespace {

constexpr int kTriesBeforeAlone = 2, kTriesBeforeClosed = 3;
// Tokens wait this long to be looked at; ends of outputs do not.
constexpr absl::Duration kPoll = absl::Milliseconds(50);
constexpr size_t kRecentLines = 256;

}  // namespace

// A line on its way.
struct BatchRunner::Run {
  Run(int64_t index, BatchLine line) : index(index), line(std::move(line)) {}

  int64_t index;
  BatchLine line;
  struct Prompt {
    Prompt(const AcceptedRequest& accepted, const Tokenizer& tokenizer) : outputs(accepted, tokenizer) {}
    GenerateOutputs outputs;
    RequestId id = 0;
    bool ended = false;
  };
  std::deque<Prompt> prompts;  // as far as they are submitted
  int64_t outputs = 0;
  absl::Time started = absl::InfinitePast();
};

struct BatchRunner::Inbox {
  struct Item {
    int64_t line;
    size_t prompt;
    TokenEvent event;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<Item> items;
  bool urgent = false;  // an output has ended, or may have
  absl::Time deadline = absl::InfiniteFuture();
  std::string stop_reason;
};

class BatchRunner::Sink final : public RequestSink {
 public:
  Sink(std::shared_ptr<Inbox> inbox, int64_t line, size_t prompt, bool may_stop)
      : inbox_(std::move(inbox)), line_(line), prompt_(prompt), may_stop_(may_stop) {}

  void on_event(const TokenEvent& event) override {
    const std::lock_guard lock(inbox_->mutex);
    inbox_->items.push_back({line_, prompt_, event});
    if (event.finish == FinishReason::kNone && !may_stop_) return;
    inbox_->urgent = true;
    inbox_->changed.notify_one();
  }

 private:
  const std::shared_ptr<Inbox> inbox_;
  const int64_t line_;
  const size_t prompt_;
  const bool may_stop_;  // at a stop string, which the engine knows nothing of
};

BatchRunner::BatchRunner(const BatchRunnerOptions& options, BatchJob* job, const BatchFacts* facts,
                         const ServedModel* model, Engine* engine)
    : options_(options),
      job_(*job),
      facts_(*facts),
      model_(*model),
      engine_(*engine),
      next_line_(job->first_line()),
      inbox_(std::make_shared<Inbox>()) {
  state_.lines = job->lines();
  state_.answered_before = job->journal().answers();
  publish();
}

BatchRunner::~BatchRunner() = default;

absl::Status BatchRunner::run() {
  find_suspects();
  while (true) {
    if (absl::Status status = read_lines(); !status.ok()) return give_up(status);
    if (absl::Status status = start_lines(); !status.ok()) return give_up(status);
    const bool idle = running_.empty() && ready_.empty();
    if (!idle) {
      if (absl::Status status = wait_for_events(); !status.ok()) return give_up(status);
    }
    if (absl::Status status = commit_if_due(/*now=*/idle); !status.ok()) return give_up(status);
    publish();
    if (idle && job_.journal().uncommitted_answers() == 0 && at_end()) break;
  }
  if (job_.journal().answers() == job_.lines()) return absl::OkStatus();
  if (!out_of_time_.empty()) return absl::UnavailableError(out_of_time_);
  const std::lock_guard lock(inbox_->mutex);
  return absl::UnavailableError(absl::StrCat("stopped: ", inbox_->stop_reason));
}

// Whether nothing more will be started: a disk that failed may be back, and then more is.
bool BatchRunner::at_end() const {
  return job_.journal().answers() == job_.lines() || stopping() || !out_of_time_.empty();
}

// What is done by now is kept, what runs is not: another run makes the same of it.
absl::Status BatchRunner::give_up(const absl::Status& cause) {
  for (const auto& [line, run] : running_) {
    for (const Run::Prompt& prompt : run->prompts) {
      if (!prompt.ended) engine_.cancel(prompt.id);
    }
  }
  running_.clear();
  ready_.clear();
  if (!absl::IsAborted(cause)) job_.journal().commit().IgnoreError();  // the cause matters more
  publish();
  return cause;
}

void BatchRunner::find_suspects() {
  for (const auto& [line, tries] : job_.journal().tries()) {
    if (tries < kTriesBeforeAlone) continue;
    suspects_.push_back(line);
    alone_.insert(line);
  }
}

std::optional<int64_t> BatchRunner::next_line() {
  if (!suspects_.empty()) {
    const int64_t line = suspects_.front();
    suspects_.pop_front();
    return line;
  }
  const int64_t end = job_.first_line() + job_.lines();
  while (next_line_ < end && (alone_.contains(next_line_) || job_.journal().answered(next_line_))) ++next_line_;
  if (next_line_ == end) return std::nullopt;
  return next_line_++;
}

absl::Time BatchRunner::stop_deadline() const {
  const std::lock_guard lock(inbox_->mutex);
  return inbox_->deadline;
}

bool BatchRunner::stopping() const { return stop_deadline() != absl::InfiniteFuture(); }

bool BatchRunner::may_start() {
  if (stopping() || !out_of_time_.empty() || disk_failed_ != absl::InfiniteFuture()) return false;
  const bool busy = !running_.empty() || !ready_.empty();
  if (!suspects_.empty() && busy) return false;
  if (busy && alone_.contains(ready_.empty() ? running_.begin()->first : ready_.front()->index)) return false;
  int64_t outputs = outputs_running_;
  for (const auto& run : ready_) outputs += run->outputs;
  if (outputs >= options_.outputs_in_flight) return false;
  if (job_.journal().uncommitted_answers() >= options_.commit_answers) return false;  // of lines that are only errors
  const absl::Duration slowest = recent_.empty() ? absl::ZeroDuration() : *std::ranges::max_element(recent_);
  if (absl::Now() + slowest < options_.end) return true;
  out_of_time_ = absl::StrCat("a line takes up to ", absl::FormatDuration(slowest),
                              ", and the job's time ends before that: no more lines are started");
  return false;
}

// Reads as many lines as may start. Those that cannot run are answered at once.
absl::Status BatchRunner::read_lines() {
  while (may_start()) {
    const std::optional<int64_t> index = next_line();
    if (!index.has_value()) return absl::OkStatus();
    const absl::StatusOr<BatchInput::Line> text = job_.input().read(*index);
    if (!text.ok()) return text.status();
    auto run = std::make_unique<Run>(*index, BatchLine::read(text->text, text->number, facts_, model_));
    const std::map<int64_t, int> tries = alone_.contains(*index) ? job_.journal().tries() : std::map<int64_t, int>();
    if (const auto found = tries.find(*index); found != tries.end() && found->second >= kTriesBeforeClosed) {
      run->line.fail(absl::InternalError(absl::StrCat("the engine failed ", found->second,
                                                      " times while this line ran, the last time alone")),
                     "engine_crash");
    }
    if (run->line.failed()) {
      answer(run.get());
      continue;
    }
    for (const AcceptedRequest& request : run->line.requests()) run->outputs += request.request.outputs;
    job_.journal().add_intent(*index);
    ready_.push_back(std::move(run));
  }
  return absl::OkStatus();
}

// A line runs only after its intent is written: should it take the process with it, the next one knows.
absl::Status BatchRunner::start_lines() {
  if (ready_.empty()) return absl::OkStatus();
  if (stopping()) {
    ready_.clear();
    return absl::OkStatus();
  }
  if (absl::Now() < disk_retry_) return absl::OkStatus();
  if (absl::Status status = job_.journal().flush(); !status.ok()) return note_disk_failure(status);
  while (!ready_.empty()) {
    std::unique_ptr<Run> run = std::move(ready_.front());
    ready_.pop_front();
    if (absl::Status status = submit(std::move(run)); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status BatchRunner::submit(std::unique_ptr<Run> owned) {
  Run* run = owned.get();
  running_.emplace(run->index, std::move(owned));
  outputs_running_ += run->outputs;
  run->started = absl::Now();
  for (size_t i = 0; i < run->line.requests().size(); ++i) {
    AcceptedRequest& accepted = run->line.requests()[i];
    Run::Prompt& prompt = run->prompts.emplace_back(accepted, model_.tokenizer);
    const absl::StatusOr<RequestId> id =
        engine_.submit(std::move(accepted.request),
                       std::make_shared<Sink>(inbox_, run->index, i, /*may_stop=*/!accepted.stop.empty()));
    if (id.ok()) {
      prompt.id = *id;
      continue;
    }
    if (absl::IsUnavailable(id.status())) return id.status();  // the workers have failed: not this line's fault
    prompt.ended = true;
    run->line.fail(id.status());
    end_line(run);
    return absl::OkStatus();
  }
  return absl::OkStatus();
}

// Sleeps until something is to be done, and does what events say.
absl::Status BatchRunner::wait_for_events() {
  std::vector<Inbox::Item> items;
  {
    std::unique_lock lock(inbox_->mutex);
    const absl::Time until = std::min({absl::Now() + kPoll, commit_due_, inbox_->deadline});
    inbox_->changed.wait_until(lock, absl::ToChronoTime(until), [this] { return inbox_->urgent; });
    inbox_->urgent = false;
    std::swap(items, inbox_->items);
    if (items.empty() && absl::Now() >= inbox_->deadline) {
      return absl::UnavailableError(absl::StrCat("stopped: ", inbox_->stop_reason));
    }
  }
  for (const Inbox::Item& item : items) {
    if (absl::Status status = take_event(item.line, item.prompt, item.event); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status BatchRunner::take_event(int64_t line, size_t index, const TokenEvent& event) {
  const auto found = running_.find(line);
  if (found == running_.end()) return absl::OkStatus();  // the line has ended without this prompt
  Run* run = found->second.get();
  Run::Prompt& prompt = run->prompts[index];
  if (prompt.ended) return absl::OkStatus();
  if (prompt.outputs.absorb(event)) engine_.stop(prompt.id, event.output_index);
  if (!prompt.outputs.ended()) return absl::OkStatus();
  if (!prompt.outputs.status().ok()) return prompt.outputs.status();
  prompt.ended = true;
  v1::GenerateResponse message;
  while (prompt.outputs.take(&message)) run->line.add(index, message);
  const bool all_ended =
      run->prompts.size() == run->line.requests().size() && std::ranges::all_of(run->prompts, &Run::Prompt::ended);
  if (all_ended) end_line(run);
  return absl::OkStatus();
}

void BatchRunner::end_line(Run* run) {
  for (const Run::Prompt& prompt : run->prompts) {
    if (!prompt.ended) engine_.cancel(prompt.id);
  }
  recent_.push_back(absl::Now() - run->started);
  if (recent_.size() > kRecentLines) recent_.pop_front();
  outputs_running_ -= run->outputs;
  answer(run);
  running_.erase(run->index);
}

void BatchRunner::answer(Run* run) {
  if (job_.journal().uncommitted_answers() == 0) commit_due_ = absl::Now() + options_.commit_after;
  std::string text = run->line.answer();
  if (text.size() > kMaxAnswerBytes) {
    run->line.fail(absl::InvalidArgumentError("the answer has more than 1 GiB: ask for fewer outputs or logprobs"),
                   "answer_too_long");
    text = run->line.answer();
  }
  job_.journal().add_answer({.line = run->index,
                             .failed = run->line.failed(),
                             .prompt_tokens = static_cast<uint32_t>(run->line.prompt_tokens()),
                             .completion_tokens = static_cast<uint32_t>(run->line.completion_tokens()),
                             .text = std::move(text)});
}

absl::Status BatchRunner::commit_if_due(bool now) {
  const bool due = now || absl::Now() >= commit_due_ || job_.journal().uncommitted_answers() >= options_.commit_answers;
  if (!due) return absl::OkStatus();
  if (now) absl::SleepFor(std::min(disk_retry_, stop_deadline()) - absl::Now());  // there is nothing else to do
  if (absl::Now() < std::min(disk_retry_, stop_deadline())) return absl::OkStatus();
  absl::Status status = job_.journal().commit();
  if (status.ok()) status = job_.journal().check_fence();
  if (absl::IsAborted(status)) return status;
  if (!status.ok()) return note_disk_failure(status);
  commit_due_ = disk_failed_ = absl::InfiniteFuture();
  disk_retry_ = absl::InfinitePast();
  return absl::OkStatus();
}

// A disk that fails is tried again until its patience ends. Meanwhile what runs goes on, and nothing is started.
absl::Status BatchRunner::note_disk_failure(const absl::Status& status) {
  disk_failed_ = std::min(disk_failed_, absl::Now());
  if (absl::Now() - disk_failed_ >= options_.disk_patience || absl::Now() >= stop_deadline()) return status;
  disk_retry_ = absl::Now() + options_.disk_pause;
  commit_due_ = disk_retry_;
  return absl::OkStatus();
}

void BatchRunner::stop(absl::Time deadline, const std::string& reason) {
  const std::lock_guard lock(inbox_->mutex);
  if (inbox_->stop_reason.empty()) inbox_->stop_reason = reason;
  inbox_->deadline = std::min(inbox_->deadline, deadline);
  inbox_->changed.notify_one();
}

void BatchRunner::publish() {
  const Journal& journal = job_.journal();
  const std::lock_guard lock(state_mutex_);
  state_.answered = {.lines = journal.answers(),
                     .failed = journal.failed(),
                     .prompt_tokens = journal.prompt_tokens(),
                     .completion_tokens = journal.completion_tokens()};
  state_.running = static_cast<int64_t>(running_.size());
}

BatchState BatchRunner::state() const {
  const std::lock_guard lock(state_mutex_);
  return state_;
}

}  // namespace octet
