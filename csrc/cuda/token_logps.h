// The two ops of csrc/fastdpo.h for tensors on one CUDA device (forward.cpp, backward.cpp). Argument names and meanings
// are the schemas'.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace fastdpo::cuda {

using torch::stable::Tensor;

using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;

ForwardResult token_logps_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                  const std::optional<Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                                  double logit_scale, double softcap, double temperature, bool need_direction,
                                  int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits,
                                  bool top_gap);

BackwardResult token_logps_backward(const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& targets, const std::optional<Tensor>& bias, const Tensor& row_state,
                                    const Tensor& direction, const Tensor& retained,
                                    const std::optional<Tensor>& weight_sum, const std::optional<Tensor>& bias_sum,
                                    int64_t ignore_index, int64_t num_scored, double logit_scale, double softcap,
                                    double temperature, bool need_hidden, bool need_weight, bool need_bias);

}  // namespace fastdpo::cuda
