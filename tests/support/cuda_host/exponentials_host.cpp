// csrc/cuda/exponentials.h for the host: float32 accumulators as on a device, and tiles of the same columns.
#include <cmath>
#include <stdexcept>

#include "cuda_shim.h"
#include "exponentials.h"
#include "runtime_host.h"

namespace fastdpo::cuda {
namespace {

float load(const void* data, Type type, int64_t index) {
  return type == Type::kBFloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(data)[index])
                                 : __half2float(static_cast<const __half*>(data)[index]);
}

bool on_boundary(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

const char* exponentials_missing() { return host_settings().has_level1 ? nullptr : "the tests say so"; }

void exponentials(const ExponentialsArguments& a, void*) {
  // What the device's kernel relies on and cannot check.
  const bool type = a.type == Type::kBFloat16 || (a.type == Type::kFloat16 && a.operand == nullptr && !a.extras);
  const bool fits = type && a.rows > 0 && a.columns > 0 && a.depth % kRowAlignment == 0 &&
                    a.operand_stride % kRowAlignment == 0 && on_boundary(a.hidden) && on_boundary(a.weight) &&
                    on_boundary(a.operand);
  if (!fits) throw std::runtime_error("fastdpo: exponentials of what Level 1 cannot do");
  ++host_settings().fused_products;
  for (int64_t r = 0; r < a.rows; ++r) {
    const float exponent = a.exponents[r * a.exponent_stride];
    for (int64_t tile = 0; tile < tiles_of(a.columns); ++tile) {
      float sums[kTileSums] = {0, 0, 0, 0, -INFINITY};
      for (int64_t c = tile * kTileColumns; c < a.columns && c < (tile + 1) * kTileColumns; ++c) {
        float product = 0;
        for (int64_t d = 0; d < a.depth; ++d) {
          product += load(a.hidden, a.type, r * a.depth + d) * load(a.weight, a.type, c * a.depth + d);
        }
        const bool is_target = c + a.first_column == a.targets[r];
        const float above = std::fma(product, a.slope, -exponent);
        const float e = is_target ? 0 : std::exp(above);
        sums[kTileExponentials] += e;
        if (e != 0) sums[kTileWeighted] += e * above;
        sums[kTileSquares] += e * e;
        if (!is_target) {
          sums[kTileLogits] += product * a.slope;
          if (product * a.slope > sums[kTileLargest]) sums[kTileLargest] = product * a.slope;
        }
        if (a.operand == nullptr) continue;
        static_cast<__nv_bfloat16*>(a.operand)[r * a.operand_stride + c] = __float2bfloat16_rn(e);
      }
      if (a.tile_sums == nullptr) continue;
      for (int64_t which = 0; which < tile_sums_of(a.extras); ++which) {
        a.tile_sums[(which * a.rows + r) * tiles_of(a.columns) + tile] = sums[which];
      }
    }
  }
}

}  // namespace fastdpo::cuda
