// The row kernel: one chunk of the vocabulary, as float32 (float64) products, becomes the row's running sums and the
// gradient operand exp(z - k) * slope_factor(z).
//
// One block per row. The products are read once, 16 bytes at a time and neighbouring threads side by side; a thread has
// 64 bytes of loads in flight before it uses the first. With the product that writes z, the gradient path moves 4 + 4
// + 2 bytes a logit for 16-bit operands; about 95 instructions a logit would fit in the time those 10 bytes take on an
// H100 (3 TB/s, 132 x 128 lanes), so the accurate exp() and tanh() cost nothing here.
#pragma once

#include "device.cuh"

namespace fastdpo::cuda {

enum class RowPass {
  kSums,            // forward, no gradient wanted: sums, nothing written
  kSumsAndOperand,  // forward: sums and operand
  kOperand          // backward: the operand again, from the exponent that forward settled on
};

template <typename Compute, typename Operand, RowPass kRowPass, bool kRowExtras>
struct RowTraits {
  using C = Compute;
  using O = Operand;
  static constexpr RowPass kPass = kRowPass;
  static constexpr bool kExtras = kRowExtras;  // the sums behind entropy, log_sum_sq_probs and mean_logits
  static constexpr bool kWrites = kPass != RowPass::kSums;
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kPack = kAccessBytes / static_cast<int>(sizeof(O));    // one 16-byte store
  static constexpr int kUnroll = 64 / (kPack * static_cast<int>(sizeof(C)));  // 64 bytes of loads in flight
  // Three blocks of 256 threads leave 80 registers a thread (float64: two blocks, 128), which is enough to spill none,
  // and keep 3 x 256 x 64 bytes of loads in flight a multiprocessor, where 16 KiB already cover the memory's latency.
  static constexpr int kLeastBlocks = sizeof(C) == 8 ? 2 : 3;
  static_assert(kThreads % kWarpSize == 0 && kUnroll >= 1 && 2 * (kPack - 1) <= kThreads);
};

// A block's view of the work. Rows are scored rows in their compact order, `row` from 0 in the present token block.
template <typename C, typename O>
struct RowChunk {
  // [rows, logits_stride] products h.w; columns [0, columns) are the vocabulary entries from first_column on. Written
  // by the matrix product, read here. Rows of `operand` lie at the same offset from a 16-byte boundary, counted in
  // elements: (operand_stride - logits_stride) and first_column are multiples of kRowAlignment.
  const C* logits;
  int64_t logits_stride;
  // [rows, operand_stride], at the chunk's first column. With `retained`, a row's earlier columns lie before it.
  O* operand;
  int64_t operand_stride;
  bool tensor_float32;  // round the operand to TF32, of which O = float has room for more
  bool retained;
  int64_t first_column;
  int columns;  // a chunk is far smaller than 2^31, so columns inside it are counted in 32 bits
  // [rows, hidden_units] sum over the earlier chunks of operand * weight; null when no direction is wanted.
  C* direction;
  int64_t hidden_units;
  const C* bias;           // of the chunk's columns, or null
  const int64_t* targets;  // [rows]
  int64_t ignore_index;
  RowSums<C>* sums;     // [rows]; forward only
  const int64_t* rows;  // [rows] a row's place in row_state, or null when that is `row` itself; backward only
  const C* row_state;   // [kRowStates, state_stride]; backward only
  int64_t state_stride;
  LogitTransform<C> transform;
};

// What one thread, then one block, sums over a chunk.
template <typename C>
struct ChunkSums {
  C max_logit;
  C sum;
  C weighted_sum;
  C square_sum;
  C logit_sum;

