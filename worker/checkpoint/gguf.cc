#include "worker/checkpoint/gguf.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "kernels/check.h"
#include "kernels/fp8.h"
#include "worker/checkpoint/half.h"

namespace octet {
namespace {

constexpr uint32_t kMagic = 0x46554747;  // "GGUF"
constexpr uint64_t kMaxTensors = 1'000'000;
constexpr uint64_t kMaxKeys = 100'000;
constexpr uint64_t kMaxNameBytes = 4096;
constexpr uint64_t kMaxStringBytes = uint64_t{64} << 20;
constexpr uint32_t kMaxDimensions = 4;

struct Layout {
  uint32_t type;
  const char* name;
  int64_t block_elements;
  int64_t block_bytes;
};

// Every type that files hold, so that one may hold types that are never read.
constexpr Layout kLayouts[] = {
    {0, "F32", 1, 4},         {1, "F16", 1, 2},        {2, "Q4_0", 32, 18},      {3, "Q4_1", 32, 20},
    {6, "Q5_0", 32, 22},      {7, "Q5_1", 32, 24},     {8, "Q8_0", 32, 34},      {10, "Q2_K", 256, 84},
    {11, "Q3_K", 256, 110},   {12, "Q4_K", 256, 144},  {13, "Q5_K", 256, 176},   {14, "Q6_K", 256, 210},
    {16, "IQ2_XXS", 256, 66}, {17, "IQ2_XS", 256, 74}, {18, "IQ3_XXS", 256, 98}, {19, "IQ1_S", 256, 50},
    {20, "IQ4_NL", 32, 18},   {21, "IQ3_S", 256, 110}, {22, "IQ2_S", 256, 82},   {23, "IQ4_XS", 256, 136},
    {24, "I8", 1, 1},         {25, "I16", 1, 2},       {26, "I32", 1, 4},        {27, "I64", 1, 8},
    {28, "F64", 1, 8},        {29, "IQ1_M", 256, 56},  {30, "BF16", 1, 2},       {34, "TQ1_0", 256, 54},
    {35, "TQ2_0", 256, 66},   {39, "MXFP4", 32, 17},
};

const Layout* layout_of(uint32_t type) {
  for (const Layout& layout : kLayouts) {
    if (layout.type == type) return &layout;
  }
  return nullptr;
}

// Reads the head of a file piece by piece; every read is checked against the file's end.
class Cursor {
 public:
  explicit Cursor(const ReadFile& file) : file_(file) {}

  int64_t position() const { return buffer_begin_ + next_; }
  int64_t remaining() const { return file_.bytes() - position(); }

  absl::Status read(void* dst, int64_t bytes) {
    if (bytes > remaining()) return ends_early(bytes);
    char* out = static_cast<char*>(dst);
    while (bytes > 0) {
      if (next_ == static_cast<int64_t>(buffer_.size())) {
        if (absl::Status status = refill(); !status.ok()) return status;
      }
      const int64_t piece = std::min(bytes, static_cast<int64_t>(buffer_.size()) - next_);
      std::memcpy(out, buffer_.data() + next_, static_cast<size_t>(piece));
      next_ += piece;
      out += piece;
      bytes -= piece;
    }
    return absl::OkStatus();
  }

  template <typename T>
  absl::StatusOr<T> number() {
    T value;
    if (absl::Status status = read(&value, sizeof(T)); !status.ok()) return status;
    return value;
  }

  absl::StatusOr<std::string> string(uint64_t most_bytes) {
    absl::StatusOr<uint64_t> size = number<uint64_t>();
    if (!size.ok()) return size.status();
    if (*size > most_bytes || static_cast<int64_t>(*size) > remaining()) {
      return absl::InvalidArgumentError(absl::StrCat("a string of ", *size, " bytes at byte ", position()));
    }
    std::string text(static_cast<size_t>(*size), '\0');
    if (absl::Status status = read(text.data(), static_cast<int64_t>(*size)); !status.ok()) return status;
    return text;
  }

