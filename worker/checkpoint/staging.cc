#include "worker/checkpoint/staging.h"

#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace octet {
namespace {

namespace fs = std::filesystem;

absl::Status already_exists(const std::string& destination) {
  return absl::AlreadyExistsError(
      absl::StrCat(destination, " exists already: remove it, or choose another name (nothing is overwritten)"));
}

// Holds the directory against other processes; the kernel lets go when we die.
absl::StatusOr<FileDescriptor> lock_directory(const std::string& path) {
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return errno_status(errno, absl::StrCat("cannot open ", path));
  struct stat locked {
  }, named{};
  if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0 || ::fstat(fd.get(), &locked) != 0 ||
      ::stat(path.c_str(), &named) != 0 || locked.st_ino != named.st_ino) {
    return absl::AbortedError(absl::StrCat("another process is writing ", path, ": wait for it, or stop it"));
  }
  return fd;
}

}  // namespace

absl::StatusOr<StagingDirectory> StagingDirectory::create(const std::string& destination) {
  fs::path target = fs::path(destination).lexically_normal();
  if (!target.has_filename()) target = target.parent_path();
  const std::string name = target.filename().string();
  if (name.empty() || name == "." || name == "..") {
    return absl::InvalidArgumentError(absl::StrCat("\"", destination, "\" cannot be the name of a new directory"));
  }
  std::error_code error;
  if (fs::exists(fs::symlink_status(target, error))) return already_exists(target.string());
  const fs::path parent = target.has_parent_path() ? target.parent_path() : fs::path(".");
  fs::create_directories(parent, error);
  if (error) return errno_status(error.value(), absl::StrCat("cannot create ", parent.string()));

  StagingDirectory staging;
  const std::string path = (parent / absl::StrCat(".", name, ".partial")).string();
  if (::mkdir(path.c_str(), 0755) != 0 && errno != EEXIST)
    return errno_status(errno, absl::StrCat("cannot create ", path));
  absl::StatusOr<FileDescriptor> lock = lock_directory(path);
  if (!lock.ok()) return lock.status();
  staging.lock_ = *std::move(lock);
  staging.path_ = path;
  staging.destination_ = target.string();
  for (const fs::directory_entry& stale : fs::directory_iterator(path, error)) fs::remove_all(stale.path(), error);
  if (error) return errno_status(error.value(), absl::StrCat("cannot clear ", path));
  return staging;
}

StagingDirectory::StagingDirectory(StagingDirectory&& other) noexcept
    : destination_(std::move(other.destination_)),
      path_(std::exchange(other.path_, {})),
      lock_(std::move(other.lock_)) {}

StagingDirectory::~StagingDirectory() {
  std::error_code ignored;
  if (!path_.empty()) fs::remove_all(path_, ignored);
}

int64_t StagingDirectory::available_bytes() const {
  struct statvfs info {};
  if (::statvfs(path_.c_str(), &info) != 0) return INT64_MAX;  // then writing will tell
  return static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize);
}

absl::Status StagingDirectory::publish() {
  if (absl::Status status = sync_directory(path_); !status.ok()) return status;
  int result = ::renameat2(AT_FDCWD, path_.c_str(), AT_FDCWD, destination_.c_str(), RENAME_NOREPLACE);
  // Some file systems do not know the flag; there a plain rename still replaces nothing but an empty directory.
  if (result != 0 && errno == EINVAL) result = ::rename(path_.c_str(), destination_.c_str());
  if (result != 0 && (errno == EEXIST || errno == ENOTEMPTY)) return already_exists(destination_);
  if (result != 0) return errno_status(errno, absl::StrCat("cannot rename ", path_, " to ", destination_));
  path_.clear();
  const fs::path parent = fs::path(destination_).parent_path();
  return sync_directory(parent.empty() ? "." : parent.string());
}

}  // namespace octet
