// Level 1's small kernels: from a chunk's tile sums to the rows' sums, and what its product could not know.
#pragma once

#include "dot.cuh"
#include "exponentials.h"
#include "row_kernel.cuh"

namespace fastdpo::cuda {

// Level 1 has one operand type, for float16 comes without an operand. The chunk's logits and bias are not used here.
using TiledChunk = RowChunk<float, bfloat16>;

template <typename T>
struct TileChunk {
  const float* tile_sums;  // [tile_sums_of(extras), rows, tiles], as in ExponentialsArguments
  int tiles;
  int64_t rows;
  const T* hidden;  // [rows, hidden_units]
  const T* weight;  // [columns, hidden_units], the chunk's
  int64_t hidden_units;
};

// The same rule as the row kernel's, with the sum of a tile, which bounds it from above, for its greatest exponential.
__device__ __forceinline__ bool too_large(float log_of_tile_sum) {
  return log_of_tile_sum > static_cast<float>(kMaxExponentGap);
}

// A tile's exponentials are in range where their sum is: above, some may be infinite in float32, or in bfloat16, whose
// largest number is 0.4 % below float32's; and so may their squares, where these are summed. A NaN counts as in range,
// for no exponent would help.
template <bool kExtras>
__device__ __forceinline__ bool in_range(float tile_sum) {
  return !(tile_sum > (kExtras ? 0x1p63f : 0x1p126f));
}

// The largest of the warps' numbers, of which a warp's lanes have the same, in every thread; a comparison drops a NaN.
// As with sum_over_block, a barrier has to lie between two calls.
template <typename Traits>
__device__ __forceinline__ float max_over_warps(float of_this_warp) {
  __shared__ float of_warp[Traits::kWarps];
  if (threadIdx.x % kWarpSize == 0) of_warp[threadIdx.x / kWarpSize] = of_this_warp;
  __syncthreads();  // all warps' are in of_warp before anybody reads them
  float largest = of_warp[0];
#pragma unroll
  for (int warp = 1; warp < Traits::kWarps; ++warp) largest = of_warp[warp] > largest ? of_warp[warp] : largest;
  return largest;
}

// The same of the threads' numbers.
template <typename Traits>
__device__ __forceinline__ float max_over_block(float mine) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, mine, distance);
    mine = other > mine ? other : mine;
  }
  return max_over_warps<Traits>(mine);
}

// One row of a chunk, and the block that has it.
template <typename T, bool kExtras>
struct TiledRow {
  using Traits = RowTraits<float, bfloat16, RowPass::kSums, kExtras>;
  static constexpr int kColumns = static_cast<int>(kTileColumns);

  const TiledChunk& chunk;
  const TileChunk<T>& tiles;
  int64_t row;
  int target;         // the target's column in this chunk; -1 when it is in another
  bfloat16* operand;  // or null

  __device__ __forceinline__ float tile_sum(int tile, TileSum which = kTileExponentials) const {
    return tiles.tile_sums[(which * tiles.rows + row) * tiles.tiles + tile];
  }
  __device__ __forceinline__ int columns(int tile) const {
    const int left = chunk.columns - tile * kColumns;
    return left < kColumns ? left : kColumns;
  }

  // Calls use(column, logit) in all lanes of a warp for the warp's share of the tile's columns, without the target's.
  template <typename Use>
  __device__ __forceinline__ void each_logit(int tile, Use use) const {
    const T* hidden = tiles.hidden + row * tiles.hidden_units;
    for (int i = static_cast<int>(threadIdx.x) / kWarpSize; i < columns(tile); i += Traits::kWarps) {
      const int column = tile * kColumns + i;
      if (column == target) continue;
      const T* weight = tiles.weight + column * tiles.hidden_units;
      use(column, chunk.transform.logit(dot_over_warp<true>(hidden, weight, tiles.hidden_units)));
    }
  }

  // An exponent that suits all tiles: the largest logit of those that are out of range, or what bounds the others'.
  __device__ __forceinline__ float suitable_exponent(float exponent) const {
    float largest = -std::numeric_limits<float>::infinity();
    auto consider = [&](float logit) { largest = logit > largest ? logit : largest; };
    for (int tile = 0; tile < tiles.tiles; ++tile) {
      const float sum = tile_sum(tile);
      if (in_range<kExtras>(sum)) {
        consider(exponent + std::log(sum));
      } else {
        each_logit(tile, [&](int, float logit) { consider(logit); });
      }
    }
    return max_over_warps<Traits>(largest);
  }

  // This thread's share of the chunk's sums, relative to the exponent that the tiles were made with. `max_logit` is
  // an upper bound of (z - exponent) over the chunk; the largest logit itself is among the extras.
  __device__ __forceinline__ ChunkSums<float> sum_tiles() const {
    ChunkSums<float> sums = ChunkSums<float>::empty();
    for (int tile = static_cast<int>(threadIdx.x); tile < tiles.tiles; tile += Traits::kThreads) {
      const float sum = tile_sum(tile);
      const float log_of_sum = std::log(sum);
      sums.sum += sum;
      // The comparison drops a NaN; the sum keeps it.
      sums.max_logit = log_of_sum > sums.max_logit ? log_of_sum : sums.max_logit;
      if constexpr (kExtras) {
        sums.weighted_sum += tile_sum(tile, kTileWeighted);
        sums.square_sum += tile_sum(tile, kTileSquares);
        sums.logit_sum += tile_sum(tile, kTileLogits);
      }
    }
    return sums;
  }

