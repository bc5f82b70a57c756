#include "products.h"

#include <torch/csrc/stable/c/shim.h>

#include <limits>
#include <stdexcept>
#include <string>

// cuBLAS is called directly, with torch's handle: the stable ABI's dispatcher takes no Scalar arguments, so addmm with
// its alpha and beta is out of its reach, and without beta = 1 every accumulation would cost a pass over memory of its
// own. torch's handle brings torch's stream, workspace (hence CUDA graphs and determinism) and TF32 setting.
//
// The symbols come from whichever cuBLAS the loaded torch is linked to, of any major version: these signatures have
// been the same since CUDA 11. Weak, so that a torch without them can be told by a message instead of a failure to
// load.
#define FASTDPO_WEAK __attribute__((weak, visibility("default")))
extern "C" {
FASTDPO_WEAK int cublasGemmEx(void* handle, int transa, int transb, int m, int n, int k, const void* alpha,
                              const void* a, int a_type, int lda, const void* b, int b_type, int ldb, const void* beta,
                              void* c, int c_type, int ldc, int compute_type, int algorithm);
FASTDPO_WEAK int cublasGetMathMode(void* handle, int* mode);
FASTDPO_WEAK int cublasSetMathMode(void* handle, int mode);
}

namespace fastdpo::cuda {
namespace {

// Values of cublasOperation_t, cudaDataType, cublasComputeType_t, cublasGemmAlgo_t and cublasMath_t; a CUDA toolkit
// without cuBLAS's headers is enough to build with.
constexpr int kCublasOpN = 0;
constexpr int kCublasOpT = 1;
constexpr int kCudaR32F = 0;
constexpr int kCudaR64F = 1;
constexpr int kCudaR16F = 2;
constexpr int kCudaR16BF = 14;
constexpr int kCublasCompute32F = 68;
constexpr int kCublasCompute32FFastTf32 = 77;
constexpr int kCublasCompute64F = 70;
constexpr int kCublasGemmDefault = -1;
constexpr int kCublasMathDisallowReducedPrecisionReduction = 16;

int data_type(Type type) {
  switch (type) {
    case Type::kFloat32:
      return kCudaR32F;
    case Type::kFloat64:
      return kCudaR64F;
    case Type::kFloat16:
      return kCudaR16F;
    case Type::kBFloat16:
      return kCudaR16BF;
  }
  throw std::runtime_error("fastdpo: multiply: unknown type");
}

int as_int(int64_t size) {
  if (size > std::numeric_limits<int>::max()) {
    throw std::runtime_error("fastdpo: multiply: a matrix of more than 2^31 - 1 rows or columns");
  }
  return static_cast<int>(size);
}

void check(int status, const char* what) {
  if (status != 0) throw std::runtime_error(std::string("fastdpo: ") + what + ": status " + std::to_string(status));
}

// While it lives, partial sums of a product are added in the compute type, also where the result is of 16 bits.
class FullPrecisionSums {
 public:
  explicit FullPrecisionSums(void* handle) : handle_(handle) {
    check(cublasGetMathMode(handle, &mode_), "cublasGetMathMode");
    check(cublasSetMathMode(handle, mode_ | kCublasMathDisallowReducedPrecisionReduction), "cublasSetMathMode");
  }
  ~FullPrecisionSums() { cublasSetMathMode(handle_, mode_); }
  FullPrecisionSums(const FullPrecisionSums&) = delete;
  FullPrecisionSums& operator=(const FullPrecisionSums&) = delete;

 private:
  void* handle_;
  int mode_ = 0;
};

}  // namespace

void multiply(const Product& p) {
  if (cublasGemmEx == nullptr || cublasGetMathMode == nullptr || cublasSetMathMode == nullptr) {
    throw std::runtime_error("fastdpo: the loaded torch brings no cuBLAS; fastdpo_cuda needs a CUDA build of torch");
  }
  void* handle = nullptr;
  if (torch_get_current_cuda_blas_handle(&handle) != AOTI_TORCH_SUCCESS) {
    // It allocates cuBLAS's workspace.
    throw std::runtime_error("fastdpo: out of memory: torch gave no cuBLAS handle");
  }
  const FullPrecisionSums sums(handle);
  const bool in_float64 = p.operands == Type::kFloat64;
  const float one32 = 1, beta32 = p.accumulate ? 1 : 0;
  const double one64 = 1, beta64 = p.accumulate ? 1 : 0;
  const void* one = in_float64 ? static_cast<const void*>(&one64) : &one32;
  const void* beta = in_float64 ? static_cast<const void*>(&beta64) : &beta32;
  const int compute = in_float64 ? kCublasCompute64F : p.tensor_float32 ? kCublasCompute32FFastTf32 : kCublasCompute32F;
  // cuBLAS reads column-major: a row-major matrix is its transpose there, so out^T = b^T a^T.
  const int status =
      cublasGemmEx(handle, p.b.transposed ? kCublasOpT : kCublasOpN, p.a.transposed ? kCublasOpT : kCublasOpN,
                   as_int(p.columns), as_int(p.rows), as_int(p.depth), one, p.b.data, data_type(p.operands),
                   as_int(p.b.stride), p.a.data, data_type(p.operands), as_int(p.a.stride), beta, p.out,
                   data_type(p.out_type), as_int(p.out_stride), compute, kCublasGemmDefault);
  if (status != 0) {
    throw std::runtime_error("fastdpo: cublasGemmEx refused a product of " + std::to_string(p.rows) + " x " +
                             std::to_string(p.depth) + " by " + std::to_string(p.depth) + " x " +
                             std::to_string(p.columns) + ": status " + std::to_string(status));
  }
}

}  // namespace fastdpo::cuda
