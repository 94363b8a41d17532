#include "launch/batch.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "coordinator/batch/batch_job.h"
#include "coordinator/batch/batch_runner.h"
#include "coordinator/batch/provenance.h"
#include "coordinator/batch/sha256.h"
#include "coordinator/engine.h"
#include "launch/batch_report.h"
#include "launch/drain.h"
#include "launch/log.h"
#include "launch/machine.h"
#include "launch/progress.h"
#include "launch/rank.h"
#include "launch/version.h"
#include "worker/flight.h"

namespace octet {
namespace {

// For whoever runs the job again, or does not: sysexits.h has the words for the last two.
enum ExitStatus { kAllDone = 0, kDoneWithErrors = 3, kComeBack = 75, kRefused = 78 };

struct BatchOptions {
  RankOptions rank{.arithmetic = Arithmetic::kReproducible, .refused = kRefused, .lost = kComeBack};
  std::string input, output;
  std::string shard = "0/1";
  uint64_t seed = 0;
  SamplingDefaults defaults;
  std::optional<int64_t> created;
  double drain_seconds = 60.0;
  double disk_patience_seconds = 60.0;
  int64_t segment_bytes = int64_t{64} << 20;
  std::string svg_file;
};

int exit_status_of(const BatchTotals& totals) { return totals.failed == 0 ? kAllDone : kDoneWithErrors; }

constexpr char kSince[] = ", since ";

// This run, as its epoch's file has it. The time is there because a container may give every run the same process id.
std::string run_name() {
  return absl::StrCat(host_name(), ", process ", getpid(), kSince,
                      absl::FormatTime(absl::RFC3339_full, absl::Now(), absl::UTCTimeZone()));
}

// Whether `flight` is that of the run whose name is `text`, which has begun before its flight.
bool is_of_run(const Flight& flight, const std::string& text) {
  const std::pair<std::string, std::string> process_and_time = absl::StrSplit(text, absl::MaxSplits(kSince, 1));
  absl::Time since;
  std::string error;
  return process_and_time.first == absl::StrCat(flight.host, ", process ", flight.pid) &&
         absl::ParseTime(absl::RFC3339_full, process_and_time.second, &since, &error) && flight.start >= since;
}

// Where ranks leave their flights: beside the journal, so that whichever machine goes on with the job finds them.
std::string flights_of(const std::string& output) { return batch_directory(output) + "/flights"; }

// The flights of the run of that name; empty when it has left none.
std::vector<Flight> flights_of_run(const RankOptions& options, const std::string& run) {
  std::vector<std::string> directories;
  if (!options.flight_directory.empty()) {
    directories.push_back(options.flight_directory);
  } else {
    std::error_code error;
    std::filesystem::directory_iterator entry(options.flight_home, error), end;
    for (; !error && entry != end; entry.increment(error)) directories.push_back(entry->path());
  }
  for (const std::string& directory : directories) {
    absl::StatusOr<std::vector<Flight>> flights = read_flights(directory);
    if (!flights.ok() || flights->empty()) continue;
    if (flights->front().rank == 0 && is_of_run(flights->front(), run)) return *std::move(flights);
  }
  return {};
}

// Whether an earlier run's end may be the fault of the lines that were in flight then: only if a rank's last words say
// so. Ranks that were killed, and those that lost them, say nothing against a line.
void judge(int epoch, const RankOptions& options, Journal* journal) {
  const absl::StatusOr<std::string> run = journal->writer_of(epoch);
  for (const Flight& flight : run.ok() ? flights_of_run(options, *run) : std::vector<Flight>()) {
    if (!blames_the_work(flight.kind)) continue;
    const std::string cause = absl::StrCat("rank ", flight.rank, ": ", flight.last_words);
    log_line(LogLevel::kWarning,
             absl::StrCat("run ", epoch, " ended by ", name_of(flight.kind), ", which counts against the ",
                          journal->in_flight(epoch).size(), " lines that were in flight; ", cause));
    return journal->judge(epoch, /*counts=*/true, cause);
  }
  journal->judge(epoch, /*counts=*/false, "no rank's last words blame the work");
}

// Of the files of a checkpoint that decide how text becomes tokens and tokens are chosen; the weights have a digest of
// their own.
std::string text_digest(const std::string& model) {
  Sha256 hash;
  for (const char* name :
       {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}) {
    const absl::StatusOr<std::string> text = real_disk().read(absl::StrCat(model, "/", name));
    hash.add(absl::StrCat(name, text.ok() ? absl::StrCat(" ", text->size(), " ") : std::string(" none ")));
    if (text.ok()) hash.add(*text);
  }
  return hash.hex().substr(0, 16);
}

absl::StatusOr<std::pair<int32_t, int32_t>> parse_shard(const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, '/');
  int32_t shard = 0, shards = 0;
  if (parts.size() == 2 && absl::SimpleAtoi(parts[0], &shard) && absl::SimpleAtoi(parts[1], &shards)) {
    return std::pair(shard, shards);
  }
  return absl::InvalidArgumentError(absl::StrCat("--shard is I/N, from 0/N to N-1/N; found \"", text, "\""));
}

// Whatever else gives other answers when it differs.
nlohmann::ordered_json identity_of(const Job& job, const BatchOptions& options) {
  nlohmann::ordered_json identity = {{"model", job.model->name},
                                     {"checkpoint_digest", absl::StrFormat("%016x", job.checkpoint_digest)},
                                     {"text_digest", text_digest(options.rank.runtime.model)},
                                     {"numerics_id", job.facts.numerics_id},
                                     {"reproducible", job.facts.reproducible},
                                     {"max_context", job.plan.limits.max_context},
                                     {"seed", options.seed}};
  const auto add = [&](const char* name, const auto& value) {
    if (value.has_value()) identity[name] = *value;
  };
  add("temperature", options.defaults.temperature);
  add("top_p", options.defaults.top_p);
  add("top_k", options.defaults.top_k);
  add("max_tokens", options.defaults.max_tokens);
  return identity;
}

// Tells how far the job is, several times a second on a terminal, every few seconds in a log, and in a file for others.
class Reporter {
 public:
  Reporter(const BatchRunner& runner, const Engine& engine, const BatchJob& job, LogFormat format)
      : runner_(runner), engine_(engine), job_(job), terminal_(format == LogFormat::kText && isatty(STDERR_FILENO)) {
    thread_ = std::thread([this] { watch(); });
  }
  ~Reporter() { end(); }

