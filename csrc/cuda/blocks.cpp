#include "blocks.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <string>
#include <string_view>

#include "chunk.h"
#include "exponentials.h"

namespace fastdpo::cuda {
namespace {

// Time is counted in steps: one multiprocessor takes one to add one rank to a tile of 128 x 256 sums. All tiles of a
// product run in waves of one a multiprocessor, and a wave that is not full takes as long as a full one: with 132
// multiprocessors, 672 tiles take 6 waves, as 792 would. That, more than memory, is what a good cut saves.
struct Tile {
  int64_t rows;
  int64_t columns;
  double steps;         // for one rank
  int64_t cluster = 1;  // tiles of rows come in multiples of it
};
// What matrix products on 16-bit numbers are made of on current devices; a library takes the tile that suits. A tile
// half the size takes more than half the time, since it reads more for each number that it sums.
constexpr Tile kLibraryTiles[] = {{128, 256, 1.0}, {256, 128, 1.0}, {128, 128, 0.6}};
constexpr Tile kLevel1Tile{128, kTileColumns, kTileColumns / 256.0, 2};

// An H100's balance: 800 TFLOP/s (a step of 132 multiprocessors is 10.8 ns) beside 3 TB/s.
constexpr double kBytesOfStep = 245;  // of memory traffic, for each multiprocessor
// Three or four kernels a chunk, each with a start and an end of some microseconds in which little runs.
constexpr double kStepsOfChunk = 1000;
// Smaller blocks would read the weight for too few rows.
constexpr int64_t kLeastRows = 512;

// Of columns, for a number of rows: some 10 microseconds of the host's time.
constexpr int64_t kMostTrials = 128;

constexpr const char* kVariable = "FASTDPO_CUDA_BLOCKS";

int64_t parts(int64_t total, int64_t size) { return (total + size - 1) / size; }
int64_t round_up(int64_t value, int64_t multiple) { return parts(value, multiple) * multiple; }

double waves(const BlockCase& c, const Tile& tile, int64_t rows, int64_t columns) {
  const int64_t tiles = round_up(parts(rows, tile.rows), tile.cluster) * parts(columns, tile.columns);
  return tile.steps * static_cast<double>(parts(tiles, c.multiprocessors));
}

double library_waves(const BlockCase& c, int64_t rows, int64_t columns) {
  double least = waves(c, kLibraryTiles[0], rows, columns);
  for (const Tile& tile : kLibraryTiles) least = std::min(least, waves(c, tile, rows, columns));
  return least;
}

// A product of 16-bit operands, and the traffic of `sum_bytes` for each element of its result, which comes at its end.
double product_steps(const BlockCase& c, double all_waves, int64_t rows, int64_t columns, int64_t depth,
                     int64_t sum_bytes) {
  const double bytes_of_step = kBytesOfStep * c.multiprocessors;
  const double operands = 2.0 * static_cast<double>((rows + columns) * depth) / bytes_of_step;
  return std::max(all_waves * static_cast<double>(depth), operands) +
         static_cast<double>(sum_bytes * rows * columns) / bytes_of_step;
}

double chunk_steps(const BlockCase& c, int64_t rows, int64_t columns) {
  const double first_waves =
      c.level == Level::kFused ? waves(c, kLevel1Tile, rows, columns) : library_waves(c, rows, columns);
  const double steps = kStepsOfChunk + product_steps(c, first_waves, rows, columns, c.hidden_units, 0);
  switch (c.pass) {
    case Pass::kSums:
      return steps;
    case Pass::kDirection:  // float32 sums are read and written for every chunk
      return steps + product_steps(c, library_waves(c, rows, c.hidden_units), rows, c.hidden_units, columns, 8);
    case Pass::kWeight:  // float32 sums are read and written for every block; a single block's are written in 16 bits
      break;
  }
  return steps + product_steps(c, library_waves(c, columns, c.hidden_units), columns, c.hidden_units, rows,
                               rows < c.rows ? 8 : 2);
}

// All chunks of all blocks: whole ones, and what is left at either end.
double total_steps(const BlockCase& c, const Blocks& blocks) {
  const auto block_steps = [&](int64_t rows) {
    const int64_t left = c.vocabulary % blocks.columns;
    const double whole = static_cast<double>(c.vocabulary / blocks.columns) * chunk_steps(c, rows, blocks.columns);
    return left == 0 ? whole : whole + chunk_steps(c, rows, left);
  };
  const int64_t left = c.rows % blocks.rows;
  const double whole = static_cast<double>(c.rows / blocks.rows) * block_steps(blocks.rows);
  return left == 0 ? whole : whole + block_steps(left);
}

// The number that `text` is, if it is a positive one; 0 otherwise.
int64_t positive_number(std::string_view text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? std::max<int64_t>(value, 0) : 0;
}

}  // namespace

Blocks choose_blocks(const BlockCase& c) {
  const int64_t multiple = chunk_multiple(c.level);
  const int64_t whole = round_up(c.vocabulary, multiple);
  Blocks best{0, multiple};
  double least = std::numeric_limits<double>::infinity();
  // All rows, a half of them, a quarter ... in whole tiles.
  for (int64_t cuts = 1, rows = c.rows;; cuts *= 2) {
    const bool last = rows <= kLeastRows;
    if (last || rows * c.row_bytes <= kWorkspaceBytes) {
      const int64_t bytes = c.column_bytes(rows);
      const int64_t most = bytes == 0 ? whole : std::min(kWorkspaceBytes / bytes / multiple * multiple, whole);
      // Chunks that use a quarter of the memory or less have more ends than full waves could save. A long way down is
      // taken in longer steps: a wave more or less in many is not worth the host's time.
      const int64_t stride = multiple * std::max<int64_t>(most / multiple / kMostTrials, 1);
      for (int64_t columns = most; columns > most / 4; columns -= stride) {
        const double steps = total_steps(c, {rows, columns});
        if (steps < least) {
          best = {rows, columns};
          least = steps;
        }
      }
    }
    if (last) break;
    rows = std::min(round_up(parts(c.rows, 2 * cuts), kLibraryTiles[0].rows), c.rows);
  }
  // Where not even the shortest block had memory for the narrowest chunk.
  if (best.rows == 0) best.rows = std::min(kLeastRows, c.rows);
  return best;
}

std::optional<Blocks> asked_blocks() {
  const char* value = std::getenv(kVariable);
  const std::string_view text = value == nullptr ? "" : value;
  if (text.empty()) return std::nullopt;
  const size_t comma = std::min(text.find(','), text.size());
  const Blocks asked{positive_number(text.substr(0, comma)),
                     comma == text.size() ? 0 : positive_number(text.substr(comma + 1))};
  if (asked.rows == 0 || asked.columns == 0) {
    throw std::runtime_error(std::string("fastdpo: ") + kVariable + " is '" + value +
                             "', but must be two positive numbers with a comma between: tokens of a block, and "
                             "vocabulary entries of a chunk");
  }
  return asked;
}

Blocks blocks_of(const BlockCase& c) {
  const std::optional<Blocks> asked = asked_blocks();
  if (!asked.has_value()) return choose_blocks(c);
  const int64_t multiple = least_chunk_multiple(c.level);
  const int64_t columns = std::min(asked->columns, c.vocabulary);
  // The next block's rows of `retained` begin as far from a 16-byte boundary as these do.
  return {std::min(round_up(asked->rows, kRowAlignment), c.rows), round_up(columns, multiple)};
}

}  // namespace fastdpo::cuda
