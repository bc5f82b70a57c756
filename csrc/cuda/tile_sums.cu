#include <cstddef>

#include "row_chunk.cuh"
#include "tile_sums.cuh"

namespace fastdpo::cuda {
namespace {

template <typename T, bool kExtras>
void launch_settle_rows(const TiledChunk& chunk, const float* tile_sums, const void* hidden, const void* weight,
                        int64_t count, void* stream) {
  const TileChunk<T> tiles{tile_sums,
                           static_cast<int>(tiles_of(chunk.columns)),
                           count,
                           static_cast<const T*>(hidden),
                           static_cast<const T*>(weight),
                           chunk.hidden_units};
  launch_kernel("settle_rows", settle_rows_kernel<T, kExtras>, count, kBlockThreads, stream, chunk, tiles);
}

}  // namespace

void settle_rows(const RowChunkArguments& arguments, const float* tile_sums, bool extras, const void* hidden,
                 const void* weight, void* sums, void* direction, int64_t hidden_units, void* stream) {
  static_assert(offsetof(RowSums<float>, exponent) == kExponentInRowSums * sizeof(float));
  TiledChunk chunk = row_chunk<float, bfloat16>(arguments);
  chunk.sums = static_cast<RowSums<float>*>(sums);
  chunk.direction = static_cast<float*>(direction);
  chunk.hidden_units = hidden_units;
  const auto launch = arguments.type == Type::kFloat16 ? launch_settle_rows<half, false>
                      : extras                         ? launch_settle_rows<bfloat16, true>
                                                       : launch_settle_rows<bfloat16, false>;
  launch(chunk, tile_sums, hidden, weight, arguments.count, stream);
}

void place_targets(const RowChunkArguments& arguments, const int64_t* rows, const void* row_state, int64_t positions,
                   void* stream) {
  TiledChunk chunk = row_chunk<float, bfloat16>(arguments);
  chunk.rows = rows;
  chunk.row_state = static_cast<const float*>(row_state);
  chunk.state_stride = positions;
  launch_kernel("place_targets", place_targets_kernel, arguments.count, kBlockThreads, stream, chunk);
}

}  // namespace fastdpo::cuda