  // The last look; nothing is shown afterwards.
  const BatchReport& end() {
    if (!thread_.joinable()) return report_;
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    changed_.notify_one();
    thread_.join();
    look();
    if (terminal_) std::fprintf(stderr, "\r\033[K");
    return report_;
  }

  // After end().
  void write_status(const std::string& name) {
    nlohmann::ordered_json status = report_.status(name);
    status.update({{"job_id", job_.id()},
                   {"run_by", absl::StrCat(host_name(), ", process ", getpid())},
                   {"updated", absl::ToUnixSeconds(absl::Now())}});
    // Who watches can wait for the next one.
    real_disk().replace(job_.directory() + "/status.json", status.dump(2) + "\n").IgnoreError();
  }

 private:
  static constexpr absl::Duration kLook = absl::Milliseconds(250), kWrite = absl::Seconds(2), kLog = absl::Seconds(5);

  void look() {
    const EngineStats stats = engine_.stats();
    report_.add({.seconds = absl::ToDoubleSeconds(absl::Now() - began_),
                 .state = runner_.state(),
                 .prompt_tokens = static_cast<int64_t>(stats.prompt_tokens),
                 .generated_tokens = static_cast<int64_t>(stats.generated_tokens)});
  }

  void watch() {
    absl::Time written = absl::InfinitePast(), logged = began_;
    std::unique_lock lock(mutex_);
    while (!ending_) {
      look();
      const absl::Time now = absl::Now();
      if (now - written >= kWrite) {
        written = now;
        write_status("running");
      }
      if (terminal_) {
        show_bar();
      } else if (now - logged >= kLog) {
        logged = now;
        log(report_.line());
      }
      changed_.wait_for(lock, absl::ToChronoMilliseconds(kLook), [this] { return ending_; });
    }
  }

