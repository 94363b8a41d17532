// StagingDirectory: a directory that appears under its name complete, or not at all. It is written beside its
// destination under a hidden name, ".NAME.partial", and renamed when it is whole and on disk.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "worker/checkpoint/file.h"

namespace octet {

class StagingDirectory {
 public:
  // Clears what an earlier, killed run left under the hidden name. ALREADY_EXISTS when `destination` exists; ABORTED
  // when another process is writing it now. Creates missing parents.
  static absl::StatusOr<StagingDirectory> create(const std::string& destination);

  StagingDirectory(StagingDirectory&& other) noexcept;
  StagingDirectory& operator=(StagingDirectory&&) = delete;
  // Removes it unless it was published.
  ~StagingDirectory();

  const std::string& path() const { return path_; }
  // Bytes that its file system has room for.
  int64_t available_bytes() const;
  // Gives it its name. REQUIRES: every file in it is written and flushed.
  absl::Status publish();

 private:
  StagingDirectory() = default;

  std::string destination_;
  std::string path_;  // empty: published or moved from
  FileDescriptor lock_;
};

}  // namespace octet
