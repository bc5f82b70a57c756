// The beginning and the end of a row in the forward op, whatever computes the products in between.
#pragma once

#include "problem.h"

namespace fastdpo::cpu {

// h . w_y of scored row i, summed in float64: the reference exponent is the one number that every term depends on.
template <typename T>
double target_product(const Problem<T>& problem, int64_t i) {
  const int64_t size = problem.hidden_size();
  return with_element_type(problem.hidden, [&](auto element) {
    using E = decltype(element);
    const E* h = problem.hidden.template const_data_ptr<E>() + problem.rows()[i] * size;
    const E* w = problem.weight.template const_data_ptr<E>() + problem.target(i) * size;
    double total = 0;
    for (int64_t k = 0; k < size; ++k) total += static_cast<double>(h[k]) * static_cast<double>(w[k]);
    return total;
  });
}

template <typename T>
RowSums<double> start_row(const Problem<T>& problem, int64_t i) {
  const LogitTransform<double> transform{problem.transform.scale, problem.transform.softcap,
                                         problem.transform.inv_temperature};
  const double bias = problem.bias.defined() ? problem.bias.template const_data_ptr<T>()[problem.target(i)] : 0;
  // Rounded to the compute type, in which the differences z_j - k are formed.
  return RowSums<double>::start(static_cast<T>(transform.logit(target_product(problem, i) + bias)));
}

// d logp / d (h . w_y): what the target's own row of weight contributes.
template <typename T>
double target_weight(const Problem<T>& problem, const RowSums<double>& sums, const RowResult<double>& result) {
  const double factor = problem.transform.slope_factor(static_cast<T>(sums.target_logit));
  return problem.transform.slope() * result.one_minus_p * factor;
}

// Everything that the op returns.
template <typename T>
struct Results {
  at::Tensor logps, row_state, direction, retained, entropy, log_sum_sq_probs, mean_logits, top_gap;

  void write(const Problem<T>& problem, int64_t i, const RowSums<double>& sums) {
    const RowResult<double> result = sums.finish(problem.vocabulary());
    const int64_t t = problem.rows()[i], n = logps.size(0);
    const auto put = [t](at::Tensor& tensor, double value) {
      if (tensor.numel() > 0) tensor.mutable_data_ptr<T>()[t] = static_cast<T>(value);
    };
    put(logps, result.logp);
    put(entropy, result.entropy);
    put(log_sum_sq_probs, result.log_sum_sq_probs);
    put(mean_logits, result.mean_logit);
    put(top_gap, result.top_gap);
    T* state = row_state.mutable_data_ptr<T>();
    state[kRowExponent * n + t] = static_cast<T>(sums.exponent);
    state[kRowNorm * n + t] = static_cast<T>(result.norm);
    state[kRowTargetWeight * n + t] = static_cast<T>(target_weight(problem, sums, result));
  }
};

// direction = target_weight * w_y - slope / norm * (sum over j of operand_j w_j); sum and direction may be the same
// row.
template <typename T>
void finish_direction(const Problem<T>& problem, int64_t i, const RowSums<double>& sums, const T* sum, T* direction) {
  const RowResult<double> result = sums.finish(problem.vocabulary());
  const T of_target = static_cast<T>(target_weight(problem, sums, result));
  const T of_sum = static_cast<T>(problem.transform.slope() / result.norm);
  with_element_type(problem.weight, [&](auto element) {
    using E = decltype(element);
    const E* w = problem.weight.template const_data_ptr<E>() + problem.target(i) * problem.hidden_size();
    for (int64_t k = 0; k < problem.hidden_size(); ++k) {
      direction[k] = of_target * static_cast<T>(w[k]) - of_sum * sum[k];
    }
  });
}

}  // namespace fastdpo::cpu
