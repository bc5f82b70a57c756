// What Level 1's product does to a tile of accumulators: CUTLASS's epilogue visits them here, and no others see them.
#pragma once

#include <cutlass/array.h>
#include <cutlass/cutlass.h>

#include <cstdint>
#include <cute/tensor.hpp>
#include <cutlass/epilogue/fusion/sm90_visitor_tma_warpspecialized.hpp>

namespace fastdpo::cuda {

// Rows of the tile are rows of hidden (the product's M), columns are vocabulary entries (its N). A thread's wgmma
// accumulators are then two rows of every 64, with a quarter of their columns each. So what belongs to a row (exponent,
// target, sum) is one register of a thread for dozens of accumulators, a row's sum is additions in the thread and two
// shuffles at the end, no warp holds a part of another warp's rows, and the columns that a thread holds side by side
// are side by side in memory. The other way round a thread would hold 2 rows of every 8, dozens in all, and a row's
// sum would run through all warps and shared memory.
template <int kTileRows, int kColumns>
struct ExponentialTile {
  using ElementAux = cutlass::bfloat16_t;  // CUTLASS lays out D by it where D is not written

  static_assert(kTileRows == 128, "a warp group has a tile to itself, and each thread fetches a row's Row");
  static constexpr int kRowsOfThread = kTileRows / 32;

  struct Arguments {
    float slope;
    const float* exponents;  // row r's at exponents[r * exponent_stride]
    int64_t exponent_stride;
    const int64_t* targets;  // [rows]
    int64_t first_column;    // the vocabulary entry of column 0
    float* tile_sums;        // [rows, tiles] or null
    int64_t tiles;
  };
  using Params = Arguments;

  // What a row's accumulators need. In shared memory rather than in registers, of which a thread has 232 and 192
  // accumulators; and since nothing read there moves over a barrier, the compiler cannot take all the tile's
  // exponentials before the first of them is stored, which made it spill.
  struct Row {
    float exponent;
    int target;  // a column of the tile; -1 when it is in another tile
  };
  struct SharedStorage {
    alignas(16) Row rows[kTileRows];
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
      : params_(&params), rows_(const_cast<Row*>(storage.rows)) {}

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
    Row* rows;           // the tile's, in shared memory
    int thread;          // of the warp group that has the tile
    int row_in_tile;     // the thread's first row
    int rows_left;       // of the product, from the tile's first row on; 0 or less in a tile beyond the last row
    int columns_left;    // of the product, from the tile's first column on
    int column_in_tile;  // the thread's first column
    int tile_row;        // the tile's first row
    int tile;            // its place along N
    float sum[kRowsOfThread];

    // A thread has rows 0, 8, 64, 72, ... from its first on.
    CUTLASS_DEVICE static constexpr int row_of(int index) { return index / 2 * 64 + index % 2 * 8; }
    CUTLASS_DEVICE static constexpr int index_of(int row) { return row / 64 * 2 + row % 64 / 8; }

    CUTLASS_DEVICE void begin() {
      Row mine{0.0f, -1};
      if (thread < rows_left) {
        const int64_t row = tile_row + thread;
        const int64_t column = params.targets[row] - params.first_column - int64_t{tile} * kColumns;
        mine.exponent = params.exponents[row * params.exponent_stride];
        if (column >= 0 && column < kColumns) mine.target = static_cast<int>(column);
      }
      rows[thread] = mine;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) sum[i] = 0;
    }
    CUTLASS_DEVICE bool begin_sync_needed() const { return true; }

    template <typename Accumulator, int kSize>
    CUTLASS_DEVICE cutlass::Array<float, kSize> visit(const cutlass::Array<Accumulator, kSize>& accumulators,
                                                      int fragment, int part_m, int part_n) {
      cutlass::Array<float, kSize> e;
      const auto places = coordinates(cute::_, cute::_, cute::_, part_m, part_n);
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kSize; ++i) {
        const auto place = places(fragment * kSize + i);
        const int row = cute::get<0>(place);
        const int column = cute::get<1>(place);
        const Row of_row = rows[row_in_tile + row];
        e[i] = expf(fmaf(accumulators[i], params.slope, -of_row.exponent));
        if (column == of_row.target - column_in_tile || column >= columns_left - column_in_tile) e[i] = 0;
        sum[index_of(row)] += e[i];
      }
      return e;
    }

    CUTLASS_DEVICE void end() {
      if (params.tile_sums == nullptr) return;
      CUTLASS_PRAGMA_UNROLL
      for (int i = 0; i < kRowsOfThread; ++i) {
        // The four lanes that share the row.
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        const int row = row_in_tile + row_of(i);
        if (thread % 4 == 0 && row < rows_left) params.tile_sums[(tile_row + row) * params.tiles + tile] = sum[i];
      }
    }
  };

  template <bool kFromSource, typename... Ts>
  CUTLASS_DEVICE auto get_consumer_store_callbacks(const cutlass::epilogue::fusion::ConsumerStoreArgs<Ts...>& args) {
    // The product's last corner, seen from the tile's first accumulator and from the thread's.
    const auto [rows_left, columns_left] = args.residue_cD;
    const auto [rows_of_thread, columns_of_thread] = args.residue_tCcD;
    return Visitor<decltype(args.tCcD)>{{},
                                        *params_,
                                        args.tCcD,
                                        rows_,
                                        args.thread_idx,
                                        rows_left - rows_of_thread,
                                        rows_left,
                                        columns_left,
                                        columns_left - columns_of_thread,
                                        cute::get<0>(args.problem_shape_mnkl) - rows_left,
                                        cute::get<1>(args.tile_coord_mnkl),
                                        {}};
  }

 private:
  const Params* params_;
  Row* rows_;
};

}  // namespace fastdpo::cuda
