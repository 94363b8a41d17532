#include "coordinator/batch/batch_input.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "coordinator/batch/disk.h"
#include "coordinator/batch/sha256.h"
#include "kernels/check.h"

namespace octet {
namespace {

using nlohmann::json;

constexpr size_t kBufferBytes = size_t{1} << 20;

bool blank(std::string_view text) { return text.find_first_not_of(" \t\r") == std::string_view::npos; }

// Stops at the first top-level custom_id.
class CustomIdReader final : public json::json_sax_t {
 public:
  std::optional<std::string> take() { return std::move(id_); }

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(int64_t) override { return value(); }
  bool number_unsigned(uint64_t) override { return value(); }
  bool number_float(double, const std::string&) override { return value(); }
  bool binary(json::binary_t&) override { return value(); }
  bool string(std::string& text) override {
    if (!due_) return true;
    id_ = std::move(text);
    return false;
  }
  bool start_object(size_t) override { return ++depth_ < kMaxDepth && value(); }
  bool start_array(size_t) override { return ++depth_ < kMaxDepth && value(); }
  bool end_object() override { return --depth_ > 0; }
  bool end_array() override { return --depth_ > 0; }
  bool key(std::string& name) override {
    due_ = depth_ == 1 && name == "custom_id";
    return true;
  }
  bool parse_error(size_t, const std::string&, const nlohmann::detail::exception&) override { return false; }

 private:
  static constexpr int kMaxDepth = 64;
  bool value() { return !due_; }

  int depth_ = 0;
  bool due_ = false;
  std::optional<std::string> id_;
};

absl::Status unreadable(const std::string& path) { return disk_error(path); }

}  // namespace

std::optional<std::string> custom_id_of(std::string_view line) {
  CustomIdReader reader;
  json::sax_parse(line, &reader);
  return reader.take();
}

// Physical lines, one after the other from any offset.
class BatchInput::Reader {
 public:
  static absl::StatusOr<std::unique_ptr<Reader>> open(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return unreadable(path);
    posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL);
    return std::unique_ptr<Reader>(new Reader(fd, path));
  }
  ~Reader() { close(fd_); }

  void seek(const InputIndex::Mark& mark) {
    offset_ = line_offset_ = mark.offset;
    number_ = mark.number - 1;
    buffer_.clear();
    used_ = 0;
  }

  // The next physical line; false at the file's end. *line keeps its memory from call to call.
  absl::StatusOr<bool> next(Line* line) {
    line->text.clear();
    line->bytes = 0;
    line_offset_ = offset_ - static_cast<int64_t>(buffer_.size() - used_);
    bool any = false;
    while (true) {
      if (used_ == buffer_.size()) {
        const absl::StatusOr<bool> more = fill();
        if (!more.ok()) return more.status();
        if (!*more) break;
      }
      any = true;
      const std::string_view rest = std::string_view(buffer_).substr(used_);
      const size_t end = rest.find('\n');
      const std::string_view part = rest.substr(0, end);
      line->bytes += static_cast<int64_t>(part.size());
      line->text.append(part.substr(0, static_cast<size_t>(kMaxBatchLineBytes) + 1 - line->text.size()));
      used_ += part.size();
      if (end == std::string_view::npos) continue;
      ++used_;
      break;
    }
    if (any) line->number = ++number_;
    return any;
  }

  int64_t line_offset() const { return line_offset_; }  // of the line that next() gave last
  // What is read from the file, as it comes.
  void on_bytes(std::function<void(std::string_view)> listener) { listener_ = std::move(listener); }
  const std::string& path() const { return path_; }

 private:
  Reader(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}

  absl::StatusOr<bool> fill() {
    buffer_.resize(kBufferBytes);
    used_ = 0;
    ssize_t got = 0;
    while ((got = pread(fd_, buffer_.data(), buffer_.size(), offset_)) < 0 && errno == EINTR) {
    }
    buffer_.resize(got > 0 ? static_cast<size_t>(got) : 0);
    if (got < 0) return unreadable(path_);
    offset_ += got;
    if (listener_) listener_(buffer_);
    return got > 0;
  }

  const int fd_;
  const std::string path_;
  std::string buffer_;
  size_t used_ = 0;          // bytes of buffer_ that are behind us
  int64_t offset_ = 0;       // of the buffer's end in the file
  int64_t line_offset_ = 0;  // of the line that is being read
  int64_t number_ = 0;
  std::function<void(std::string_view)> listener_;
};

namespace {

// Hashes of ids, and only where two are equal the ids themselves: a million ids take 16 MB.
class CustomIds {
 public:
  void add(const std::optional<std::string>& id, int64_t line) {
    if (id.has_value()) hashes_.emplace_back(std::hash<std::string>()(*id), line);
  }

  // INVALID_ARGUMENT when two lines of `input` have the same.
  absl::Status check(BatchInput* input, const std::string& path) {
    std::ranges::sort(hashes_);
    for (size_t i = 1; i < hashes_.size(); ++i) {
      if (hashes_[i].first != hashes_[i - 1].first) continue;
      const absl::StatusOr<BatchInput::Line> one = input->read(hashes_[i - 1].second);
      if (!one.ok()) return one.status();
      const absl::StatusOr<BatchInput::Line> other = input->read(hashes_[i].second);
      if (!other.ok()) return other.status();
      const std::string id = custom_id_of(one->text).value_or("");
      if (id != custom_id_of(other->text)) continue;
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": lines ", one->number, " and ", other->number, " have the same custom_id \"",
                       absl::Utf8SafeCEscape(id), "\", so nobody could tell their answers apart: give each its own"));
    }
    return absl::OkStatus();
  }

 private:
  std::vector<std::pair<size_t, int64_t>> hashes_;  // and the line
};

}  // namespace

