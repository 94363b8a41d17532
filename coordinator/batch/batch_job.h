// BatchJob: a batch job as it lies on disk: its input, what defines its answers, the journal of those that are made,
// and the output file that comes of them. Everything but the output is in the directory OUTPUT.octet:
//   manifest.json  what the job is; a run that would give other answers is refused
//   index.json     where the input's lines are
//   epoch-*, seg-* the journal
//   done.json      counts and the output's SHA-256, once it is finished
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/batch/batch_input.h"
#include "coordinator/batch/disk.h"
#include "coordinator/batch/journal.h"
#include "nlohmann/json.hpp"

namespace octet {

// Called often, with what is done and all there is.
using BatchProgress = std::function<void(int64_t done, int64_t total)>;

struct BatchJobOptions {
  std::string input, output;
  int32_t shard = 0, shards = 1;    // this run's part of the input: contiguous lines, so that outputs can be joined
  nlohmann::ordered_json identity;  // an object: whatever else gives other answers when it differs
  std::optional<int64_t> created;   // Unix seconds; default: what the job began with, or now
  std::string writer;               // who this run is: "host, process 12"
  int64_t segment_bytes = int64_t{64} << 20;
  BatchProgress progress;  // of reading the input
};

struct BatchTotals {
  int64_t lines = 0, failed = 0, prompt_tokens = 0, completion_tokens = 0;
};

class BatchJob {
 public:
  // Begins the job or goes on with it. INVALID_ARGUMENT, FAILED_PRECONDITION and NOT_FOUND for what another try would
  // not help: an output that is somebody else's, an input or an identity that is not the one the job began with (naming
  // the first difference), two lines with one custom_id. UNAVAILABLE when the disk does not do its part.
  static absl::StatusOr<std::unique_ptr<BatchJob>> open(Disk* disk, const BatchJobOptions& options);

  const std::string& id() const { return id_; }  // of the identity, the input and `created`, whatever the shard; hex
  int64_t created() const { return created_; }
  const std::string& directory() const { return directory_; }
  int64_t first_line() const { return first_line_; }
  int64_t lines() const { return lines_; }
  const nlohmann::ordered_json& manifest() const { return manifest_; }

  // Set when an earlier run has finished the job: there is nothing to do, and no journal.
  const std::optional<BatchTotals>& done() const { return done_; }
  BatchInput& input() { return *input_; }
  Journal& journal() { return *journal_; }

  // Writes the output from the journal. REQUIRES: every line is answered and committed. May be killed anywhere and
  // called again by a later run. ABORTED when a later run has taken over.
  absl::Status finish(const BatchProgress& progress);
  // How many lines have answers of how many tokens, errors left out. Known after finish().
  const std::map<uint32_t, int64_t>& answer_tokens() const { return answer_tokens_; }

 private:
  BatchJob(Disk* disk, const BatchJobOptions& options);
  std::string path(const std::string& name) const { return directory_ + "/" + name; }
  absl::Status read_input();
  absl::Status begin();
  absl::Status resume(const std::string& manifest);
  absl::Status read_done();
  absl::Status sweep(int before_epoch);
  absl::Status write_output(const BatchProgress& progress, nlohmann::ordered_json* done);

  Disk* const disk_;
  const BatchJobOptions options_;
  const std::string directory_;
  std::string id_;
  int64_t created_ = 0, first_line_ = 0, lines_ = 0;
  nlohmann::ordered_json manifest_;
  std::optional<BatchTotals> done_;
  std::optional<BatchInput> input_;
  std::unique_ptr<Journal> journal_;
  std::map<uint32_t, int64_t> answer_tokens_;
};

// OUTPUT.octet.
std::string batch_directory(const std::string& output);

// Joins the outputs of a job's shards to `output`, in the order of its lines, whatever order they are given in. Refuses
// (FAILED_PRECONDITION) shards that are not finished, that have changed since, that belong to different jobs, are
// missing or there twice.
absl::StatusOr<BatchTotals> merge_batch(Disk* disk, const std::string& output, const std::vector<std::string>& shards,
                                        const BatchProgress& progress);

}  // namespace octet
