#include "level.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "exponentials.h"

namespace fastdpo::cuda {
namespace {

constexpr const char* kVariable = "FASTDPO_CUDA_LEVEL";

// TMA reads rows that start on 16-byte boundaries.
bool on_boundary(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

bool fused_can(const LevelCase& c) {
  // float16 cannot hold the exponentials: its operand is float32, and its gradients' products take twice the time of
  // the first one, so there is less to win there.
  const bool type = c.type == Type::kBFloat16 || (c.type == Type::kFloat16 && !c.operand && !c.extras);
  return type && c.compute_capability == 90 && c.hidden_units % kRowAlignment == 0 &&
         c.retained_stride % kRowAlignment == 0 && on_boundary(c.hidden) && on_boundary(c.weight) && !c.bias &&
         !c.softcap;
}

std::optional<Level> asked_level() {
  const char* value = std::getenv(kVariable);
  const std::string text = value == nullptr ? "" : value;
  if (text.empty()) return std::nullopt;
  if (text == "0") return Level::kProducts;
  if (text == "1") return Level::kFused;
  throw std::runtime_error(std::string("fastdpo: ") + kVariable + " is '" + text + "', but must be 0 or 1");
}

Level choose_level(const LevelCase& c, std::optional<Level> asked) {
  // Level 1 has not been measured, so nobody gets it unasked.
  if (asked != Level::kFused) return Level::kProducts;
  if (const char* why = exponentials_missing()) {
    throw std::runtime_error(std::string("fastdpo: ") + kVariable +
                             " is 1, but fastdpo was built without Level 1: " + why);
  }
  return fused_can(c) ? Level::kFused : Level::kProducts;
}

}  // namespace fastdpo::cuda