 private:
  absl::Status ends_early(int64_t bytes) const {
    return absl::InvalidArgumentError(
        absl::StrCat("the file ends inside its head, ", bytes - remaining(), " bytes short"));
  }

  absl::Status refill() {
    buffer_begin_ = position();
    next_ = 0;
    buffer_.resize(static_cast<size_t>(std::min<int64_t>(int64_t{1} << 20, file_.bytes() - buffer_begin_)));
    return file_.read(buffer_begin_, static_cast<int64_t>(buffer_.size()), buffer_.data());
  }

  const ReadFile& file_;
  std::string buffer_;
  int64_t buffer_begin_ = 0;
  int64_t next_ = 0;
};

enum ValueType : uint32_t { kU8, kI8, kU16, kI16, kU32, kI32, kF32, kBool, kString, kArray, kU64, kI64, kF64 };

// Bytes that a value of this type takes at least.
int64_t least_bytes(uint32_t type) {
  constexpr int64_t kBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};
  return type <= kF64 ? kBytes[type] : 0;
}

template <typename T>
absl::StatusOr<int64_t> read_integer(Cursor& cursor) {
  absl::StatusOr<T> value = cursor.number<T>();
  if (!value.ok()) return value.status();
  if constexpr (std::is_same_v<T, uint64_t>) {
    if (*value > static_cast<uint64_t>(INT64_MAX)) return absl::InvalidArgumentError("an integer beyond 2^63");
  }
  return static_cast<int64_t>(*value);
}

absl::StatusOr<int64_t> read_integer(Cursor& cursor, uint32_t type) {
  switch (type) {
    case kU8:
      return read_integer<uint8_t>(cursor);
    case kI8:
      return read_integer<int8_t>(cursor);
    case kU16:
      return read_integer<uint16_t>(cursor);
    case kI16:
      return read_integer<int16_t>(cursor);
    case kU32:
      return read_integer<uint32_t>(cursor);
    case kI32:
      return read_integer<int32_t>(cursor);
    case kI64:
      return read_integer<int64_t>(cursor);
    default:
      return read_integer<uint64_t>(cursor);
  }
}

absl::StatusOr<double> read_float(Cursor& cursor, uint32_t type) {
  if (type == kF64) return cursor.number<double>();
  absl::StatusOr<float> value = cursor.number<float>();
  if (!value.ok()) return value.status();
  return static_cast<double>(*value);
}

absl::StatusOr<bool> read_bool(Cursor& cursor) {
  absl::StatusOr<uint8_t> value = cursor.number<uint8_t>();
  if (!value.ok()) return value.status();
  if (*value > 1) return absl::InvalidArgumentError("a boolean that is neither 0 nor 1");
  return *value == 1;
}

template <typename T, typename ReadOne>
absl::StatusOr<GgufValue> read_many(uint64_t count, ReadOne read_one) {
  std::vector<T> values;
  values.reserve(static_cast<size_t>(count));
  for (uint64_t i = 0; i < count; ++i) {
    absl::StatusOr<T> value = read_one();
    if (!value.ok()) return value.status();
    values.push_back(*std::move(value));
  }
  return GgufValue(std::move(values));
}

absl::StatusOr<GgufValue> read_array(Cursor& cursor) {
  absl::StatusOr<uint32_t> type = cursor.number<uint32_t>();
  if (!type.ok()) return type.status();
  absl::StatusOr<uint64_t> count = cursor.number<uint64_t>();
  if (!count.ok()) return count.status();
  if (*type > kF64 || *type == kArray) return absl::InvalidArgumentError(absl::StrCat("an array of type ", *type));
  if (*count > static_cast<uint64_t>(cursor.remaining() / least_bytes(*type))) {
    return absl::InvalidArgumentError(absl::StrCat("an array of ", *count, " values, more than the file holds"));
  }
  if (*type == kString) return read_many<std::string>(*count, [&] { return cursor.string(kMaxStringBytes); });
  if (*type == kBool) return read_many<bool>(*count, [&] { return read_bool(cursor); });
  if (*type == kF32 || *type == kF64) return read_many<double>(*count, [&] { return read_float(cursor, *type); });
  return read_many<int64_t>(*count, [&] { return read_integer(cursor, *type); });
}

template <typename T>
absl::StatusOr<GgufValue> as_value(absl::StatusOr<T> value) {
  if (!value.ok()) return value.status();
  return GgufValue(*std::move(value));
}

absl::StatusOr<GgufValue> read_value(Cursor& cursor) {
  absl::StatusOr<uint32_t> type = cursor.number<uint32_t>();
  if (!type.ok()) return type.status();
  if (*type > kF64) return absl::InvalidArgumentError(absl::StrCat("a value of type ", *type));
  if (*type == kArray) return read_array(cursor);
  if (*type == kString) return as_value(cursor.string(kMaxStringBytes));
  if (*type == kBool) return as_value(read_bool(cursor));
  if (*type == kF32 || *type == kF64) return as_value(read_float(cursor, *type));
  return as_value(read_integer(cursor, *type));
}

// A tensor's description; offset is relative to the data section, bytes are computed.
absl::StatusOr<GgufTensor> read_tensor(Cursor& cursor) {
  GgufTensor tensor;
  absl::StatusOr<std::string> name = cursor.string(kMaxNameBytes);
  if (!name.ok()) return name.status();
  tensor.name = *std::move(name);
  const auto refuse = [&](const std::string& fault) {
    return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name.substr(0, 200), " has ", fault));
  };
  absl::StatusOr<uint32_t> dimensions = cursor.number<uint32_t>();
  if (!dimensions.ok()) return dimensions.status();
  if (*dimensions == 0 || *dimensions > kMaxDimensions) return refuse(absl::StrCat(*dimensions, " dimensions"));
  int64_t elements = 1;
  for (uint32_t i = 0; i < *dimensions; ++i) {
    absl::StatusOr<uint64_t> size = cursor.number<uint64_t>();
    if (!size.ok()) return size.status();
    if (*size == 0 || *size > static_cast<uint64_t>(INT64_MAX) ||
        __builtin_mul_overflow(elements, static_cast<int64_t>(*size), &elements)) {
      return refuse(absl::StrCat("a dimension of ", *size));
    }
    tensor.shape.push_back(static_cast<int64_t>(*size));
  }
  std::reverse(tensor.shape.begin(), tensor.shape.end());
  absl::StatusOr<uint32_t> type = cursor.number<uint32_t>();
  if (!type.ok()) return type.status();
  absl::StatusOr<uint64_t> offset = cursor.number<uint64_t>();
  if (!offset.ok()) return offset.status();
  tensor.type = *type;
  const Layout* layout = layout_of(*type);
  if (layout == nullptr) return refuse(absl::StrCat("type ", *type, ", which is not a GGUF type known here"));
  if (tensor.shape.back() % layout->block_elements != 0) {
    return refuse(absl::StrCat("rows of ", tensor.shape.back(), " elements, but ", layout->name, " comes in blocks of ",
                               layout->block_elements));
  }
  if (__builtin_mul_overflow(elements / layout->block_elements, layout->block_bytes, &tensor.bytes)) {
    return refuse(absl::StrCat(elements, " elements"));
  }
  if (*offset > static_cast<uint64_t>(INT64_MAX)) return refuse(absl::StrCat("its data at ", *offset));
  tensor.offset = static_cast<int64_t>(*offset);
  return tensor;
}

