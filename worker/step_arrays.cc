#include "worker/step_arrays.h"

#include <algorithm>
#include <string>

#include "kernels/check.h"
#include "kernels/ops.h"

namespace octet {
namespace {

constexpr int64_t kAlignment = 256;  // of an array: any load of a kernel may read it

}  // namespace

int64_t StepArrays::bytes_of(int64_t numbers) {
  return (numbers * size_of(DType::kI32) + kAlignment - 1) / kAlignment * kAlignment;
}

StepArrays::StepArrays(Stream& stream, int64_t bytes)
    : stream_(stream),
      host_(Buffer::page_locked(bytes, stream)),
      device_(stream.device() == Device::kCpu ? 0 : bytes, stream) {}

Tensor StepArrays::add(std::span<const int32_t> values, Shape shape) {
  const int64_t bytes = bytes_of(shape.elements());
  OCTET_CHECK(static_cast<int64_t>(values.size()) == shape.elements() && used_ + bytes <= host_.bytes(),
              std::to_string(values.size()) + " numbers as " + shape.to_string() + " behind " + std::to_string(used_) +
                  " of " + std::to_string(host_.bytes()) + " bytes");
  std::ranges::copy(values, reinterpret_cast<int32_t*>(static_cast<char*>(host_.data()) + used_));
  const Device device = stream_.device();
  const Buffer& there = device == Device::kCpu ? host_ : device_;
  const Tensor array(static_cast<char*>(there.data()) + used_, DType::kI32, shape, device);
  used_ += bytes;
  return array;
}

void StepArrays::send() {
  if (stream_.device() == Device::kCpu) return;
  queue_copy(stream_, host_.tensor(DType::kU8, {used_}), device_.tensor(DType::kU8, {used_}));
}

}  // namespace octet
