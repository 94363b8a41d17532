#include "kernels/backend.h"

#include "kernels/cpu/cpu_ops.h"

namespace octet::cpu {

const Backend& backend() {
  static constexpr Backend kBackend = {.copy = copy,
                                       .queue_copy = queue_copy,
                                       .pack_rows = pack_rows,
                                       .quantize = quantize,
                                       .linear = linear,
                                       .linear_over_slices = linear_over_slices,
                                       .add_tree_sum = add_tree_sum,
                                       .tree_sum = tree_sum,
                                       .copy_rows = copy_rows,
                                       .rms_norm = rms_norm,
                                       .silu_mul = silu_mul,
                                       .rms_norm_and_quantize = rms_norm_and_quantize,
                                       .silu_mul_and_quantize = silu_mul_and_quantize,
                                       .rope_angles = rope_angles,
                                       .rope_and_cache = rope_and_cache,
                                       .attention = attention,
                                       .copy_blocks = copy_blocks,
                                       .softmax_parts = softmax_parts,
                                       .join_columns = join_columns};
  return kBackend;
}

}  // namespace octet::cpu
