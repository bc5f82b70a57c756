// Declares the ops, registers them for CPU tensors, and tells how this library was built.
#include <pybind11/pybind11.h>
#include <torch/library.h>
#include <torch/version.h>

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

PYBIND11_MODULE(_C, m) {
  m.def("build_facts", [] {
    pybind11::dict facts;
    facts["version"] = FASTDPO_VERSION;
    facts["compiler"] = FASTDPO_COMPILER;
    facts["torch"] = TORCH_VERSION;
    facts["cpu_path"] = fastdpo::cpu::name_of(fastdpo::cpu::isa());
    return facts;
  });
  m.def("cpu_products", [] {
    pybind11::dict products;
    for (const auto& [name, type] : {std::pair{"float32", at::kFloat}, std::pair{"bfloat16", at::kBFloat16},
                                     std::pair{"float16", at::kHalf}, std::pair{"float64", at::kDouble}}) {
      const auto operand = fastdpo::cpu::fused_operand(at::empty({1, 2}, type));
      products[name] = !operand.has_value()        ? "at::mm in chunks"
                       : *operand == at::kBFloat16 ? "fused, bfloat16 operands"
                                                   : "fused, float32 operands";
    }
    return products;
  });
}
