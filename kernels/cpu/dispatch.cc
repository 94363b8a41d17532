// From an instruction family to its kernels. The only place that knows which sources were built for this architecture.
#include "kernels/check.h"
#include "kernels/cpu/kernel_table.h"
#include "kernels/memory.h"

namespace octet::cpu {

const KernelTable& kernels_for(Isa isa) {
  OCTET_CHECK(runs_here(isa), std::string("this machine does not run ") + name_of(isa));
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return avx512_kernels();
  if (isa == Isa::kAvx2) return avx2_kernels();
#endif
  return portable_kernels();
}

}  // namespace octet::cpu
