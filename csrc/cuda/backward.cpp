// The backward op. hidden's gradient is the forward's direction, scaled. Those of weight and bias, for each chunk of
// the vocabulary:
//
//   for rows whose operand was not retained, a block at a time:
//     backward_chunk   operand
//   multiply           grad_weight = operand^T * scaled hidden
//                        or weight_sum += the same
//
// What backward_chunk is depends on the level (chunk.h), as in the forward.
#include <algorithm>

#include "../fastdpo.h"
#include "head_gradients.h"
#include "row_list.h"
#include "runtime.h"
#include "token_logps.h"
#include "workspace.h"

namespace fastdpo::cuda {
namespace {

// Rows of the list from `kept` on, whose operand is made again: side by side, where the inputs have them so, or copied.
class RecomputedRows {
 public:
  RecomputedRows(const Inputs& in, const RowList& rows, const Tensor& row_state, int64_t kept)
      : in_(in), rows_(rows), row_state_(static_cast<const char*>(row_state.data_ptr())), kept_(kept) {
    const char* exponents = row_state_ + kRowExponent * in.positions * in.compute_bytes();
    hidden_ = in.hidden_row(kept);
    targets_ = in.targets + kept;
    exponents_ = exponents + kept * in.compute_bytes();
    if (count() == 0 || !rows.listed()) return;
    const int64_t* positions = rows.from(kept);
    hidden_copy_ = in.empty({count(), in.hidden_units}, in.type);
    targets_copy_ = in.empty({count()}, ScalarType::Long);
    exponents_copy_ = in.empty({count()}, in.compute());
    gather_rows(in.hidden_data, positions, count(), in.hidden_bytes(), hidden_copy_.data_ptr(), in.stream);
    gather_rows(in.targets, positions, count(), sizeof(int64_t), targets_copy_.data_ptr(), in.stream);
    gather_rows(exponents, positions, count(), in.compute_bytes(), exponents_copy_.data_ptr(), in.stream);
    hidden_ = static_cast<const char*>(hidden_copy_.data_ptr());
    targets_ = static_cast<const int64_t*>(targets_copy_.data_ptr());
    exponents_ = static_cast<const char*>(exponents_copy_.data_ptr());
  }

  int64_t count() const { return rows_.count - kept_; }
  const void* hidden() const { return hidden_; }

  // The operand of `rows` rows from the first-th on and the chunk at `column`, in the workspace.
  RowOperand operand(const Workspace& space, int64_t first, int64_t column) const {
    const BlockRows block{.count = std::min(space.rows, count() - first),
                          .hidden = hidden_ + first * in_.hidden_bytes(),
                          .targets = targets_ + first};
    const int64_t row = kept_ + first;
    // Without a list of rows, row i of the block is position row + i of row_state.
    const int64_t position = rows_.listed() ? 0 : row;
    const ChunkArguments chunk = space.chunk(in_, block, column);
    backward_chunk(chunk, rows_.from(row), row_state_ + position * in_.compute_bytes(), in_.positions,
                   exponents_ + first * in_.compute_bytes(), in_.stream);
    return {.data = chunk.rows.operand, .stride = chunk.rows.operand_stride, .first = row, .count = block.count};
  }