  void show_bar() const {
    constexpr int kCells = 30;
    const int cells = static_cast<int>(report_.share() * kCells);
    std::fprintf(stderr, "\r[%s%s] %s\033[K", std::string(cells, '#').c_str(), std::string(kCells - cells, '.').c_str(),
                 report_.line().c_str());
  }

  const BatchRunner& runner_;
  const Engine& engine_;
  const BatchJob& job_;
  const bool terminal_;
  const absl::Time began_ = absl::Now();
  BatchReport report_;  // the thread's until it has ended
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ending_ = false;
  std::thread thread_;
};

class Batching final : public Leader {
 public:
  explicit Batching(const BatchOptions& options) : options_(options) {}

  absl::StatusOr<std::optional<int>> prepare(const Job& job) override {
    const absl::StatusOr<std::pair<int32_t, int32_t>> shard = parse_shard(options_.shard);
    if (!shard.ok()) return shard.status();
    Progress progress("Reading the input");
    absl::StatusOr<std::unique_ptr<BatchJob>> opened =
        BatchJob::open(&real_disk(), {.input = options_.input,
                                      .output = options_.output,
                                      .shard = shard->first,
                                      .shards = shard->second,
                                      .identity = identity_of(job, options_),
                                      .created = options_.created,
                                      .writer = run_name(),
                                      .segment_bytes = options_.segment_bytes,
                                      .progress = [&](int64_t done, int64_t all) { progress.update(done, all); }});
    progress.clear();
    if (!opened.ok()) return opened.status();
    batch_ = *std::move(opened);
    if (batch_->done().has_value()) {
      log(absl::StrCat("nothing to do: ", options_.output, " is finished"));
      if (absl::Status status = write_provenance(job); !status.ok()) return status;
      return exit_status_of(*batch_->done());
    }
    Journal& journal = batch_->journal();
    for (const int epoch : journal.unjudged()) judge(epoch, options_.rank, &journal);
    std::string begin = absl::StrFormat("job %s: %d of %d lines are answered, run %d", batch_->id().substr(0, 12),
                                        journal.answers(), batch_->lines(), journal.epoch());
    if (const int64_t lost = journal.in_flight_last(); lost > 0) {
      absl::StrAppend(&begin, "; ", lost, " lines were in flight when the one before ended");
    }
    log(begin);
    return std::nullopt;
  }

  absl::StatusOr<int> lead(const Job& job, WorkerGroup* workers) override {
    Drain& drain = *job.drain;
    Engine engine({.limits = job.plan.limits, .max_waiting = std::numeric_limits<int32_t>::max()}, workers,
                  [&drain](const absl::Status& cause) { drain.fail(cause); });
    const BatchFacts facts = facts_of(job);
    BatchRunner runner({.outputs_in_flight = 2 * int64_t{job.plan.limits.slots},
                        .disk_patience = absl::Seconds(options_.disk_patience_seconds),
                        .end = job_end() - kGoodbye},
                       batch_.get(), &facts, job.model.get(), &engine);
    Reporter reporter(runner, engine, *batch_, options_.rank.log_format);
    absl::Status status;
    std::thread running([&] {
      status = runner.run();
      drain.request("the lines are done");
    });
    const DrainOrder order = drain.wait(job_end() - kGoodbye);
    const absl::Duration patience = order.failure.ok() ? absl::Seconds(options_.drain_seconds) : absl::ZeroDuration();
    runner.stop(std::min(absl::Now() + order.time_left(patience), job_end() - kGoodbye), order.reason);
    running.join();
    const BatchReport& report = reporter.end();
    if (!order.failure.ok()) {
      reporter.write_status("stopped");
      return order.failure;
    }
    return close(job, status, report, &reporter);
  }

