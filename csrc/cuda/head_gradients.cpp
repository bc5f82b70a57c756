#include "head_gradients.h"

#include <torch/csrc/stable/ops.h>

#include "products.h"

namespace fastdpo::cuda {

HeadGradients::HeadGradients(const Inputs& in, bool need_weight, bool need_bias,
                             const std::optional<Tensor>& weight_sum, const std::optional<Tensor>& bias_sum)
    : in_(in),
      need_weight_(need_weight),
      need_bias_(need_bias),
      adds_weight_(weight_sum.has_value()),
      adds_bias_(bias_sum.has_value()),
      grad_weight_(in.empty({need_weight && !adds_weight_ ? in.vocabulary : 0, in.hidden_units}, in.type)),
      grad_bias_(in.empty({need_bias && !adds_bias_ ? in.vocabulary : 0}, in.bias_type)),
      weight_grad_(static_cast<char*>((adds_weight_ ? *weight_sum : grad_weight_).data_ptr())),
      bias_grad_(static_cast<char*>((adds_bias_ ? *bias_sum : grad_bias_).data_ptr())),
      weight_grad_type_(adds_weight_ ? in.compute() : in.type),
      bias_in_place_(adds_bias_ || in.bias_type == in.compute()) {}

void HeadGradients::set_to_zero() {
  torch::stable::zero_(grad_weight_);
  torch::stable::zero_(grad_bias_);
}

void HeadGradients::scale(const RowList& rows, const Tensor& grad_logps, const Tensor& row_state) {
  scaled_ = in_.empty({need_weight_ ? rows.count : 0, in_.hidden_units}, in_.operand());
  coefficients_ = in_.empty({need_bias_ ? rows.count : 0}, in_.operand());
  scale_rows({.type = in_.type,
              .grad_logps = grad_logps.data_ptr(),
              .hidden = in_.hidden_data,
              .targets = in_.targets,
              .rows = rows.positions,
              .row_state = row_state.data_ptr(),
              .count = rows.count,
              .positions = in_.positions,
              .hidden_units = in_.hidden_units,
              .ignore_index = in_.ignore_index,
              .slope = in_.transform.scale * in_.transform.inv_temperature,
              .scaled = need_weight_ ? scaled_.data_ptr() : nullptr,
              .coefficients = need_bias_ ? coefficients_.data_ptr() : nullptr},
             in_.stream);
}

bool HeadGradients::sums_in_place(int64_t products) const {
  return adds_weight_ || in_.type == in_.compute() || (products == 1 && in_.operand() == in_.type);
}

int64_t HeadGradients::column_bytes(int64_t products) const {
  return need_weight_ && !sums_in_place(products) ? in_.hidden_units * in_.compute_bytes() : 0;
}

void HeadGradients::make_sums(int64_t columns, int64_t products) {
  in_place_ = sums_in_place(products);
  chunk_sum_ = in_.empty({need_weight_ && !in_place_ ? columns : 0, in_.hidden_units}, in_.compute());
  whole_bias_sum_ = in_.empty({need_bias_ && !bias_in_place_ ? in_.vocabulary : 0}, in_.compute());
  if (!bias_in_place_) bias_grad_ = static_cast<char*>(whole_bias_sum_.data_ptr());
}

void HeadGradients::add(const Columns& columns, const RowOperand& operand, bool begun) {
  const int64_t operand_bytes = in_.operand_bytes();
  char* chunk_grad = weight_grad_ + columns.first * in_.hidden_units * size_of(weight_grad_type_);
  Product product{.rows = columns.count,
                  .columns = in_.hidden_units,
                  .depth = operand.count,
                  .operands = in_.operand(),
                  .a = {operand.data, operand.stride, true},
                  .b = {static_cast<const char*>(scaled_.data_ptr()) + operand.first * in_.hidden_units * operand_bytes,
                        in_.hidden_units, false},
                  .out = in_place_ ? chunk_grad : chunk_sum_.data_ptr(),
                  .out_stride = in_.hidden_units,
                  .out_type = in_place_ ? weight_grad_type_ : in_.compute(),
                  .accumulate = adds_weight_ || begun,
                  .tensor_float32 = in_.weight_needs_cast()};
  if (need_weight_) multiply(product);
  if (need_bias_) {
    product.columns = 1;
    product.b = {static_cast<const char*>(coefficients_.data_ptr()) + operand.first * operand_bytes, 1, false};
    product.out = bias_grad_ + columns.first * in_.compute_bytes();
    product.out_stride = 1;
    product.out_type = in_.compute();
    product.accumulate = adds_bias_ || begun;
    multiply(product);
  }
}

void HeadGradients::finish(const Columns& columns) {
  if (!need_weight_ || in_place_) return;
  convert(chunk_sum_.data_ptr(), in_.compute(),
          weight_grad_ + columns.first * in_.hidden_units * size_of(weight_grad_type_), in_.type,
          columns.count * in_.hidden_units, in_.stream);
}

void HeadGradients::finish() {
  if (!need_bias_ || bias_in_place_) return;
  convert(whole_bias_sum_.data_ptr(), in_.compute(), grad_bias_.data_ptr(), in_.bias_type, in_.vocabulary, in_.stream);
}

}  // namespace fastdpo::cuda
