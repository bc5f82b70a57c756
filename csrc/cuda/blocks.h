// How an op's work is cut: how many tokens, and how many vocabulary entries, at a time. Free of torch and of CUDA
// headers. What is assumed of devices to decide it stands in blocks.cpp, and nowhere else.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>

#include "level.h"

namespace fastdpo::cuda {

struct Blocks {
  int64_t rows;     // of a token block
  int64_t columns;  // of a vocabulary chunk
};

// The products of a block and a chunk, after the one that makes its logits.
enum class Pass {
  kSums,       // none
  kDirection,  // forward: [rows, H] += operand [rows, columns] * weight
  kWeight      // backward: [columns, H] += operand^T * hidden [rows, H]
};

struct BlockCase {
  Pass pass;
  Level level;  // of the product that makes the logits
  int64_t rows;
  int64_t vocabulary;
  int64_t hidden_units;
  int multiprocessors;
  // Scratch memory: of a row of a block, whatever the chunk is; and of a column of a chunk, for a block of so many
  // rows.
  int64_t row_bytes;
  std::function<int64_t(int64_t rows)> column_bytes;
};

// Beside inputs, outputs and N x H numbers, an op takes this much memory for a chunk, whatever V and N are, and at most
// as much for the rows of a block.
constexpr int64_t kWorkspaceBytes = int64_t{128} << 20;

// The cut with the least estimated time of those whose scratch memory fits; one of the least memory where none does.
// 0 < rows <= c.rows, which must not be 0; columns is a multiple of chunk_multiple(c.level), so it may pass V. The same
// case is always cut alike.
Blocks choose_blocks(const BlockCase& c);

// What FASTDPO_CUDA_BLOCKS asks for, as "rows,columns", in place of choose_blocks; nothing where it is not set or
// empty. For measurements. Throws if it is anything but two positive numbers.
std::optional<Blocks> asked_blocks();

// asked_blocks() fitted to the case, or choose_blocks().
Blocks blocks_of(const BlockCase& c);

}  // namespace fastdpo::cuda
