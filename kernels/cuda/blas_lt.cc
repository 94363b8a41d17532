#include "kernels/cuda/blas_lt.h"

#if __has_include(<cublasLt.h>)

#include <algorithm>
#include <bit>
#include <map>
#include <optional>

#include "kernels/check.h"
#include "kernels/cuda/blas_lt_functions.h"

namespace octet::cuda {
namespace {

// Of CUDA 12.9: by number, as older headers do not name them, and older libraries refuse them.
constexpr int kScaleModeOfWeight = 31;  // CUBLASLT_MATMUL_DESC_A_SCALE_MODE
constexpr int kScaleModeOfX = 32;       // CUBLASLT_MATMUL_DESC_B_SCALE_MODE
constexpr int32_t kOneScaleARow = 3;    // CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F

// Of pointers and of rows, in bytes, for every kernel of the library.
constexpr uint32_t kAlignment = 16;
constexpr int64_t kCodeOutputs = 16;  // FP8 takes multiples of these

// Where the library multiplies with scales.
enum class Scales : uint8_t { kNone, kOfRows };

bool aligned(const void* data, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(data) % kAlignment == 0 && row_bytes % kAlignment == 0;
}

// What the library asks of every product; what it makes of one that keeps to that, it is asked.
bool may_suit(const Product& product) {
  if (product.x_type != product.weight_type) return false;
  const bool codes = product.x_type == DType::kF8E4M3;
  const bool scales = product.x_scales != nullptr, weight_scales = product.weight_scales != nullptr;
  if (scales != codes || weight_scales != codes) return false;
  if (codes && product.outputs % kCodeOutputs != 0) return false;
  const int64_t row_bytes = product.columns * size_of(product.x_type);
  return aligned(product.x, row_bytes) && aligned(product.weight, row_bytes) &&
         aligned(product.out, product.outputs * size_of(DType::kF32));
}

// Numbers of tokens that are computed the same way, up to the largest of them: an eighth of an octave, at least 16.
int64_t largest_alike(int64_t tokens) {
  const auto octave = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(tokens)));
  const int64_t step = std::max<int64_t>(16, octave / 8);
  return (tokens + step - 1) / step * step;
}

void check(cublasStatus_t status, const char* what) {
  OCTET_CHECK(status == CUBLAS_STATUS_SUCCESS,
              std::string("cuBLASLt, ") + what + ": status " + std::to_string(static_cast<int>(status)));
}

bool is_refusal(cublasStatus_t status) {
  return status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE ||
         status == CUBLAS_STATUS_ARCH_MISMATCH;
}

// The library thinks in columns: out^T [outputs, tokens] = weight x^T, where a row-major weight is a column-major
// [columns, outputs] to be transposed, and x a [columns, tokens] that is not.
class Description {
 public:
  Description(const BlasLtFunctions& functions, const Product& product, int64_t tokens) : functions_(functions) {
    const cudaDataType type = product.x_type == DType::kF8E4M3 ? CUDA_R_8F_E4M3 : CUDA_R_16BF;
    check(functions_.create_matmul(&matmul_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "describing a product");
    create(&weight_, type, product.columns, product.outputs);
    create(&x_, type, product.columns, tokens);
    create(&out_, CUDA_R_32F, product.outputs, tokens);
    const int32_t transposed = CUBLAS_OP_T, as_it_is = CUBLAS_OP_N;
    check(set(CUBLASLT_MATMUL_DESC_TRANSA, transposed), "transposing the weights");
    check(set(CUBLASLT_MATMUL_DESC_TRANSB, as_it_is), "leaving the input as it is");
  }
  ~Description() {
    (void)functions_.destroy_layout(out_);
    (void)functions_.destroy_layout(x_);
    (void)functions_.destroy_layout(weight_);
    (void)functions_.destroy_matmul(matmul_);
  }
  Description(const Description&) = delete;
  Description& operator=(const Description&) = delete;

  // False where the library does not know scales of rows.
  bool scale_rows(const Product& product) {
    return set(kScaleModeOfWeight, kOneScaleARow) == CUBLAS_STATUS_SUCCESS &&
           set(kScaleModeOfX, kOneScaleARow) == CUBLAS_STATUS_SUCCESS &&
           set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.weight_scales) == CUBLAS_STATUS_SUCCESS &&
           set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, product.x_scales) == CUBLAS_STATUS_SUCCESS;
  }

  cublasLtMatmulDesc_t matmul() const { return matmul_; }
  cublasLtMatrixLayout_t weight() const { return weight_; }
  cublasLtMatrixLayout_t x() const { return x_; }
  cublasLtMatrixLayout_t out() const { return out_; }

 private:
  void create(cublasLtMatrixLayout_t* layout, cudaDataType type, int64_t rows, int64_t columns) {
    check(functions_.create_layout(layout, type, static_cast<uint64_t>(rows), static_cast<uint64_t>(columns), rows),
          "describing a matrix");
  }
  template <typename T>
  cublasStatus_t set(int attribute, const T& value) {
    return functions_.set_matmul(matmul_, static_cast<cublasLtMatmulDescAttributes_t>(attribute), &value,
                                 sizeof(value));
  }

  const BlasLtFunctions& functions_;
  cublasLtMatmulDesc_t matmul_ = nullptr;
  cublasLtMatrixLayout_t weight_ = nullptr, x_ = nullptr, out_ = nullptr;
};

