// token_logps_backward over at::mm: hidden's gradient is the forward's direction, scaled; the weight's is computed for
// one chunk of the vocabulary after another, over all tokens, from retained exponentials or from products made again.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <utility>
#include <vector>

#include "problem.h"
#include "token_logps.h"

namespace fastdpo::cpu {
namespace {

auto operand_of(float) { return row_kernels().operand_f32; }
auto operand_of(double) { return row_kernels().operand_f64; }

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

// What the caller wants the gradients added to, unrounded; undefined where they are results of their own.
struct Sums {
  at::Tensor weight, bias;
};

// Gradients of one chunk of the vocabulary at a time, summed over all tokens in the compute type and rounded once.
template <typename T>
class WeightGradient {
 public:
  WeightGradient(const Problem<T>& problem, const at::Tensor& retained, const Sums& sums,
                 std::vector<RowCoefficients> coefficients)
      : problem_(problem), retained_(retained), sums_(sums), coefficients_(std::move(coefficients)) {}

  // Entries [v, v + width); grad_weight and grad_bias are undefined where not needed.
  void run(int64_t v, int64_t width, at::Tensor& grad_weight, at::Tensor& grad_bias) {
    const at::Tensor weight = problem_.weight_chunk(v, v + width, weight_buffer_);
    at::Tensor sum;
    if (grad_weight.defined()) sum = weight_sum(v, width, grad_weight);
    at::Tensor bias_sum =
        sums_.bias.defined() ? sums_.bias.narrow(0, v, width) : at::zeros({width}, problem_.compute());
    for (int64_t begin = 0; begin < problem_.count(); begin += problem_.tiles.block) {
      const int64_t size = std::min(problem_.tiles.block, problem_.count() - begin);
      const at::Tensor hidden = problem_.hidden_block(begin, begin + size, hidden_buffer_);
      const at::Tensor operand = scaled_operand(hidden, weight, begin, v);
      if (sum.defined()) at::addmm_out(sum, sum, operand.t(), hidden);
      if (grad_bias.defined()) bias_sum.add_(at::sum(operand, {0}));
    }
    if (sum.defined() && !sums_.weight.defined() && problem_.converts()) grad_weight.narrow(0, v, width).copy_(sum);
    if (grad_bias.defined() && !sums_.bias.defined()) grad_bias.narrow(0, v, width).copy_(bias_sum);
  }

 private:
  // Where a chunk's gradient grows: in the caller's sum, or in the result itself unless that has 16 bits.
  at::Tensor weight_sum(int64_t v, int64_t width, at::Tensor& grad_weight) {
    if (sums_.weight.defined()) return sums_.weight.narrow(0, v, width);
    if (!problem_.converts()) return grad_weight.narrow(0, v, width).zero_();
    if (!sum_buffer_.defined()) sum_buffer_ = at::empty({width, problem_.hidden_size()}, problem_.compute());
    return sum_buffer_.narrow(0, 0, width).zero_();
  }

  // dL/d(h.w_j) of a tile: retained rows are scaled, the others computed again.
  at::Tensor scaled_operand(const at::Tensor& hidden, const at::Tensor& weight, int64_t begin, int64_t v) {
    const int64_t size = hidden.size(0), width = weight.size(0);
    const int64_t kept = std::clamp<int64_t>(retained_.size(0) - begin, 0, size);
    // The first block and chunk are the largest.
    if (!tile_buffer_.defined()) tile_buffer_ = at::empty({size * width}, problem_.compute());
    at::Tensor tile = tile_buffer_.narrow(0, 0, size * width).view({size, width});
    if (kept > 0) tile.narrow(0, 0, kept).copy_(retained_.narrow(0, begin, kept).narrow(1, v, width));
    if (kept < size) {
      at::Tensor rest = tile.narrow(0, kept, size - kept);
      at::mm_out(rest, hidden.narrow(0, kept, size - kept), weight.t());
    }
    const auto recompute = operand_of(T());
    at::parallel_for(0, size, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const RowCoefficients& c = coefficients_[begin + i];
        const T of_operand = static_cast<T>(c.of_operand), of_target = static_cast<T>(c.of_target);
        const Row<T> row = problem_.row(tile.mutable_data_ptr<T>() + i * width, begin + i, v, width);
        if (i >= kept) {
          recompute(row, static_cast<T>(c.exponent), of_operand, of_target);
          continue;
        }
        for (int64_t j = 0; j < width; ++j) row.values[j] *= of_operand;
        if (row.target >= 0 && row.target < width) row.values[row.target] = of_target;
      }
    });
    return tile;
  }

