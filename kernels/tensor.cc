#include "kernels/tensor.h"

namespace octet {

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  return "?";
}

const char* name_of(Device device) { return device == Device::kCpu ? "CPU" : "CUDA device"; }

std::string Shape::to_string() const {
  std::string text = "[";
  for (int i = 0; i < rank_; ++i) text += (i ? ", " : "") + std::to_string(dims_[i]);
  return text + "]";
}

Tensor Tensor::rows(int64_t begin, int64_t end) const {
  OCTET_CHECK(shape_.rank() >= 1 && 0 <= begin && begin <= end && end <= shape_[0],
              "rows " + std::to_string(begin) + ".." + std::to_string(end) + " of " + shape_.to_string());
  std::array<int64_t, Shape::kMaxRank> dims{};
  int64_t row_elements = 1;
  for (int i = 0; i < shape_.rank(); ++i) {
    dims[i] = shape_[i];
    if (i > 0) row_elements *= shape_[i];
  }
  dims[0] = end - begin;
  return Tensor(static_cast<char*>(data_) + begin * row_elements * size_of(dtype_), dtype_,
                Shape(std::span<const int64_t>(dims.data(), shape_.rank())), device_);
}

Tensor Tensor::reshaped(Shape shape) const {
  OCTET_CHECK(shape.elements() == elements(), shape_.to_string() + " cannot be seen as " + shape.to_string());
  return Tensor(data_, dtype_, shape, device_);
}

}  // namespace octet