absl::Status check_version(uint32_t magic, uint32_t version) {
  if (magic != kMagic) return absl::InvalidArgumentError("it does not begin with GGUF: this is not a GGUF file");
  if (version == 2 || version == 3) return absl::OkStatus();
  const bool swapped = (version & 0xFFFF) == 0;
  return absl::UnimplementedError(absl::StrCat("GGUF version ", version, swapped ? " (a big-endian file)" : "",
                                               "; supported: versions 2 and 3, little-endian"));
}

float half_at(const uint8_t* bytes) {
  uint16_t bits;
  std::memcpy(&bits, bytes, 2);
  return f16_to_float(bits);
}

// Blocks of 32: a half-precision scale (and, for Q4_1, a minimum), then codes. The low nibbles of the 16 code bytes are
// the first 16 elements, the high nibbles the others.
void dequantize_q4_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>((block[2 + i] & 15) - 8);
    out[i + 16] = scale * static_cast<float>((block[2 + i] >> 4) - 8);
  }
}

void dequantize_q4_1(const uint8_t* block, float* out) {
  const float scale = half_at(block), minimum = half_at(block + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = scale * static_cast<float>(block[4 + i] & 15) + minimum;
    out[i + 16] = scale * static_cast<float>(block[4 + i] >> 4) + minimum;
  }
}

