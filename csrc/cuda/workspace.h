// What an op works in beside its results: how many tokens and vocabulary entries it takes at a time, and the scratch
// memory of a chunk of them.
#pragma once

#include <cstdint>
#include <functional>

#include "blocks.h"
#include "chunk.h"
#include "inputs.h"
#include "level.h"

namespace fastdpo::cuda {

// `hidden` is what the products read: the input, or a copy of its rows, for which null will do, as torch puts memory on
// a boundary. `operand` says whether exponentials are written, `retained` whether they go into the result of that name.
Level level_of(const Inputs& in, const void* hidden, bool operand, bool retained, bool extras);

struct WorkspaceCase {
  Pass pass;
  Level level;
  bool extras;    // whether the sums behind the extra outputs are formed
  int64_t rows;   // of all blocks together
  bool logits;    // whether any chunk's logits are multiplied
  bool operand;   // whether exponentials are written to scratch memory
  bool retained;  // whether they are written to `retained`
  // The op's own memory: for a row of a block; and for a column of a chunk, when a block has so many rows.
  int64_t row_bytes;
  std::function<int64_t(int64_t rows)> column_bytes;
};

// The rows of a block, side by side.
struct BlockRows {
  int64_t count;
  const void* hidden;        // [count, H]
  const int64_t* targets;    // [count]
  char* retained = nullptr;  // [count, V]: where the exponentials go. Null: to scratch memory, if anywhere
};

struct Workspace {
  Level level;
  bool extras;
  int64_t rows;     // of a block
  int64_t columns;  // of a chunk
  int64_t stride;   // of a row of the logits, and of the operand in scratch memory
  bool has_operand;
  Tensor logits;   // Level 0's, or the sums of Level 1's tiles
  Tensor operand;  // [rows, stride]; [0, stride] where exponentials are not written here

  // The chunk that begins at the vocabulary entry `column`.
  ChunkArguments chunk(const Inputs& in, const BlockRows& block, int64_t column) const;
};

Workspace make_workspace(const Inputs& in, const WorkspaceCase& c);

}  // namespace fastdpo::cuda
