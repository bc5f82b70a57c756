// From targets to scored rows and back: which rows are scored, their hidden states side by side, their target's logit
// before the first chunk, and their results after the last.
#pragma once

#include "device.cuh"
#include "dot.cuh"

namespace fastdpo::cuda {

// What partition_rows_kernel found; the host reads it when it does not know num_scored.
struct TargetFacts {
  int64_t scored;        // targets other than ignore_index
  int64_t bad_position;  // first target that is neither ignored nor in the vocabulary; -1 when there is none
  int64_t bad_target;
};

// rows[0, scored) = positions of the scored targets, in order; rows[scored, count) = the others, last first. One block:
// a block-wide scan needs no second launch, and 131,072 targets are read in 512 rounds, about 0.1 % of such a batch.
struct PartitionTraits {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
};

__global__ void __launch_bounds__(PartitionTraits::kThreads)
    partition_rows_kernel(const int64_t* targets, int64_t count, int64_t ignore_index, int64_t vocabulary,
                          int64_t* rows, TargetFacts* facts) {
  using Traits = PartitionTraits;
  __shared__ int of_warp[Traits::kWarps];
  __shared__ int64_t first_bad[Traits::kThreads];
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int warp = static_cast<int>(threadIdx.x) / kWarpSize;
  int64_t scored_before = 0;
  int64_t bad_position = count;
  for (int64_t start = 0; start < count; start += Traits::kThreads) {
    const int64_t position = start + threadIdx.x;
    const int64_t target = position < count ? targets[position] : ignore_index;
    const bool scored = target != ignore_index;
    if (scored && (target < 0 || target >= vocabulary) && position < bad_position) bad_position = position;
    const unsigned in_warp = __ballot_sync(kAllLanes, scored);
    if (lane == 0) of_warp[warp] = __popc(in_warp);
    __syncthreads();  // of_warp is complete
    int in_earlier_warps = 0;
    int in_block = 0;
#pragma unroll
    for (int w = 0; w < Traits::kWarps; ++w) {
      if (w < warp) in_earlier_warps += of_warp[w];
      in_block += of_warp[w];
    }
    __syncthreads();  // all have read of_warp before the next round writes it
    const int in_earlier_lanes = __popc(in_warp & ((1u << lane) - 1u));
    const int64_t rank = scored_before + in_earlier_warps + in_earlier_lanes;
    if (scored) {
      rows[rank] = position;
    } else if (position < count) {
      rows[count - 1 - (position - rank)] = position;
    }
    scored_before += in_block;
  }
  first_bad[threadIdx.x] = bad_position;
  __syncthreads();  // first_bad is complete
  if (threadIdx.x == 0) {
    for (int t = 1; t < Traits::kThreads; ++t) bad_position = first_bad[t] < bad_position ? first_bad[t] : bad_position;
    const bool bad = bad_position < count;
    *facts = {scored_before, bad ? bad_position : -1, bad ? targets[bad_position] : 0};
  }
}

// to[row] = from[rows[row]], rows of row_bytes bytes moved as Words. One block per row.
template <typename Word>
__global__ void __launch_bounds__(kBlockThreads)
    gather_rows_kernel(const Word* from, const int64_t* rows, int64_t row_words, Word* to) {
  const int64_t row = blockIdx.x;
  const Word* source = from + rows[row] * row_words;
  Word* destination = to + row * row_words;
  for (int64_t i = threadIdx.x; i < row_words; i += kBlockThreads) destination[i] = source[i];
}

template <typename T>
struct StartRows {
  using C = typename ComputeOf<T>::type;
  const T* hidden;         // [positions, hidden_units]
  const T* weight;         // [vocabulary, hidden_units]
  const C* bias;           // [vocabulary] or null
  const int64_t* targets;  // [positions]
  const int64_t* rows;     // [count] position of a row, or null when that is the row itself
  int64_t count;
  int64_t hidden_units;
  int64_t vocabulary;
  int64_t ignore_index;
  LogitTransform<C> transform;
  RowSums<C>* sums;      // [count], written
  int64_t* row_targets;  // [count], written: the targets in compact order
};

// Starts every row's sums from its target's logit, a dot product in the compute type. One warp per row, so that its sum
// needs shuffles only.
template <typename T>
__global__ void __launch_bounds__(kBlockThreads) start_rows_kernel(const StartRows<T> work) {
  using C = typename StartRows<T>::C;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  const int64_t row = grid_index() / kWarpSize;
  if (row >= work.count) return;  // the whole warp leaves
  const int64_t position = work.rows != nullptr ? work.rows[row] : row;
  const int64_t target = work.targets[position];
  C product = 0;
  if (target >= 0 && target < work.vocabulary) {
    product = dot_over_warp<false>(work.hidden + position * work.hidden_units, work.weight + target * work.hidden_units,
                                   work.hidden_units);
  }
  if (lane == 0) {
    constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
    C logit = kNaN;  // what a target outside the vocabulary makes of its row
    if (target == work.ignore_index) {
      logit = 0;
    } else if (target >= 0 && target < work.vocabulary) {
      if (work.bias != nullptr) product += work.bias[target];
      logit = work.transform.logit(product);
    }
    work.sums[row] = RowSums<C>::start(logit);
    work.row_targets[row] = target;
  }
}

// Where results go: by position; a null pointer is not wanted.
template <typename C>
struct RowResults {
  C* logps;      // [positions]
  C* row_state;  // [kRowStates, positions]
  C* direction;  // [positions, hidden_units]
  C* entropy;    // [positions], as the rest
  C* log_sum_sq_probs;
  C* mean_logits;
  C* top_gap;
  int64_t positions;
  int64_t hidden_units;
};

// The results of a row that was not computed: `value` is 0 for an ignored row, else NaN.
template <typename C>
__device__ __forceinline__ void write_uncomputed(const RowResults<C>& results, int64_t position, C value) {
  if (threadIdx.x == 0) {
    results.logps[position] = value;
    results.row_state[kRowExponent * results.positions + position] = value;
    results.row_state[kRowNorm * results.positions + position] = C(1) + value;
    results.row_state[kRowTargetWeight * results.positions + position] = value;
    if (results.entropy != nullptr) results.entropy[position] = value;
    if (results.log_sum_sq_probs != nullptr) results.log_sum_sq_probs[position] = value;
    if (results.mean_logits != nullptr) results.mean_logits[position] = value;
    if (results.top_gap != nullptr) results.top_gap[position] = value;
  }
  if (results.direction != nullptr) {
    C* direction = results.direction + position * results.hidden_units;
    for (int64_t i = threadIdx.x; i < results.hidden_units; i += kBlockThreads) direction[i] = value;
  }
}

// The rows beyond num_scored. A scored row among them means that the caller's num_scored was too small: NaN says so
// where no host synchronisation could. One block per row.
template <typename C>
__global__ void __launch_bounds__(kBlockThreads)
    fill_rows_kernel(const int64_t* targets, int64_t ignore_index, const int64_t* rows, const RowResults<C> results) {
  const int64_t position = rows[blockIdx.x];
  constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
  write_uncomputed(results, position, targets[position] == ignore_index ? C(0) : kNaN);
}

template <typename T, typename Operand>
struct FinishRows {
  using C = typename ComputeOf<T>::type;
  const RowSums<C>* sums;  // [count]
  const int64_t* targets;  // [count] in compact order
  const int64_t* rows;     // [count] position of a row, or null
  int64_t first_position;  // added to the row when rows is null
  int64_t ignore_index;
  int64_t vocabulary;
  const T* weight;       // [vocabulary, hidden_units]
  const C* accumulated;  // [count, hidden_units] sum of operand * weight; may be the direction itself
  Operand* retained;     // [count, vocabulary] or null: the row's operand, kept for backward
  LogitTransform<C> transform;
  RowResults<C> results;
};

// One block per row: its sums become its results, at its position.
template <typename T, typename O>
__global__ void __launch_bounds__(kBlockThreads) finish_rows_kernel(const FinishRows<T, O> work) {
  using C = typename FinishRows<T, O>::C;
  const int64_t row = blockIdx.x;
  const int64_t position = work.rows != nullptr ? work.rows[row] : work.first_position + row;
  const int64_t target = work.targets[row];
  const RowResults<C>& results = work.results;
  const bool known = target >= 0 && target < work.vocabulary;
  if (target == work.ignore_index || !known) {
    constexpr C kNaN = std::numeric_limits<C>::quiet_NaN();
    write_uncomputed(results, position, target == work.ignore_index ? C(0) : kNaN);
    return;
  }
  // Every thread finishes the row for itself: cheaper than a barrier and a broadcast.
  const RowSums<C> sums = work.sums[row];
  const RowResult<C> result = sums.finish(work.vocabulary);
  const C slope = work.transform.slope();
  const C slope_factor = work.transform.slope_factor(sums.target_logit);
  const C target_weight = slope * result.one_minus_p * slope_factor;
  if (threadIdx.x == 0) {
    results.logps[position] = result.logp;
    results.row_state[kRowExponent * results.positions + position] = sums.exponent;
    results.row_state[kRowNorm * results.positions + position] = result.norm;
    results.row_state[kRowTargetWeight * results.positions + position] = target_weight;
    if (results.entropy != nullptr) results.entropy[position] = result.entropy;
    if (results.log_sum_sq_probs != nullptr) results.log_sum_sq_probs[position] = result.log_sum_sq_probs;
    if (results.mean_logits != nullptr) results.mean_logits[position] = result.mean_logit;
    if (results.top_gap != nullptr) results.top_gap[position] = result.top_gap;
    // The direction's product needed a zero here, and is done; backward needs the target's term.
    if (work.retained != nullptr) {
      work.retained[row * work.vocabulary + target] =
          round_to_operand<T, O>(target_operand(target_weight, result.norm, slope));
    }
  }
  if (results.direction != nullptr) {
    const T* w = work.weight + target * results.hidden_units;
    const C* accumulated = work.accumulated + row * results.hidden_units;
    C* direction = results.direction + position * results.hidden_units;
    const C scale = slope / result.norm;
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < results.hidden_units; i += kBlockThreads) {
      direction[i] = target_weight * load_as_compute(w[i]) - scale * accumulated[i];
    }
  }
}

}  // namespace fastdpo::cuda
