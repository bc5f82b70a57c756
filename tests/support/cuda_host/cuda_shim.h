// Runs CUDA kernels on the host: enough of the CUDA language for csrc/cuda/*.cuh and *.cu to be compiled by g++.
//
// A block's threads are fibres, which run one after the other until each waits at a barrier, a shuffle or a ballot.
// Blocks run one after the other, so `__shared__` is plain static memory. Fibres that wait at a block barrier which the
// others never reach are an error here, and undefined on a device.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};
inline thread_local Index3 threadIdx, blockIdx, blockDim, gridDim;

// The 16-bit types: float's upper half, and IEEE half; both rounded to nearest, ties to even.
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __bfloat162float(__nv_bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const float sign = x.bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (x.bits >> 10) & 31;
  const int mantissa = x.bits & 1023;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                               : std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25));
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float magnitude = std::fabs(x);
  if (std::isnan(x)) return {0x7fff};
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  // In units of the last place, nearbyint rounds ties to even; a carry runs into the exponent, as it should.
  const int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {static_cast<uint16_t>(sign | (units + (exponent + 14) * 1024))};
}

namespace cuda_shim {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 << 10;

struct Fibre {
  ucontext_t entry{};
  jmp_buf state;
  std::unique_ptr<char[]> stack;
  bool started = false;  // the fibre waits in `state`; else it has never run
  bool done = true;      // this block's work
  bool at_block_barrier = false;
};

// One grid at a time: the tests call the ops from one thread.
struct Machine {
  std::vector<std::unique_ptr<Fibre>> fibres;
  std::function<void()> body;
  jmp_buf scheduler;
  ucontext_t scheduler_entry;
  int threads = 0;
  int current = 0;
  // What lanes show each other, twice: a fast lane may be one exchange ahead of a slow one.
  std::vector<uint64_t> shown[2];
  std::vector<uint8_t> exchanges;  // a thread's count of exchanges, modulo 2

  static Machine& get() {
    static Machine machine;
    return machine;
  }

  static void fibre_main() {
    Machine& m = get();
    for (;;) {
      m.body();
      m.fibres[m.current]->done = true;
      m.wait();
    }
  }
  void wait() {
    if (_setjmp(fibres[current]->state) == 0) _longjmp(scheduler, 1);
  }
  void resume(int thread) {
    current = thread;
    threadIdx.x = static_cast<unsigned>(thread);
    Fibre& fibre = *fibres[thread];
    if (_setjmp(scheduler) != 0) return;
    if (fibre.started) _longjmp(fibre.state, 1);
    fibre.started = true;
    swapcontext(&scheduler_entry, &fibre.entry);  // first run only: never returns this way
  }

  void run_block(int thread_count) {
    threads = thread_count;
    while (static_cast<int>(fibres.size()) < threads) {
      auto fibre = std::make_unique<Fibre>();
      fibre->stack = std::make_unique<char[]>(kStackBytes);
      getcontext(&fibre->entry);
      fibre->entry.uc_stack.ss_sp = fibre->stack.get();
      fibre->entry.uc_stack.ss_size = kStackBytes;
      fibre->entry.uc_link = nullptr;
      makecontext(&fibre->entry, fibre_main, 0);
      fibres.push_back(std::move(fibre));
    }
    for (auto& lanes : shown) lanes.assign(threads, 0);
    exchanges.assign(threads, 0);
    for (int t = 0; t < threads; ++t) fibres[t]->done = fibres[t]->at_block_barrier = false;
    for (;;) {
      int waiting = 0, left = 0;
      for (int t = 0; t < threads; ++t) {
        if (!fibres[t]->done && !fibres[t]->at_block_barrier) resume(t);
        left += fibres[t]->done ? 0 : 1;
        waiting += fibres[t]->at_block_barrier ? 1 : 0;
      }
      if (left == 0) return;
      if (waiting == threads) {
        for (int t = 0; t < threads; ++t) fibres[t]->at_block_barrier = false;
      } else if (waiting == left) {
        std::fprintf(stderr, "cuda_shim: %d of %d threads wait at a barrier that the others never reach\n", left,
                     threads);
        std::abort();
      }
    }
  }
};

template <typename... Parameters, typename... Arguments>
void run_grid(void (*kernel)(Parameters...), int64_t blocks, int threads, Arguments... arguments) {
  Machine& m = Machine::get();
  m.body = [&] { kernel(arguments...); };
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    m.run_block(threads);
  }
}

// Shows `mine` to the warp and returns once all lanes have shown theirs: the scheduler runs lanes in order, so after
// one turn each lane has.
inline const uint64_t* exchange(uint64_t mine) {
  Machine& m = Machine::get();
  const int thread = m.current;
  auto& lanes = m.shown[m.exchanges[thread]];
  m.exchanges[thread] ^= 1;
  lanes[thread] = mine;
  m.wait();
  return lanes.data() + thread / kLanes * kLanes;
}

}  // namespace cuda_shim

inline void __syncthreads() {
  auto& m = cuda_shim::Machine::get();
  m.fibres[m.current]->at_block_barrier = true;
  m.wait();
}
template <typename T>
T __shfl_xor_sync(unsigned, T mine, int distance) {
  uint64_t bits = 0;
  std::memcpy(&bits, &mine, sizeof(T));
  const int lane = static_cast<int>(threadIdx.x) % cuda_shim::kLanes;
  const uint64_t other = cuda_shim::exchange(bits)[lane ^ distance];
  T value;
  std::memcpy(&value, &other, sizeof(T));
  return value;
}
inline unsigned __ballot_sync(unsigned, bool mine) {
  const uint64_t* lanes = cuda_shim::exchange(mine);
  unsigned bits = 0;
  for (int lane = 0; lane < cuda_shim::kLanes; ++lane) bits |= static_cast<unsigned>(lanes[lane]) << lane;
  return bits;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
