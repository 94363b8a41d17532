// FakeDisk: a disk in memory that forgets. What was not synced is lost, torn or kept, as its seed says, when it
// crashes; any call can be made to fail.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/batch/disk.h"

namespace octet {

class FakeDisk final : public Disk {
 public:
  explicit FakeDisk(uint64_t seed = 1) : random_(seed) {}

  // From now on the n-th call that changes the disk fails (1: the next one), and so do the `more` after it.
  void fail_at(int64_t n, int64_t more = 0) {
    fail_from_ = changes_ + n;
    fail_to_ = fail_from_ + more;
  }
  int64_t changes() const { return changes_; }

  // The machine loses power: names and bytes that were not synced are there, in part or not at all.
  void crash() {
    for (auto& [path, file] : files_) {
      if (!file->name_synced && random_() % 2 == 0) file->gone = true;
      for (const auto& [offset, data] : file->unsynced) {
        const size_t kept = std::min<size_t>(random_() % 3 * data.size() / 2, data.size());  // none, half, all
        put(&file->synced, offset, data.substr(0, kept));
      }
      file->unsynced.clear();
      file->now = file->synced;
      file->name_synced = true;
    }
    std::erase_if(files_, [](const auto& entry) { return entry.second->gone; });
  }

  absl::Status make_directory(const std::string&) override { return change("make directory"); }

  absl::StatusOr<std::vector<std::string>> list(const std::string& directory) override {
    std::vector<std::string> names;
    for (const auto& [path, file] : files_) {
      if (directory_of(path) == directory) names.push_back(path.substr(directory.size() + 1));
    }
    return names;
  }

  absl::StatusOr<std::unique_ptr<DiskFile>> open(const std::string& path) override {
    const auto found = files_.find(path);
    if (found == files_.end()) return absl::NotFoundError(path);
    return std::make_unique<File>(this, found->second);
  }

  absl::StatusOr<std::unique_ptr<DiskFile>> create(const std::string& path) override {
    if (files_.contains(path)) return absl::AlreadyExistsError(path);
    if (absl::Status status = change("create"); !status.ok()) return status;
    const auto content = std::make_shared<Content>();
    files_[path] = content;
    return std::make_unique<File>(this, content);
  }

  absl::Status rename(const std::string& from, const std::string& to) override {
    if (absl::Status status = change("rename"); !status.ok()) return status;
    files_[to] = files_.at(from);  // a crash may lose neither name's content: simpler than real disks, and enough here
    files_.erase(from);
    return absl::OkStatus();
  }

  absl::Status remove(const std::string& path) override {
    if (absl::Status status = change("remove"); !status.ok()) return status;
    files_.erase(path);
    return absl::OkStatus();
  }

  absl::Status sync_directory(const std::string& path) override {
    if (absl::Status status = change("sync directory"); !status.ok()) return status;
    for (auto& [name, file] : files_) {
      if (directory_of(name) == path) file->name_synced = true;
    }
    return absl::OkStatus();
  }

  // Changes a byte of a file behind everybody's back.
  void damage(const std::string& path, size_t offset) { files_.at(path)->now.at(offset) ^= 0x40; }

 private:
  struct Content {
    std::string now, synced;
    std::vector<std::pair<int64_t, std::string>> unsynced;
    bool name_synced = false, gone = false;
  };

  static void put(std::string* bytes, int64_t offset, const std::string& data) {
    const auto end = static_cast<size_t>(offset) + data.size();
    if (bytes->size() < end) bytes->resize(end, '\0');
    bytes->replace(static_cast<size_t>(offset), data.size(), data);
  }

  class File final : public DiskFile {
   public:
    File(FakeDisk* disk, std::shared_ptr<Content> content) : disk_(disk), content_(std::move(content)) {}

    absl::StatusOr<int64_t> size() const override { return static_cast<int64_t>(content_->now.size()); }

    absl::StatusOr<std::string> read(int64_t offset, int64_t bytes) const override {
      if (offset >= static_cast<int64_t>(content_->now.size())) return std::string();
      return content_->now.substr(static_cast<size_t>(offset), static_cast<size_t>(bytes));
    }

    absl::Status write(int64_t offset, std::string_view data) override {
      const absl::Status status = disk_->change("write");
      if (!status.ok()) data = data.substr(0, data.size() / 2);  // a disk that fills up takes a part
      put(&content_->now, offset, std::string(data));
      content_->unsynced.emplace_back(offset, data);
      return status;
    }

    absl::Status allocate(int64_t bytes) override {
      if (absl::Status status = disk_->change("allocate"); !status.ok()) return status;
      if (static_cast<int64_t>(content_->now.size()) < bytes) {
        content_->now.resize(static_cast<size_t>(bytes), '\0');
        content_->synced.resize(static_cast<size_t>(bytes), '\0');
      }
      return absl::OkStatus();
    }

    absl::Status sync() override {
      if (absl::Status status = disk_->change("sync"); !status.ok()) {
        content_->unsynced.clear();  // as Linux does: the pages are clean now, and their bytes nowhere
        return status;
      }
      content_->synced = content_->now;
      content_->unsynced.clear();
      return absl::OkStatus();
    }

   private:
    FakeDisk* const disk_;
    const std::shared_ptr<Content> content_;
  };

  absl::Status change(std::string_view what) {
    ++changes_;
    if (changes_ < fail_from_ || changes_ > fail_to_) return absl::OkStatus();
    return absl::UnavailableError(absl::StrCat(std::string(what), ": no space left on the fake disk"));
  }

  std::mt19937_64 random_;
  std::map<std::string, std::shared_ptr<Content>> files_;
  int64_t changes_ = 0, fail_from_ = INT64_MAX, fail_to_ = INT64_MAX;
};

}  // namespace octet
