// The two ops: what they are given is checked here, their results are allocated here, and the path is chosen.
#include "token_logps.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/zeros.h>

#include "fused.h"
#include "huge_pages.h"
#include "mm.h"

namespace fastdpo::cpu {
namespace {

// The operand type of ../fastdpo.h.
at::ScalarType retained_type(const at::Tensor& hidden) {
  return hidden.scalar_type() == at::kHalf ? at::kFloat : hidden.scalar_type();
}

template <typename T>
Results<T> make_results(const Problem<T>& problem, at::ScalarType operand, bool need_direction, int64_t retain_bytes,
                        bool entropy, bool log_sum_sq_probs, bool mean_logits, bool top_gap) {
  const int64_t n = problem.hidden.size(0);
  const auto options = problem.compute();
  const int64_t row_bytes = problem.vocabulary() * static_cast<int64_t>(at::elementSize(operand));
  const int64_t retain = std::min(n, std::max<int64_t>(retain_bytes, 0) / row_bytes);
  const auto per_row = [&](bool wanted) { return at::zeros({wanted ? n : 0}, options); };
  Results<T> results{
      per_row(true),
      at::zeros({kRowStates, n}, options),
      at::zeros({need_direction ? n : 0, problem.hidden_size()}, options),
      at::empty({retain, problem.vocabulary()}, options.dtype(operand)),
      per_row(entropy),
      per_row(log_sum_sq_probs),
      per_row(mean_logits),
      per_row(top_gap),
  };
  results.row_state.select(0, kRowNorm).fill_(1);  // what ignored rows keep
  prefer_huge_pages(results.retained);
  return results;
}

void forward(const Problem<float>& problem, Results<float>& results) {
  const auto operand = fused_operand(problem.hidden);
  operand.has_value() ? fused_forward(problem, *operand, results) : mm_forward(problem, results);
}
void forward(const Problem<double>& problem, Results<double>& results) { mm_forward(problem, results); }

void weight_gradient(const Problem<float>& problem, const at::Tensor& retained,
                     const std::vector<RowCoefficients>& coefficients, const Gradients& gradients) {
  const auto operand = fused_operand(problem.hidden);
  operand.has_value() ? fused_weight_gradient(problem, *operand, retained, coefficients, gradients)
                      : mm_weight_gradient(problem, retained, coefficients, gradients);
}
void weight_gradient(const Problem<double>& problem, const at::Tensor& retained,
                     const std::vector<RowCoefficients>& coefficients, const Gradients& gradients) {
  mm_weight_gradient(problem, retained, coefficients, gradients);
}

}  // namespace

ForwardResult token_logps_forward(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                  const std::optional<at::Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                                  double logit_scale, double softcap, double temperature, bool need_direction,
                                  int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits,
                                  bool top_gap) {
  return with_compute_type(hidden, [&](auto compute) -> ForwardResult {
    const auto problem = make_problem<decltype(compute)>(hidden, weight, targets, bias, ignore_index, num_scored,
                                                         logit_scale, softcap, temperature);
    auto results = make_results(problem, retained_type(hidden), need_direction, retain_bytes, entropy, log_sum_sq_probs,
                                mean_logits, top_gap);
    forward(problem, results);
    return {results.logps,   results.row_state,        results.direction,   results.retained,
            results.entropy, results.log_sum_sq_probs, results.mean_logits, results.top_gap};
  });
}

BackwardResult token_logps_backward(const at::Tensor& grad_logps, const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                    const at::Tensor& row_state, const at::Tensor& direction,
                                    const at::Tensor& retained, const std::optional<at::Tensor>& weight_sum,
                                    const std::optional<at::Tensor>& bias_sum, int64_t ignore_index, int64_t num_scored,
                                    double logit_scale, double softcap, double temperature, bool need_hidden,
                                    bool need_weight, bool need_bias) {
  return with_compute_type(hidden, [&](auto compute) -> BackwardResult {
    using T = decltype(compute);
    const auto problem =
        make_problem<T>(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
    const int64_t n = hidden.size(0);
    TORCH_CHECK(grad_logps.sizes() == targets.sizes() && grad_logps.scalar_type() == kComputeType<T> &&
                    row_state.dim() == 2 && row_state.size(0) == kRowStates && row_state.size(1) == n &&
                    row_state.scalar_type() == kComputeType<T> && row_state.is_contiguous(),
                "grad_logps and row_state should be as the forward returned them");
    TORCH_CHECK(!need_hidden || (direction.sizes() == hidden.sizes() && direction.scalar_type() == kComputeType<T>),
                "direction should be as the forward returned it, [N, H], for hidden's gradient; it is a ",
                direction.scalar_type(), " tensor of shape ", direction.sizes());
    TORCH_CHECK(retained.dim() == 2 && retained.size(1) == weight.size(0) && retained.is_contiguous() &&
                    retained.scalar_type() == retained_type(hidden),
                "retained should be as the forward returned it, contiguous, [R, V]; it is a ", retained.scalar_type(),
                " tensor of shape ", retained.sizes());

    const auto check_sum = [](const char* name, const at::Tensor& sum, bool needed, at::IntArrayRef shape) {
      TORCH_CHECK(needed && sum.sizes() == shape && sum.scalar_type() == kComputeType<T> && sum.is_contiguous(), name,
                  " should be a contiguous ", kComputeType<T>, " tensor of shape ", shape, ", given only where that ",
                  "gradient is needed; it is a ", sum.scalar_type(), " tensor of shape ", sum.sizes());
    };
    if (weight_sum.has_value()) check_sum("weight_sum", *weight_sum, need_weight, weight.sizes());
    if (bias_sum.has_value()) check_sum("bias_sum", *bias_sum, need_bias, {weight.size(0)});

    const auto options = hidden.options(), bias_options = bias.value_or(hidden).options();
    const bool return_weight = need_weight && !weight_sum.has_value(), return_bias = need_bias && !bias_sum.has_value();
    at::Tensor grad_hidden = at::empty({need_hidden ? hidden.size(0) : 0, hidden.size(1)}, options);
    at::Tensor grad_weight = at::empty({return_weight ? weight.size(0) : 0, hidden.size(1)}, options);
    at::Tensor grad_bias = at::empty({return_bias ? weight.size(0) : 0}, bias_options);
    if (need_hidden) {
      // An ignored row's direction is zero, and zero times what its gradient holds could be NaN.
      const at::Tensor of_rows = grad_logps.masked_fill(targets.eq(ignore_index), 0);
      at::mul_out(grad_hidden, direction, of_rows.unsqueeze(1));
    }
    if (need_weight || need_bias) {
      prefer_huge_pages(grad_weight);
      Gradients gradients;
      if (need_weight) gradients.weight = weight_sum.value_or(grad_weight);
      if (need_bias) gradients.bias = bias_sum.value_or(grad_bias);
      gradients.adds_to_weight = weight_sum.has_value();
      gradients.adds_to_bias = bias_sum.has_value();
      weight_gradient(problem, retained, row_coefficients(problem, grad_logps.contiguous(), row_state), gradients);
    }
    return {grad_hidden, grad_weight, grad_bias};
  });
}

}  // namespace fastdpo::cpu