void dequantize_q8_0(const uint8_t* block, float* out) {
  const float scale = half_at(block);
  for (int i = 0; i < 32; ++i) out[i] = scale * static_cast<float>(static_cast<int8_t>(block[2 + i]));
}

void dequantize_bf16(const uint8_t* element, float* out) {
  uint16_t bits;
  std::memcpy(&bits, element, 2);
  *out = bf16_to_float(bits);
}

using Dequantize = void (*)(const uint8_t* block, float* out);

Dequantize dequantizer_of(uint32_t type) {
  switch (static_cast<GgufType>(type)) {
    case GgufType::kF32:
      return [](const uint8_t* element, float* out) { std::memcpy(out, element, 4); };
    case GgufType::kF16:
      return [](const uint8_t* element, float* out) { *out = half_at(element); };
    case GgufType::kBF16:
      return dequantize_bf16;
    case GgufType::kQ4_0:
      return dequantize_q4_0;
    case GgufType::kQ4_1:
      return dequantize_q4_1;
    case GgufType::kQ8_0:
      return dequantize_q8_0;
  }
  return nullptr;
}

}  // namespace

std::string gguf_type_name(uint32_t type) {
  const Layout* layout = layout_of(type);
  return layout != nullptr ? layout->name : absl::StrCat("type ", type);
}

absl::StatusOr<GgufFile> GgufFile::open(const std::string& path) {
  absl::StatusOr<ReadFile> file = ReadFile::open(path);
  if (!file.ok()) return file.status();
  GgufFile gguf(*std::move(file));
  if (absl::Status status = gguf.parse(); !status.ok()) {
    return absl::Status(status.code(), absl::StrCat(path, ": ", status.message()));
  }
  return gguf;
}

absl::Status GgufFile::parse() {
  Cursor cursor(file_);
  uint32_t start[2];
  if (absl::Status status = cursor.read(start, sizeof(start)); !status.ok()) return status;
  if (absl::Status status = check_version(start[0], start[1]); !status.ok()) return status;
  uint64_t counts[2];  // of tensors and of keys
  if (absl::Status status = cursor.read(counts, sizeof(counts)); !status.ok()) return status;
  if (counts[0] > kMaxTensors || counts[1] > kMaxKeys) {
    return absl::InvalidArgumentError(
        absl::StrCat("it claims ", counts[0], " tensors and ", counts[1], " metadata keys"));
  }
  for (uint64_t i = 0; i < counts[1]; ++i) {
    absl::StatusOr<std::string> key = cursor.string(kMaxNameBytes);
    if (!key.ok()) return key.status();
    absl::StatusOr<GgufValue> value = read_value(cursor);
    if (!value.ok()) return absl::Status(value.status().code(), absl::StrCat(*key, ": ", value.status().message()));
    if (!metadata_.emplace(*key, *std::move(value)).second) {
      return absl::InvalidArgumentError(absl::StrCat("metadata key ", *key, " appears twice"));
    }
  }
  std::vector<GgufTensor> tensors;
  for (uint64_t i = 0; i < counts[0]; ++i) {
    absl::StatusOr<GgufTensor> tensor = read_tensor(cursor);
    if (!tensor.ok()) return tensor.status();
    tensors.push_back(*std::move(tensor));
  }
  return place(std::move(tensors), cursor.position());
}