  const Problem<T>& problem_;
  const at::Tensor& retained_;
  const Sums& sums_;
  const std::vector<RowCoefficients> coefficients_;
  at::Tensor hidden_buffer_, weight_buffer_, sum_buffer_, tile_buffer_;
};

template <typename T>
BackwardResult backward(const Problem<T>& problem, const at::Tensor& grad_logps, const at::Tensor& row_state,
                        const at::Tensor& direction, const at::Tensor& retained, const Sums& sums, bool need_hidden,
                        bool need_weight, bool need_bias, at::ScalarType bias_type) {
  const auto options = problem.hidden.options();
  at::Tensor grad_hidden = at::empty({need_hidden ? problem.hidden.size(0) : 0, problem.hidden_size()}, options);
  const bool return_weight = need_weight && !sums.weight.defined();
  const bool return_bias = need_bias && !sums.bias.defined();
  at::Tensor grad_weight = at::empty({return_weight ? problem.vocabulary() : 0, problem.hidden_size()}, options);
  at::Tensor grad_bias = at::empty({return_bias ? problem.vocabulary() : 0}, options.dtype(bias_type));
  if (need_hidden) at::mul_out(grad_hidden, direction, grad_logps.unsqueeze(1));
  if (need_weight || need_bias) {
    WeightGradient<T> gradient(problem, retained, sums, row_coefficients(problem, grad_logps, row_state));
    at::Tensor weight_result = need_weight ? grad_weight : at::Tensor();
    at::Tensor bias_result = need_bias ? grad_bias : at::Tensor();
    for (int64_t v = 0; v < problem.vocabulary(); v += problem.tiles.chunk) {
      gradient.run(v, std::min(problem.tiles.chunk, problem.vocabulary() - v), weight_result, bias_result);
    }
  }
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace

BackwardResult token_logps_backward(const at::Tensor& grad_logps, const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                    const at::Tensor& row_state, const at::Tensor& direction,
                                    const at::Tensor& retained, const std::optional<at::Tensor>& weight_sum,
                                    const std::optional<at::Tensor>& bias_sum, int64_t ignore_index, int64_t num_scored,
                                    double logit_scale, double softcap, double temperature, bool need_hidden,
                                    bool need_weight, bool need_bias) {
  return with_compute_type(hidden, [&](auto compute) {
    using T = decltype(compute);
    const auto problem =
        make_problem<T>(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
    const int64_t n = hidden.size(0);
    TORCH_CHECK(grad_logps.sizes() == targets.sizes() && grad_logps.scalar_type() == kComputeType<T> &&
                    row_state.dim() == 2 && row_state.size(0) == kRowStates && row_state.size(1) == n &&
                    row_state.scalar_type() == kComputeType<T> && row_state.is_contiguous(),
                "grad_logps and row_state should be as the forward returned them");
    TORCH_CHECK(!need_hidden || direction.sizes() == hidden.sizes(),
                "direction should be [N, H] for hidden's gradient");
    TORCH_CHECK(retained.dim() == 2 && retained.size(1) == weight.size(0), "retained should be [R, V]");
    const auto check_sum = [](const char* name, const at::Tensor& sum, bool needed, at::IntArrayRef shape) {
      TORCH_CHECK(needed && sum.sizes() == shape && sum.scalar_type() == kComputeType<T> && sum.is_contiguous(), name,
                  " should be a contiguous ", kComputeType<T>, " tensor of shape ", shape, ", given only where that ",
                  "gradient is needed; it is a ", sum.scalar_type(), " tensor of shape ", sum.sizes());
    };
    if (weight_sum.has_value()) check_sum("weight_sum", *weight_sum, need_weight, weight.sizes());
    if (bias_sum.has_value()) check_sum("bias_sum", *bias_sum, need_bias, {weight.size(0)});
    const Sums sums{weight_sum.value_or(at::Tensor()), bias_sum.value_or(at::Tensor())};
    return backward(problem, grad_logps.contiguous(), row_state, direction, retained, sums, need_hidden, need_weight,
                    need_bias, bias.has_value() ? bias->scalar_type() : hidden.scalar_type());
  });
}

}  // namespace fastdpo::cpu
