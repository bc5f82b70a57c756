// token_logps_forward over at::mm: each block of tokens visits the vocabulary once (the arithmetic: ../fastdpo.h).
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

#include <vector>

#include "mm.h"

namespace fastdpo::cpu {
namespace {

auto accumulate_of(float) { return row_kernels().accumulate_f32; }
auto accumulate_of(double) { return row_kernels().accumulate_f64; }

// Multiplies what was formed with a row's old exponent: its direction's sum and its retained columns [0, columns).
// In float64, for the factor may be less than any float32.
template <typename T>
void shrink_row(double factor, T* direction_sum, int64_t hidden_size, const at::Tensor& retained_row, int64_t columns) {
  if (direction_sum != nullptr) {
    for (int64_t k = 0; k < hidden_size; ++k) direction_sum[k] = static_cast<T>(direction_sum[k] * factor);
  }
  if (retained_row.defined() && columns > 0) {
    const at::Tensor earlier = retained_row.narrow(0, 0, columns);
    earlier.copy_(earlier.to(at::kDouble).mul_(factor));
  }
}

// One block of tokens after another against the whole vocabulary.
template <typename T>
class Forward {
 public:
  Forward(const Problem<T>& problem, Results<T>& results) : problem_(problem), results_(results) {}

  // Scored rows [begin, end).
  void run(int64_t begin, int64_t end) {
    const int64_t size = end - begin;
    const at::Tensor hidden = problem_.hidden_block(begin, end, hidden_buffer_);
    at::Tensor sum;
    if (results_.direction.numel() > 0) sum = direction_sum(begin, size);
    const int64_t retain = std::clamp<int64_t>(results_.retained.size(0) - begin, 0, size);
    start(begin, size);
    for (int64_t v = 0; v < problem_.vocabulary(); v += problem_.tiles.chunk) {
      const int64_t width = std::min(problem_.tiles.chunk, problem_.vocabulary() - v);
      const at::Tensor weight = problem_.weight_chunk(v, v + width, weight_buffer_);
      at::Tensor logits = tile(size, width);
      at::mm_out(logits, hidden, weight.t());
      accumulate(logits, begin, v, sum, retain);  // logits become the gradient operand
      if (retain > 0) results_.retained.narrow(0, begin, retain).narrow(1, v, width).copy_(logits.narrow(0, 0, retain));
      if (sum.defined()) at::addmm_out(sum, sum, logits, weight);
    }
    finish(begin, sum);
  }

 private:
  // Where the direction's sums grow: in the result itself unless rows were dropped.
  at::Tensor direction_sum(int64_t begin, int64_t size) {
    if (!problem_.drops()) return results_.direction.narrow(0, begin, size);
    if (!sum_buffer_.defined()) {
      sum_buffer_ =
          at::empty({std::min(problem_.tiles.block, problem_.count()), problem_.hidden_size()}, problem_.compute());
    }
    return sum_buffer_.narrow(0, 0, size).zero_();
  }

  // A contiguous [size, width] view of the one logits buffer; the first block and chunk are the largest.
  at::Tensor tile(int64_t size, int64_t width) {
    if (!logits_buffer_.defined()) logits_buffer_ = at::empty({size * width}, problem_.compute());
    return logits_buffer_.narrow(0, 0, size * width).view({size, width});
  }

  void start(int64_t begin, int64_t size) {
    sums_.resize(size);
    at::parallel_for(0, size, kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        sums_[i] = start_row(problem_, begin + i);
      }
    });
  }

  void accumulate(at::Tensor& logits, int64_t begin, int64_t v, at::Tensor& sum, int64_t retain) {
    const int64_t width = logits.size(1);
    const auto kernel = accumulate_of(T());
    at::parallel_for(0, logits.size(0), kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const RowOutputs outputs{sum.defined() || i < retain, results_.entropy.numel() > 0,
                                 results_.log_sum_sq_probs.numel() > 0, results_.mean_logits.numel() > 0};
        const Row<T> row = problem_.row(logits.mutable_data_ptr<T>() + i * width, begin + i, v, width);
        const double factor = kernel(row, outputs, sums_[i]);
        if (factor != 1) {
          shrink_row(factor, sum.defined() ? sum.mutable_data_ptr<T>() + i * problem_.hidden_size() : nullptr,
                     problem_.hidden_size(), i < retain ? results_.retained.select(0, begin + i) : at::Tensor(), v);
        }
      }
    });
  }

  void finish(int64_t begin, const at::Tensor& sum) {
    const int64_t width = problem_.hidden_size();
    at::parallel_for(0, static_cast<int64_t>(sums_.size()), kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        results_.write(problem_, begin + i, sums_[i]);
        if (sum.defined()) {
          T* direction = results_.direction.template mutable_data_ptr<T>() + problem_.rows()[begin + i] * width;
          finish_direction(problem_, begin + i, sums_[i], sum.const_data_ptr<T>() + i * width, direction);
        }
      }
    });
  }

  const Problem<T>& problem_;
  Results<T>& results_;
  std::vector<RowSums<double>> sums_;
  at::Tensor hidden_buffer_, weight_buffer_, sum_buffer_, logits_buffer_;
};

}  // namespace

template <typename T>
void mm_forward(const Problem<T>& problem, Results<T>& results) {
  // Rows past the scored ones are never read; they are set so that a call's results are a function of its inputs.
  const int64_t retain = results.retained.size(0), used = std::min(retain, problem.count());
  results.retained.narrow(0, used, retain - used).zero_();
  Forward<T> blocks(problem, results);
  for (int64_t begin = 0; begin < problem.count(); begin += problem.tiles.block) {
    blocks.run(begin, std::min(begin + problem.tiles.block, problem.count()));
  }
}

template void mm_forward<float>(const Problem<float>&, Results<float>&);
template void mm_forward<double>(const Problem<double>&, Results<double>&);

}  // namespace fastdpo::cpu
