#include "row_kernels.h"

#include "isa.h"

namespace fastdpo::cpu {

const RowKernels& row_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
    case Isa::kAvx512:
      return avx512_row_kernels();
    case Isa::kAvx2:
      return avx2_row_kernels();
    case Isa::kPlain:
      break;
  }
#endif
  return plain_row_kernels();
}

}  // namespace fastdpo::cpu
