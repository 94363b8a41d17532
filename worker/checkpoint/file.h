// Files as checkpoints use them: positioned reads of exactly so many bytes, and writes that are on disk when they say
// so. Invariant: a ReadFile's size is what it was when it was opened; a file that shrank since yields DATA_LOSS.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace octet {

// An open file descriptor that closes itself.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();

  int get() const { return fd_; }
  // Closes it and says whether the file system accepted all that was written.
  bool close();

 private:
  int fd_ = -1;
};

// Thread safe.
class ReadFile {
 public:
  // NOT_FOUND, PERMISSION_DENIED or INVALID_ARGUMENT (a directory, a device) naming the path. Follows symlinks.
  static absl::StatusOr<ReadFile> open(const std::string& path);

  const std::string& path() const { return path_; }
  int64_t bytes() const { return bytes_; }

  // Reads [offset, offset + bytes) to dst. DATA_LOSS when the file ends before.
  absl::Status read(int64_t offset, int64_t bytes, void* dst) const;
  // Tells the kernel that this range is read soon. Only a hint.
  void will_read(int64_t offset, int64_t bytes) const;

 private:
  ReadFile() = default;
  FileDescriptor fd_;
  std::string path_;
  int64_t bytes_ = 0;
};

// A whole small file. RESOURCE_EXHAUSTED when it is larger than max_bytes.
absl::StatusOr<std::string> read_text_file(const std::string& path, int64_t max_bytes);

// A new file, written anywhere in any order. One thread at a time.
class WriteFile {
 public:
  // ALREADY_EXISTS rather than overwriting.
  static absl::StatusOr<WriteFile> create(const std::string& path);

  const std::string& path() const { return path_; }
  absl::Status write(int64_t offset, std::string_view bytes);
  // Flushes to disk and closes. Nothing may be written after it.
  absl::Status finish();

 private:
  WriteFile() = default;
  FileDescriptor fd_;
  std::string path_;
};

absl::Status write_text_file(const std::string& path, std::string_view text);

// Flushes a directory's entries, so that a rename inside it survives a crash of the machine.
absl::Status sync_directory(const std::string& path);

// A status of `what` failing with errno `error`, code chosen to match.
absl::Status errno_status(int error, const std::string& what);

}  // namespace octet
