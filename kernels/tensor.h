// Tensor: a contiguous, row-major view {data, dtype, device, shape}. It never owns memory, so count and type travel
// with the pointer and a kernel need not be told them apart. Buffer (memory.h) is the owner.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

#include "kernels/check.h"

namespace octet {

enum class DType : uint8_t { kF32, kBF16, kF16, kF8E4M3, kI32, kU8 };
enum class Device : uint8_t { kCpu, kCuda };

// Bytes of one element.
constexpr int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
    case DType::kF16:
      return 2;
    case DType::kF8E4M3:
    case DType::kU8:
      return 1;
  }
  return 0;
}

// "BF16", as safetensors spells it.
const char* name_of(DType dtype);
// "CPU" or "CUDA device".
const char* name_of(Device device);

// The dtype that element type T stands for. BF16, F16 and F8_E4M3 travel as their bit patterns (uint16_t, uint8_t);
// as<uint16_t>() is accepted for both 16-bit types.
template <typename T>
constexpr bool holds(DType dtype);
template <>
constexpr bool holds<float>(DType dtype) {
  return dtype == DType::kF32;
}
template <>
constexpr bool holds<int32_t>(DType dtype) {
  return dtype == DType::kI32;
}
template <>
constexpr bool holds<uint16_t>(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16;
}
template <>
constexpr bool holds<uint8_t>(DType dtype) {
  return dtype == DType::kF8E4M3 || dtype == DType::kU8;
}

class Shape {
 public:
  static constexpr int kMaxRank = 5;

  Shape() = default;
  Shape(std::initializer_list<int64_t> dims) : Shape(std::span<const int64_t>(dims.begin(), dims.size())) {}
  explicit Shape(std::span<const int64_t> dims) : rank_(static_cast<int>(dims.size())) {
    OCTET_CHECK(rank_ <= kMaxRank, "tensors have at most 5 dimensions");
    for (int i = 0; i < rank_; ++i) dims_[i] = dims[i];
  }

  int rank() const { return rank_; }
  int64_t operator[](int i) const { return dims_[i]; }
  int64_t elements() const {
    int64_t n = 1;
    for (int i = 0; i < rank_; ++i) n *= dims_[i];
    return n;
  }
  bool operator==(const Shape& other) const = default;
  std::string to_string() const;  // "[4, 64]"

 private:
  std::array<int64_t, kMaxRank> dims_{};
  int rank_ = 0;
};

class Tensor {
 public:
  Tensor() = default;
  Tensor(void* data, DType dtype, Shape shape, Device device = Device::kCpu)
      : data_(data), shape_(shape), dtype_(dtype), device_(device) {}

  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  Device device() const { return device_; }
  const Shape& shape() const { return shape_; }
  int64_t dim(int i) const { return shape_[i]; }
  int64_t elements() const { return shape_.elements(); }
  int64_t bytes() const { return elements() * size_of(dtype_); }
  bool empty() const { return data_ == nullptr; }

  // The elements as T. REQUIRES: T holds this dtype.
  template <typename T>
  T* as() const {
    OCTET_CHECK(holds<T>(dtype_), std::string("a ") + name_of(dtype_) + " tensor was read as another type");
    return static_cast<T*>(data_);
  }

  // Rows [begin, end) of the first dimension. REQUIRES: 0 <= begin <= end <= dim(0).
  Tensor rows(int64_t begin, int64_t end) const;
  // The same elements under another shape. REQUIRES: as many elements.
  Tensor reshaped(Shape shape) const;

 private:
  void* data_ = nullptr;
  Shape shape_;
  DType dtype_ = DType::kF32;
  Device device_ = Device::kCpu;
};

}  // namespace octet
