// The ops over at::mm, blocks of tokens times chunks of the vocabulary: for float64, and for processors and settings
// that the fused kernels do not run on.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "backward_rows.h"
#include "forward_rows.h"
#include "problem.h"

namespace fastdpo::cpu {

// Fills what the forward returns; results.retained is [R, V], of which the first scored rows are used.
template <typename T>
void mm_forward(const Problem<T>& problem, Results<T>& results);

// weight's and bias's gradients from what mm_forward returned.
template <typename T>
void mm_weight_gradient(const Problem<T>& problem, const at::Tensor& retained,
                        const std::vector<RowCoefficients>& coefficients, const Gradients& gradients);

}  // namespace fastdpo::cpu
