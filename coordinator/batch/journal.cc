#include "coordinator/batch/journal.h"

#include <sodium.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "kernels/check.h"

namespace octet {
namespace {

using nlohmann::json;

enum class Kind : uint8_t { kSeal = 1, kVerdict, kIntent, kAnswer };

// As it lies on disk, little-endian; the payload follows.
struct Header {
  uint32_t magic = 0;
  Kind kind = Kind::kSeal;
  uint8_t failed = 0;
  uint16_t zero = 0;
  int64_t line = 0;
  uint32_t epoch = 0;
  uint32_t prompt_tokens = 0, completion_tokens = 0;
  uint32_t payload_bytes = 0;
  uint64_t checksum = 0;  // of the header with this 0, and the payload
};
static_assert(sizeof(Header) == 40);

constexpr uint32_t kMagic = 0x4a54434f;  // "OCTJ"
constexpr int64_t kHeaderBytes = sizeof(Header);
// A length beyond it is a torn record's. Seals may be as long as answers.
constexpr uint32_t kMaxPayloadBytes = kMaxAnswerBytes;

// SipHash, keyed by the job, so that another job's record is no record.
uint64_t checksum_of(const std::string& job_id, Header header, std::string_view payload) {
  std::array<unsigned char, crypto_shorthash_KEYBYTES> key{};
  crypto_generichash(key.data(), key.size(), reinterpret_cast<const unsigned char*>(job_id.data()), job_id.size(),
                     nullptr, 0);
  header.checksum = 0;
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof header);
  bytes.append(payload);
  std::array<unsigned char, crypto_shorthash_BYTES> hash{};
  crypto_shorthash(hash.data(), reinterpret_cast<const unsigned char*>(bytes.data()), bytes.size(), key.data());
  uint64_t value = 0;
  std::memcpy(&value, hash.data(), sizeof value);
  return value;
}

std::string encode(const std::string& job_id, Header header, std::string_view payload) {
  OCTET_CHECK(payload.size() <= kMaxPayloadBytes, "a record that could not be read back");
  header.magic = kMagic;
  header.payload_bytes = static_cast<uint32_t>(payload.size());
  header.checksum = checksum_of(job_id, header, payload);
  std::string record(reinterpret_cast<const char*>(&header), sizeof header);
  record.append(payload);
  return record;
}

constexpr char kEpochPrefix[] = "epoch-";
constexpr char kSegmentPrefix[] = "seg-";

std::string epoch_name(int epoch) { return absl::StrFormat("%s%06d", kEpochPrefix, epoch); }
std::string segment_name(int epoch, int number) {
  return absl::StrFormat("%s%06d-%05d", kSegmentPrefix, epoch, number);
}

// The epoch in the name of an epoch's file or of a segment; 0: it is neither.
int epoch_of(std::string_view name, std::string_view prefix) {
  if (!name.starts_with(prefix)) return 0;
  const std::string_view digits = name.substr(prefix.size(), 6);
  int epoch = 0;
  return absl::SimpleAtoi(absl::string_view(digits.data(), digits.size()), &epoch) ? epoch : 0;
}

}  // namespace

struct Journal::Record {
  Header header;
  std::string payload;
  int64_t bytes() const { return kHeaderBytes + static_cast<int64_t>(payload.size()); }
};

Journal::Journal(const JournalOptions& options) : options_(options), places_(static_cast<size_t>(options.lines)) {}

Journal::~Journal() = default;

absl::StatusOr<std::unique_ptr<Journal>> Journal::open(const JournalOptions& options) {
  OCTET_CHECK(sodium_init() >= 0, "libsodium does not start");
  std::unique_ptr<Journal> journal(new Journal(options));
  if (absl::Status status = journal->take_epoch(); !status.ok()) return status;
  // After the epoch is ours: what an older incarnation has written before it finds out is there to be read.
  const absl::StatusOr<std::vector<std::string>> names = options.disk->list(options.directory);
  if (!names.ok()) return names.status();
  absl::StatusOr<std::vector<Segment>> segments = journal->sealed_segments(*names);
  if (!segments.ok()) return segments.status();
  for (const Segment& segment : *segments) {
    if (absl::Status status = journal->scan(segment); !status.ok()) return status;
  }
  json seal = json::array();
  for (const Segment& segment : journal->known_) {
    seal.push_back({{"segment", segment.name}, {"bytes", segment.valid_bytes}});
  }
  journal->add({.bytes = encode(options.job_id, {.kind = Kind::kSeal, .epoch = static_cast<uint32_t>(journal->epoch_)},
                                seal.dump())});
  if (absl::Status status = journal->commit(); !status.ok()) return status;
  return journal;
}

