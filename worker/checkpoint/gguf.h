// The GGUF file format, versions 2 and 3, little-endian: typed metadata, then tensors of plain and block-quantised
// types. Counts, lengths and offsets are checked against the bytes that are really there before anything is sized by
// them. Invariant: an accepted file's tensors tile its data section exactly, alignment included.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/checkpoint/file.h"

namespace octet {

// Types whose values can be computed. Others may be in a file and are an error where one is read.
enum class GgufType : uint32_t { kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kBF16 = 30 };

// "Q4_1"; "type 77" for a number that GGUF does not define.
std::string gguf_type_name(uint32_t type);

// Integers of every width arrive as int64_t (uint64 beyond it is refused), both float widths as double.
using GgufValue = std::variant<bool, int64_t, double, std::string, std::vector<bool>, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string>>;

struct GgufTensor {
  std::string name;
  uint32_t type = 0;
  std::vector<int64_t> shape;  // outermost dimension first, as everywhere in Octet: GGUF's own order is reversed
  int64_t offset = 0;          // from the start of the file
  int64_t bytes = 0;
};

class GgufFile {
 public:
  // Reads and checks everything but the tensors' data. Errors name the file.
  static absl::StatusOr<GgufFile> open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  const std::map<std::string, GgufTensor, std::less<>>& tensors() const { return tensors_; }
  const GgufTensor* find(std::string_view name) const;

  // Null when absent.
  const GgufValue* metadata(std::string_view key) const;
  // The value as T; nothing when the key is absent. INVALID_ARGUMENT when it has another type.
  template <typename T>
  absl::StatusOr<std::optional<T>> get(std::string_view key) const;

  // Rows [begin, end) of a matrix, or elements of a vector, as FP32, exactly as GGUF defines them.
  // UNIMPLEMENTED, naming the type, for types other than GgufType's. REQUIRES: the range lies inside the tensor.
  absl::Status read_f32(const GgufTensor& tensor, int64_t begin, int64_t end, float* dst) const;

 private:
  explicit GgufFile(ReadFile file) : file_(std::move(file)) {}
  absl::Status parse();
  absl::Status place(std::vector<GgufTensor> tensors, int64_t head_bytes);
  absl::Status wrong_type(std::string_view key) const;

  ReadFile file_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::map<std::string, GgufTensor, std::less<>> tensors_;
};

template <typename T>
absl::StatusOr<std::optional<T>> GgufFile::get(std::string_view key) const {
  const GgufValue* value = metadata(key);
  if (value == nullptr) return std::optional<T>();
  if (const T* typed = std::get_if<T>(value)) return std::optional<T>(*typed);
  return wrong_type(key);
}

}  // namespace octet
