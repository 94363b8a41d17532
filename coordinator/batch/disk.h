// Disk: what a batch job does to files, as one small interface, so that tests can let any of it fail or lose what was
// not synced. Paths are the caller's; nothing here is atomic but create() and rename().
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace octet {

// One thread at a time. Errors are those of disk_error(), with the path.
class DiskFile {
 public:
  virtual ~DiskFile() = default;  // closes
  virtual absl::StatusOr<int64_t> size() const = 0;
  // `bytes` bytes, fewer at the file's end.
  virtual absl::StatusOr<std::string> read(int64_t offset, int64_t bytes) const = 0;
  virtual absl::Status write(int64_t offset, std::string_view data) = 0;
  // Reserves the file's first `bytes` bytes; those that were not written read as zeros. Where a file system cannot,
  // this is no error.
  virtual absl::Status allocate(int64_t bytes) = 0;
  // What was written is on the disk. After a failure nothing is known about it, and another sync() proves nothing.
  virtual absl::Status sync() = 0;
};

class Disk {
 public:
  virtual ~Disk() = default;
  virtual absl::Status make_directory(const std::string& path) = 0;                         // no error when it is there
  virtual absl::StatusOr<std::vector<std::string>> list(const std::string& directory) = 0;  // names, sorted
  virtual absl::StatusOr<std::unique_ptr<DiskFile>> open(const std::string& path) = 0;      // to read; NOT_FOUND
  virtual absl::StatusOr<std::unique_ptr<DiskFile>> create(const std::string& path) = 0;    // ALREADY_EXISTS
  virtual absl::Status rename(const std::string& from, const std::string& to) = 0;          // replaces `to`
  virtual absl::Status remove(const std::string& path) = 0;                                 // no error when it is gone
  // Names that were created, renamed or removed in it are so on the disk.
  virtual absl::Status sync_directory(const std::string& path) = 0;

  // The whole file; NOT_FOUND.
  absl::StatusOr<std::string> read(const std::string& path);
  // `path` has this content, all of it or, after a crash, what it had before: a file beside it, synced and renamed.
  // That file's name is this process's own, so that two that replace the same path do not meet before the end.
  absl::Status replace(const std::string& path, std::string_view content);
};

// This machine's.
Disk& real_disk();

// errno's words about what was tried. NOT_FOUND and ALREADY_EXISTS; FAILED_PRECONDITION for what stays as it is until
// somebody changes it (rights, names, a read-only disk); UNAVAILABLE for the rest.
absl::Status disk_error(const std::string& what);

// "a/b" for "a/b/c", "." for "c".
std::string directory_of(const std::string& path);

}  // namespace octet