// Whoever creates the file has the epoch.
absl::Status Journal::take_epoch() {
  while (true) {
    const absl::StatusOr<std::vector<std::string>> names = options_.disk->list(options_.directory);
    if (!names.ok()) return names.status();
    epoch_ = 1;
    for (const std::string& name : *names) epoch_ = std::max(epoch_, epoch_of(name, kEpochPrefix) + 1);
    absl::StatusOr<std::unique_ptr<DiskFile>> file = options_.disk->create(path(epoch_name(epoch_)));
    if (absl::IsAlreadyExists(file.status())) continue;
    if (!file.ok()) return file.status();
    if (absl::Status status = (*file)->write(0, options_.writer); !status.ok()) return status;
    if (absl::Status status = (*file)->sync(); !status.ok()) return status;
    return options_.disk->sync_directory(options_.directory);
  }
}

// The segments of earlier epochs that count. The last epoch that sealed its predecessors says which of theirs do, and
// how much of them; its own count as far as they are valid. An epoch without a seal has written nothing.
absl::StatusOr<std::vector<Journal::Segment>> Journal::sealed_segments(const std::vector<std::string>& names) const {
  std::map<int, std::vector<std::string>> of_epoch;
  for (const std::string& name : names) {
    if (const int epoch = epoch_of(name, kSegmentPrefix); epoch > 0 && epoch < epoch_) of_epoch[epoch].push_back(name);
  }
  constexpr int64_t kToItsEnd = std::numeric_limits<int64_t>::max();
  for (auto own = of_epoch.rbegin(); own != of_epoch.rend(); ++own) {
    const absl::StatusOr<std::unique_ptr<DiskFile>> file = options_.disk->open(path(own->second.front()));
    if (!file.ok()) return file.status();
    const absl::StatusOr<Record> first = read_record(**file, 0, kToItsEnd);
    if (absl::IsUnavailable(first.status())) return first.status();
    if (!first.ok() || first->header.kind != Kind::kSeal) continue;
    const json seal = json::parse(first->payload, nullptr, /*allow_exceptions=*/false);
    std::vector<Segment> segments;
    for (const json& entry : seal) {
      segments.push_back({.name = entry.value("segment", ""), .valid_bytes = entry.value("bytes", int64_t{0})});
    }
    for (const std::string& name : own->second) segments.push_back({.name = name, .valid_bytes = kToItsEnd});
    return segments;
  }
  return std::vector<Segment>();
}

// DATA_LOSS when there is no whole record at that place.
absl::StatusOr<Journal::Record> Journal::read_record(const DiskFile& file, int64_t offset, int64_t end) const {
  const absl::Status torn = absl::DataLossError(absl::StrCat("no whole record at byte ", offset));
  Record record;
  absl::StatusOr<std::string> bytes = file.read(offset, std::min(kHeaderBytes, end - offset));
  if (!bytes.ok()) return bytes.status();
  if (static_cast<int64_t>(bytes->size()) < kHeaderBytes) return torn;
  std::memcpy(&record.header, bytes->data(), sizeof record.header);
  const int64_t payload_bytes = record.header.payload_bytes;
  if (record.header.magic != kMagic || payload_bytes > kMaxPayloadBytes) return torn;
  if (end - offset - kHeaderBytes < payload_bytes) return torn;
  bytes = file.read(offset + kHeaderBytes, payload_bytes);
  if (!bytes.ok()) return bytes.status();
  if (static_cast<int64_t>(bytes->size()) < payload_bytes) return torn;
  record.payload = *std::move(bytes);
  if (checksum_of(options_.job_id, record.header, record.payload) != record.header.checksum) return torn;
  return record;
}

absl::Status Journal::scan(const Segment& segment) {
  absl::StatusOr<std::unique_ptr<DiskFile>> file = options_.disk->open(path(segment.name));
  if (absl::IsNotFound(file.status())) return absl::OkStatus();  // its lines are run again
  if (!file.ok()) return file.status();
  const auto index = static_cast<int32_t>(known_.size());
  known_.push_back({.name = segment.name});
  int64_t& offset = known_.back().valid_bytes;
  while (offset < segment.valid_bytes) {
    const absl::StatusOr<Record> record = read_record(**file, offset, segment.valid_bytes);
    if (absl::IsDataLoss(record.status())) break;
    if (!record.ok()) return record.status();
    take(*record, {.segment = index, .bytes = static_cast<int32_t>(record->bytes()), .offset = offset});
    offset += record->bytes();
  }
  return absl::OkStatus();
}

