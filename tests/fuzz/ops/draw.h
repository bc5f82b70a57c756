// A call of the ops, drawn from a fuzzer's bytes.
#pragma once

#include <ATen/ATen.h>
#include <fuzzer/FuzzedDataProvider.h>

#include <optional>

namespace fastdpo::fuzz {

// All that both ops are given, and what is asked of them.
struct Drawn {
  at::Tensor hidden, weight, targets;
  std::optional<at::Tensor> bias;
  int64_t ignore_index, num_scored;
  double scale, softcap, temperature;
  bool need_hidden, need_weight, need_bias;
  int64_t retain_bytes;
  bool entropy, log_sum_sq_probs, mean_logits, top_gap;
  at::Tensor grad_logps;
  std::optional<at::Tensor> weight_sum, bias_sum;
  int threads;
  bool misused;  // something is wrong with it on purpose: it may be refused, and nothing else is asked
};

Drawn draw(FuzzedDataProvider& bytes);

// Something wrong with what the backward gets of the forward.
void spoil_state(FuzzedDataProvider& bytes, at::Tensor& row_state, at::Tensor& direction, at::Tensor& retained,
                 at::Tensor& grad_logps);

}  // namespace fastdpo::fuzz
