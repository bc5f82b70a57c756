// Compiled for the compiler's default target: 16-byte vectors are in every x86-64 and 64-bit Arm processor.
#define FASTDPO_VECTOR_BYTES 16
#include "row_kernels_impl.h"

namespace fastdpo::cpu {
const RowKernels& plain_row_kernels() {
  static constexpr RowKernels kKernels = make_row_kernels();
  return kKernels;
}
}  // namespace fastdpo::cpu