 private:
  // For the finish, before the batch system ends the job. Whoever is killed in it finishes the next time.
  static constexpr absl::Duration kGoodbye = absl::Seconds(10);

  BatchFacts facts_of(const Job& job) const {
    return {.job_id = batch_->id(),
            .created = batch_->created(),
            .system_fingerprint = job.facts.numerics_id,
            .seed = options_.seed,
            .chat_date = absl::FormatTime("%d %b %Y", absl::FromUnixSeconds(batch_->created()), absl::UTCTimeZone()),
            .defaults = options_.defaults};
  }

  // The job's end, or this run's.
  absl::StatusOr<int> close(const Job& job, absl::Status status, const BatchReport& report, Reporter* reporter) {
    if (status.ok()) {
      reporter->write_status("finishing");
      Progress progress("Writing the output", [](int64_t lines) { return absl::StrCat(lines, " lines"); });
      status = batch_->finish([&](int64_t done, int64_t all) { progress.update(done, all); });
      progress.clear();
    }
    if (status.ok()) status = write_provenance(job);
    reporter->write_status(status.ok() ? "done" : "stopped");
    log(report.summary());
    // Fast arithmetic promises no bits.
    const int64_t other = job.facts.reproducible ? batch_->journal().contradictions() : 0;
    if (other > 0) {
      log_line(LogLevel::kWarning, absl::StrCat(other,
                                                " lines were answered twice with different words, the first "
                                                "counts: this should never be, please report it"));
    }
    if (absl::IsAborted(status)) {
      log_line(LogLevel::kWarning, std::string(status.message()));
      return kRefused;  // whoever started this one again would only take the job from the other
    }
    if (!status.ok()) {
      log_line(LogLevel::kWarning,
               absl::StrCat(std::string(status.message()), "; run the same command again to go on"));
      return kComeBack;
    }
    if (absl::Status drawn = draw(report); !drawn.ok()) log_line(LogLevel::kWarning, std::string(drawn.message()));
    log(absl::StrCat("finished: ", options_.output));
    return exit_status_of(*batch_->done());
  }

  absl::Status write_provenance(const Job& job) const {
    return octet::write_provenance(
        &real_disk(), *batch_, options_.output,
        {.directory = std::filesystem::weakly_canonical(options_.rank.runtime.model),
         .llama3_tokens = job.model->tokenizer.special_id("<|begin_of_text|>").has_value(),
         .rope_factor =
             job.config.rope_scaling ? std::optional<double>(job.config.rope_scaling->factor) : std::nullopt},
        kVersion);
  }

  absl::Status draw(const BatchReport& report) const {
    if (options_.svg_file.empty()) return absl::OkStatus();
    return real_disk().replace(options_.svg_file, report.svg(options_.output, batch_->answer_tokens()));
  }