void Journal::take(const Record& record, const Place& place) {
  const int64_t line = record.header.line;
  const auto epoch = static_cast<int>(record.header.epoch);
  const bool ours = line >= options_.first_line && line < options_.first_line + options_.lines;
  switch (record.header.kind) {
    case Kind::kSeal:
      return;
    case Kind::kVerdict:
      counts_[static_cast<int>(line)] = record.header.failed != 0;
      return;
    case Kind::kIntent:
      if (ours && !answered(line)) in_flight_[epoch].insert(line);
      return;
    case Kind::kAnswer:
      if (!ours) return;
      if (answered(line)) {
        const absl::StatusOr<JournalAnswer> before = read_answer(line);
        if (before.ok() && before->text != record.payload) ++contradictions_;
        return;
      }
      failed_ += record.header.failed;
      prompt_tokens_ += record.header.prompt_tokens;
      completion_tokens_ += record.header.completion_tokens;
      place_answer(line, place);
  }
}

void Journal::place_answer(int64_t line, const Place& place) {
  places_[static_cast<size_t>(line - options_.first_line)] = place;
  ++answers_;
  for (auto& [epoch, lines] : in_flight_) lines.erase(line);
  std::erase_if(in_flight_, [this](const auto& entry) { return entry.first < epoch_ && entry.second.empty(); });
}

bool Journal::answered(int64_t line) const {
  return places_[static_cast<size_t>(line - options_.first_line)].segment >= 0;
}

std::vector<int> Journal::unjudged() const {
  std::vector<int> epochs;
  for (const auto& [epoch, lines] : in_flight_) {
    if (epoch < epoch_ && !lines.empty() && !counts_.contains(epoch)) epochs.push_back(epoch);
  }
  return epochs;
}

absl::StatusOr<std::string> Journal::writer_of(int epoch) const { return options_.disk->read(path(epoch_name(epoch))); }

int64_t Journal::in_flight_last() const {
  const auto last = in_flight_.find(epoch_ - 1);
  return last == in_flight_.end() ? 0 : static_cast<int64_t>(last->second.size());
}

void Journal::judge(int epoch, bool counts, std::string_view cause) {
  counts_[epoch] = counts;
  add({.bytes = encode(options_.job_id,
                       {.kind = Kind::kVerdict,
                        .failed = static_cast<uint8_t>(counts),
                        .line = epoch,
                        .epoch = static_cast<uint32_t>(epoch_)},
                       cause)});
}

std::map<int64_t, int> Journal::tries() const {
  std::map<int64_t, int> tries;
  for (const auto& [epoch, counts] : counts_) {
    const auto lines = in_flight_.find(epoch);
    if (!counts || lines == in_flight_.end()) continue;
    for (const int64_t line : lines->second) ++tries[line];
  }
  return tries;
}

void Journal::add_intent(int64_t line) {
  add({.bytes =
           encode(options_.job_id, {.kind = Kind::kIntent, .line = line, .epoch = static_cast<uint32_t>(epoch_)}, "")});
}

void Journal::add_answer(const JournalAnswer& answer) {
  ++uncommitted_answers_;
  add({.bytes = encode(options_.job_id,
                       {.kind = Kind::kAnswer,
                        .failed = static_cast<uint8_t>(answer.failed),
                        .line = answer.line,
                        .epoch = static_cast<uint32_t>(epoch_),
                        .prompt_tokens = answer.prompt_tokens,
                        .completion_tokens = answer.completion_tokens},
                       answer.text),
       .answers = answer.line});
}

void Journal::add(Unsynced record) { unsynced_.push_back(std::move(record)); }

absl::Status Journal::begin_segment() {
  const std::string name = segment_name(epoch_, next_segment_++);
  absl::StatusOr<std::unique_ptr<DiskFile>> file = options_.disk->create(path(name));
  if (!file.ok()) return file.status();
  if (absl::Status status = (*file)->allocate(options_.segment_bytes); !status.ok()) {
    options_.disk->remove(path(name)).IgnoreError();
    return status;
  }
  if (absl::Status status = options_.disk->sync_directory(options_.directory); !status.ok()) {
    options_.disk->remove(path(name)).IgnoreError();
    return status;
  }
  segment_ = *std::move(file);
  written_ = 0;
  known_.push_back({.name = name});
  return absl::OkStatus();
}

