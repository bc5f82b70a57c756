// What every kernel file here builds on: the 16-bit types, 16-byte accesses, and how a kernel is launched.
//
// Under nvcc these are CUDA's own. Without it the test shim (tests/support/cuda_host) supplies the same names, and g++
// compiles the same kernels for the host.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#else
#include "cuda_shim.h"
#endif

#include "../fastdpo.h"

// The shim runs one fibre per thread, so it is built with a smaller block.
#ifndef FASTDPO_BLOCK_THREADS
#define FASTDPO_BLOCK_THREADS 256
#endif

namespace fastdpo::cuda {

using bfloat16 = __nv_bfloat16;
using half = __half;

constexpr int kWarpSize = 32;
constexpr int kBlockThreads = FASTDPO_BLOCK_THREADS;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kAccessBytes = 16;  // the widest load and store of one thread

// The type arithmetic is done in.
template <typename T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};

__device__ __forceinline__ float load_as_compute(float x) { return x; }
__device__ __forceinline__ double load_as_compute(double x) { return x; }
__device__ __forceinline__ float load_as_compute(half x) { return __half2float(x); }
__device__ __forceinline__ float load_as_compute(bfloat16 x) { return __bfloat162float(x); }

template <typename T, typename C>
__device__ __forceinline__ T round_to(C x) {
  if constexpr (std::is_same_v<T, half>) {
    return __float2half_rn(static_cast<float>(x));
  } else if constexpr (std::is_same_v<T, bfloat16>) {
    return __float2bfloat16_rn(static_cast<float>(x));
  } else {
    return static_cast<T>(x);
  }
}

// Float16's gradient products have float32 operands and read them as TF32: how they drop the 13 bits that TF32 lacks is
// the hardware's affair, and may be by cutting them off, which shrinks every term. Of operands that are rounded to TF32
// beforehand they drop nothing.
__device__ __forceinline__ float round_to_tf32(float x) {
  if (x != x) return x;  // a NaN's bits must not be carried on
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  bits = (bits + 0x1000u) & ~0x1fffu;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// As the operands of inputs of type T are: O.
template <typename T, typename O, typename C>
__device__ __forceinline__ O round_to_operand(C x) {
  if constexpr (std::is_same_v<T, half>) {
    return round_to_tf32(x);
  } else {
    return round_to<O>(x);
  }
}

// kSize neighbours, moved by 16-byte accesses. `from` and `to` must be 16-byte aligned.
template <typename T, int kSize>
struct Pack {
  static constexpr int kAccesses = kSize * static_cast<int>(sizeof(T)) / kAccessBytes;
  static_assert(kAccesses * kAccessBytes == kSize * static_cast<int>(sizeof(T)));
  T values[kSize];

  __device__ __forceinline__ void load(const T* from) {
    uint4 words[kAccesses];
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) words[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(values, words, sizeof(values));
  }
  __device__ __forceinline__ void store(T* to) const {
    uint4 words[kAccesses];
    memcpy(words, values, sizeof(values));
#pragma unroll
    for (int i = 0; i < kAccesses; ++i) reinterpret_cast<uint4*>(to)[i] = words[i];
  }
};

// What backward's operand holds in the target's column. The rows of hidden that meet it are scaled by -c slope / norm,
// so it adds c target_weight h to the target's row of the weight gradient: no scatter and no atomics. In bfloat16 it is
// rounded once, as every other entry of the operand is.
template <typename C>
__device__ __forceinline__ C target_operand(C target_weight, C norm, C slope) {
  return slope == C(0) ? C(0) : -(target_weight / slope) * norm;
}

// Elements of T before the first 16-byte boundary at or after `address`.
template <typename T>
__device__ __forceinline__ int elements_to_boundary(const T* address) {
  const auto past = reinterpret_cast<uintptr_t>(address) % kAccessBytes;
  return past == 0 ? 0 : static_cast<int>((kAccessBytes - past) / sizeof(T));
}

__device__ __forceinline__ bool on_boundary(const void* address) {
  return reinterpret_cast<uintptr_t>(address) % kAccessBytes == 0;
}

// Element `index` of a strided loop over the whole grid.
__device__ __forceinline__ int64_t grid_index() { return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; }
__device__ __forceinline__ int64_t grid_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

constexpr int64_t kMaxGrid = (int64_t{1} << 31) - 1;

// Launches on `stream` and throws if the launch itself was refused; what goes wrong later shows at the next check.
template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
                   Arguments... arguments) {
  if (blocks > kMaxGrid) throw std::runtime_error(std::string("fastdpo: ") + name + ": too many rows for one launch");
#if defined(__CUDACC__)
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("fastdpo: ") + name + " did not launch on " + std::to_string(blocks) +
                             " blocks of " + std::to_string(threads) + " threads: " + cudaGetErrorString(error));
  }
#else
  (void)stream;
  cuda_shim::run_grid(kernel, blocks, threads, arguments...);
#endif
}

// Blocks for an elementwise loop over `count` elements: each thread takes several, and no more blocks are launched than
// keep every multiprocessor of any card busy.
inline int64_t elementwise_blocks(int64_t count) {
  constexpr int64_t kMostBlocks = 4096;
  const int64_t blocks = (count + kBlockThreads - 1) / kBlockThreads;
  return blocks < kMostBlocks ? blocks : kMostBlocks;
}

}  // namespace fastdpo::cuda
