// The two ops for CPU tensors; the contract is in ../fastdpo.h.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace fastdpo::cpu {

using ForwardResult =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using BackwardResult = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

ForwardResult token_logps_forward(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                                  const std::optional<at::Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                                  double logit_scale, double softcap, double temperature, bool need_direction,
                                  int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits,
                                  bool top_gap);

BackwardResult token_logps_backward(const at::Tensor& grad_logps, const at::Tensor& hidden, const at::Tensor& weight,
                                    const at::Tensor& targets, const std::optional<at::Tensor>& bias,
                                    const at::Tensor& row_state, const at::Tensor& direction,
                                    const at::Tensor& retained, const std::optional<at::Tensor>& weight_sum,
                                    const std::optional<at::Tensor>& bias_sum, int64_t ignore_index, int64_t num_scored,
                                    double logit_scale, double softcap, double temperature, bool need_hidden,
                                    bool need_weight, bool need_bias);

}  // namespace fastdpo::cpu
