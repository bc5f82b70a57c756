// The elementwise kernels of the gradients: work on N x H and chunk x H numbers, small beside the N x V of the row
// kernel.
#pragma once

#include "device.cuh"

namespace fastdpo::cuda {

template <typename T, typename Operand>
struct ScaleRows {
  using C = typename ComputeOf<T>::type;
  const C* grad_logps;     // [positions]
  const T* hidden;         // [positions, hidden_units]
  const int64_t* targets;  // [positions]
  const int64_t* rows;     // [count] position of a row, or null when that is the row itself
  const C* row_state;      // [kRowStates, positions]
  int64_t positions;
  int64_t hidden_units;
  int64_t ignore_index;
  C slope;
  Operand* scaled;        // [count, hidden_units] or null
  Operand* coefficients;  // [count] or null
};

// coefficient = -c slope / norm; scaled = coefficient * hidden, rounded once. The weight gradient is operand^T *
// scaled, the bias gradient operand^T * coefficients, so the operand needs no pass of its own. One block per row.
template <typename T, typename O>
__global__ void __launch_bounds__(kBlockThreads) scale_rows_kernel(const ScaleRows<T, O> work) {
  using C = typename ScaleRows<T, O>::C;
  const int64_t row = blockIdx.x;
  const int64_t position = work.rows != nullptr ? work.rows[row] : row;
  // Zero times an ignored row's hidden state could be NaN, and the weight gradient sums over rows.
  const bool ignored = work.targets[position] == work.ignore_index;
  const C coefficient =
      ignored ? C(0) : -work.grad_logps[position] * work.slope / work.row_state[kRowNorm * work.positions + position];
  if (work.coefficients != nullptr && threadIdx.x == 0) work.coefficients[row] = round_to_operand<T, O>(coefficient);
  if (work.scaled == nullptr) return;
  const T* hidden = work.hidden + position * work.hidden_units;
  O* scaled = work.scaled + row * work.hidden_units;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < work.hidden_units; i += kBlockThreads) {
    scaled[i] = round_to_operand<T, O>(ignored ? C(0) : coefficient * load_as_compute(hidden[i]));
  }
}

// grad_hidden = c * direction, rounded once. One block per row.
template <typename T, typename C = typename ComputeOf<T>::type>
__global__ void __launch_bounds__(kBlockThreads)
    scale_direction_kernel(const C* grad_logps, const C* direction, const int64_t* targets, int64_t ignore_index,
                           int64_t hidden_units, T* grad_hidden) {
  const int64_t position = blockIdx.x;
  const bool ignored = targets[position] == ignore_index;
  const C c = grad_logps[position];
  const C* from = direction + position * hidden_units;
  T* to = grad_hidden + position * hidden_units;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < hidden_units; i += kBlockThreads) {
    to[i] = round_to<T>(ignored ? C(0) : c * from[i]);
  }
}

// to[i] = from[i] in another type.
template <typename From, typename To>
__global__ void __launch_bounds__(kBlockThreads) convert_kernel(const From* from, To* to, int64_t count) {
#pragma unroll 4
  for (int64_t i = grid_index(); i < count; i += grid_threads()) to[i] = round_to<To>(load_as_compute(from[i]));
}

}  // namespace fastdpo::cuda
