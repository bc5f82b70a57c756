// One chunk of the vocabulary, from hidden states to sums and gradient operand, at either level. Free of torch.
#pragma once

#include <cstdint>

#include "launch.h"
#include "level.h"

namespace fastdpo::cuda {

// Numbers of the compute type that a row needs as scratch memory for a chunk whose logits have this row stride: the
// logits themselves, or their tiles' sums.
int64_t scratch_columns(Level level, bool extras, int64_t stride);
// The same as bytes of one column for all of `rows`, rounded up.
int64_t scratch_bytes_per_column(Level level, bool extras, int64_t rows, int64_t number_bytes);
// What a chunk's size must be a multiple of, and what it is best a multiple of: the side of a product's tile.
int64_t least_chunk_multiple(Level level);
int64_t chunk_multiple(Level level);

struct ChunkArguments {
  Level level;
  // Without logits: Level 0's are in scratch memory, with logits_stride, and Level 1 has none.
  RowChunkArguments rows;
  const void* hidden;  // [count, hidden_units]
  const void* weight;  // [columns, hidden_units], the chunk's
  int64_t hidden_units;
  bool extras;    // whether the sums behind the extra outputs are formed; forward only
  void* scratch;  // [count, scratch_columns(level, extras, stride)] of the compute type
};

// Adds the chunk to the sums, and writes the operand if there is one. `direction` is what the earlier chunks' products
// have made of it; it shrinks where a row's exponent is raised.
void forward_chunk(const ChunkArguments& chunk, void* sums, void* direction, void* stream);

// The operand again, with the target's term in its column. `rows` and `row_state` are as in recompute_operand;
// `exponents` [count] are the rows' own, side by side; Level 1 alone reads them.
void backward_chunk(const ChunkArguments& chunk, const int64_t* rows, const void* row_state, int64_t positions,
                    const void* exponents, void* stream);

}  // namespace fastdpo::cuda
