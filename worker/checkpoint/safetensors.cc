#include "worker/checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/check.h"
#include "worker/checkpoint/json.h"

namespace octet {
namespace {

struct DTypeName {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;
};

constexpr DTypeName kDTypes[] = {
    {"F32", 32, DType::kF32},       {"BF16", 16, DType::kBF16},       {"F16", 16, DType::kF16},
    {"F8_E4M3", 8, DType::kF8E4M3}, {"I32", 32, DType::kI32},         {"U8", 8, DType::kU8},
    {"BOOL", 8, std::nullopt},      {"I8", 8, std::nullopt},          {"F8_E5M2", 8, std::nullopt},
    {"F8_E8M0", 8, std::nullopt},   {"F8_E4M3FNUZ", 8, std::nullopt}, {"F8_E5M2FNUZ", 8, std::nullopt},
    {"I16", 16, std::nullopt},      {"U16", 16, std::nullopt},        {"U32", 32, std::nullopt},
    {"F64", 64, std::nullopt},      {"I64", 64, std::nullopt},        {"U64", 64, std::nullopt},
    {"C64", 64, std::nullopt},      {"F4", 4, std::nullopt},          {"F6_E2M3", 6, std::nullopt},
    {"F6_E3M2", 6, std::nullopt},
};

const DTypeName* find_dtype(std::string_view name) {
  for (const DTypeName& entry : kDTypes) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

// Builds the entries while the JSON is walked, so that a header of a million tensors never exists as a JSON tree.
class HeaderWalk : public StrictJsonWalk {
 public:
  std::vector<SafetensorsEntry> entries;  // offset, bytes: as data_offsets say, begin and end
  std::map<std::string, std::string> metadata;

 protected:
  bool on_begin(bool is_object) override {
    if (depth() == 1) return is_object || fail("the header is not a JSON object");
    if (depth() == 2) return is_object || fail(absl::StrCat(subject(), " is not an object"));
    if (in_metadata_) return fail("__metadata__ may hold strings only");
    if (depth() == 3 && !is_object && wants_numbers()) {
      in_numbers_ = true;
    } else if (depth() == 3 && is_known_field()) {
      return wrong_field();
    }
    if (depth() > 3 && in_numbers_) return wrong_field();
    return true;
  }

  bool on_end(bool) override {
    if (depth() == 2) in_numbers_ = false;
    if (depth() != 1) return true;
    return std::exchange(in_metadata_, false) || finish_entry();
  }

  bool on_key(const std::string& name) override {
    if (depth() == 1) return begin_entry(name);
    if (depth() == 2) field_ = name;
    return true;
  }

  bool on_unsigned(uint64_t value) override {
    if (!in_numbers_) return on_other("a number");
    if (value > static_cast<uint64_t>(INT64_MAX)) return fail(absl::StrCat(subject(), ": ", field_, " is too large"));
    std::vector<int64_t>& numbers = field_ == "shape" ? entries.back().shape : offsets_;
    const size_t most = field_ == "shape" ? kMaxSafetensorsRank : 2;
    if (numbers.size() == most) return fail(absl::StrCat(subject(), ": ", field_, " has more than ", most, " numbers"));
    numbers.push_back(static_cast<int64_t>(value));
    return true;
  }

  bool on_string(std::string& value) override {
    if (depth() == 2 && in_metadata_) {
      metadata[field_] = value;
    } else if (depth() == 2 && field_ == "dtype") {
      entries.back().dtype = value;
    } else {
      return on_other("a string");
    }
    return true;
  }

  bool on_other(std::string_view) override {
    if (depth() == 0) return fail("the header is not a JSON object");
    if (depth() == 1) return fail(absl::StrCat(subject(), " is not an object"));
    if (in_metadata_) return fail("__metadata__ may hold strings only");
    if (in_numbers_ || (depth() == 2 && is_known_field())) return wrong_field();
    return true;  // fields that a later version of the format may add
  }

 private:
  bool begin_entry(const std::string& name) {
    field_.clear();
    offsets_.clear();
    in_metadata_ = name == "__metadata__";
    if (in_metadata_) return true;
    if (static_cast<int64_t>(name.size()) > kMaxSafetensorsNameBytes) {
      return fail(absl::StrCat("a tensor's name has ", name.size(), " bytes; at most ", kMaxSafetensorsNameBytes));
    }
    if (static_cast<int64_t>(entries.size()) == kMaxSafetensorsTensors) {
      return fail(absl::StrCat("more than ", kMaxSafetensorsTensors, " tensors"));
    }
    entries.push_back({.name = name, .dtype = {}, .shape = {}, .offset = -1, .bytes = -1});
    has_shape_ = false;
    return true;
  }

  bool finish_entry() {
    SafetensorsEntry& entry = entries.back();
    if (entry.dtype.empty() || !has_shape_ || offsets_.size() != 2) {
      return fail(absl::StrCat(subject(), " lacks dtype, shape or two data_offsets"));
    }
    entry.offset = offsets_[0];
    entry.bytes = offsets_[1];
    return true;
  }

  bool wants_numbers() {
    if (field_ == "shape") has_shape_ = true;
    return field_ == "shape" || field_ == "data_offsets";
  }
  bool is_known_field() const { return field_ == "shape" || field_ == "data_offsets" || field_ == "dtype"; }
  bool wrong_field() {
    return fail(absl::StrCat(subject(), ": ", field_, " must be ",
                             field_ == "dtype" ? "a string" : "an array of integers from 0"));
  }
  std::string subject() const {
    return entries.empty() || in_metadata_ ? "a header entry"
                                           : absl::StrCat("tensor ", entries.back().name.substr(0, 200));
  }

  std::string field_;
  std::vector<int64_t> offsets_;
  bool in_metadata_ = false;
  bool in_numbers_ = false;
  bool has_shape_ = false;
};

// Bytes that dtype and shape ask for; nothing when the product overflows or does not end on a byte.
std::optional<int64_t> bytes_of(const SafetensorsEntry& entry, int bits) {
  int64_t total = bits;
  for (const int64_t dim : entry.shape) {
    if (__builtin_mul_overflow(total, dim, &total)) return std::nullopt;
  }
  if (total % 8 != 0) return std::nullopt;
  return total / 8;
}

// Turns begin/end into offset/bytes and checks that the tensors tile [data_begin, file_bytes).
absl::Status place(std::vector<SafetensorsEntry>& entries, int64_t data_begin, int64_t file_bytes,
                   const std::string& what) {
  const auto refuse = [&](const SafetensorsEntry& entry, absl::string_view fault) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": tensor ", entry.name.substr(0, 200), " ", fault,
                                                   ": the file is damaged or was not written by a safetensors writer"));
  };
  std::stable_sort(entries.begin(), entries.end(), [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  int64_t previous_end = 0;
  for (SafetensorsEntry& entry : entries) {
    const int64_t begin = entry.offset, end = entry.bytes;
    if (end < begin) return refuse(entry, absl::StrCat("ends at ", end, ", before its begin ", begin));
    if (begin != previous_end) {
      return refuse(entry, absl::StrCat("begins at ", begin, ", but the tensor before it ends at ", previous_end));
    }
    if (end > file_bytes - data_begin) {
      return refuse(entry,
                    absl::StrCat("ends at ", end, ", but the file holds ", file_bytes - data_begin, " bytes of data"));
    }
    entry.offset = data_begin + begin;
    entry.bytes = end - begin;
    if (const DTypeName* dtype = find_dtype(entry.dtype); dtype != nullptr) {
      const std::optional<int64_t> expected = bytes_of(entry, dtype->bits);
      if (expected != entry.bytes) {
        return refuse(entry, absl::StrCat("of type ", entry.dtype, " and shape [", absl::StrJoin(entry.shape, ", "),
                                          "] cannot have ", entry.bytes, " bytes"));
      }
    }
    previous_end = end;
  }
  if (previous_end != file_bytes - data_begin) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": ", file_bytes - data_begin - previous_end,
                     " bytes after the last tensor belong to nothing: the file is damaged"));
  }
  return absl::OkStatus();
}

}  // namespace

