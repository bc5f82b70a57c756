// Which way the first product goes. Free of torch and of CUDA headers; everything that decides it stands here.
#pragma once

#include <cstdint>
#include <optional>

#include "launch.h"

namespace fastdpo::cuda {

enum class Level {
  kProducts,  // 0: a matrix product writes logits, and the row kernel reads them; any GPU, any options
  kFused      // 1: the product's own epilogue takes the exponentials; Hopper, plain cases
};

// What the choice depends on.
struct LevelCase {
  Type type;
  int compute_capability;  // 90 is 9.0
  int64_t hidden_units;
  const void* hidden;
  const void* weight;
  bool operand;             // whether exponentials are written, for a gradient
  int64_t retained_stride;  // of their rows where they are retained; 0 in scratch memory, which has aligned ones
  bool bias;
  bool softcap;
  bool extras;  // any output beside log-probabilities and gradients
};

// Whether Level 1's kernels can do it.
bool fused_can(const LevelCase& c);

// What FASTDPO_CUDA_LEVEL asks for; nothing where it is not set or empty. Throws if it is neither 0 nor 1.
std::optional<Level> asked_level();

// Throws if Level 1 is asked for and was not built, for whatever case: whoever sets FASTDPO_CUDA_LEVEL wants to know.
// A case that Level 1 cannot do is Level 0's, also then.
Level choose_level(const LevelCase& c, std::optional<Level> asked);

}  // namespace fastdpo::cuda