// What an answer of the library is for.
struct Question {
  DType type;
  Scales scales;
  int64_t outputs, columns, tokens;
  auto operator<=>(const Question&) const = default;
};

}  // namespace

struct BlasLt::State {
  const BlasLtFunctions functions;
  void* const workspace;
  const int64_t workspace_bytes;
  cublasLtHandle_t handle = nullptr;
  cublasLtMatmulPreference_t preference = nullptr;
  std::map<Question, std::optional<cublasLtMatmulAlgo_t>> answers = {};  // empty: refused

  State(const BlasLtFunctions& table, void* memory, int64_t bytes)
      : functions(table), workspace(memory), workspace_bytes(bytes) {}
  ~State() {
    if (preference != nullptr) (void)functions.destroy_preference(preference);
    if (handle != nullptr) (void)functions.destroy(handle);
  }
  State(const State&) = delete;
  State& operator=(const State&) = delete;

  void prefer() {
    check(functions.create_preference(&preference), "making a preference");
    const auto bytes = static_cast<uint64_t>(workspace_bytes);
    check(functions.set_preference(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &bytes, sizeof(bytes)),
          "preferring what fits into the workspace");
    for (const auto alignment :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES}) {
      check(functions.set_preference(preference, alignment, &kAlignment, sizeof(kAlignment)), "naming the alignment");
    }
  }

  std::optional<cublasLtMatmulAlgo_t> ask(const Product& product, Scales scales, int64_t tokens) {
    Description description(functions, product, tokens);
    if (scales == Scales::kOfRows && !description.scale_rows(product)) return std::nullopt;
    cublasLtMatmulHeuristicResult_t best = {};
    int count = 0;
    const cublasStatus_t status = functions.choose(handle, description.matmul(), description.weight(), description.x(),
                                                   description.out(), description.out(), preference, 1, &best, &count);
    if (!is_refusal(status)) check(status, "choosing an algorithm");
    const bool found = status == CUBLAS_STATUS_SUCCESS && count > 0 && best.state == CUBLAS_STATUS_SUCCESS;
    return found ? std::optional(best.algo) : std::nullopt;
  }

  bool multiply(cudaStream_t stream, const Product& product, Scales scales) {
    const Question question = {product.x_type, scales, product.outputs, product.columns, largest_alike(product.tokens)};
    auto answer = answers.find(question);
    if (answer == answers.end()) {
      answer = answers.emplace(question, ask(product, scales, question.tokens)).first;
    }
    if (!answer->second) return false;
    Description description(functions, product, product.tokens);
    if (scales == Scales::kOfRows && !description.scale_rows(product)) return false;
    const float one = 1, zero = 0;
    const cublasStatus_t status =
        functions.multiply(handle, description.matmul(), &one, product.weight, description.weight(), product.x,
                           description.x(), &zero, product.out, description.out(), product.out, description.out(),
                           &*answer->second, workspace, static_cast<size_t>(workspace_bytes), stream);
    if (is_refusal(status)) return false;  // what suits the largest of its kind need not suit all of them
    check(status, "multiplying");
    return true;
  }
};

BlasLt::BlasLt(std::unique_ptr<State> state) : state_(std::move(state)) {}
BlasLt::~BlasLt() = default;

std::unique_ptr<BlasLt> BlasLt::open(void* workspace, int64_t workspace_bytes, std::string* why) {
  const std::optional<BlasLtFunctions> functions = open_blas_lt_functions(why);
  if (!functions) return nullptr;
  auto state = std::make_unique<State>(*functions, workspace, workspace_bytes);
  const cublasStatus_t status = functions->create(&state->handle);
  if (status != CUBLAS_STATUS_SUCCESS) {
    *why = "cuBLASLt does not start on this device: status " + std::to_string(static_cast<int>(status));
    return nullptr;
  }
  state->prefer();
  return std::unique_ptr<BlasLt>(new BlasLt(std::move(state)));
}

BlasLt::Outcome BlasLt::multiply(cudaStream_t stream, const Product& product) {
  if (!may_suit(product)) return Outcome::kRefused;
  if (product.x_scales == nullptr) {
    return state_->multiply(stream, product, Scales::kNone) ? Outcome::kDone : Outcome::kRefused;
  }
  if (state_->multiply(stream, product, Scales::kOfRows)) return Outcome::kDone;
  return state_->multiply(stream, product, Scales::kNone) ? Outcome::kUnscaled : Outcome::kRefused;
}

}  // namespace octet::cuda

#else

namespace octet::cuda {

struct BlasLt::State {};

BlasLt::BlasLt(std::unique_ptr<State> state) : state_(std::move(state)) {}
BlasLt::~BlasLt() = default;

std::unique_ptr<BlasLt> BlasLt::open(void*, int64_t, std::string* why) {
  *why = "the CUDA module was built without cublasLt.h: build it with the CUDA toolkit's cuBLAS";
  return nullptr;
}

BlasLt::Outcome BlasLt::multiply(cudaStream_t, const Product&) { return Outcome::kRefused; }

}  // namespace octet::cuda

#endif