  __device__ __forceinline__ static ChunkSums empty() {
    constexpr C kInfinity = std::numeric_limits<C>::infinity();
    return {-kInfinity, C(0), C(0), C(0), C(0)};
  }
};

template <typename Traits, typename C>
__device__ __forceinline__ void add(ChunkSums<C>& into, const ChunkSums<C>& from) {
  into.max_logit = from.max_logit > into.max_logit ? from.max_logit : into.max_logit;
  into.sum += from.sum;
  if constexpr (Traits::kExtras) {
    into.weighted_sum += from.weighted_sum;
    into.square_sum += from.square_sum;
    into.logit_sum += from.logit_sum;
  }
}

// Sums over the block, in an order that depends on nothing but the block's size; every thread gets the result. A second
// call overwrites of_warp, so a barrier has to lie between two calls: nobody may still be reading the first one's
// values.
template <typename Traits, typename C>
__device__ __forceinline__ ChunkSums<C> sum_over_block(ChunkSums<C> mine) {
  __shared__ ChunkSums<C> of_warp[Traits::kWarps];
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    ChunkSums<C> other = ChunkSums<C>::empty();
    other.max_logit = __shfl_xor_sync(kAllLanes, mine.max_logit, distance);
    other.sum = __shfl_xor_sync(kAllLanes, mine.sum, distance);
    if constexpr (Traits::kExtras) {
      other.weighted_sum = __shfl_xor_sync(kAllLanes, mine.weighted_sum, distance);
      other.square_sum = __shfl_xor_sync(kAllLanes, mine.square_sum, distance);
      other.logit_sum = __shfl_xor_sync(kAllLanes, mine.logit_sum, distance);
    }
    add<Traits>(mine, other);
  }
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = mine;
  __syncthreads();  // all warps' sums are in of_warp before anybody reads them
  ChunkSums<C> total = ChunkSums<C>::empty();
#pragma unroll
  for (int warp = 0; warp < Traits::kWarps; ++warp) add<Traits>(total, of_warp[warp]);
  return total;
}

template <typename O, typename C>
__device__ __forceinline__ O as_operand(C x, bool tensor_float32) {
  if constexpr (std::is_same_v<O, float>) {
    return tensor_float32 ? round_to_tf32(x) : x;
  } else {
    return round_to<O>(x);
  }
}

// One row's columns, as the thread's share of the sums; the operand goes out on the way.
template <typename Traits>
struct RowVisitor {
  using C = typename Traits::C;
  using O = typename Traits::O;

  const C* logits;
  O* operand;
  const C* bias;
  int columns;
  int target;        // the target's column in this chunk; -1 when it is in another
  C target_operand;  // what the operand holds there
  bool tensor_float32;
  LogitTransform<C> transform;

  __device__ __forceinline__ O entry(C product, int column, C exponent, ChunkSums<C>& sums) const {
    if (bias != nullptr) product += bias[column];
    const C z = transform.logit(product);
    const C above = z - exponent;
    const C e = std::exp(above);
    const bool is_target = column == target;
    if constexpr (Traits::kPass != RowPass::kOperand) {
      if (!is_target) {
        // The comparison drops a NaN; the sum keeps it.
        sums.max_logit = z > sums.max_logit ? z : sums.max_logit;
        sums.sum += e;
        if constexpr (Traits::kExtras) {
          if (e != C(0)) sums.weighted_sum += e * above;  // an entry masked by -inf adds 0, not 0 * inf
          sums.square_sum += e * e;
          sums.logit_sum += z;
        }
      }
    }
    return as_operand<O>(is_target ? target_operand : e * transform.slope_factor(z), tensor_float32);
  }

  __device__ __forceinline__ ChunkSums<C> visit(C exponent) const {
    ChunkSums<C> sums = ChunkSums<C>::empty();
    // Up to the boundary and after the last whole pack, single elements; between them, packs. The operand's boundary
    // is the logits' as well (see RowChunk).
    int head = Traits::kWrites ? elements_to_boundary(operand) : elements_to_boundary(logits);
    if (head > columns) head = columns;
    const int packs = (columns - head) / Traits::kPack;

    for (int first = static_cast<int>(threadIdx.x); first < packs; first += Traits::kThreads * Traits::kUnroll) {
      Pack<C, Traits::kPack> loaded[Traits::kUnroll];
#pragma unroll
      for (int u = 0; u < Traits::kUnroll; ++u) {
        const int pack = first + u * Traits::kThreads;
        if (pack < packs) loaded[u].load(logits + head + pack * Traits::kPack);
      }
#pragma unroll
      for (int u = 0; u < Traits::kUnroll; ++u) {
        const int pack = first + u * Traits::kThreads;
        if (pack >= packs) break;
        const int column = head + pack * Traits::kPack;
        Pack<O, Traits::kPack> entries;
#pragma unroll
        for (int i = 0; i < Traits::kPack; ++i) {
          entries.values[i] = entry(loaded[u].values[i], column + i, exponent, sums);
        }
        if constexpr (Traits::kWrites) entries.store(operand + column);
      }
    }

    // Fewer than a pack on either side, so a thread has one at most.
    const int in_packs = packs * Traits::kPack;
    const int single = static_cast<int>(threadIdx.x);
    if (single < columns - in_packs) {
      const int column = single < head ? single : single + in_packs;
      const O value = entry(logits[column], column, exponent, sums);
      if constexpr (Traits::kWrites) operand[column] = value;
    }
    return sums;
  }
};

