// BatchRunner: takes the lines of a batch job through an engine and their answers into its journal. It keeps the engine
// full, in the order of the input, and loses no more than what runs when it is stopped.
//
// A line that was in flight in two ends of the job that may be its own fault (BatchJob's journal counts them) runs
// alone, before all others; one that was in three is closed with an error. So one bad line cannot keep a job from its
// end.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "coordinator/batch/batch_job.h"
#include "coordinator/batch_line.h"
#include "coordinator/engine.h"
#include "coordinator/served_model.h"

namespace octet {

struct BatchRunnerOptions {
  int64_t outputs_in_flight = 128;  // twice what the engine runs at once, so that it never waits for a line
  // Answers are on disk when there are so many, or when the first of them is so old.
  int64_t commit_answers = 256;
  absl::Duration commit_after = absl::Milliseconds(250);
  // A disk that fails is tried again after each pause, and the run ends when it still fails after all this patience.
  absl::Duration disk_patience = absl::Seconds(60), disk_pause = absl::Seconds(1);
  absl::Time end = absl::InfiniteFuture();  // no line is started that would not be done by then
};

// How far a job is.
struct BatchState {
  BatchTotals answered;  // and committed, by this run and earlier ones
  int64_t lines = 0;     // in all
  int64_t running = 0;
  int64_t answered_before = 0;  // by earlier runs
};

class BatchRunner {
 public:
  // Everything outlives the runner.
  BatchRunner(const BatchRunnerOptions& options, BatchJob* job, const BatchFacts* facts, const ServedModel* model,
              Engine* engine);
  ~BatchRunner();

  // Returns OK when every line is answered and committed. UNAVAILABLE when another run has to go on: stop() was called,
  // time or the disk ran out, the workers failed. ABORTED when another run has taken over.
  absl::Status run();

  // Any thread: starts no more lines, and gives up at `deadline` what runs then. run() ends with this reason unless
  // everything is done by then.
  void stop(absl::Time deadline, const std::string& reason);
  // Any thread.
  BatchState state() const;

 private:
  struct Run;
  struct Inbox;
  class Sink;

  void find_suspects();
  std::optional<int64_t> next_line();
  bool may_start();
  absl::Status read_lines();
  absl::Status start_lines();
  absl::Status submit(std::unique_ptr<Run> run);
  absl::Status wait_for_events();
  absl::Status take_event(int64_t line, size_t prompt, const TokenEvent& event);
  void end_line(Run* run);
  void answer(Run* run);
  absl::Status commit_if_due(bool now);
  absl::Status note_disk_failure(const absl::Status& status);
  absl::Status give_up(const absl::Status& cause);
  void publish();
  absl::Time stop_deadline() const;  // infinite: nobody has called stop()
  bool stopping() const;
  bool at_end() const;

  const BatchRunnerOptions options_;
  BatchJob& job_;
  const BatchFacts& facts_;
  const ServedModel& model_;
  Engine& engine_;

  // run()'s thread only.
  std::deque<int64_t> suspects_;  // to be run alone
  std::set<int64_t> alone_;       // what was in suspects_
  int64_t next_line_;
  std::deque<std::unique_ptr<Run>> ready_;           // read, their intents are noted
  std::map<int64_t, std::unique_ptr<Run>> running_;  // by line
  int64_t outputs_running_ = 0;
  std::deque<absl::Duration> recent_;  // how long lines took
  absl::Time commit_due_ = absl::InfiniteFuture();
  absl::Time disk_failed_ = absl::InfiniteFuture();  // since when
  absl::Time disk_retry_ = absl::InfinitePast();
  std::string out_of_time_;

  const std::shared_ptr<Inbox> inbox_;  // the engine's sinks may outlive us by a moment
  mutable std::mutex state_mutex_;
  BatchState state_;
};

}  // namespace octet
