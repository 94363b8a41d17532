// The safetensors file format: eight bytes of header length, a JSON header, dense tensors. Every rule of the format is
// checked before a byte of data is believed. Invariant: an accepted header's tensors tile the data section exactly.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "worker/checkpoint/file.h"

namespace octet {

// Bounds on what a header may ask of us; the first is the reference implementation's.
constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;
constexpr int64_t kMaxSafetensorsTensors = 1'000'000;
constexpr int64_t kMaxSafetensorsNameBytes = 4096;
constexpr int64_t kMaxSafetensorsRank = 32;

struct SafetensorsEntry {
  std::string name;
  std::string dtype;           // as written: types that Octet cannot compute with are legal in a file
  std::vector<int64_t> shape;  // [] is a scalar; dimensions may be 0
  int64_t offset = 0;          // of the first byte, from the start of the file
  int64_t bytes = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> tensors;  // in file order
  std::map<std::string, std::string> metadata;
  int64_t header_bytes = 0;  // of the JSON
};

// The DType that `dtype` ("BF16", "F8_E4M3", ...) names; nothing for types that Octet does not compute with.
std::optional<DType> dtype_named(std::string_view dtype);

// Checks the JSON of a header against a file of file_bytes. Errors are INVALID_ARGUMENT and begin with `what`.
absl::StatusOr<SafetensorsHeader> parse_safetensors_header(std::string_view json, int64_t file_bytes,
                                                           const std::string& what);
// Reads and checks a file's header; never its data.
absl::StatusOr<SafetensorsHeader> read_safetensors_header(const ReadFile& file);

// Writes a file whose tensors are known by dtype and shape beforehand and filled in any order.
class SafetensorsWriter {
 public:
  struct Plan {
    std::string name;
    DType dtype;
    Shape shape;
  };
  // Tensors are laid out with wide types first, so that each starts at a multiple of its element size; otherwise in
  // order.
  static absl::StatusOr<SafetensorsWriter> create(const std::string& path, std::vector<Plan> tensors,
                                                  const std::map<std::string, std::string>& metadata);

  // Writes bytes at `offset` inside plan `tensor` (an index into create()'s list). REQUIRES: they lie inside it, and no
  // byte is written twice.
  absl::Status write(size_t tensor, int64_t offset, std::string_view bytes);
  // Flushes to disk and closes. REQUIRES: every byte of every tensor has been written.
  absl::Status finish();

  // Bytes of all tensors.
  int64_t tensor_bytes() const { return tensor_bytes_; }

 private:
  SafetensorsWriter(WriteFile file) : file_(std::move(file)) {}

  WriteFile file_;
  std::vector<int64_t> begins_;  // per tensor, from the start of the file
  std::vector<int64_t> sizes_;
  int64_t tensor_bytes_ = 0;
  int64_t written_ = 0;
};

}  // namespace octet
