#include "coordinator/batch/batch_job.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "coordinator/batch/sha256.h"
#include "kernels/check.h"

namespace octet {
namespace {

using nlohmann::ordered_json;

constexpr int kFormat = 1;
constexpr char kManifest[] = "manifest.json";
constexpr char kIndex[] = "index.json";
constexpr char kDone[] = "done.json";
constexpr char kPart[] = "part-";  // and the epoch: an output that is being written
constexpr size_t kBufferBytes = size_t{1} << 20;

ordered_json parse(const std::string& text) { return ordered_json::parse(text, nullptr, /*allow_exceptions=*/false); }

// OK, or the first member that differs between what a job began with and what this run has.
absl::Status compare(const ordered_json& began, const ordered_json& now, const std::string& directory) {
  for (const auto& [key, value] : now.items()) {
    const ordered_json before = began.value(key, ordered_json());
    if (before == value) continue;
    return absl::FailedPreconditionError(
        absl::StrCat("the job in ", directory, " began with ", key, " ", before.dump(), ", this run has ", value.dump(),
                     ": it would mix two kinds of answers. Run it as it began, or give another --output"));
  }
  return absl::OkStatus();
}

ordered_json to_json(const BatchTotals& totals) {
  return {{"lines", totals.lines},
          {"failed", totals.failed},
          {"prompt_tokens", totals.prompt_tokens},
          {"completion_tokens", totals.completion_tokens}};
}

absl::StatusOr<BatchTotals> totals_of(const ordered_json& done, const std::string& path) {
  BatchTotals totals;
  for (const auto& [key, to] : {std::pair<const char*, int64_t*>{"lines", &totals.lines},
                                {"failed", &totals.failed},
                                {"prompt_tokens", &totals.prompt_tokens},
                                {"completion_tokens", &totals.completion_tokens}}) {
    if (!done.is_object() || !done.contains(key) || !done[key].is_number_integer()) {
      return absl::FailedPreconditionError(absl::StrCat(path, " is damaged: it has no ", key));
    }
    *to = done[key];
  }
  return totals;
}

// A file that is made beside its place and moved there when it is whole.
class OutputFile {
 public:
  static absl::StatusOr<OutputFile> create(Disk* disk, const std::string& path, const std::string& suffix) {
    const std::string beside = absl::StrCat(path, ".", suffix);
    if (absl::Status status = disk->remove(beside); !status.ok()) return status;
    absl::StatusOr<std::unique_ptr<DiskFile>> file = disk->create(beside);
    if (!file.ok()) return file.status();
    return OutputFile(disk, path, beside, *std::move(file));
  }

  absl::Status append(std::string_view bytes) {
    buffer_.append(bytes);
    return buffer_.size() < kBufferBytes ? absl::OkStatus() : flush();
  }

  absl::Status finish() {
    if (absl::Status status = flush(); !status.ok()) return status;
    if (absl::Status status = file_->sync(); !status.ok()) return status;
    if (absl::Status status = disk_->rename(beside_, path_); !status.ok()) return status;
    return disk_->sync_directory(directory_of(path_));
  }

  int64_t bytes() const { return bytes_; }
  std::string sha256() { return hash_.hex(); }

 private:
  OutputFile(Disk* disk, std::string path, std::string beside, std::unique_ptr<DiskFile> file)
      : disk_(disk), path_(std::move(path)), beside_(std::move(beside)), file_(std::move(file)) {}

  absl::Status flush() {
    if (absl::Status status = file_->write(bytes_, buffer_); !status.ok()) return status;
    hash_.add(buffer_);
    bytes_ += static_cast<int64_t>(buffer_.size());
    buffer_.clear();
    return absl::OkStatus();
  }

