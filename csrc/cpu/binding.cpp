// Declares the ops, registers them for CPU tensors, and tells how this library was built. Free of Python, so that one
// library serves every version of that.
#include <torch/library.h>
#include <torch/version.h>

#include <exception>
#include <string>
#include <utility>

#include "../fastdpo.h"
#include "fused.h"
#include "isa.h"
#include "token_logps.h"

TORCH_LIBRARY(fastdpo, m) {
  m.def(fastdpo::kForwardSchema, {at::Tag::pt2_compliant_tag});
  m.def(fastdpo::kBackwardSchema, {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(fastdpo, CPU, m) {
  m.impl("token_logps_forward", &fastdpo::cpu::token_logps_forward);
  m.impl("token_logps_backward", &fastdpo::cpu::token_logps_backward);
}

namespace {

std::string facts() {
  try {
    const std::string path = fastdpo::cpu::name_of(fastdpo::cpu::isa());
    return R"({"version": ")" FASTDPO_VERSION R"(", "compiler": ")" FASTDPO_COMPILER R"(", "torch": ")" TORCH_VERSION
           R"(", "cpu_path": ")" +
           path + "\"}";
  } catch (const std::exception& error) {  // which must not leave a C function
    return std::string(R"({"error": ")") + error.what() + "\"}";
  }
}

std::string products() {
  std::string all;
  for (const auto& [name, type] : {std::pair{"float32", at::kFloat}, std::pair{"bfloat16", at::kBFloat16},
                                   std::pair{"float16", at::kHalf}, std::pair{"float64", at::kDouble}}) {
    const auto operand = fastdpo::cpu::fused_operand(at::empty({1, 2}, type));
    const char* const words = !operand.has_value()        ? "at::mm in chunks"
                              : *operand == at::kBFloat16 ? "fused, bfloat16 operands"
                                                          : "fused, float32 operands";
    all += (all.empty() ? "{\"" : ", \"") + std::string(name) + "\": \"" + words + "\"";
  }
  return all + "}";
}

}  // namespace

// JSON; what fastdpo.build_info() shows of this library, or the error of a FASTDPO_CPU_PATH that cannot be taken.
extern "C" __attribute__((visibility("default"))) const char* fastdpo_cpu_build_facts() {
  static const std::string kFacts = facts();
  return kFacts.c_str();
}

// JSON: by dtype, how its matrix products are made here.
extern "C" __attribute__((visibility("default"))) const char* fastdpo_cpu_products() {
  static const std::string kProducts = products();
  return kProducts.c_str();
}
