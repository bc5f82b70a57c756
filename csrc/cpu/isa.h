// Which instruction set the vectorised kernels use, chosen once per process.
#pragma once

namespace fastdpo::cpu {

enum class Isa { kPlain, kAvx2, kAvx512, kAvx512Bf16 };

// The best one that this processor runs, or the one that the environment variable FASTDPO_CPU_PATH names (plain, avx2,
// avx512, avx512_bf16); throws std::runtime_error when that is unknown or cannot run here.
Isa isa();

const char* name_of(Isa isa);

}  // namespace fastdpo::cpu
