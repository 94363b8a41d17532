#include "tests/cuda_emulation/fake_blas_lt.h"

#include <cstdio>
#include <map>

#include "kernels/cuda/blas_lt_functions.h"
#include "kernels/fp8.h"

struct cublasLtContext {};
struct cublasLtMatmulDescOpaque_t {
  std::map<int, int32_t> numbers;
  std::map<int, const float*> pointers;
};
struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  int64_t rows, columns, leading;
};
struct cublasLtMatmulPreferenceOpaque_t {
  std::map<int, uint64_t> values;
};

FakeBlasLt& fake_blas_lt() {
  static FakeBlasLt fake;
  return fake;
}

namespace {

constexpr int32_t kOuterVectors = 3;
constexpr uint64_t kAlignment = 16;
constexpr uint64_t kOfThisLibrary = 0xB1A5;
constexpr size_t kWorkspace = 1 << 20;  // that its algorithms need

[[noreturn]] void misused(const char* what) {
  std::fprintf(stderr, "cuBLASLt: %s\n", what);
  std::abort();
}
void require(bool met, const char* what) {
  if (!met) misused(what);
}

template <typename T, typename... Values>
cublasStatus_t make(T** object, Values... values) {
  *object = new T{values...};
  ++fake_blas_lt().objects;
  return CUBLAS_STATUS_SUCCESS;
}
template <typename T>
cublasStatus_t unmake(T* object) {
  delete object;
  --fake_blas_lt().objects;
  return CUBLAS_STATUS_SUCCESS;
}

int64_t size_of(cudaDataType type) { return type == CUDA_R_8F_E4M3 ? 1 : type == CUDA_R_16BF ? 2 : 4; }

double value_at(const void* data, cudaDataType type, int64_t i) {
  if (type == CUDA_R_8F_E4M3) return octet::e4m3_to_float(static_cast<const uint8_t*>(data)[i]);
  return octet::bf16_to_float(static_cast<const uint16_t*>(data)[i]);
}

// The form that FP8 kernels have, and the only one that is asked for: a transposed, b not, FP32 sums and results.
FakeBlasLt::Call call_of(const cublasLtMatmulDescOpaque_t& matmul, const cublasLtMatrixLayoutOpaque_t& a,
                         const cublasLtMatrixLayoutOpaque_t& b, const cublasLtMatrixLayoutOpaque_t& d) {
  const auto number = [&](int attribute) {
    const auto found = matmul.numbers.find(attribute);
    return found == matmul.numbers.end() ? 0 : found->second;
  };
  require(number(CUBLASLT_MATMUL_DESC_TRANSA) == CUBLAS_OP_T && number(CUBLASLT_MATMUL_DESC_TRANSB) == CUBLAS_OP_N,
          "a is to be transposed, b is not");
  require(a.type == b.type && d.type == CUDA_R_32F, "types that do not go together");
  require(a.rows == b.rows && d.rows == a.columns && d.columns == b.columns, "shapes that do not go together");
  for (const auto& layout : {a, b, d}) {
    require(layout.leading >= layout.rows, "columns that overlap");
    require(layout.leading * size_of(layout.type) % static_cast<int64_t>(kAlignment) == 0, "columns not aligned");
  }
  const bool codes = a.type == CUDA_R_8F_E4M3;
  require(!codes || (a.rows % 16 == 0 && d.rows % 16 == 0), "FP8 takes multiples of 16");
  const bool of_a = number(CUBLASLT_MATMUL_DESC_A_SCALE_MODE) == kOuterVectors;
  require(of_a == (number(CUBLASLT_MATMUL_DESC_B_SCALE_MODE) == kOuterVectors), "vectors of scales go together");
  require(of_a == (matmul.pointers.size() == 2), "a mode for each vector of scales");
  require(codes || !of_a, "scales are for FP8");
  return {a.type, of_a, d.rows, d.columns, a.rows};
}

cublasStatus_t create(cublasLtHandle_t* handle) {
  if (fake_blas_lt().create != CUBLAS_STATUS_SUCCESS) return fake_blas_lt().create;
  *handle = new cublasLtContext;
  ++fake_blas_lt().handles;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t destroy(cublasLtHandle_t handle) {
  delete handle;
  --fake_blas_lt().handles;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t create_matmul(cublasLtMatmulDesc_t* matmul, cublasComputeType_t compute, cudaDataType scale) {
  require(compute == CUBLAS_COMPUTE_32F && scale == CUDA_R_32F, "sums are FP32");
  return make(matmul);
}
cublasStatus_t set_matmul(cublasLtMatmulDesc_t matmul, cublasLtMatmulDescAttributes_t attribute, const void* value,
                          size_t bytes) {
  const bool mode = attribute == CUBLASLT_MATMUL_DESC_A_SCALE_MODE || attribute == CUBLASLT_MATMUL_DESC_B_SCALE_MODE;
  if (mode && !fake_blas_lt().knows_row_scales) return CUBLAS_STATUS_INVALID_VALUE;
  const bool pointer =
      attribute == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER || attribute == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER;
  require(bytes == (pointer ? sizeof(void*) : sizeof(int32_t)), "an attribute has another size");
  std::memcpy(pointer ? static_cast<void*>(&matmul->pointers[attribute]) : &matmul->numbers[attribute], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t create_layout(cublasLtMatrixLayout_t* layout, cudaDataType type, uint64_t rows, uint64_t columns,
                             int64_t leading) {
  return make(layout, type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), leading);
}

cublasStatus_t create_preference(cublasLtMatmulPreference_t* preference) { return make(preference); }
cublasStatus_t set_preference(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
                              const void* value, size_t bytes) {
  const bool workspace = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
  require(bytes == (workspace ? sizeof(uint64_t) : sizeof(uint32_t)), "a preference has another size");
  std::memcpy(&preference->values[attribute], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t choose(cublasLtHandle_t, cublasLtMatmulDesc_t matmul, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                      cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference,
                      int wanted, cublasLtMatmulHeuristicResult_t results[], int* found) {
  FakeBlasLt& fake = fake_blas_lt();
  require(c == d && wanted >= 1, "an odd question");
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
    require(preference->values[attribute] == kAlignment, "256 bytes of alignment are taken for granted");
  }
  require(preference->values[CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES] >= kWorkspace, "no algorithm has the room");
  fake.chosen.push_back(call_of(*matmul, *a, *b, *d));
  *found = 0;
  const cublasStatus_t status = fake.choose(fake.chosen.back());
  if (status != CUBLAS_STATUS_SUCCESS || fake.finds_none) return status;
  *found = 1;
  const auto& call = fake.chosen.back();
  results[0] = {.algo = {{kOfThisLibrary, static_cast<uint64_t>(call.m), static_cast<uint64_t>(call.k)}},
                .workspaceSize = kWorkspace,
                .state = CUBLAS_STATUS_SUCCESS};
  return status;
}

cublasStatus_t multiply(cublasLtHandle_t, cublasLtMatmulDesc_t matmul, const void* alpha, const void* a,
                        cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                        const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                        cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm, void* workspace,
                        size_t workspace_bytes, cudaStream_t) {
  FakeBlasLt& fake = fake_blas_lt();
  const FakeBlasLt::Call call = call_of(*matmul, *a_layout, *b_layout, *d_layout);
  require(algorithm->data[0] == kOfThisLibrary && algorithm->data[1] == static_cast<uint64_t>(call.m) &&
              algorithm->data[2] == static_cast<uint64_t>(call.k),
          "an algorithm for another product");
  require(*static_cast<const float*>(alpha) == 1 && *static_cast<const float*>(beta) == 0, "odd factors");
  require(c == d && c_layout == d_layout, "c that is not d");
  require(workspace != nullptr && workspace_bytes >= kWorkspace, "no room to work in");
  for (const void* const data : {a, b, static_cast<const void*>(d)}) {
    require(reinterpret_cast<uintptr_t>(data) % kAlignment == 0, "a matrix is not aligned");
  }
  const cublasStatus_t status = fake.multiply(call);
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  fake.multiplied.push_back(call);
  const cuda_emulation::DeviceAccess access;
  std::memset(workspace, cuda_emulation::kGarbage, kWorkspace);
  for (int64_t j = 0; j < call.n; ++j) {
    for (int64_t i = 0; i < call.m; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < call.k; ++k) {
        sum += value_at(a, call.type, i * a_layout->leading + k) * value_at(b, call.type, j * b_layout->leading + k);
      }
      if (call.row_scales) {
        sum *= double{matmul->pointers[CUBLASLT_MATMUL_DESC_A_SCALE_POINTER][i]} *
               matmul->pointers[CUBLASLT_MATMUL_DESC_B_SCALE_POINTER][j];
      }
      static_cast<float*>(d)[j * d_layout->leading + i] = static_cast<float>(sum);
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

constexpr octet::cuda::BlasLtFunctions kFunctions = {.create = create,
                                                     .destroy = destroy,
                                                     .create_matmul = create_matmul,
                                                     .destroy_matmul = unmake,
                                                     .set_matmul = set_matmul,
                                                     .create_layout = create_layout,
                                                     .destroy_layout = unmake,
                                                     .create_preference = create_preference,
                                                     .destroy_preference = unmake,
                                                     .set_preference = set_preference,
                                                     .choose = choose,
                                                     .multiply = multiply};

}  // namespace

namespace octet::cuda {

std::optional<BlasLtFunctions> open_blas_lt_functions(std::string* why) {
  if (fake_blas_lt().present) return kFunctions;
  *why = "the emulation has none";
  return std::nullopt;
}

}  // namespace octet::cuda