std::optional<DType> dtype_named(std::string_view dtype) {
  const DTypeName* found = find_dtype(dtype);
  return found == nullptr ? std::nullopt : found->dtype;
}

absl::StatusOr<SafetensorsHeader> parse_safetensors_header(std::string_view json, int64_t file_bytes,
                                                           const std::string& what) {
  if (json.empty() || json.front() != '{') {
    return absl::InvalidArgumentError(absl::StrCat(what, ": the header does not begin with '{'"));
  }
  const int64_t header_bytes = static_cast<int64_t>(json.size());
  if (file_bytes < 8 + header_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(what, ": a header of ", header_bytes, " bytes in a file of ", file_bytes));
  }
  HeaderWalk walk;
  if (absl::Status status = walk.walk(json, what); !status.ok()) return status;
  if (absl::Status status = place(walk.entries, 8 + header_bytes, file_bytes, what); !status.ok()) return status;
  return SafetensorsHeader{
      .tensors = std::move(walk.entries), .metadata = std::move(walk.metadata), .header_bytes = header_bytes};
}

absl::StatusOr<SafetensorsHeader> read_safetensors_header(const ReadFile& file) {
  const auto refuse = [&](const std::string& fault) {
    return absl::InvalidArgumentError(
        absl::StrCat(file.path(), ": ", fault, ": this is not a whole safetensors file; download it again"));
  };
  if (file.bytes() < 8) return refuse(absl::StrCat("only ", file.bytes(), " bytes"));
  uint64_t header_bytes = 0;
  if (absl::Status status = file.read(0, 8, &header_bytes); !status.ok()) return status;
  if (header_bytes > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes)) {
    return refuse(absl::StrCat("its header claims ", header_bytes, " bytes, more than ", kMaxSafetensorsHeaderBytes));
  }
  if (static_cast<int64_t>(header_bytes) > file.bytes() - 8) {
    return refuse(absl::StrCat("its header claims ", header_bytes, " bytes, the file has ", file.bytes()));
  }
  std::string json(header_bytes, '\0');
  if (absl::Status status = file.read(8, static_cast<int64_t>(header_bytes), json.data()); !status.ok()) return status;
  return parse_safetensors_header(json, file.bytes(), file.path());
}

