// Level 1's product on the host (csrc/cuda/exponentials.h), for the library without it: what surrounds the product
// (settle_rows, place_targets, chunks, rows) is nvcc's own here, too. Float32 accumulators, tiles of the same columns.
#include "exponentials.h"

#include <bit>
#include <cmath>
#include <cstring>

#include "api.h"
#include "device.h"

#ifdef FASTDPO_NO_LEVEL1

namespace fastdpo::cuda {
namespace {

// `bytes` bytes from element `first` of an array of `size` bytes each, checked as a kernel's access would be.
const std::byte* place(const void* data, int64_t first, int64_t size, int64_t bytes) {
  const auto address = reinterpret_cast<uint64_t>(data) + static_cast<uint64_t>(first * size);
  return ptx::the_machine().memory.host_place(address, static_cast<uint64_t>(bytes), true, "exponentials");
}

float number(const std::byte* row, Type type, int64_t i) {
  uint16_t bits;
  std::memcpy(&bits, row + 2 * i, sizeof(bits));
  if (type == Type::kBFloat16) return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
  return static_cast<float>(std::bit_cast<_Float16>(bits));
}

template <typename T>
void write(void* data, int64_t i, T value) {
  auto& memory = ptx::the_machine().memory;
  const auto address = reinterpret_cast<uint64_t>(data) + static_cast<uint64_t>(i) * sizeof(T);
  std::memcpy(memory.host_place(address, sizeof(T), false, "exponentials"), &value, sizeof(T));
  memory.mark_known(address, sizeof(T));
}

uint16_t to_bfloat16(float x) {
  const auto bits = std::bit_cast<uint32_t>(x);
  return x != x ? 0x7fff : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

}  // namespace

const char* exponentials_missing() { return nullptr; }

void exponentials(const ExponentialsArguments& a, void*) {
  ptx::forget_freed_tensors();
  for (int64_t r = 0; r < a.rows; ++r) {
    float exponent;
    std::memcpy(&exponent, place(a.exponents, r * a.exponent_stride, 4, 4), sizeof(exponent));
    int64_t target;
    std::memcpy(&target, place(a.targets, r, 8, 8), sizeof(target));
    const std::byte* hidden = place(a.hidden, r * a.depth, 2, a.depth * 2);
    for (int64_t tile = 0; tile < tiles_of(a.columns); ++tile) {
      float sums[kTileSums] = {0, 0, 0, 0, -INFINITY};
      for (int64_t c = tile * kTileColumns; c < a.columns && c < (tile + 1) * kTileColumns; ++c) {
        const std::byte* weight = place(a.weight, c * a.depth, 2, a.depth * 2);
        float product = 0;
        for (int64_t d = 0; d < a.depth; ++d) product += number(hidden, a.type, d) * number(weight, a.type, d);
        const bool is_target = c + a.first_column == target;
        const float above = std::fma(product, a.slope, -exponent);
        const float e = is_target ? 0 : std::exp(above);
        sums[kTileExponentials] += e;
        if (e != 0) sums[kTileWeighted] += e * above;
        sums[kTileSquares] += e * e;
        if (!is_target) {
          sums[kTileLogits] += product * a.slope;
          if (product * a.slope > sums[kTileLargest]) sums[kTileLargest] = product * a.slope;
        }
        if (a.operand != nullptr) write(a.operand, r * a.operand_stride + c, to_bfloat16(e));
      }
      if (a.tile_sums == nullptr) continue;
      for (int64_t which = 0; which < tile_sums_of(a.extras); ++which) {
        write(a.tile_sums, (which * a.rows + r) * tiles_of(a.columns) + tile, sums[which]);
      }
    }
  }
}

}  // namespace fastdpo::cuda

#endif
