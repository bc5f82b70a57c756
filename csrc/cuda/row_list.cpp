#include "row_list.h"

#include <array>

#include "runtime.h"

namespace fastdpo::cuda {

RowList find_scored_rows(const Inputs& in) {
  if (in.num_scored == in.positions || in.positions == 0) return {in.positions, nullptr, Tensor()};
  Tensor storage = in.empty({in.positions + kTargetFactsSize}, ScalarType::Long);
  auto* positions = static_cast<int64_t*>(storage.data_ptr());
  int64_t* facts = positions + in.positions;
  partition_rows(in.targets, in.positions, in.ignore_index, in.vocabulary, positions, facts, in.stream);
  if (in.num_scored >= 0) return {in.num_scored, positions, storage};
  // A graph must do the same work at every replay: all rows, through the same order of rows.
  if (is_capturing(in.stream)) return {in.positions, positions, storage};
  std::array<int64_t, kTargetFactsSize> found;
  copy_to_host(found.data(), facts, sizeof(found), in.stream);
  const auto [scored, bad_position, bad_target] = found;
  STD_TORCH_CHECK(bad_position < 0, "`targets`[", bad_position, "] is ", bad_target, ", but must be ignore_index (",
                  in.ignore_index, ") or lie in [0, V = ", in.vocabulary, ")");
  return {scored, scored == in.positions ? nullptr : positions, storage};
}

}  // namespace fastdpo::cuda
