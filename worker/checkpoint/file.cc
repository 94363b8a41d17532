#include "worker/checkpoint/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

namespace octet {

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  if (this != &other) {
    close();
    fd_ = std::exchange(other.fd_, -1);
  }
  return *this;
}

FileDescriptor::~FileDescriptor() { close(); }

bool FileDescriptor::close() {
  const int fd = std::exchange(fd_, -1);
  return fd < 0 || ::close(fd) == 0;
}

absl::Status errno_status(int error, const std::string& what) { return absl::ErrnoToStatus(error, what); }

absl::StatusOr<ReadFile> ReadFile::open(const std::string& path) {
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));  // a FIFO must not block us
  if (fd.get() < 0) return errno_status(errno, absl::StrCat("cannot open ", path));
  struct stat info {};
  if (::fstat(fd.get(), &info) != 0) return errno_status(errno, absl::StrCat("cannot stat ", path));
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path, " is not a regular file"));
  ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  ReadFile file;
  file.fd_ = std::move(fd);
  file.path_ = path;
  file.bytes_ = info.st_size;
  return file;
}

absl::Status ReadFile::read(int64_t offset, int64_t bytes, void* dst) const {
  constexpr int64_t kLargestRequest = int64_t{64} << 20;
  char* out = static_cast<char*>(dst);
  while (bytes > 0) {
    const ssize_t got = ::pread(fd_.get(), out, std::min(bytes, kLargestRequest), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return errno_status(errno, absl::StrCat("cannot read ", path_));
    if (got == 0) {
      return absl::DataLossError(
          absl::StrCat(path_, " ends at byte ", offset, ", ", bytes, " bytes short: copy or download it again"));
    }
    out += got;
    offset += got;
    bytes -= got;
  }
  return absl::OkStatus();
}

void ReadFile::will_read(int64_t offset, int64_t bytes) const {
  ::posix_fadvise(fd_.get(), offset, bytes, POSIX_FADV_WILLNEED);
}

absl::StatusOr<std::string> read_text_file(const std::string& path, int64_t max_bytes) {
  absl::StatusOr<ReadFile> file = ReadFile::open(path);
  if (!file.ok()) return file.status();
  if (file->bytes() > max_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, " has ", file->bytes(), " bytes, more than the ", max_bytes, " such a file may have"));
  }
  std::string text(static_cast<size_t>(file->bytes()), '\0');
  if (absl::Status status = file->read(0, file->bytes(), text.data()); !status.ok()) return status;
  return text;
}

absl::StatusOr<WriteFile> WriteFile::create(const std::string& path) {
  FileDescriptor fd(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644));
  if (fd.get() < 0) return errno_status(errno, absl::StrCat("cannot create ", path));
  WriteFile file;
  file.fd_ = std::move(fd);
  file.path_ = path;
  return file;
}

absl::Status WriteFile::write(int64_t offset, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t put = ::pwrite(fd_.get(), bytes.data(), bytes.size(), offset);
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) return errno_status(errno, absl::StrCat("cannot write ", path_));
    bytes.remove_prefix(static_cast<size_t>(put));
    offset += put;
  }
  return absl::OkStatus();
}

absl::Status WriteFile::finish() {
  if (::fsync(fd_.get()) != 0) return errno_status(errno, absl::StrCat("cannot flush ", path_));
  if (!fd_.close()) return errno_status(errno, absl::StrCat("cannot close ", path_));
  return absl::OkStatus();
}

absl::Status write_text_file(const std::string& path, std::string_view text) {
  absl::StatusOr<WriteFile> file = WriteFile::create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = file->write(0, text); !status.ok()) return status;
  return file->finish();
}

absl::Status sync_directory(const std::string& path) {
  FileDescriptor fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd.get() < 0) return errno_status(errno, absl::StrCat("cannot open ", path));
  // Some file systems cannot flush a directory and say EINVAL: then there is nothing to do.
  if (::fsync(fd.get()) != 0 && errno != EINVAL) return errno_status(errno, absl::StrCat("cannot flush ", path));
  return absl::OkStatus();
}

}  // namespace octet
