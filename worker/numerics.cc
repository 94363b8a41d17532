#include "worker/numerics.h"

#include "absl/strings/str_format.h"

namespace octet {

std::string numerics_id(const ModelConfig& config, Isa isa, ActivationMode activations) {
  // The instruction families with fused multiply-add agree to the bit; the portable build's compiler is not asked to.
  const char* family = isa == Isa::kPortable ? "cpu-portable" : "cpu-fma";
  return absl::StrFormat("octet%d-%s-slices%d-%s-kvbf16", kArithmeticVersion, family, config.num_key_value_heads,
                         activations == ActivationMode::kFP8 ? "w8a8" : "w8a16");
}

}  // namespace octet
