// The product of one row of hidden and one of the weight, where a matrix product is not worth it.
#pragma once

#include "device.cuh"

namespace fastdpo::cuda {

// a . b over `count` elements, summed in the compute type; for whole warps, and every lane gets the result. kAligned:
// the rows lie on 16-byte boundaries and are whole packs, as Level 1's are (fused_can).
template <bool kAligned, typename T, typename C = typename ComputeOf<T>::type>
__device__ __forceinline__ C dot_over_warp(const T* a, const T* b, int64_t count) {
  constexpr int kPack = kAccessBytes / static_cast<int>(sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  C sum = 0;
  int64_t in_packs = 0;
  if (kAligned || (on_boundary(a) && on_boundary(b))) {
    in_packs = kAligned ? count : count / kPack * kPack;
    for (int64_t i = lane * kPack; i < in_packs; i += kWarpSize * kPack) {
      Pack<T, kPack> of_a;
      Pack<T, kPack> of_b;
      of_a.load(a + i);
      of_b.load(b + i);
#pragma unroll
      for (int j = 0; j < kPack; ++j) sum += load_as_compute(of_a.values[j]) * load_as_compute(of_b.values[j]);
    }
  }
  if constexpr (!kAligned) {
    for (int64_t i = in_packs + lane; i < count; i += kWarpSize) sum += load_as_compute(a[i]) * load_as_compute(b[i]);
  }
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(kAllLanes, sum, distance);
  return sum;
}

}  // namespace fastdpo::cuda