// Turns offsets into places in the file and checks that the tensors, each padded to the alignment, tile the rest of it.
absl::Status GgufFile::place(std::vector<GgufTensor> tensors, int64_t head_bytes) {
  absl::StatusOr<std::optional<int64_t>> stated = get<int64_t>("general.alignment");
  if (!stated.ok()) return stated.status();
  const int64_t alignment = stated->value_or(32);
  if (alignment < 1 || alignment > 65536 || (alignment & (alignment - 1)) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("general.alignment is ", alignment, ", expected a power of two up to 65536"));
  }
  const auto padded = [&](int64_t bytes) { return (bytes + alignment - 1) & ~(alignment - 1); };
  const int64_t data_begin = padded(head_bytes);
  std::stable_sort(tensors.begin(), tensors.end(),
                   [](const GgufTensor& a, const GgufTensor& b) { return a.offset < b.offset; });
  int64_t expected = 0, end = 0;
  for (GgufTensor& tensor : tensors) {
    if (tensor.offset != expected) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name.substr(0, 200), " begins at ",
                                                     tensor.offset, " of the data, expected ", expected,
                                                     ": the file is damaged"));
    }
    if (tensor.bytes > file_.bytes() - data_begin - tensor.offset) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name.substr(0, 200), " of ", tensor.bytes,
                                                     " bytes goes beyond the end of the file: download it again"));
    }
    end = tensor.offset + tensor.bytes;
    expected = padded(end);
    tensor.offset += data_begin;
    if (find(tensor.name) != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("tensor ", tensor.name.substr(0, 200), " appears twice"));
    }
    const std::string name = tensor.name;
    tensors_[name] = std::move(tensor);
  }
  const int64_t data_bytes = std::max<int64_t>(0, file_.bytes() - data_begin);
  if (data_bytes > expected) {
    return absl::InvalidArgumentError(absl::StrCat(data_bytes - end, " bytes after the last tensor belong to nothing"));
  }
  return absl::OkStatus();
}

const GgufTensor* GgufFile::find(std::string_view name) const {
  const auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

const GgufValue* GgufFile::metadata(std::string_view key) const {
  const auto found = metadata_.find(key);
  return found == metadata_.end() ? nullptr : &found->second;
}

absl::Status GgufFile::wrong_type(std::string_view key) const {
  return absl::InvalidArgumentError(
      absl::StrCat(path(), ": metadata key ", absl::string_view(key.data(), key.size()), " has an unexpected type"));
}

absl::Status GgufFile::read_f32(const GgufTensor& tensor, int64_t begin, int64_t end, float* dst) const {
  const int64_t row_elements = tensor.shape.size() == 1 ? 1 : tensor.shape.back();
  const Layout& layout = *layout_of(tensor.type);
  const Dequantize dequantize = dequantizer_of(tensor.type);
  if (dequantize == nullptr) {
    return absl::UnimplementedError(absl::StrCat(path(), ": tensor ", tensor.name, " is of type ", layout.name,
                                                 "; supported: F32, F16, BF16, Q8_0, Q4_0, Q4_1"));
  }
  int64_t rows = 1;
  for (const int64_t dim : tensor.shape) rows *= dim;
  rows /= row_elements;
  const int64_t first = begin * row_elements, count = (end - begin) * row_elements;
  OCTET_CHECK(0 <= begin && begin <= end && end <= rows && first % layout.block_elements == 0 &&
                  count % layout.block_elements == 0,
              "a range outside " + tensor.name);
  const int64_t bytes = count / layout.block_elements * layout.block_bytes;
  const auto raw = std::make_unique_for_overwrite<uint8_t[]>(static_cast<size_t>(bytes));
  absl::Status status =
      file_.read(tensor.offset + first / layout.block_elements * layout.block_bytes, bytes, raw.get());
  if (!status.ok()) return absl::Status(status.code(), absl::StrCat("tensor ", tensor.name, ": ", status.message()));
  for (int64_t block = 0; block < count / layout.block_elements; ++block) {
    dequantize(raw.get() + block * layout.block_bytes, dst + block * layout.block_elements);
  }
  return absl::OkStatus();
}

}  // namespace octet
