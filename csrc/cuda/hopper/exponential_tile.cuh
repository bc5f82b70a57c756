// What Level 1's product does to a tile of accumulators: CUTLASS's epilogue visits them here, and no others see them.
#pragma once

#include <cutlass/array.h>
#include <cutlass/cutlass.h>

#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

#include "../exponentials.h"

namespace fastdpo::cuda {

// Rows of the tile are rows of hidden (the product's M), columns are vocabulary entries (its N). A thread's wgmma
// accumulators are then two rows of every 64, with a quarter of their columns each. So what belongs to a row (exponent,
// target, sum) is one register of a thread for dozens of accumulators, a row's sum is additions in the thread and two
// shuffles at the end, no warp holds a part of another warp's rows, and the columns that a thread holds side by side
// are side by side in memory. The other way round a thread would hold 2 rows of every 8, dozens in all, and a row's
// sum would run through all warps and shared memory.
//
// kExtras: all of TileSum, and not the exponentials' sum alone.
template <int kTileRows, int kColumns, bool kExtras>
struct ExponentialTile {
  using ElementAux = cutlass::bfloat16_t;  // CUTLASS lays out D by it where D is not written

  static_assert(kTileRows == 128, "a warp group has a tile to itself, and each thread fetches a row's Row");
  static constexpr int kRowsOfThread = kTileRows / 32;
  static constexpr int kSums = static_cast<int>(tile_sums_of(kExtras));

  struct Arguments {
    float slope;
    const float* exponents;  // row r's at exponents[r * exponent_stride]
    int64_t exponent_stride;
    const int64_t* targets;  // [rows]
    int64_t first_column;    // the vocabulary entry of column 0
    float* tile_sums;        // [tile_sums_of(kExtras), rows, tiles] or null
    int64_t tiles;
    int64_t rows;
  };
  using Params = Arguments;

  // What a row's accumulators need. In shared memory rather than in registers, of which a thread has 232 and 192
  // accumulators; and since nothing read there moves over a barrier, the compiler cannot take all the tile's
  // exponentials before the first of them is stored, which made it spill.
  struct Row {
    float exponent;
    int target;  // a column of the tile; -1 when it is in another tile
  };
  // Where the tile is. Here, as it is needed at the tile's end, and not while its accumulators fill the registers.
  struct Corner {
    int rows_left;     // of the product, from the tile's first row on; 0 or less in a tile beyond the last row
    int columns_left;  // the same along N
    int row;           // the tile's first one
    int tile;          // its place along N
  };
  // A thread's sums. One number for a row has room in its registers; with extras they have not, and each thread has a
  // place of its own in shared memory for every sum, where neighbouring threads are side by side.
  static constexpr int kThreads = 128;
  static constexpr int kKeptSums = kExtras ? kSums * kRowsOfThread * kThreads : 1;
  struct SharedStorage {
    alignas(16) Row rows[kTileRows];
    Corner corner;
    float sums[kKeptSums];
  };

  template <typename Shape>
  static constexpr Params to_underlying_arguments(const Shape&, const Arguments& arguments, void*) {
    return arguments;
  }
  template <typename Shape>
  static bool can_implement(const Shape&, const Arguments&) {
    return true;
  }
  template <typename Shape>
  static size_t get_workspace_size(const Shape&, const Arguments&) {
    return 0;
  }
  template <typename Shape>
  static cutlass::Status initialize_workspace(const Shape&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }

  CUTLASS_HOST_DEVICE ExponentialTile() {}
  CUTLASS_HOST_DEVICE ExponentialTile(const Params& params, const SharedStorage& storage)
      : params_(&params), storage_(const_cast<SharedStorage*>(&storage)) {}

  CUTLASS_DEVICE bool is_producer_load_needed() const { return false; }
  CUTLASS_DEVICE bool is_C_load_needed() const { return false; }
  template <typename... Ts>
  CUTLASS_DEVICE auto get_producer_load_callbacks(const cutlass::epilogue::fusion::ProducerLoadArgs<Ts...>&) {
    return cutlass::epilogue::fusion::EmptyProducerLoadCallbacks{};
  }

  // One thread's share of one tile. `Coordinates` are its accumulators' places, relative to the first of them:
  // (accumulator, _, _, part of the tile along M, along N) -> (row, column), known at compile time.
  template <typename Coordinates>
  struct Visitor : cutlass::epilogue::fusion::EmptyConsumerStoreCallbacks {
    const Params& params;
    Coordinates coordinates;
    SharedStorage& shared;
    int thread;          // of the warp group that has the tile
    int row_in_tile;     // the thread's first row
    int column_in_tile;  // the thread's first column
    Corner corner;
    float sum[kRowsOfThread];  // of exponentials; without extras

    // A thread has rows 0, 8, 64, 72, ... from its first on.
    CUTLASS_DEVICE static constexpr int row_of(int index) { return index / 2 * 64 + index % 2 * 8; }
    CUTLASS_DEVICE static constexpr int index_of(int row) { return row / 64 * 2 + row % 64 / 8; }

