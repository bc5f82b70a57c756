// Level 1's first product: exponentials of a chunk of logits, and no logits. Free of torch and of CUDA headers.
#pragma once

#include <cstdint>

#include "launch.h"

// The columns of one tile of the product, which are summed together. The tests' host build takes small ones.
#ifndef FASTDPO_TILE_COLUMNS
#define FASTDPO_TILE_COLUMNS 192
#endif

namespace fastdpo::cuda {

constexpr int64_t kTileColumns = FASTDPO_TILE_COLUMNS;
static_assert(kTileColumns % kRowAlignment == 0);

constexpr int64_t tiles_of(int64_t columns) { return (columns + kTileColumns - 1) / kTileColumns; }

// What is summed of a row's entries in a tile, the target's left out; the largest logit counts as a sum, too.
enum TileSum : int { kTileExponentials, kTileWeighted, kTileSquares, kTileLogits, kTileLargest, kTileSums };
constexpr int64_t tile_sums_of(bool extras) { return extras ? kTileSums : 1; }

// Of rows r and columns j: z = slope * hidden[r] . weight[j] and e = exp(z - exponents[r]), which is 0 where j is the
// row's target.
// float32 from the product's accumulators on; rounded once, where it is written.
struct ExponentialsArguments {
  Type type;           // of hidden and weight: bfloat16, or float16 without operand and extras
  int64_t rows;        // at least 1
  int64_t columns;     // at least 1
  int64_t depth;       // a multiple of kRowAlignment
  const void* hidden;  // [rows, depth], on a 16-byte boundary
  const void* weight;  // [columns, depth], the chunk's, on a 16-byte boundary
  float slope;
  const float* exponents;  // row r's at exponents[r * exponent_stride]
  int64_t exponent_stride;
  const int64_t* targets;  // [rows]
  int64_t first_column;    // the vocabulary entry of column 0
  void* operand;           // [rows, operand_stride] bfloat16, on a 16-byte boundary; or null: not wanted
  int64_t operand_stride;  // a multiple of kRowAlignment
  // [tile_sums_of(extras), rows, tiles_of(columns)], or null: not wanted. Sums over a tile, of e before it is rounded:
  // e; with extras also e (z - exponent), e^2, z, and the largest z, -inf where the target is alone in its tile.
  float* tile_sums;
  bool extras;
};

// Queued on `stream`. Throws where exponentials_missing() says why there are none.
void exponentials(const ExponentialsArguments& arguments, void* stream);

// Why this build has no Level 1, in a few words; null if it has.
const char* exponentials_missing();

}  // namespace fastdpo::cuda