absl::StatusOr<SafetensorsWriter> SafetensorsWriter::create(const std::string& path, std::vector<Plan> tensors,
                                                            const std::map<std::string, std::string>& metadata) {
  std::vector<size_t> order(tensors.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return size_of(tensors[a].dtype) > size_of(tensors[b].dtype); });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::vector<int64_t> begins(tensors.size()), sizes(tensors.size());
  int64_t position = 0;
  for (const size_t i : order) {
    const Plan& plan = tensors[i];
    std::vector<int64_t> shape;
    for (int d = 0; d < plan.shape.rank(); ++d) shape.push_back(plan.shape[d]);
    sizes[i] = plan.shape.elements() * size_of(plan.dtype);
    begins[i] = position;
    position += sizes[i];
    OCTET_CHECK(!header.contains(plan.name), "two tensors named " + plan.name);
    header[plan.name] = {{"dtype", name_of(plan.dtype)}, {"shape", shape}, {"data_offsets", {begins[i], position}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  const uint64_t header_bytes = text.size();
  std::string prefix(8, '\0');
  std::memcpy(prefix.data(), &header_bytes, 8);

  absl::StatusOr<WriteFile> file = WriteFile::create(path);
  if (!file.ok()) return file.status();
  if (absl::Status status = file->write(0, prefix + text); !status.ok()) return status;
  SafetensorsWriter writer(*std::move(file));
  for (int64_t& begin : begins) begin += 8 + static_cast<int64_t>(header_bytes);
  writer.begins_ = std::move(begins);
  writer.sizes_ = std::move(sizes);
  writer.tensor_bytes_ = position;
  return writer;
}

absl::Status SafetensorsWriter::write(size_t tensor, int64_t offset, std::string_view bytes) {
  const int64_t size = static_cast<int64_t>(bytes.size());
  OCTET_CHECK(tensor < sizes_.size() && offset >= 0 && size <= sizes_[tensor] - offset, "a write outside its tensor");
  written_ += size;
  return file_.write(begins_[tensor] + offset, bytes);
}

absl::Status SafetensorsWriter::finish() {
  OCTET_CHECK(written_ == tensor_bytes_, "a safetensors file was finished before all its tensors were written");
  return file_.finish();
}

}  // namespace octet
