// Compiled with AVX2 and FMA: see setup.py.
#define FASTDPO_VECTOR_BYTES 32
#include "row_kernels_impl.h"

namespace fastdpo::cpu {
const RowKernels& avx2_row_kernels() {
  static constexpr RowKernels kKernels = make_row_kernels();
  return kKernels;
}
}  // namespace fastdpo::cpu
