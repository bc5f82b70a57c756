// Compiled with AVX-512 (F, BW, DQ, VL) and FMA: see setup.py.
#define FASTDPO_VECTOR_BYTES 64
#include "row_kernels_impl.h"

namespace fastdpo::cpu {
const RowKernels& avx512_row_kernels() {
  static constexpr RowKernels kKernels = make_row_kernels();
  return kKernels;
}
}  // namespace fastdpo::cpu
