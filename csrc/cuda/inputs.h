// What both ops are given, checked once: nothing behind this looks at a type, a shape or a device again. Against the
// LibTorch stable ABI only.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "launch.h"

namespace fastdpo::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

ScalarType scalar_type(Type type);

// For messages: [2, 3].
std::string shape_text(const Tensor& tensor);

// Throws unless the tensor has this shape and type, is contiguous, and lies where `hidden` does. Every tensor argument
// of an op passes here once.
void check_tensor(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type,
                  const Tensor& hidden);

// The arguments that both ops share, checked.
struct Inputs {
  const Tensor& hidden;
  Type type;
  int64_t positions;     // N
  int64_t hidden_units;  // H
  int64_t vocabulary;    // V
  int64_t ignore_index;
  int64_t num_scored;  // -1 where the caller does not know it
  Transform transform;
  void* stream;
  const char* hidden_data;
  const char* weight_data;
  const int64_t* targets;
  Type bias_type;
  Tensor bias_as_compute;  // kept alive for `bias`
  const char* bias = nullptr;

  Type compute() const { return compute_type(type); }
  Type operand() const { return operand_type(type); }
  int64_t compute_bytes() const { return size_of(compute()); }
  int64_t operand_bytes() const { return size_of(operand()); }
  int64_t hidden_bytes() const { return hidden_units * size_of(type); }  // of a row
  // The gradient products have operands of another type than the weight.
  bool weight_needs_cast() const { return operand() != type; }

  const char* hidden_row(int64_t position) const { return hidden_data + position * hidden_bytes(); }
  const char* weight_row(int64_t entry) const { return weight_data + entry * hidden_bytes(); }
  const char* bias_at(int64_t entry) const { return bias == nullptr ? nullptr : bias + entry * compute_bytes(); }

  // Memory on the inputs' device.
  Tensor empty(const std::vector<int64_t>& shape, Type element) const { return empty(shape, scalar_type(element)); }
  Tensor empty(const std::vector<int64_t>& shape, ScalarType element) const;
};

// The names are the schemas' (csrc/fastdpo.h).
Inputs check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                    const std::optional<Tensor>& bias, int64_t ignore_index, int64_t num_scored, double logit_scale,
                    double softcap, double temperature);

}  // namespace fastdpo::cuda