  // The chunk's largest logit, in every thread; -inf where the chunk holds the target alone.
  __device__ __forceinline__ float largest_logit() const {
    float largest = -std::numeric_limits<float>::infinity();
    for (int tile = static_cast<int>(threadIdx.x); tile < tiles.tiles; tile += Traits::kThreads) {
      const float of_tile = tile_sum(tile, kTileLargest);
      largest = of_tile > largest ? of_tile : largest;
    }
    return max_over_block<Traits>(largest);
  }

  // The chunk's sums relative to another exponent, and the operand likewise: tiles in range shrink, the others are
  // computed again. `shift` is the old exponent minus the new one. The product left a zero in the target's column.
  // Without the sum of logits, which has no exponent.
  __device__ __forceinline__ ChunkSums<float> sum_again(float exponent, float shift) const {
    const auto shrink = Shrink<float>::by(shift);
    ChunkSums<float> sums = ChunkSums<float>::empty();
    for (int tile = 0; tile < tiles.tiles; ++tile) {
      const float sum = tile_sum(tile);
      if (in_range<kExtras>(sum)) {
        if (threadIdx.x == 0) {
          sums.sum += shrink(sum);
          if constexpr (kExtras) {
            sums.weighted_sum += shrink(tile_sum(tile, kTileWeighted) + shift * sum);
            sums.square_sum += shrink(shrink(tile_sum(tile, kTileSquares)));
          }
        }
        if (operand != nullptr) shrink_row(operand + tile * kColumns, columns(tile), shrink);
      } else {
        each_logit(tile, [&](int column, float logit) {
          if (threadIdx.x % kWarpSize != 0) return;
          const float above = logit - exponent;
          const float e = std::exp(above);
          sums.sum += e;
          if constexpr (kExtras) {
            if (e != 0.0f) sums.weighted_sum += e * above;
            sums.square_sum += e * e;
          }
          if (operand != nullptr) operand[column] = round_to<bfloat16>(e);
        });
      }
    }
    return sum_over_block<Traits>(sums);
  }
};

// Forward, one block per row: the tile sums, added in an order that depends on their number alone, become part of the
// row's sum. Where one is too large the row's exponent is raised, and what was formed with the old one is put right, as
// in the row kernel. That is rare (a target less likely than e^-kMaxExponentGap; less likely than 2^-126 for tiles out
// of range), so it may be slow, but it is decided here, and every launch is the same. Three blocks leave 80 registers a
// thread: without a number, ptxas takes 48 for sm_80 and spills.
template <typename T, bool kExtras>
__global__ void __launch_bounds__(kBlockThreads, 3)
    settle_rows_kernel(const TiledChunk chunk, const TileChunk<T> tiles) {
  using Traits = typename TiledRow<T, kExtras>::Traits;
  const int64_t row = blockIdx.x;
  const int64_t target = chunk.targets[row];
  bfloat16* operand = chunk.operand != nullptr ? chunk.operand + row * chunk.operand_stride : nullptr;
  // As in the row kernel: zeros, whatever the row's hidden states hold.
  if (target == chunk.ignore_index) {
    if (operand != nullptr) clear_row(operand, chunk.columns);
    return;
  }

  const int64_t offset = target - chunk.first_column;
  const bool here = offset >= 0 && offset < chunk.columns;
  const TiledRow<T, kExtras> tiled{chunk, tiles, row, here ? static_cast<int>(offset) : -1, operand};
  // All threads read the exponent before the barrier of sum_over_block, and thread 0 writes it after that. Between two
  // sums lies the barrier of a maximum, and the other way round.
  RowSums<float> total = chunk.sums[row];
  ChunkSums<float> sums = sum_over_block<Traits>(tiled.sum_tiles());
  if constexpr (kExtras) total.logit_sum += sums.logit_sum;
  if (too_large(sums.max_logit)) {
    const float raised = tiled.suitable_exponent(total.exponent);
    const float shift = total.exponent - raised;
    total.raise(raised);
    if (chunk.first_column > 0) {
      const auto shrink = Shrink<float>::by(shift);
      if (chunk.direction != nullptr) {
        shrink_row(chunk.direction + row * chunk.hidden_units, chunk.hidden_units, shrink);
      }
      if (operand != nullptr && chunk.retained) shrink_row(operand - chunk.first_column, chunk.first_column, shrink);
    }
    sums = tiled.sum_again(raised, shift);
  }
  total.sum += sums.sum;
  if constexpr (kExtras) {
    total.weighted_sum += sums.weighted_sum;
    total.square_sum += sums.square_sum;
    const float largest = tiled.largest_logit();
    total.max_logit = largest > total.max_logit ? largest : total.max_logit;
  }
  if (threadIdx.x == 0) chunk.sums[row] = total;
}

// Backward, one block per row: the target's term, and zeros for ignored rows.
__global__ void __launch_bounds__(kBlockThreads) place_targets_kernel(const TiledChunk chunk) {
  const int64_t row = blockIdx.x;
  const int64_t target = chunk.targets[row];
  bfloat16* operand = chunk.operand + row * chunk.operand_stride;
  if (target == chunk.ignore_index) {
    clear_row(operand, chunk.columns);
    return;
  }
  const int64_t offset = target - chunk.first_column;
  if (threadIdx.x != 0 || offset < 0 || offset >= chunk.columns) return;
  const float* state = chunk.row_state + (chunk.rows != nullptr ? chunk.rows[row] : row);
  operand[offset] = round_to<bfloat16>(target_operand(state[kRowTargetWeight * chunk.state_stride],
                                                      state[kRowNorm * chunk.state_stride], chunk.transform.slope()));
}

}  // namespace fastdpo::cuda
