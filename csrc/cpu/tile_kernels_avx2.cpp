// Compiled with its own instruction set: see setup.py.
#define FASTDPO_VECTOR_BYTES 32
#include "tile_kernels_impl.h"

namespace fastdpo::cpu {
const TileKernels* avx2_tile_kernels() { return &kTileKernels; }
}  // namespace fastdpo::cpu
