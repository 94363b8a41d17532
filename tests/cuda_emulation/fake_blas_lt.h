// A cuBLASLt of plain loops that refuses by script and takes nothing that the real one would not: what a caller gets
// wrong ends the process with a sentence. Each process has one, which is missing until a test says otherwise.
#pragma once

#include <cublasLt.h>

#include <functional>
#include <vector>

struct FakeBlasLt {
  // One question or one product: out^T [m, n] = a^T [k, m]^T b [k, n].
  struct Call {
    cudaDataType type;
    bool row_scales;
    int64_t m, n, k;
    bool operator==(const Call&) const = default;
  };

  bool present = false;
  cublasStatus_t create = CUBLAS_STATUS_SUCCESS;
  bool knows_row_scales = true;  // false: a library before CUDA 12.9
  // What the questions and the products end with.
  std::function<cublasStatus_t(const Call&)> choose = [](const Call&) { return CUBLAS_STATUS_SUCCESS; };
  std::function<cublasStatus_t(const Call&)> multiply = choose;
  bool finds_none = false;  // success, but no algorithm

  std::vector<Call> chosen, multiplied;
  int handles = 0, objects = 0;  // that live
};

// The process's; assign FakeBlasLt{} to begin anew.
FakeBlasLt& fake_blas_lt();
