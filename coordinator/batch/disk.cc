#include "coordinator/batch/disk.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace octet {
namespace {

absl::Status error_of(std::string_view what, const std::string& path) {
  return disk_error(absl::StrCat(std::string(what), " ", path));
}

// No other process's, on this machine or another that shares the disk.
const std::string& own_suffix() {
  static const std::string kSuffix = [] {
    std::random_device source;
    return absl::StrCat("tmp-", getpid(), "-", source());
  }();
  return kSuffix;
}

class RealFile final : public DiskFile {
 public:
  RealFile(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  ~RealFile() override { close(fd_); }

  absl::StatusOr<int64_t> size() const override {
    struct stat status {};
    if (fstat(fd_, &status) != 0) return error_of("stat", path_);
    return status.st_size;
  }

  absl::StatusOr<std::string> read(int64_t offset, int64_t bytes) const override {
    std::string data(static_cast<size_t>(bytes), '\0');
    size_t done = 0;
    while (done < data.size()) {
      const ssize_t got = pread(fd_, data.data() + done, data.size() - done, offset + static_cast<int64_t>(done));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) return error_of("read", path_);
      if (got == 0) break;
      done += static_cast<size_t>(got);
    }
    data.resize(done);
    return data;
  }

  absl::Status write(int64_t offset, std::string_view data) override {
    while (!data.empty()) {
      const ssize_t put = pwrite(fd_, data.data(), data.size(), offset);
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) return error_of("write", path_);
      offset += put;
      data.remove_prefix(static_cast<size_t>(put));
    }
    return absl::OkStatus();
  }

  absl::Status allocate(int64_t bytes) override {
    if (fallocate(fd_, 0, 0, bytes) == 0 || errno == EOPNOTSUPP || errno == ENOSYS) return absl::OkStatus();
    return error_of("allocate", path_);
  }

  absl::Status sync() override { return fdatasync(fd_) == 0 ? absl::OkStatus() : error_of("sync", path_); }

 private:
  const int fd_;
  const std::string path_;
};

class RealDisk final : public Disk {
 public:
  absl::Status make_directory(const std::string& path) override {
    if (mkdir(path.c_str(), 0777) == 0 || errno == EEXIST) return absl::OkStatus();
    return error_of("make directory", path);
  }

  absl::StatusOr<std::vector<std::string>> list(const std::string& directory) override {
    DIR* open = opendir(directory.c_str());
    if (open == nullptr) return error_of("list", directory);
    std::vector<std::string> names;
    while (const dirent* entry = readdir(open)) {
      const std::string name = entry->d_name;
      if (name != "." && name != "..") names.push_back(name);
    }
    closedir(open);
    std::ranges::sort(names);
    return names;
  }

  absl::StatusOr<std::unique_ptr<DiskFile>> open(const std::string& path) override {
    return file("open", path, O_RDONLY);
  }

  absl::StatusOr<std::unique_ptr<DiskFile>> create(const std::string& path) override {
    return file("create", path, O_RDWR | O_CREAT | O_EXCL);
  }

  absl::Status rename(const std::string& from, const std::string& to) override {
    return std::rename(from.c_str(), to.c_str()) == 0 ? absl::OkStatus() : error_of("rename", from);
  }

  absl::Status remove(const std::string& path) override {
    return unlink(path.c_str()) == 0 || errno == ENOENT ? absl::OkStatus() : error_of("remove", path);
  }

  absl::Status sync_directory(const std::string& path) override {
    const int fd = ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) return error_of("open", path);
    // Some network file systems do not sync directories; they have no need to, and say EINVAL.
    const bool synced = fsync(fd) == 0 || errno == EINVAL;
    const absl::Status status = synced ? absl::OkStatus() : error_of("sync", path);
    close(fd);
    return status;
  }

 private:
  static absl::StatusOr<std::unique_ptr<DiskFile>> file(std::string_view what, const std::string& path, int flags) {
    const int fd = ::open(path.c_str(), flags | O_CLOEXEC, 0666);
    if (fd < 0) return error_of(what, path);
    return std::make_unique<RealFile>(fd, path);
  }
};

}  // namespace

absl::Status disk_error(const std::string& what) {
  const std::string text = absl::StrCat(what, ": ", std::strerror(errno));
  switch (errno) {
    case ENOENT:
      return absl::NotFoundError(text);
    case EEXIST:
      return absl::AlreadyExistsError(text);
    case EACCES:
    case EINVAL:
    case EISDIR:
    case ELOOP:
    case ENAMETOOLONG:
    case ENOTDIR:
    case EPERM:
    case EROFS:
      return absl::FailedPreconditionError(text);
    default:
      return absl::UnavailableError(text);
  }
}

absl::StatusOr<std::string> Disk::read(const std::string& path) {
  const absl::StatusOr<std::unique_ptr<DiskFile>> file = open(path);
  if (!file.ok()) return file.status();
  const absl::StatusOr<int64_t> size = (*file)->size();
  if (!size.ok()) return size.status();
  return (*file)->read(0, *size);
}

absl::Status Disk::replace(const std::string& path, std::string_view content) {
  const std::string beside = absl::StrCat(path, ".", own_suffix());
  if (absl::Status status = remove(beside); !status.ok()) return status;
  {
    const absl::StatusOr<std::unique_ptr<DiskFile>> file = create(beside);
    if (!file.ok()) return file.status();
    if (absl::Status status = (*file)->write(0, content); !status.ok()) return status;
    if (absl::Status status = (*file)->sync(); !status.ok()) return status;
  }
  if (absl::Status status = rename(beside, path); !status.ok()) return status;
  return sync_directory(directory_of(path));
}

Disk& real_disk() {
  static RealDisk disk;
  return disk;
}

std::string directory_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

}  // namespace octet