template <typename O, typename C = typename ComputeOf<O>::type>
__device__ __forceinline__ void clear_row(O* row, int64_t columns) {
  for (int64_t column = threadIdx.x; column < columns; column += kBlockThreads) row[column] = round_to<O>(C(0));
}

// exp(shift), by which what was formed with another exponent shrinks. In two steps: float32 ends at e^-104, where what
// was large before (a tile of Level 1 up to e^87) has not shrunk to nothing.
template <typename C>
struct Shrink {
  C half;

  __device__ __forceinline__ static Shrink by(C shift) { return {std::exp(shift / C(2))}; }
  __device__ __forceinline__ C operator()(C x) const { return x * half * half; }
};

template <typename T, typename C>
__device__ __forceinline__ void shrink_row(T* row, int64_t columns, Shrink<C> shrink, bool tensor_float32 = false) {
  for (int64_t column = threadIdx.x; column < columns; column += kBlockThreads) {
    row[column] = as_operand<T>(shrink(load_as_compute(row[column])), tensor_float32);
  }
}

template <typename Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kLeastBlocks)
    row_kernel(const RowChunk<typename Traits::C, typename Traits::O> chunk) {
  using C = typename Traits::C;
  using O = typename Traits::O;
  const int64_t row = blockIdx.x;
  const int64_t target = chunk.targets[row];
  O* operand = Traits::kWrites ? chunk.operand + row * chunk.operand_stride : nullptr;

  // Ignored rows are here only when the host does not know their number. The weight gradient sums over rows, so theirs
  // must be zeros whatever their hidden states hold.
  if (target == chunk.ignore_index) {
    if constexpr (Traits::kWrites) clear_row(operand, chunk.columns);
    return;
  }

  const int64_t offset = target - chunk.first_column;
  RowVisitor<Traits> visitor{chunk.logits + row * chunk.logits_stride,
                             operand,
                             chunk.bias,
                             chunk.columns,
                             offset >= 0 && offset < chunk.columns ? static_cast<int>(offset) : -1,
                             C(0),
                             chunk.tensor_float32,
                             chunk.transform};
  if constexpr (Traits::kPass == RowPass::kOperand) {
    const int64_t place = chunk.rows != nullptr ? chunk.rows[row] : row;
    const C* state = chunk.row_state + place;
    const C slope = chunk.transform.slope();
    visitor.target_operand =
        target_operand(state[kRowTargetWeight * chunk.state_stride], state[kRowNorm * chunk.state_stride], slope);
    visitor.visit(state[kRowExponent * chunk.state_stride]);
  } else {
    const C exponent = chunk.sums[row].exponent;
    ChunkSums<C> sums = sum_over_block<Traits>(visitor.visit(exponent));
    // The chunk was visited in the hope that z - k stays in range. All threads have the same sums and decide alike.
    const bool raised = sums.max_logit - exponent > C(kMaxExponentGap);
    if (raised) {
      const auto shrink = Shrink<C>::by(exponent - sums.max_logit);
      if (chunk.first_column > 0) {
        if (chunk.direction != nullptr) {
          shrink_row(chunk.direction + row * chunk.hidden_units, chunk.hidden_units, shrink);
        }
        if (Traits::kWrites && chunk.retained) {
          shrink_row(operand - chunk.first_column, chunk.first_column, shrink, chunk.tensor_float32);
        }
      }
      // The same thread writes the same entries again, so the two visits' stores need no barrier; the two sums do.
      const ChunkSums<C> mine = visitor.visit(sums.max_logit);
      __syncthreads();
      sums = sum_over_block<Traits>(mine);
    }
    // Thread 0 may write the row's sums: all threads read the exponent before the barrier of sum_over_block.
    if (threadIdx.x == 0) {
      RowSums<C> total = chunk.sums[row];
      if (raised) total.raise(sums.max_logit);
      total.max_logit = sums.max_logit > total.max_logit ? sums.max_logit : total.max_logit;
      total.sum += sums.sum;
      if constexpr (Traits::kExtras) {
        total.weighted_sum += sums.weighted_sum;
        total.square_sum += sums.square_sum;
        total.logit_sum += sums.logit_sum;
      }
      chunk.sums[row] = total;
    }
  }
}

}  // namespace fastdpo::cuda
