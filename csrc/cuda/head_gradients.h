// The gradients of weight and bias: where their sums are formed, in which type, and how rows add to them.
#pragma once

#include <cstdint>
#include <optional>

#include "inputs.h"
#include "row_list.h"

namespace fastdpo::cuda {

// Entries [first, first + count) of the vocabulary.
struct Columns {
  int64_t first;
  int64_t count;
};

// The gradient operand of rows [first, first + count) of the list and some columns, in the operand type.
struct RowOperand {
  const void* data;
  int64_t stride;
  int64_t first;
  int64_t count;
};

class HeadGradients {
 public:
  // Makes room for the results. weight_sum and bias_sum are the schema's: what is there is added to, not rounded.
  HeadGradients(const Inputs& in, bool need_weight, bool need_bias, const std::optional<Tensor>& weight_sum,
                const std::optional<Tensor>& bias_sum);

  const Tensor& weight() const { return grad_weight_; }
  const Tensor& bias() const { return grad_bias_; }

  // Where no row is scored.
  void set_to_zero();

  // The scored rows of hidden and their coefficients, as the products read them: once for all chunks, at the price of
  // N x H numbers of the operand's type.
  void scale(const RowList& rows, const Tensor& grad_logps, const Tensor& row_state);

  // What a column's sums take up in scratch memory if so many products of a chunk add to them.
  int64_t column_bytes(int64_t products) const;
  // Makes room for the sums of chunks of so many columns.
  void make_sums(int64_t columns, int64_t products);

  // Adds operand^T * scaled rows. `begun` says whether an earlier product has left a sum of these columns.
  void add(const Columns& columns, const RowOperand& operand, bool begun);
  // All rows of these columns have been added.
  void finish(const Columns& columns);
  // All columns have.
  void finish();

 private:
  // Sums over several products are kept in the compute type; a single product rounds its own sum once as it leaves.
  bool sums_in_place(int64_t products) const;

  const Inputs& in_;
  const bool need_weight_;
  const bool need_bias_;
  const bool adds_weight_;
  const bool adds_bias_;
  Tensor grad_weight_;  // [V, H], or [0, H] where it is not a result
  Tensor grad_bias_;    // [V], or [0]
  char* weight_grad_;   // of weight_grad_type_
  char* bias_grad_;     // of the compute type
  Type weight_grad_type_;
  bool bias_in_place_;
  bool in_place_ = false;
  Tensor scaled_;          // [rows, H]
  Tensor coefficients_;    // [rows]
  Tensor chunk_sum_;       // [columns of a chunk, H]; [0, H] where the sum is formed in place
  Tensor whole_bias_sum_;  // [V], or [0] likewise
};

}  // namespace fastdpo::cuda
