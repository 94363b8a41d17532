// Provenance: what must be known of a batch job's output wherever it goes: how it was made, and what the model's
// licence asks of those who use it. Written beside the output, as OUTPUT.provenance.json and, for Llama models,
// OUTPUT.NOTICE.txt; the licence files of the model's directory come along as OUTPUT.LICENSE...
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/batch/batch_job.h"
#include "coordinator/batch/disk.h"

namespace octet {

// What tells a Llama model from another of its architecture.
struct ModelTraits {
  std::string directory;
  bool llama3_tokens = false;         // the vocabulary has Llama 3's special tokens
  std::optional<double> rope_factor;  // of rope_scaling "llama3": 8 in 3.1 and 3.3, 32 in 3.2
};

struct LlamaLicence {
  std::string version;   // "3.1"
  bool certain = false;  // read in a licence file of the model's directory, and not guessed
};

// The licence of a Llama model; nothing for a model that is none.
std::optional<LlamaLicence> llama_licence(const ModelTraits& traits);

// The text that travels with the outputs of a Llama model.
std::string llama_notice(const LlamaLicence& licence, const std::string& model);

// Writes the files. REQUIRES: the job is done. May be called again. `octet_version` is the program's.
absl::Status write_provenance(Disk* disk, const BatchJob& job, const std::string& output, const ModelTraits& traits,
                              const std::string& octet_version);

// Gives `output`, which was merged from the outputs of all shards, what one of them has beside it, with the totals of
// all.
absl::Status merge_provenance(Disk* disk, const std::string& shard_output, const std::string& output,
                              const BatchTotals& totals);

}  // namespace octet
