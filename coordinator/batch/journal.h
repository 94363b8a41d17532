// Journal: the answers of a batch job, on disk as they are made, so that a job that is killed anywhere goes on where it
// was. Lines are known by their place among the input's lines, from 0.
//
// A journal is a directory of segments. Each incarnation of the job takes the next epoch and writes segments of its
// own, seg-EPOCH-NUMBER; the first record of its first segment seals what all earlier ones hold: their segments with
// the lengths that were valid then. What an older incarnation writes later, because it was stopped and not dead, is
// never read. A record has a checksum; the first one that does not hold ends its segment, and what follows it is
// ignored. Invariant: what commit() has returned OK for is found again, whole, by every later open().
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/batch/disk.h"

namespace octet {

struct JournalOptions {
  Disk* disk = nullptr;
  std::string directory;
  std::string job_id;      // records of another job do not count
  int64_t first_line = 0;  // of this job's lines
  int64_t lines = 0;
  int64_t segment_bytes = 0;  // reserved ahead, so that a full disk is met before the work
  std::string writer;         // who this incarnation is, for the message that fences an older one: "host, process 12"
};

// Of an answer's text.
constexpr size_t kMaxAnswerBytes = size_t{1} << 30;

struct JournalAnswer {
  int64_t line = 0;
  bool failed = false;  // it is an error's
  uint32_t prompt_tokens = 0, completion_tokens = 0;
  std::string text;  // the output line without its end
};

// One thread at a time.
class Journal {
 public:
  // Reads what there is, takes the next epoch and seals the earlier ones. UNAVAILABLE when the disk does not do its
  // part.
  static absl::StatusOr<std::unique_ptr<Journal>> open(const JournalOptions& options);
  ~Journal();

  int epoch() const { return epoch_; }

  // ---- What earlier incarnations left, and this one adds
  bool answered(int64_t line) const;
  int64_t answers() const { return answers_; }
  int64_t failed() const { return failed_; }
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t completion_tokens() const { return completion_tokens_; }
  // Lines that were answered twice with different words: never, unless a promise of the numerics is broken.
  int64_t contradictions() const { return contradictions_; }

  // ---- Lines that may have killed an earlier incarnation
  // Epochs that ended with lines in flight and have not been judged.
  std::vector<int> unjudged() const;
  const std::set<int64_t>& in_flight(int epoch) const { return in_flight_.at(epoch); }
  int64_t in_flight_last() const;                          // how many, in the epoch before this one
  absl::StatusOr<std::string> writer_of(int epoch) const;  // JournalOptions::writer of that run
  // Notes whether the end of that epoch counts as a try of the lines that were in flight then.
  void judge(int epoch, bool counts, std::string_view cause);
  // Tries of a line that is not answered; lines without any are not in it.
  std::map<int64_t, int> tries() const;

  // ---- Writing
  // Records are held in memory until commit() has returned OK.
  void add_intent(int64_t line);  // it is about to run
  void add_answer(const JournalAnswer& answer);
  int64_t uncommitted() const { return static_cast<int64_t>(unsynced_.size()); }  // records
  int64_t uncommitted_answers() const { return uncommitted_answers_; }

  // What was added is written, so that the next incarnation finds it unless the machine itself fails.
  absl::Status flush();
  // ... and synced: it survives that too. A failure leaves everything to the next call, in a new segment.
  absl::Status commit();
  // ABORTED when a later incarnation has taken over: nothing that this one writes counts any more.
  absl::Status check_fence() const;

  // ---- Reading answers back
  // REQUIRES: it is answered and committed. DATA_LOSS when the disk does not hold it any more.
  absl::StatusOr<JournalAnswer> read_answer(int64_t line) const;

 private:
  struct Segment {
    std::string name;
    int64_t valid_bytes = 0;
  };
  struct Place {
    int32_t segment = -1;  // in known_; -1: not answered
    int32_t bytes = 0;     // of the record
    int64_t offset = 0;
  };
  struct Unsynced {
    std::string bytes;     // the record
    int64_t answers = -1;  // the line that it answers
  };
  struct Record;

  explicit Journal(const JournalOptions& options);
  std::string path(const std::string& name) const { return options_.directory + "/" + name; }
  absl::Status take_epoch();
  absl::StatusOr<std::vector<Segment>> sealed_segments(const std::vector<std::string>& names) const;
  absl::Status scan(const Segment& segment);
  void take(const Record& record, const Place& place);
  void place_answer(int64_t line, const Place& place);
  void add(Unsynced record);
  absl::Status begin_segment();
  absl::Status write_unsynced();
  absl::Status sync_segment();
  absl::StatusOr<Record> read_record(const DiskFile& file, int64_t offset, int64_t end) const;
  const DiskFile* open_segment(int32_t segment) const;

  const JournalOptions options_;
  int epoch_ = 0;
  std::vector<Segment> known_;  // of earlier epochs as sealed, then our own
  std::vector<Place> places_;   // by line - first_line
  int64_t answers_ = 0, failed_ = 0, prompt_tokens_ = 0, completion_tokens_ = 0, contradictions_ = 0;
  std::map<int, std::set<int64_t>> in_flight_;  // by epoch: lines with an intent there and no answer
  std::map<int, bool> counts_;                  // by epoch: the verdict

  std::vector<Unsynced> unsynced_;
  int64_t uncommitted_answers_ = 0;
  std::unique_ptr<DiskFile> segment_;  // null: the next write begins one
  int next_segment_ = 0;
  int64_t written_ = 0;  // bytes of segment_
  size_t flushed_ = 0;   // of unsynced_, those that segment_ holds
  std::vector<int64_t> flushed_offsets_;

  mutable std::map<int32_t, std::unique_ptr<DiskFile>> reading_;
};

// Removes the segments of all epochs before this one. REQUIRES: the answers are safe elsewhere.
absl::Status remove_segments(Disk* disk, const std::string& directory, int before_epoch);

}  // namespace octet
