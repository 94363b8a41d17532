#include "kernels/cuda/gemm.h"

#include "kernels/cuda/blas_lt.h"
#include "kernels/cuda/queue.h"

namespace octet::cuda {

void multiply(Queue& queue, const Product& product) {
  BlasLt* const library = queue.blas_lt();
  const auto outcome = library == nullptr ? BlasLt::Outcome::kRefused : library->multiply(queue.stream(), product);
  switch (outcome) {
    case BlasLt::Outcome::kDone:
      return;
    case BlasLt::Outcome::kUnscaled:
      return add_parts(queue, product, product.out, 1);
    case BlasLt::Outcome::kRefused:
      return multiply_in_tiles(queue, product);
  }
}

}  // namespace octet::cuda
