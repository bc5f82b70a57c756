#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fastdpo::cpu {
namespace {

bool runs(Isa isa) {
#if defined(__x86_64__)
  // Every processor with AVX2 has F16C as well, which not every compiler can ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx2:
      return avx2;
    case Isa::kPlain:
      break;
  }
#endif
  return isa == Isa::kPlain;
}

Isa choose() {
  const char* const wanted = std::getenv("FASTDPO_CPU_PATH");
  for (const Isa isa : {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kPlain}) {
    if (runs(isa) && (wanted == nullptr || std::string(wanted) == name_of(isa))) return isa;
  }
  throw std::runtime_error("FASTDPO_CPU_PATH is '" + std::string(wanted) +
                           "'; it should be avx512_bf16, avx512, avx2 or plain, and one that this processor runs");
}

}  // namespace

Isa isa() {
  static const Isa kChosen = choose();
  return kChosen;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kPlain:
      break;
  }
  return "plain";
}

}  // namespace fastdpo::cpu