 private:
  const Inputs& in_;
  const RowList& rows_;
  const char* row_state_;
  int64_t kept_;
  const char* hidden_;
  const int64_t* targets_;
  const char* exponents_;
  Tensor hidden_copy_;
  Tensor targets_copy_;
  Tensor exponents_copy_;
};

// The retained rows' operand, which holds those of the list that come first.
RowOperand kept_operand(const Inputs& in, const Tensor& retained, int64_t kept, int64_t column) {
  return {.data = static_cast<const char*>(retained.data_ptr()) + column * in.operand_bytes(),
          .stride = in.vocabulary,
          .first = 0,
          .count = kept};
}

void add_rows(const Inputs& in, const RowList& rows, const Tensor& row_state, const Tensor& retained,
              HeadGradients& gradients) {
  const int64_t kept = std::min(retained.size(0), rows.count);
  const RecomputedRows recomputed(in, rows, row_state, kept);
  const bool recomputes = recomputed.count() > 0;
  const auto products = [&](int64_t block_rows) {
    return (kept > 0 ? 1 : 0) + (recomputed.count() + block_rows - 1) / block_rows;
  };
  const Workspace space =
      make_workspace(in, {.pass = Pass::kWeight,
                          .level = level_of(in, recomputed.hidden(), true, false, false),
                          .extras = false,
                          .rows = recomputes ? recomputed.count() : kept,
                          .logits = recomputes,
                          .operand = recomputes,
                          .retained = false,
                          .row_bytes = 0,
                          .column_bytes = [&](int64_t rows) { return gradients.column_bytes(products(rows)); }});
  gradients.make_sums(space.columns, products(space.rows));
  for (int64_t column = 0; column < in.vocabulary; column += space.columns) {
    const Columns columns{column, std::min(space.columns, in.vocabulary - column)};
    if (kept > 0) gradients.add(columns, kept_operand(in, retained, kept, column), false);
    for (int64_t first = 0; first < recomputed.count(); first += space.rows) {
      gradients.add(columns, recomputed.operand(space, first, column), kept > 0 || first > 0);
    }
    gradients.finish(columns);
  }
  gradients.finish();
}

}  // namespace

BackwardResult token_logps_backward(const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight,
                                    const Tensor& targets, const std::optional<Tensor>& bias, const Tensor& row_state,
                                    const Tensor& direction, const Tensor& retained,
                                    const std::optional<Tensor>& weight_sum, const std::optional<Tensor>& bias_sum,
                                    int64_t ignore_index, int64_t num_scored, double logit_scale, double softcap,
                                    double temperature, bool need_hidden, bool need_weight, bool need_bias) {
  const DeviceScope device(hidden.get_device_index());
  const Inputs in =
      check_inputs(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
  const int64_t n = in.positions;
  const ScalarType compute = scalar_type(in.compute());
  check_tensor("grad_logps", grad_logps, {n}, compute, hidden);
  check_tensor("row_state", row_state, {kRowStates, n}, compute, hidden);
  STD_TORCH_CHECK(retained.dim() == 2 && retained.size(0) <= n, "`retained` has shape ", shape_text(retained),
                  ", but must have [R, V] with R <= N = ", n);
  check_tensor("retained", retained, {retained.size(0), in.vocabulary}, scalar_type(in.operand()), hidden);
  if (need_hidden) check_tensor("direction", direction, {n, in.hidden_units}, compute, hidden);
  STD_TORCH_CHECK(!need_bias || bias.has_value(), "`need_bias` is true, but there is no `bias`");
  STD_TORCH_CHECK(need_weight || !weight_sum.has_value(), "`weight_sum` is given, but `need_weight` is false");
  STD_TORCH_CHECK(need_bias || !bias_sum.has_value(), "`bias_sum` is given, but `need_bias` is false");
  if (weight_sum.has_value()) {
    check_tensor("weight_sum", *weight_sum, {in.vocabulary, in.hidden_units}, compute, hidden);
  }
  if (bias_sum.has_value()) check_tensor("bias_sum", *bias_sum, {in.vocabulary}, compute, hidden);

  const Tensor grad_hidden = in.empty({need_hidden ? n : 0, in.hidden_units}, in.type);
  HeadGradients gradients(in, need_weight, need_bias, weight_sum, bias_sum);
  if (need_hidden && n > 0) {
    scale_direction(in.type, grad_logps.data_ptr(), direction.data_ptr(), in.targets, ignore_index, n, in.hidden_units,
                    grad_hidden.data_ptr(), in.stream);
  }
  if (need_weight || need_bias) {
    const RowList rows = find_scored_rows(in);
    if (rows.count == 0) {
      gradients.set_to_zero();
    } else {
      gradients.scale(rows, grad_logps, row_state);
      add_rows(in, rows, row_state, retained, gradients);
    }
  }
  return {grad_hidden, gradients.weight(), gradients.bias()};
}

}  // namespace fastdpo::cuda
