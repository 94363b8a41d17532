#include "worker/numerics.h"

#include "absl/strings/str_format.h"

namespace octet {

// The instruction families with fused multiply-add agree to the bit; the portable build's compiler is not asked to.
std::string family_of(Isa isa) { return isa == Isa::kPortable ? "cpu-portable" : "cpu-fma"; }

std::string family_of(const cuda::DeviceFacts& gpu, Arithmetic arithmetic, int ranks) {
  const std::string family = absl::StrFormat("cuda-%d.%d", gpu.major, gpu.minor);
  return arithmetic == Arithmetic::kFast ? absl::StrFormat("%s-fast-ranks%d", family, ranks) : family;
}

std::string numerics_id(const ModelConfig& config, const std::string& family, ActivationMode activations,
                        DType kv_dtype) {
  return absl::StrFormat("octet%d-%s-slices%d-%s-%s", kArithmeticVersion, family, config.num_key_value_heads,
                         activations == ActivationMode::kFP8 ? "w8a8" : "w8a16",
                         kv_dtype == DType::kF8E4M3 ? "kvfp8" : "kvbf16");
}

}  // namespace octet