    CUTLASS_DEVICE void begin() {
      Row mine{0.0f, -1};
      if (thread == 0) shared.corner = corner;
      if (thread < corner.rows_left) {
        const int64_t row = corner.row + thread;
        const int64_t column = params.targets[row] - params.first_column - int64_t{corner.tile} * kColumns;
        mine.exponent = params.exponents[row * params.exponent_stride];
        if (column >= 0 && column < kColumns) mine.target = static_cast<int>(column);
      }
      shared.rows[thread] = mine;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        sum[i] = 0;
        if constexpr (kExtras) {
          for (int which = 0; which < kSums; ++which) kept(which, i) = nothing(which);
        }
      }
    }
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    // Volatile: or the compiler would have all of a tile's sums in registers at once, after all.
    CUTLASS_DEVICE volatile float& kept(int which, int index) const {
      return shared.sums[(which * kRowsOfThread + index) * kThreads + thread];
    }
    CUTLASS_DEVICE static constexpr float nothing(int which) { return which == kTileLargest ? -INFINITY : 0.0f; }
    CUTLASS_DEVICE static float joined(int which, float a, float b) {
      // The comparison drops a NaN; the exponentials' sum keeps it.
      return which != kTileLargest ? a + b : b > a ? b : a;
    }

    template <typename Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(const cutlass::Array<Accumulator, kSize>& accumulators,
                                                      int fragment, int part_m, int part_n) {
      cutlass::Array<float, kSize> e;
      const auto places = coordinates(cute::_, cute::_, cute::_, part_m, part_n);
      // Volatile, as the sums are.
      const int columns_left = const_cast<const volatile Corner&>(shared.corner).columns_left - column_in_tile;
      float extra[kRowsOfThread][kSums];
      bool visited[kRowsOfThread] = {};  // known at compile time, as the places are
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto place = places(fragment * kSize + i);
        const int row = cute::get<0>(place);
        const int column = cute::get<1>(place);
        const int index = index_of(row);
        const Row of_row = shared.rows[row_in_tile + row];
        const float above = fmaf(accumulators[i], params.slope, -of_row.exponent);
        e[i] = expf(above);
        const bool left_out = column == of_row.target - column_in_tile || column >= columns_left;
        if (left_out) e[i] = 0;
        if constexpr (!kExtras) {
          sum[index] += e[i];
        } else {
          const float logit = accumulators[i] * params.slope;
          const float adds[kSums] = {e[i], e[i] != 0 ? e[i] * above : 0.0f, e[i] * e[i], left_out ? 0.0f : logit,
                                     left_out ? -INFINITY : logit};
          for (int which = 0; which < kSums; ++which) {
            extra[index][which] = joined(which, visited[index] ? extra[index][which] : nothing(which), adds[which]);
          }
          visited[index] = true;
        }
      }
      if constexpr (kExtras) {
        CUTLASS_PRAGMA_UNROLL
        for (int index = 0; index < kRowsOfThread; ++index) {
          if (!visited[index]) continue;
          for (int which = 0; which < kSums; ++which) {
            kept(which, index) = joined(which, kept(which, index), extra[index][which]);
          }
        }
      }
      return e;
    }

    CUTLASS_DEVICE void end() {
      if (params.tile_sums == nullptr) return;
      const Corner at = shared.corner;
      for (int which = 0; which < kSums; ++which) {
        CUTLASS_PRAGMA_UNROLL
        for (int i = 0; i < kRowsOfThread; ++i) {
          float of_tile = 0;
          if constexpr (kExtras) {
            of_tile = kept(which, i);
          } else {
            of_tile = sum[i];
          }
          // The four lanes that share the row.
          of_tile = joined(which, of_tile, __shfl_xor_sync(0xffffffffu, of_tile, 1));
          of_tile = joined(which, of_tile, __shfl_xor_sync(0xffffffffu, of_tile, 2));
          const int row = row_in_tile + row_of(i);
          if (thread % 4 != 0 || row >= at.rows_left) continue;
          params.tile_sums[(which * params.rows + at.row + row) * params.tiles + at.tile] = of_tile;
        }
      }
    }
  };

  template <bool kFromSource, typename... Ts>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Ts...>& args) {
    // The product's last corner, seen from the tile's first accumulator and from the thread's.
    const auto [rows_left, columns_left] = args.residue_cD;
    const auto [rows_of_thread, columns_of_thread] = args.residue_tCcD;
    const int first_row = cute::get<0>(args.problem_shape_mnkl) - rows_left;
    return Visitor<decltype(args.tCcD)>{{},
                                        *params_,
                                        args.tCcD,
                                        *storage_,
                                        args.thread_idx,
                                        rows_left - rows_of_thread,
                                        columns_left - columns_of_thread,
                                        {rows_left, columns_left, first_row, cute::get<1>(args.tile_coord_mnkl)},
                                        {}};
  }

 private:
  const Params* params_;
  SharedStorage* storage_;
};

}  // namespace fastdpo::cuda