  Disk* disk_;
  std::string path_, beside_;
  std::unique_ptr<DiskFile> file_;
  std::string buffer_;
  int64_t bytes_ = 0;
  Sha256 hash_;
};

absl::StatusOr<bool> exists(Disk* disk, const std::string& path) {
  const absl::Status status = disk->open(path).status();
  if (absl::IsNotFound(status)) return false;
  return status.ok() ? absl::StatusOr<bool>(true) : status;
}

std::string job_id_of(const ordered_json& identity, const InputIndex& input, int64_t created) {
  Sha256 hash;
  hash.add(
      ordered_json{{"format", kFormat}, {"identity", identity}, {"input", input.sha256}, {"created", created}}.dump());
  return hash.hex();
}

}  // namespace

std::string batch_directory(const std::string& output) { return output + ".octet"; }

BatchJob::BatchJob(Disk* disk, const BatchJobOptions& options)
    : disk_(disk), options_(options), directory_(batch_directory(options.output)) {}

absl::StatusOr<std::unique_ptr<BatchJob>> BatchJob::open(Disk* disk, const BatchJobOptions& options) {
  OCTET_CHECK(sodium_init() >= 0, "libsodium does not start");
  if (options.shards < 1 || options.shard < 0 || options.shard >= options.shards) {
    return absl::InvalidArgumentError(
        absl::StrCat("--shard ", options.shard, "/", options.shards, ": shards are 0/N to N-1/N"));
  }
  if (options.shards > 1 && !options.created.has_value()) {
    return absl::InvalidArgumentError(
        "the shards of a job bear one date, or they could not be joined: give all of them the same --created, such as "
        "$(stat -c %Y INPUT)");
  }
  std::unique_ptr<BatchJob> job(new BatchJob(disk, options));
  const absl::StatusOr<std::string> manifest = disk->read(job->path(kManifest));
  if (!manifest.ok() && !absl::IsNotFound(manifest.status())) return manifest.status();
  const absl::Status status = manifest.ok() ? job->resume(*manifest) : job->begin();
  if (!status.ok()) return status;
  if (job->done_.has_value()) {
    if (absl::Status swept = job->sweep(std::numeric_limits<int>::max()); !swept.ok()) return swept;
    return job;
  }
  absl::StatusOr<std::unique_ptr<Journal>> journal = Journal::open({.disk = disk,
                                                                    .directory = job->directory_,
                                                                    .job_id = job->id_,
                                                                    .first_line = job->first_line_,
                                                                    .lines = job->lines_,
                                                                    .segment_bytes = options.segment_bytes,
                                                                    .writer = options.writer});
  if (!journal.ok()) return journal.status();
  job->journal_ = *std::move(journal);
  return job;
}

// The index of the file as it is now: the one that was made before, if the file has not changed since.
absl::Status BatchJob::read_input() {
  absl::StatusOr<InputIndex> file = stat_input(options_.input);
  if (!file.ok()) return file.status();
  const absl::StatusOr<std::string> saved = disk_->read(path(kIndex));
  if (saved.ok()) {
    absl::StatusOr<InputIndex> index = InputIndex::from_json(*saved);
    if (index.ok() && index->bytes == file->bytes && index->modified_ns == file->modified_ns) {
      absl::StatusOr<BatchInput> input = BatchInput::open(options_.input, *std::move(index));
      if (!input.ok()) return input.status();
      input_.emplace(*std::move(input));
      return absl::OkStatus();
    }
  }
  absl::StatusOr<InputIndex> index = index_input(options_.input, options_.progress);
  if (!index.ok()) return index.status();
  if (absl::Status status = disk_->make_directory(directory_); !status.ok()) return status;
  if (absl::Status status = disk_->replace(path(kIndex), index->to_json()); !status.ok()) return status;
  absl::StatusOr<BatchInput> input = BatchInput::open(options_.input, *std::move(index));
  if (!input.ok()) return input.status();
  input_.emplace(*std::move(input));
  return absl::OkStatus();
}

absl::Status BatchJob::begin() {
  const absl::StatusOr<bool> taken = exists(disk_, options_.output);
  if (!taken.ok()) return taken.status();
  if (*taken) {
    return absl::FailedPreconditionError(absl::StrCat(options_.output, " exists, and no job in ", directory_,
                                                      " has made it: remove it, or give another --output"));
  }
  if (absl::Status status = read_input(); !status.ok()) return status;
  const InputIndex& index = input_->index();
  created_ = options_.created.value_or(absl::ToUnixSeconds(absl::Now()));
  id_ = job_id_of(options_.identity, index, created_);
  first_line_ = index.lines * options_.shard / options_.shards;
  lines_ = index.lines * (options_.shard + 1) / options_.shards - first_line_;
  manifest_ = {
      {"format", kFormat},
      {"job_id", id_},
      {"created", created_},
      {"input", {{"path", options_.input}, {"bytes", index.bytes}, {"sha256", index.sha256}, {"lines", index.lines}}},
      {"shard",
       {{"index", options_.shard}, {"count", options_.shards}, {"first_line", first_line_}, {"lines", lines_}}},
      {"identity", options_.identity}};
  return disk_->replace(path(kManifest), manifest_.dump(2) + "\n");
}

absl::Status BatchJob::resume(const std::string& manifest) {
  manifest_ = parse(manifest);
  // A manifest is whole or not there; one that is neither was changed by somebody.
  if (!manifest_.is_object() || !manifest_.contains("identity") || !manifest_.contains("input") ||
      !manifest_.contains("shard") || manifest_.value("format", 0) != kFormat) {
    return absl::FailedPreconditionError(absl::StrCat(path(kManifest),
                                                      " is damaged or of another version of Octet: "
                                                      "remove ",
                                                      directory_, " to begin the job again"));
  }
  created_ = manifest_.value("created", int64_t{0});
  if (absl::Status status = compare(manifest_["identity"], options_.identity, directory_); !status.ok()) return status;
  if (absl::Status status =
          compare(manifest_["shard"], {{"index", options_.shard}, {"count", options_.shards}}, directory_);
      !status.ok()) {
    return status;
  }
  if (options_.created.has_value()) {
    if (absl::Status status = compare(manifest_, {{"created", *options_.created}}, directory_); !status.ok())
      return status;
  }
  if (absl::Status status = read_input(); !status.ok()) return status;
  const InputIndex& index = input_->index();
  if (absl::Status status = compare(manifest_["input"], {{"bytes", index.bytes}, {"sha256", index.sha256}}, directory_);
      !status.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the input ", options_.input, " has changed: ", std::string(status.message())));
  }
  id_ = job_id_of(manifest_["identity"], index, created_);
  first_line_ = manifest_["shard"].value("first_line", int64_t{0});
  lines_ = manifest_["shard"].value("lines", int64_t{0});
  return read_done();
}

absl::Status BatchJob::read_done() {
  const absl::StatusOr<std::string> text = disk_->read(path(kDone));
  if (absl::IsNotFound(text.status())) return absl::OkStatus();
  if (!text.ok()) return text.status();
  const absl::StatusOr<BatchTotals> totals = totals_of(parse(*text), path(kDone));
  if (!totals.ok()) return totals.status();
  const absl::StatusOr<bool> there = exists(disk_, options_.output);
  if (!there.ok()) return there.status();
  if (!*there) {
    return absl::FailedPreconditionError(absl::StrCat("the job in ", directory_, " is finished, but its output ",
                                                      options_.output, " is gone: remove ", directory_,
                                                      " to run it again"));
  }
  done_ = *totals;
  return absl::OkStatus();
}

absl::Status BatchJob::finish(const BatchProgress& progress) {
  OCTET_CHECK(journal_->answers() == lines_, "a job is finished before its lines are");
  if (absl::Status status = journal_->check_fence(); !status.ok()) return status;
  const int epoch = journal_->epoch();
  if (absl::Status status = sweep(epoch); !status.ok()) return status;
  ordered_json done;
  if (absl::Status status = write_output(progress, &done); !status.ok()) {
    // A zombie that had every answer may have finished meanwhile, and removed the journal: its output is ours.
    if (absl::IsDataLoss(status) && read_done().ok() && done_.has_value()) return absl::OkStatus();
    return absl::IsDataLoss(status) ? absl::UnavailableError(status.message()) : status;
  }
  if (absl::Status status = disk_->replace(path(kDone), done.dump(2) + "\n"); !status.ok()) return status;
  done_ = *totals_of(done, path(kDone));
  return sweep(epoch + 1);
}

// Removes what runs that were killed in the finish have left beside the output, and of a job that is done the journal.
absl::Status BatchJob::sweep(int before_epoch) {
  const std::string directory = directory_of(options_.output);
  const absl::StatusOr<std::vector<std::string>> names = disk_->list(directory);
  if (!names.ok()) return names.status();
  const std::string part = options_.output.substr(options_.output.find_last_of('/') + 1) + "." + kPart;
  for (const std::string& name : *names) {
    int epoch = 0;
    if (!absl::StartsWith(name, part) || !absl::SimpleAtoi(name.substr(part.size()), &epoch)) continue;
    if (epoch >= before_epoch) continue;
    if (absl::Status status = disk_->remove(directory + "/" + name); !status.ok()) return status;
  }
  return done_.has_value() ? remove_segments(disk_, directory_, before_epoch) : absl::OkStatus();
}

absl::Status BatchJob::write_output(const BatchProgress& progress, ordered_json* done) {
  absl::StatusOr<OutputFile> output =
      OutputFile::create(disk_, options_.output, absl::StrCat(kPart, journal_->epoch()));
  if (!output.ok()) return output.status();
  for (int64_t i = 0; i < lines_; ++i) {
    const absl::StatusOr<JournalAnswer> answer = journal_->read_answer(first_line_ + i);
    if (!answer.ok()) return answer.status();
    if (absl::Status status = output->append(answer->text); !status.ok()) return status;
    if (absl::Status status = output->append("\n"); !status.ok()) return status;
    if (!answer->failed) ++answer_tokens_[answer->completion_tokens];
    if (progress) progress(i + 1, lines_);
  }
  if (absl::Status status = output->finish(); !status.ok()) return status;
  *done = to_json({.lines = lines_,
                   .failed = journal_->failed(),
                   .prompt_tokens = journal_->prompt_tokens(),
                   .completion_tokens = journal_->completion_tokens()});
  (*done)["bytes"] = output->bytes();
  (*done)["sha256"] = output->sha256();
  return absl::OkStatus();
}

namespace {

// A finished shard, as merge_batch() sees it.
struct Shard {
  std::string output;
  ordered_json manifest, done;
};

absl::StatusOr<Shard> read_shard(Disk* disk, const std::string& output) {
  Shard shard{.output = output};
  for (const auto& [name, to] : {std::pair{kManifest, &shard.manifest}, std::pair{kDone, &shard.done}}) {
    const std::string path = batch_directory(output) + "/" + name;
    const absl::StatusOr<std::string> text = disk->read(path);
    if (absl::IsNotFound(text.status())) {
      return absl::FailedPreconditionError(absl::StrCat(output, " is not a finished job's output: ", path,
                                                        " is missing. Run its shard to the end first"));
    }
    if (!text.ok()) return text.status();
    *to = parse(*text);
    if (!to->is_object()) return absl::FailedPreconditionError(absl::StrCat(path, " is damaged"));
  }
  return shard;
}

int64_t shard_number(const Shard& shard, const char* key) {
  return shard.manifest.value("shard", ordered_json::object()).value(key, int64_t{-1});
}

// All shards of one job, each once, in order.
absl::Status sort_shards(std::vector<Shard>* shards) {
  std::ranges::sort(*shards, {}, [](const Shard& shard) { return shard_number(shard, "index"); });
  const Shard& first = shards->front();
  const int64_t count = shard_number(first, "count");
  for (size_t i = 0; i < shards->size(); ++i) {
    const Shard& shard = (*shards)[i];
    if (shard.manifest.value("job_id", "") != first.manifest.value("job_id", "") ||
        shard_number(shard, "count") != count) {
      return absl::FailedPreconditionError(absl::StrCat(first.output, " and ", shard.output,
                                                        " are of different jobs: their manifest.json differ (the same "
                                                        "--created and options for every shard make one job)"));
    }
    if (shard_number(shard, "index") != static_cast<int64_t>(i)) {
      return absl::FailedPreconditionError(absl::StrCat("the job has shards 0/", count, " to ", count - 1, "/", count,
                                                        ", but shard ", i, " is missing or another is there twice"));
    }
  }
  if (static_cast<int64_t>(shards->size()) != count) {
    return absl::FailedPreconditionError(
        absl::StrCat("the job has ", count, " shards, ", shards->size(), " are given"));
  }
  return absl::OkStatus();
}

// `bytes` counts over all shards.
absl::Status append_shard(Disk* disk, const Shard& shard, OutputFile* output, int64_t* bytes, int64_t all,
                          const BatchProgress& progress) {
  const absl::StatusOr<std::unique_ptr<DiskFile>> file = disk->open(shard.output);
  if (!file.ok()) return file.status();
  Sha256 hash;
  for (int64_t offset = 0;;) {
    const absl::StatusOr<std::string> part = (*file)->read(offset, kBufferBytes);
    if (!part.ok()) return part.status();
    if (part->empty()) break;
    hash.add(*part);
    if (absl::Status status = output->append(*part); !status.ok()) return status;
    offset += static_cast<int64_t>(part->size());
    *bytes += static_cast<int64_t>(part->size());
    if (progress) progress(*bytes, all);
  }
  if (hash.hex() == shard.done.value("sha256", "")) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(shard.output,
                                                    " has changed since its job finished: its SHA-256 is "
                                                    "not the one in ",
                                                    batch_directory(shard.output), "/", kDone));
}

// Takes OUTPUT.octet for the merge: it is new, or an earlier merge of the same job has made it.
absl::Status claim_merge(Disk* disk, const std::string& output, const std::string& manifest) {
  const std::string directory = batch_directory(output), path = directory + "/" + kManifest;
  const absl::StatusOr<std::string> before = disk->read(path);
  if (before.ok() && *before == manifest) return absl::OkStatus();
  if (before.ok()) {
    return absl::FailedPreconditionError(absl::StrCat(directory, " is another job's: give another --output"));
  }
  if (!absl::IsNotFound(before.status())) return before.status();
  const absl::StatusOr<bool> taken = exists(disk, output);
  if (!taken.ok()) return taken.status();
  if (*taken) {
    return absl::FailedPreconditionError(absl::StrCat(output, " exists and no job has made it: remove it first"));
  }
  if (absl::Status status = disk->make_directory(directory); !status.ok()) return status;
  return disk->replace(path, manifest);
}

}  // namespace

