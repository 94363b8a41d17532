// What is said when there is no cuBLASLt where it is said to be.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "kernels/cuda/blas_lt_functions.h"

namespace octet {
namespace {

using testing::HasSubstr;

// Why the library that `file` names is not taken.
std::string refusal_of(const char* file) {
  setenv("OCTET_CUBLASLT_LIBRARY", file, 1);
  std::string why;
  EXPECT_FALSE(cuda::open_blas_lt_functions(&why).has_value());
  return why;
}

TEST(BlasLtLibrary, IsOnlyTakenFromWhereItIsSaidToBe) {
  const std::string why = refusal_of("/nowhere/libcublasLt.so.13");
  EXPECT_THAT(why, HasSubstr("/nowhere/libcublasLt.so.13: cannot open shared object file"));
  EXPECT_THAT(why,
              HasSubstr("install the CUDA toolkit's cuBLAS, or name the library's file in OCTET_CUBLASLT_LIBRARY"));
}

TEST(BlasLtLibrary, HasAllItsFunctions) { EXPECT_THAT(refusal_of("libm.so.6"), HasSubstr("cublasLtCreate")); }

}  // namespace
}  // namespace octet
