// BatchInput: the lines of a batch job's input, which may be larger than memory: one pass makes an index of it, then
// any line can be read, those in order without looking for them. Lines that are blank do not count.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace octet {

// A longer line is refused, and only its beginning is ever held.
constexpr int64_t kMaxBatchLineBytes = int64_t{16} << 20;

struct InputIndex {
  struct Mark {
    int64_t offset = 0;  // of a physical line, in bytes
    int64_t number = 0;  // that line's, from 1
  };
  static constexpr int64_t kLinesPerMark = 1024;

  int64_t bytes = 0, modified_ns = 0;  // of the file, to see whether it is the same one
  std::string sha256;
  int64_t lines = 0;        // that are not blank
  std::vector<Mark> marks;  // where line 0, 1024, 2048, ... may be looked for

  std::string to_json() const;
  static absl::StatusOr<InputIndex> from_json(std::string_view text);
};

// Reads the whole file once. `progress` is told bytes done and in all, often. NOT_FOUND; INVALID_ARGUMENT when two
// lines have the same custom_id, naming them.
absl::StatusOr<InputIndex> index_input(const std::string& path, const std::function<void(int64_t, int64_t)>& progress);

// The file's size and time, in an index that has nothing else.
absl::StatusOr<InputIndex> stat_input(const std::string& path);

// One thread at a time.
class BatchInput {
 public:
  struct Line {
    int64_t number = 0;  // of the physical line, from 1
    int64_t bytes = 0;   // of the line, without its end
    std::string text;    // as much of it as shows that it is too long
  };

  static absl::StatusOr<BatchInput> open(const std::string& path, InputIndex index);
  ~BatchInput();
  BatchInput(BatchInput&&) noexcept;
  BatchInput& operator=(BatchInput&&) noexcept;

  const InputIndex& index() const { return index_; }
  // Line `line` of those that are not blank, from 0. DATA_LOSS when the file has changed and has it no more.
  absl::StatusOr<Line> read(int64_t line);

 private:
  class Reader;
  friend absl::StatusOr<InputIndex> index_input(const std::string&, const std::function<void(int64_t, int64_t)>&);
  BatchInput(InputIndex index, std::unique_ptr<Reader> reader);

  InputIndex index_;
  std::unique_ptr<Reader> reader_;
  int64_t next_ = 0;  // the line that reader_ comes to next
};

// The top-level custom_id of a line, or nothing where it has none that is a string. Reads no further than it must.
std::optional<std::string> custom_id_of(std::string_view line);

}  // namespace octet
