#include "tile_kernels.h"

#include "isa.h"

namespace fastdpo::cpu {

const TileKernels* tile_kernels() {
#if defined(__x86_64__)
  switch (isa()) {
    case Isa::kAvx512Bf16:
      return avx512_bf16_tile_kernels();
    case Isa::kAvx512:
      return avx512_tile_kernels();
    case Isa::kAvx2:
      return avx2_tile_kernels();
    case Isa::kPlain:
      break;
  }
#endif
  return nullptr;
}

}  // namespace fastdpo::cpu
