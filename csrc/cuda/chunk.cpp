#include "chunk.h"

#include "exponentials.h"
#include "products.h"

namespace fastdpo::cuda {
namespace {

// The shorter side of what a library's product makes at a time.
constexpr int64_t kProductTile = 128;
static_assert(kProductTile % kRowAlignment == 0);

// z = hidden rows * (weight rows of the chunk)^T, accumulated in float32 (float64) and never rounded to 16 bits.
RowChunkArguments multiply_logits(const ChunkArguments& chunk) {
  RowChunkArguments rows = chunk.rows;
  rows.logits = chunk.scratch;
  multiply({.rows = rows.count,
            .columns = rows.columns,
            .depth = chunk.hidden_units,
            .operands = rows.type,
            .a = {chunk.hidden, chunk.hidden_units, false},
            .b = {chunk.weight, chunk.hidden_units, true},
            .out = chunk.scratch,
            .out_stride = rows.logits_stride,
            .out_type = compute_type(rows.type),
            .accumulate = false,
            .tensor_float32 = false});
  return rows;
}

ExponentialsArguments exponentials_of(const ChunkArguments& chunk, const void* exponents, int64_t exponent_stride,
                                      float* tile_sums) {
  const RowChunkArguments& rows = chunk.rows;
  return {.type = rows.type,
          .rows = rows.count,
          .columns = rows.columns,
          .depth = chunk.hidden_units,
          .hidden = chunk.hidden,
          .weight = chunk.weight,
          .slope = static_cast<float>(rows.transform.scale * rows.transform.inv_temperature),
          .exponents = static_cast<const float*>(exponents),
          .exponent_stride = exponent_stride,
          .targets = rows.targets,
          .first_column = rows.first_column,
          .operand = rows.operand,
          .operand_stride = rows.operand_stride,
          .tile_sums = tile_sums,
          .extras = chunk.extras};
}

}  // namespace

int64_t scratch_columns(Level level, bool extras, int64_t stride) {
  return level == Level::kFused ? tile_sums_of(extras) * tiles_of(stride) : stride;
}

int64_t scratch_bytes_per_column(Level level, bool extras, int64_t rows, int64_t number_bytes) {
  const int64_t bytes = rows * number_bytes;
  return level == Level::kFused ? (tile_sums_of(extras) * bytes + kTileColumns - 1) / kTileColumns : bytes;
}

int64_t least_chunk_multiple(Level level) { return level == Level::kFused ? kTileColumns : kRowAlignment; }

int64_t chunk_multiple(Level level) { return level == Level::kFused ? kTileColumns : kProductTile; }

void forward_chunk(const ChunkArguments& chunk, void* sums, void* direction, void* stream) {
  if (chunk.level == Level::kProducts) {
    sum_chunk(multiply_logits(chunk), sums, chunk.extras, direction, chunk.hidden_units, stream);
    return;
  }
  auto* tile_sums = static_cast<float*>(chunk.scratch);
  exponentials(exponentials_of(chunk, static_cast<float*>(sums) + kExponentInRowSums, kRowSumsSize, tile_sums), stream);
  settle_rows(chunk.rows, tile_sums, chunk.extras, chunk.hidden, chunk.weight, sums, direction, chunk.hidden_units,
              stream);
}

void backward_chunk(const ChunkArguments& chunk, const int64_t* rows, const void* row_state, int64_t positions,
                    const void* exponents, void* stream) {
  if (chunk.level == Level::kProducts) {
    recompute_operand(multiply_logits(chunk), rows, row_state, positions, stream);
    return;
  }
  exponentials(exponentials_of(chunk, exponents, 1, nullptr), stream);
  place_targets(chunk.rows, rows, row_state, positions, stream);
}

}  // namespace fastdpo::cuda
