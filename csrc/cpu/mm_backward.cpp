// token_logps_backward over at::mm: hidden's gradient is the forward's direction, scaled; the weight's is computed for
// one chunk of the vocabulary after another, over all tokens, from retained exponentials or from products made again.
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "mm.h"

namespace fastdpo::cpu {
namespace {

auto operand_of(float) { return row_kernels().operand_f32; }
auto operand_of(double) { return row_kernels().operand_f64; }

// Gradients of one chunk of the vocabulary at a time, summed over all tokens in the compute type and rounded once.
template <typename T>
class WeightGradient {
 public:
  WeightGradient(const Problem<T>& problem, const at::Tensor& retained,
                 const std::vector<RowCoefficients>& coefficients, const Gradients& gradients)
      : problem_(problem), retained_(retained), coefficients_(coefficients), gradients_(gradients) {}

  // Entries [v, v + width).
  void run(int64_t v, int64_t width) {
    const at::Tensor weight = problem_.weight_chunk(v, v + width, weight_buffer_);
    at::Tensor sum, bias_sum;
    if (gradients_.weight.defined()) sum = weight_sum(v, width);
    if (gradients_.bias.defined()) {
      bias_sum = gradients_.adds_to_bias ? gradients_.bias.narrow(0, v, width) : at::zeros({width}, problem_.compute());
    }
    for (int64_t begin = 0; begin < problem_.count(); begin += problem_.tiles.block) {
      const int64_t size = std::min(problem_.tiles.block, problem_.count() - begin);
      const at::Tensor hidden = problem_.hidden_block(begin, begin + size, hidden_buffer_);
      const at::Tensor operand = scaled_operand(hidden, weight, begin, v);
      if (sum.defined()) at::addmm_out(sum, sum, operand.t(), hidden);
      if (bias_sum.defined()) bias_sum.add_(at::sum(operand, {0}));
    }
    if (sum.defined() && !gradients_.adds_to_weight && problem_.converts()) {
      gradients_.weight.narrow(0, v, width).copy_(sum);
    }
    if (bias_sum.defined() && !gradients_.adds_to_bias) gradients_.bias.narrow(0, v, width).copy_(bias_sum);
  }

 private:
  // Where a chunk's gradient grows: in the caller's sum, or in the result itself unless that has 16 bits.
  at::Tensor weight_sum(int64_t v, int64_t width) {
    if (gradients_.adds_to_weight) return gradients_.weight.narrow(0, v, width);
    if (!problem_.converts()) return gradients_.weight.narrow(0, v, width).zero_();
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
  const std::vector<RowCoefficients>& coefficients_;
  const Gradients& gradients_;
  at::Tensor hidden_buffer_, weight_buffer_, sum_buffer_, tile_buffer_;
};

}  // namespace

template <typename T>
void mm_weight_gradient(const Problem<T>& problem, const at::Tensor& retained,
                        const std::vector<RowCoefficients>& coefficients, const Gradients& gradients) {
  WeightGradient<T> gradient(problem, retained, coefficients, gradients);
  for (int64_t v = 0; v < problem.vocabulary(); v += problem.tiles.chunk) {
    gradient.run(v, std::min(problem.tiles.chunk, problem.vocabulary() - v));
  }
}

template void mm_weight_gradient<float>(const Problem<float>&, const at::Tensor&, const std::vector<RowCoefficients>&,
                                        const Gradients&);
template void mm_weight_gradient<double>(const Problem<double>&, const at::Tensor&, const std::vector<RowCoefficients>&,
                                         const Gradients&);

}  // namespace fastdpo::cpu
