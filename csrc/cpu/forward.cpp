// token_logps_forward over at::mm: each block of tokens visits the vocabulary once (the arithmetic: ../fastdpo.h).
#include <ATen/Parallel.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "problem.h"
#include "token_logps.h"

namespace fastdpo::cpu {
namespace {

auto accumulate_of(float) { return row_kernels().accumulate_f32; }
auto accumulate_of(double) { return row_kernels().accumulate_f64; }

// h . w_y, summed in float64: the reference exponent is the one number that every term depends on.
template <typename T, typename W>
double target_product(const T* hidden_row, const W* weight_row, int64_t size) {
  double total = 0;
  for (int64_t k = 0; k < size; ++k) total += static_cast<double>(hidden_row[k]) * static_cast<double>(weight_row[k]);
  return total;
}

template <typename T>
RowSums<double> start_row(const Problem<T>& problem, int64_t i, const T* hidden_row) {
  const int64_t y = problem.target(i);
  const double product = with_weight_row(problem.weight, y, [&](const auto* weight_row) {
    return target_product(hidden_row, weight_row, problem.hidden_size());
  });
  const LogitTransform<double> transform{problem.transform.scale, problem.transform.softcap,
                                         problem.transform.inv_temperature};
  const double bias = problem.bias.defined() ? problem.bias.template const_data_ptr<T>()[y] : 0;
  // Rounded to the compute type, in which the differences z_j - k are formed.
  return RowSums<double>::start(static_cast<T>(transform.logit(product + bias)));
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
  at::Tensor logps, row_state, direction, retained, entropy, log_sum_sq_probs, mean_logits, is_top1;

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
    if (is_top1.numel() > 0) is_top1.mutable_data_ptr<bool>()[t] = result.is_top1;
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
  with_weight_row(problem.weight, problem.target(i), [&](const auto* weight_row) {
    for (int64_t k = 0; k < problem.hidden_size(); ++k) {
      direction[k] = of_target * static_cast<T>(weight_row[k]) - of_sum * sum[k];
    }
  });
}

// Multiplies what was formed with a row's old exponent: its direction's sum and its retained columns [0, columns).
template <typename T>
void shrink_row(double factor, T* direction_sum, int64_t hidden_size, const at::Tensor& retained_row, int64_t columns) {
  if (direction_sum != nullptr) {
    for (int64_t k = 0; k < hidden_size; ++k) direction_sum[k] *= static_cast<T>(factor);
  }
  if (retained_row.defined() && columns > 0) retained_row.narrow(0, 0, columns).mul_(factor);
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
    start(hidden, begin);
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

  void start(const at::Tensor& hidden, int64_t begin) {
    sums_.resize(hidden.size(0));
    at::parallel_for(0, hidden.size(0), kRowGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        sums_[i] = start_row(problem_, begin + i, hidden.const_data_ptr<T>() + i * problem_.hidden_size());
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

template <typename T>
ForwardResult forward(const Problem<T>& problem, at::ScalarType operand_type, bool need_direction, int64_t retain_bytes,
                      bool entropy, bool log_sum_sq_probs, bool mean_logits, bool is_top1) {
  const int64_t n = problem.hidden.size(0);
  const auto options = problem.compute();
  const int64_t row_bytes = problem.vocabulary() * static_cast<int64_t>(at::elementSize(operand_type));
  const int64_t retain = std::min(n, std::max<int64_t>(retain_bytes, 0) / row_bytes);
  const auto per_row = [&](bool wanted) { return at::zeros({wanted ? n : 0}, options); };
  Results<T> results{
      per_row(true),
      at::zeros({kRowStates, n}, options),
      at::zeros({need_direction ? n : 0, problem.hidden_size()}, options),
      at::empty({retain, problem.vocabulary()}, options.dtype(operand_type)),
      per_row(entropy),
      per_row(log_sum_sq_probs),
      per_row(mean_logits),
      at::zeros({is_top1 ? n : 0}, options.dtype(at::kBool)),
  };
  results.row_state.select(0, kRowNorm).fill_(1);  // what ignored rows keep
  // Rows past the scored ones are never read; they are set so that a call's results are a function of its inputs.
  const int64_t used = std::min(retain, problem.count());
  results.retained.narrow(0, used, retain - used).zero_();
  Forward<T> blocks(problem, results);
  for (int64_t begin = 0; begin < problem.count(); begin += problem.tiles.block) {
    blocks.run(begin, std::min(begin + problem.tiles.block, problem.count()));
  }
  return {results.logps,   results.row_state,        results.direction,   results.retained,
          results.entropy, results.log_sum_sq_probs, results.mean_logits, results.is_top1};
}

}  // namespace

ForwardResult token_logps_forward(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                  const std::optional<at::Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                                  double logit_scale, double softcap, double temperature, bool need_direction,
                                  int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits,
                                  bool is_top1) {
  return with_compute_type(hidden, [&](auto compute) {
    const auto problem = make_problem<decltype(compute)>(hidden, weight, targets, bias, ignore_index, num_scored,
                                                         logit_scale, softcap, temperature);
    const at::ScalarType operand_type = hidden.scalar_type() == at::kHalf ? at::kFloat : hidden.scalar_type();
    return forward(problem, operand_type, need_direction, retain_bytes, entropy, log_sum_sq_probs, mean_logits,
                   is_top1);
  });
}

}  // namespace fastdpo::cpu
