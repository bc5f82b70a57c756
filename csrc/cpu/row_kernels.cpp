#include "row_kernels.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastdpo::cpu {
namespace {

const RowKernels* runnable_avx512() {
#if defined(__x86_64__)
  const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return runs ? avx512_row_kernels() : nullptr;
#else
  return nullptr;
#endif
}

const RowKernels* runnable_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? avx2_row_kernels() : nullptr;
#else
  return nullptr;
#endif
}

const RowKernels& choose() {
  const RowKernels* const sets[] = {runnable_avx512(), runnable_avx2(), plain_row_kernels()};
  const char* const wanted = std::getenv("FASTDPO_CPU_PATH");
  for (const RowKernels* set : sets) {
    if (set != nullptr && (wanted == nullptr || std::string(wanted) == set->name)) return *set;
  }
  throw std::runtime_error("FASTDPO_CPU_PATH is '" + std::string(wanted) +
                           "'; it should be avx512, avx2 or plain, and one that this processor runs");
}

}  // namespace

const RowKernels& row_kernels() {
  static const RowKernels& kChosen = choose();
  return kChosen;
}

}  // namespace fastdpo::cpu