absl::StatusOr<BatchTotals> merge_batch(Disk* disk, const std::string& output, const std::vector<std::string>& shards,
                                        const BatchProgress& progress) {
  OCTET_CHECK(sodium_init() >= 0, "libsodium does not start");
  std::vector<Shard> parts;
  int64_t all = 0;
  BatchTotals totals;
  for (const std::string& path : shards) {
    absl::StatusOr<Shard> shard = read_shard(disk, path);
    if (!shard.ok()) return shard.status();
    const absl::StatusOr<BatchTotals> own = totals_of(shard->done, batch_directory(path) + "/" + kDone);
    if (!own.ok()) return own.status();
    totals.lines += own->lines;
    totals.failed += own->failed;
    totals.prompt_tokens += own->prompt_tokens;
    totals.completion_tokens += own->completion_tokens;
    all += shard->done.value("bytes", int64_t{0});
    parts.push_back(*std::move(shard));
  }
  if (parts.empty()) return absl::InvalidArgumentError("no outputs of shards are given");
  if (absl::Status status = sort_shards(&parts); !status.ok()) return status;

  if (std::ranges::find(shards, output) != shards.end()) {
    return absl::FailedPreconditionError(absl::StrCat(output, " is one of the shards: give another --output"));
  }
  // The whole job, as if it had been one. The manifest comes first: a merge that is killed knows its own the next time.
  ordered_json manifest = parts.front().manifest;
  manifest["shard"] = {{"index", 0}, {"count", 1}, {"first_line", 0}, {"lines", totals.lines}};
  if (absl::Status status = claim_merge(disk, output, manifest.dump(2) + "\n"); !status.ok()) return status;

  absl::StatusOr<OutputFile> file = OutputFile::create(disk, output, "part-merge");
  if (!file.ok()) return file.status();
  int64_t bytes = 0;
  for (const Shard& part : parts) {
    if (absl::Status status = append_shard(disk, part, &*file, &bytes, all, progress); !status.ok()) return status;
  }
  if (absl::Status status = file->finish(); !status.ok()) return status;
  ordered_json done = to_json(totals);
  done["bytes"] = bytes;
  done["sha256"] = file->sha256();
  const std::string done_path = batch_directory(output) + "/" + kDone;
  if (absl::Status status = disk->replace(done_path, done.dump(2) + "\n"); !status.ok()) return status;
  return totals;
}

}  // namespace octet
