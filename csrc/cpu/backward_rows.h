// What the backward op needs of each row, whatever computes the products.
#pragma once

#include <vector>

#include "problem.h"

namespace fastdpo::cpu {

// What each scored row contributes to the weight's gradient: see RowState in ../fastdpo.h.
struct RowCoefficients {
  double exponent, of_operand, of_target;
};

template <typename T>
std::vector<RowCoefficients> row_coefficients(const Problem<T>& problem, const at::Tensor& grad_logps,
                                              const at::Tensor& row_state) {
  const int64_t n = problem.hidden.size(0);
  const T* state = row_state.const_data_ptr<T>();
  const T* grad = grad_logps.const_data_ptr<T>();
  std::vector<RowCoefficients> coefficients(problem.count());
  for (int64_t i = 0; i < problem.count(); ++i) {
    const int64_t t = problem.rows()[i];
    const double c = grad[t];
    coefficients[i] = {state[kRowExponent * n + t], -c * problem.transform.slope() / state[kRowNorm * n + t],
                       c * state[kRowTargetWeight * n + t]};
  }
  return coefficients;
}

// Where the gradients of weight and bias go; undefined where one is not needed. A sum is the caller's, in the compute
// type, and is added to; a result is in the input's type, and is set.
struct Gradients {
  at::Tensor weight, bias;
  bool adds_to_weight = false, adds_to_bias = false;
};

}  // namespace fastdpo::cpu