  const BatchOptions& options_;
  std::unique_ptr<BatchJob> batch_;
};

int run_merge(const std::string& output, const std::vector<std::string>& shards) {
  Progress progress("Joining");
  absl::StatusOr<BatchTotals> totals =
      merge_batch(&real_disk(), output, shards, [&](int64_t done, int64_t all) { progress.update(done, all); });
  progress.clear();
  if (totals.ok()) {
    absl::Status status = merge_provenance(&real_disk(), shards.front(), output, *totals);
    if (!status.ok()) totals = status;
  }
  if (!totals.ok()) {
    std::fprintf(stderr, "octet batch merge: %s\n", std::string(totals.status().message()).c_str());
    return absl::IsUnavailable(totals.status()) ? kComeBack : kRefused;
  }
  absl::PrintF("%s: %d lines, %d of them with errors, %d prompt and %d completion tokens\n", output, totals->lines,
               totals->failed, totals->prompt_tokens, totals->completion_tokens);
  return exit_status_of(*totals);
}

void add_merge_command(CLI::App& batch, int* exit_code) {
  struct MergeOptions {
    std::string output;
    std::vector<std::string> shards;
  };
  auto options = std::make_shared<MergeOptions>();
  CLI::App* command = batch.add_subcommand("merge", "Join the outputs of a job's shards, in the order of its input");
  command->add_option("--output,-o", options->output, "File to write")->required();
  command->add_option("SHARD_OUTPUTS", options->shards, "Outputs of octet batch --shard I/N, all N of them")
      ->required();
  command->preparse_callback([&batch](size_t) {
    for (const char* name : {"--model", "--input", "--output"}) batch.get_option(name)->required(false);
  });
  command->callback([options, exit_code] { *exit_code = run_merge(options->output, options->shards); });
}

}  // namespace

void add_batch_command(CLI::App& app, int* exit_code) {
  auto options = std::make_shared<BatchOptions>();
  CLI::App* command = app.add_subcommand(
      "batch", "Answer a file of requests, as a job that may be killed and run again: one rank of mpirun or srun");
  command->footer(
      "mpirun -np 8 octet batch --model Llama-3.1-405B-Instruct-FP8 --input requests.jsonl --output answers.jsonl\n"
      "Lines are those of OpenAI's Batch API. Run the same command again after whatever ended it: the output will be "
      "the\n"
      "same bytes. Exit status: 0 all lines are answered, 3 some with errors, 75 come back, 78 this will not work.\n"
      "SIGUSR1, SIGTERM and SIGINT: lines under way get --drain-seconds, then 75.");
  add_rank_options(*command, &options->rank);
  command->add_option("--input,-i", options->input, "Requests, one JSON object a line")->required();
  command
      ->add_option("--output,-o", options->output,
                   "Answers, in the order of the requests; until they are complete they are kept in OUTPUT.octet")
      ->required();
  command->add_option("--shard", options->shard, "I/N: only the I-th of N parts of the input, from 0/N to N-1/N")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "Seeds of lines that bring none are made of this and the line's number")
      ->capture_default_str();
  const std::string otherwise = " of lines that do not say [the model's generation_config.json]";
  command->add_option("--temperature", options->defaults.temperature, "Temperature" + otherwise);
  command->add_option("--top-p", options->defaults.top_p, "top_p" + otherwise);
  command->add_option("--top-k", options->defaults.top_k, "top_k" + otherwise);
  command->add_option("--max-tokens", options->defaults.max_tokens, "max_tokens of lines that do not say");
  command->add_option("--created", options->created,
                      "Unix time that answers and chat dates bear: the same for all shards of a job [when it begins]");
  command
      ->add_option("--drain-seconds", options->drain_seconds,
                   "Time that lines under way get when the job is told to end; a second when mpirun is dying")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command
      ->add_option("--disk-patience-seconds", options->disk_patience_seconds,
                   "Time that a disk that is full or fails gets to come back, before the run ends with 75")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command->add_option("--journal-segment", options->segment_bytes, "Bytes that the journal reserves at a time")
      ->transform(CLI::AsSizeValue(false))
      ->check(CLI::PositiveNumber)
      ->default_str("64MiB");
  command->add_option("--svg", options->svg_file, "Draw throughput and lengths into this file at the end");
  add_merge_command(*command, exit_code);
  command->require_subcommand(0, 1);
  command->callback([command, options, exit_code] {
    if (!command->get_subcommands().empty()) return;
    options->rank.flight_home = flights_of(options->output);
    Batching batching(*options);
    *exit_code = run_rank(options->rank, &batching);
  });
}

}  // namespace octet
