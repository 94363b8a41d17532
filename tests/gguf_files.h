// GGUF files for tests, put together byte by byte so that they can also be wrong.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace octet::testing {

class GgufBytes {
 public:
  template <typename T>
  GgufBytes& raw(T value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(T));
    return *this;
  }
  GgufBytes& text(const std::string& value) {
    raw(static_cast<uint64_t>(value.size()));
    bytes_ += value;
    return *this;
  }
  GgufBytes& append(const std::string& bytes) {
    bytes_ += bytes;
    return *this;
  }
  const std::string& bytes() const { return bytes_; }

 private:
  std::string bytes_;
};

// A whole file: keys, tensors and data are collected, then laid out by bytes().
class GgufBuilder {
 public:
  uint32_t magic = 0x46554747, version = 3;
  int64_t extra_tensors = 0, extra_keys = 0;  // claimed, but not there

  GgufBuilder& key(const std::string& name, const std::string& value) { return add(name, 8, GgufBytes().text(value)); }
  GgufBuilder& key(const std::string& name, const char* value) { return key(name, std::string(value)); }
  GgufBuilder& key(const std::string& name, uint32_t value) { return add(name, 4, GgufBytes().raw(value)); }
  GgufBuilder& key(const std::string& name, float value) { return add(name, 6, GgufBytes().raw(value)); }
  GgufBuilder& key(const std::string& name, bool value) { return add(name, 7, GgufBytes().raw(uint8_t{value})); }
  GgufBuilder& key(const std::string& name, const std::vector<std::string>& values) {
    GgufBytes array;
    array.raw(uint32_t{8}).raw(static_cast<uint64_t>(values.size()));
    for (const std::string& value : values) array.text(value);
    return add(name, 9, array);
  }
  GgufBuilder& key(const std::string& name, const std::vector<int32_t>& values) {
    GgufBytes array;
    array.raw(uint32_t{5}).raw(static_cast<uint64_t>(values.size()));
    for (const int32_t value : values) array.raw(value);
    return add(name, 9, array);
  }
  // A key whose value is given as bytes.
  GgufBuilder& add(const std::string& name, uint32_t type, const GgufBytes& value) {
    keys_ += GgufBytes().text(name).raw(type).append(value.bytes()).bytes();
    ++key_count_;
    return *this;
  }

  // Dimensions innermost first, as in the file; the offset is where the data would naturally go, moved by `shift`.
  GgufBuilder& tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type,
                      const std::string& data, int64_t shift = 0) {
    GgufBytes info;
    info.text(name).raw(static_cast<uint32_t>(dims.size()));
    for (const uint64_t dim : dims) info.raw(dim);
    info.raw(type).raw(static_cast<uint64_t>(static_cast<int64_t>(data_.size()) + shift));
    tensors_ += info.bytes();
    ++tensor_count_;
    data_ += data;
    data_.resize((data_.size() + 31) / 32 * 32, '\0');
    return *this;
  }

  std::string bytes() const {
    std::string out =
        GgufBytes().raw(magic).raw(version).raw(tensor_count_ + extra_tensors).raw(key_count_ + extra_keys).bytes();
    out += keys_ + tensors_;
    out.resize((out.size() + 31) / 32 * 32, '\0');
    return out + data_;
  }

 private:
  std::string keys_, tensors_, data_;
  int64_t key_count_ = 0, tensor_count_ = 0;
};

}  // namespace octet::testing
