#include "workspace.h"

#include <algorithm>

#include "runtime.h"

namespace fastdpo::cuda {
namespace {

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The row stride of a chunk's logits, and of its operand in scratch memory: aligned, or out of alignment exactly as the
// rows of `retained` are.
int64_t chunk_stride(int64_t columns, int64_t vocabulary, bool retained) {
  return round_up(columns, kRowAlignment) + (retained ? vocabulary % kRowAlignment : 0);
}

}  // namespace

Level level_of(const Inputs& in, const void* hidden, bool operand, bool retained, bool extras) {
  return choose_level({.type = in.type,
                       .compute_capability = compute_capability(in.hidden.get_device_index()),
                       .hidden_units = in.hidden_units,
                       .hidden = hidden,
                       .weight = in.weight_data,
                       .operand = operand,
                       .retained_stride = retained ? in.vocabulary : 0,
                       .bias = in.bias != nullptr,
                       .softcap = in.transform.softcap != 0,
                       .extras = extras},
                      asked_level());
}

Workspace make_workspace(const Inputs& in, const WorkspaceCase& c) {
  const auto column_bytes = [&](int64_t rows) {
    int64_t bytes = c.column_bytes(rows);
    if (c.logits) bytes += scratch_bytes_per_column(c.level, c.extras, rows, in.compute_bytes());
    if (c.operand) bytes += rows * in.operand_bytes();
    return bytes;
  };
  const auto [rows, columns] = blocks_of({.pass = c.pass,
                                          .level = c.level,
                                          .rows = c.rows,
                                          .vocabulary = in.vocabulary,
                                          .hidden_units = in.hidden_units,
                                          .multiprocessors = multiprocessors(in.hidden.get_device_index()),
                                          .row_bytes = c.row_bytes,
                                          .column_bytes = column_bytes});
  const int64_t stride = chunk_stride(columns, in.vocabulary, c.retained);
  return {.level = c.level,
          .extras = c.extras,
          .rows = rows,
          .columns = columns,
          .stride = stride,
          .has_operand = c.operand,
          .logits = in.empty({c.logits ? rows : 0, scratch_columns(c.level, c.extras, stride)}, in.compute()),
          .operand = in.empty({c.operand ? rows : 0, stride}, in.operand())};
}

ChunkArguments Workspace::chunk(const Inputs& in, const BlockRows& block, int64_t column) const {
  void* chunk_operand = has_operand ? operand.data_ptr() : nullptr;
  if (block.retained != nullptr) chunk_operand = block.retained + column * in.operand_bytes();
  return {.level = level,
          .rows = {.type = in.type,
                   .count = block.count,
                   .logits = nullptr,  // in scratch memory, if anywhere
                   .logits_stride = stride,
                   .operand = chunk_operand,
                   .operand_stride = block.retained != nullptr ? in.vocabulary : stride,
                   .retained = block.retained != nullptr,
                   .first_column = column,
                   .columns = std::min(columns, in.vocabulary - column),
                   .bias = in.bias_at(column),
                   .targets = block.targets,
                   .ignore_index = in.ignore_index,
                   .transform = in.transform},
          .hidden = block.hidden,
          .weight = in.weight_row(column),
          .hidden_units = in.hidden_units,
          .extras = extras,
          .scratch = logits.data_ptr()};
}

}  // namespace fastdpo::cuda