// Appends what segment_ does not hold yet. A segment that is full is synced and left.
absl::Status Journal::write_unsynced() {
  while (flushed_ < unsynced_.size()) {
    const std::string& bytes = unsynced_[flushed_].bytes;
    const int64_t end = written_ + static_cast<int64_t>(bytes.size());
    if (segment_ != nullptr && written_ > 0 && end > options_.segment_bytes) {
      if (absl::Status status = sync_segment(); !status.ok()) return status;
      segment_.reset();
      continue;
    }
    if (segment_ == nullptr) {
      if (absl::Status status = begin_segment(); !status.ok()) return status;
    }
    if (absl::Status status = segment_->write(written_, bytes); !status.ok()) return status;
    flushed_offsets_.push_back(written_);
    written_ += static_cast<int64_t>(bytes.size());
    ++flushed_;
  }
  return absl::OkStatus();
}

// What segment_ holds is acknowledged.
absl::Status Journal::sync_segment() {
  if (absl::Status status = segment_->sync(); !status.ok()) return status;
  const auto index = static_cast<int32_t>(known_.size()) - 1;
  for (size_t i = 0; i < flushed_; ++i) {
    const Place place{
        .segment = index, .bytes = static_cast<int32_t>(unsynced_[i].bytes.size()), .offset = flushed_offsets_[i]};
    Record record;
    std::memcpy(&record.header, unsynced_[i].bytes.data(), sizeof record.header);
    record.payload = unsynced_[i].bytes.substr(kHeaderBytes);
    take(record, place);
    uncommitted_answers_ -= unsynced_[i].answers >= 0 ? 1 : 0;
  }
  unsynced_.erase(unsynced_.begin(), unsynced_.begin() + static_cast<ptrdiff_t>(flushed_));
  flushed_offsets_.clear();
  flushed_ = 0;
  known_.back().valid_bytes = written_;
  return absl::OkStatus();
}

absl::Status Journal::flush() {
  const absl::Status status = write_unsynced();
  if (!status.ok()) {
    // Nothing is known about the segment any more. What it has not acknowledged goes into the next one.
    segment_.reset();
    flushed_offsets_.clear();
    flushed_ = 0;
  }
  return status;
}

absl::Status Journal::commit() {
  absl::Status status = flush();
  if (!status.ok() || flushed_ == 0) return status;
  status = sync_segment();
  if (!status.ok()) {
    segment_.reset();
    flushed_offsets_.clear();
    flushed_ = 0;
  }
  return status;
}

absl::Status Journal::check_fence() const {
  const absl::StatusOr<std::string> later = writer_of(epoch_ + 1);
  if (absl::IsNotFound(later.status())) return absl::OkStatus();
  if (!later.ok()) return later.status();
  return absl::AbortedError(
      absl::StrCat("a later run of this job (", *later, ") has taken over; this one (epoch ", epoch_, ") ends"));
}

const DiskFile* Journal::open_segment(int32_t segment) const {
  const auto found = reading_.find(segment);
  if (found != reading_.end()) return found->second.get();
  absl::StatusOr<std::unique_ptr<DiskFile>> file = options_.disk->open(path(known_[static_cast<size_t>(segment)].name));
  if (!file.ok()) return nullptr;
  // Answers are read about in the order in which they were written: few segments are open at a time.
  if (reading_.size() >= 16) reading_.clear();
  return reading_.emplace(segment, *std::move(file)).first->second.get();
}

absl::StatusOr<JournalAnswer> Journal::read_answer(int64_t line) const {
  const Place& place = places_[static_cast<size_t>(line - options_.first_line)];
  OCTET_CHECK(place.segment >= 0, "a line without an answer is read");
  const std::string& name = known_[static_cast<size_t>(place.segment)].name;
  const DiskFile* file = open_segment(place.segment);
  if (file == nullptr) return absl::DataLossError(absl::StrCat("the journal's segment ", path(name), " is gone"));
  absl::StatusOr<Record> record = read_record(*file, place.offset, place.offset + place.bytes);
  if (absl::IsUnavailable(record.status())) return record.status();
  if (!record.ok() || record->header.kind != Kind::kAnswer || record->header.line != line) {
    return absl::DataLossError(absl::StrCat("the journal's segment ", path(name), " has changed at byte ", place.offset,
                                            ": the answer of line ", line, " is damaged"));
  }
  return JournalAnswer{.line = line,
                       .failed = record->header.failed != 0,
                       .prompt_tokens = record->header.prompt_tokens,
                       .completion_tokens = record->header.completion_tokens,
                       .text = std::move(record->payload)};
}

absl::Status remove_segments(Disk* disk, const std::string& directory, int before_epoch) {
  const absl::StatusOr<std::vector<std::string>> names = disk->list(directory);
  if (!names.ok()) return names.status();
  for (const std::string& name : *names) {
    const int epoch = epoch_of(name, kSegmentPrefix);
    if (epoch == 0 || epoch >= before_epoch) continue;
    if (absl::Status status = disk->remove(directory + "/" + name); !status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace octet
