// Elementwise work on one row of logits, vectorised: the interface.
//
// The kernels are compiled once per instruction set (row_kernels_*.cpp, one source: row_kernels_impl.h); this header
// is all that the rest of the CPU back end sees of them.
#pragma once

#include <cstdint>

#include "../fastdpo.h"

namespace fastdpo::cpu {

// A row of products h.w_j for the entries [first, first + size) of the vocabulary, and what is to be made of it.
template <typename T>
struct Row {
  T* values;      // [size], contiguous; in: products; out: see the functions below
  const T* bias;  // [size], or null
  int64_t size;
  int64_t target;  // column of the target within the row, or a number outside [0, size)
  LogitTransform<T> transform;
};

// Which sums beyond the norm a row has to keep.
struct RowOutputs {
  bool operand;  // leave the gradient operand in values; else their content is not defined
  bool entropy;
  bool log_sum_sq_probs;
  bool mean_logits;
};

// One set of kernels, all of the same instruction set.
struct RowKernels {
  // Adds the row to sums, raising their exponent where an entry asks for it; returns the factor by which all that was
  // formed with the old exponent shrinks (1 as a rule).
  double (*accumulate_f32)(const Row<float>&, const RowOutputs&, RowSums<double>&);
  double (*accumulate_f64)(const Row<double>&, const RowOutputs&, RowSums<double>&);
  // values_j = coefficient * exp(z_j - exponent) * slope_factor(z_j), and target_value at the target.
  void (*operand_f32)(const Row<float>&, float exponent, float coefficient, float target_value);
  void (*operand_f64)(const Row<double>&, double exponent, double coefficient, double target_value);
};

// The set for isa().
const RowKernels& row_kernels();

// The sets themselves; the first two are in x86-64 builds alone.
const RowKernels& avx512_row_kernels();
const RowKernels& avx2_row_kernels();
const RowKernels& plain_row_kernels();

}  // namespace fastdpo::cpu