std::string InputIndex::to_json() const {
  json list = json::array();
  for (const Mark& mark : marks) list.push_back({mark.offset, mark.number});
  return json{{"bytes", bytes}, {"modified_ns", modified_ns}, {"sha256", sha256}, {"lines", lines}, {"marks", list}}
      .dump();
}

absl::StatusOr<InputIndex> InputIndex::from_json(std::string_view text) {
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  InputIndex index;
  const absl::Status damaged = absl::DataLossError("the index of the input is damaged");
  if (!object.is_object()) return damaged;
  for (const char* key : {"bytes", "modified_ns", "lines"}) {
    if (!object.contains(key) || !object[key].is_number_integer()) return damaged;
  }
  if (!object.contains("sha256") || !object["sha256"].is_string() || !object.contains("marks")) return damaged;
  index.bytes = object["bytes"];
  index.modified_ns = object["modified_ns"];
  index.lines = object["lines"];
  index.sha256 = object["sha256"];
  for (const json& mark : object["marks"]) {
    if (!mark.is_array() || mark.size() != 2 || !mark[0].is_number_integer() || !mark[1].is_number_integer()) {
      return damaged;
    }
    index.marks.push_back({.offset = mark[0], .number = mark[1]});
  }
  return index;
}

absl::StatusOr<InputIndex> stat_input(const std::string& path) {
  struct stat status {};
  if (stat(path.c_str(), &status) != 0) return unreadable(path);
  if (!S_ISREG(status.st_mode)) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is no regular file: a job reads its input more than once"));
  }
  return InputIndex{.bytes = status.st_size,
                    .modified_ns = status.st_mtim.tv_sec * int64_t{1'000'000'000} + status.st_mtim.tv_nsec};
}

absl::StatusOr<InputIndex> index_input(const std::string& path, const std::function<void(int64_t, int64_t)>& progress) {
  OCTET_CHECK(sodium_init() >= 0, "libsodium does not start");
  absl::StatusOr<InputIndex> index = stat_input(path);
  if (!index.ok()) return index.status();
  absl::StatusOr<std::unique_ptr<BatchInput::Reader>> reader = BatchInput::Reader::open(path);
  if (!reader.ok()) return reader.status();
  Sha256 hash;
  int64_t done = 0;
  (*reader)->on_bytes([&](std::string_view bytes) {
    hash.add(bytes);
    done += static_cast<int64_t>(bytes.size());
    if (progress) progress(done, index->bytes);
  });
  CustomIds ids;
  BatchInput::Line line;
  while (true) {
    const absl::StatusOr<bool> more = (*reader)->next(&line);
    if (!more.ok()) return more.status();
    if (!*more) break;
    if (blank(line.text) && line.bytes <= kMaxBatchLineBytes) continue;
    if (index->lines % InputIndex::kLinesPerMark == 0) {
      index->marks.push_back({.offset = (*reader)->line_offset(), .number = line.number});
    }
    ids.add(custom_id_of(line.text), index->lines++);
  }
  if (done != index->bytes) return absl::InvalidArgumentError(absl::StrCat(path, " changes while it is read"));
  index->sha256 = hash.hex();
  absl::StatusOr<BatchInput> input = BatchInput::open(path, *index);
  if (!input.ok()) return input.status();
  if (absl::Status status = ids.check(&*input, path); !status.ok()) return status;
  return index;
}

BatchInput::BatchInput(InputIndex index, std::unique_ptr<Reader> reader)
    : index_(std::move(index)), reader_(std::move(reader)) {}
BatchInput::~BatchInput() = default;
BatchInput::BatchInput(BatchInput&&) noexcept = default;
BatchInput& BatchInput::operator=(BatchInput&&) noexcept = default;

absl::StatusOr<BatchInput> BatchInput::open(const std::string& path, InputIndex index) {
  absl::StatusOr<std::unique_ptr<Reader>> reader = Reader::open(path);
  if (!reader.ok()) return reader.status();
  return BatchInput(std::move(index), *std::move(reader));
}

absl::StatusOr<BatchInput::Line> BatchInput::read(int64_t line) {
  OCTET_CHECK(line >= 0 && line < index_.lines, "a line that the input does not have");
  const int64_t mark = line / InputIndex::kLinesPerMark;
  if (line < next_ || next_ == 0 || mark * InputIndex::kLinesPerMark > next_) {
    reader_->seek(index_.marks[static_cast<size_t>(mark)]);
    next_ = mark * InputIndex::kLinesPerMark;
  }
  Line text;
  while (true) {
    const absl::StatusOr<bool> more = reader_->next(&text);
    if (!more.ok()) return more.status();
    if (!*more) return absl::DataLossError(absl::StrCat(reader_->path(), " has lost lines since the job began"));
    if (blank(text.text) && text.bytes <= kMaxBatchLineBytes) continue;
    if (next_++ == line) return text;
  }
}

}  // namespace octet
