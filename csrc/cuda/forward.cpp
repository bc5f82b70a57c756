// The forward op. For each block of scored rows:
//
//   start_rows   z_y, a dot product
//   for each chunk of the vocabulary:
//     forward_chunk  sums, operand
//     multiply       direction += operand * weight
//   finish_rows  sums -> logps, direction
//
// What forward_chunk is depends on the level (chunk.h): a product and the row kernel, or a product with the row
// kernel's work in it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "../fastdpo.h"
#include "products.h"
#include "row_list.h"
#include "runtime.h"
#include "token_logps.h"
#include "workspace.h"

namespace fastdpo::cuda {
namespace {

// What is wanted beside log-probabilities.
struct Asked {
  bool direction;
  bool entropy;
  bool log_sum_sq_probs;
  bool mean_logits;
  bool top_gap;

  bool more_sums() const { return entropy || log_sum_sq_probs || mean_logits; }
};

// csrc/fastdpo.h says what each holds.
struct Results {
  Tensor logps;
  Tensor row_state;
  Tensor direction;
  Tensor retained;
  Tensor entropy;
  Tensor log_sum_sq_probs;
  Tensor mean_logits;
  Tensor top_gap;

  ForwardResult tuple() const {
    return {logps, row_state, direction, retained, entropy, log_sum_sq_probs, mean_logits, top_gap};
  }
};

Results make_results(const Inputs& in, const Asked& asked, int64_t retained_rows) {
  const int64_t n = in.positions;
  return {.logps = in.empty({n}, in.compute()),
          .row_state = in.empty({kRowStates, n}, in.compute()),
          .direction = in.empty({asked.direction ? n : 0, in.hidden_units}, in.compute()),
          .retained = in.empty({retained_rows, in.vocabulary}, in.operand()),
          .entropy = in.empty({asked.entropy ? n : 0}, in.compute()),
          .log_sum_sq_probs = in.empty({asked.log_sum_sq_probs ? n : 0}, in.compute()),
          .mean_logits = in.empty({asked.mean_logits ? n : 0}, in.compute()),
          .top_gap = in.empty({asked.top_gap ? n : 0}, in.compute())};
}

ResultPointers pointers_of(const Inputs& in, const Asked& asked, const Results& results) {
  const auto if_asked = [](bool wanted, const Tensor& tensor) { return wanted ? tensor.data_ptr() : nullptr; };
  return {.logps = results.logps.data_ptr(),
          .row_state = results.row_state.data_ptr(),
          .direction = if_asked(asked.direction, results.direction),
          .entropy = if_asked(asked.entropy, results.entropy),
          .log_sum_sq_probs = if_asked(asked.log_sum_sq_probs, results.log_sum_sq_probs),
          .mean_logits = if_asked(asked.mean_logits, results.mean_logits),
          .top_gap = if_asked(asked.top_gap, results.top_gap),
          .positions = in.positions,
          .hidden_units = in.hidden_units};
}

// Rows [begin, end) of the list, whose operand is all in one place: in `retained`, or in scratch memory if anywhere.
struct Range {
  int64_t begin;
  int64_t end;
  bool retain;
};

// Computes the rows of a range, block after block in the same memory.
class ForwardBlocks {
 public:
  ForwardBlocks(const Inputs& in, const RowList& rows, const Asked& asked, const Results& results, const Range& range)
      : in_(in),
        rows_(rows),
        asked_(asked),
        results_(results),
        range_(range),
        space_(make_workspace(in, workspace_case())) {
    sums_ = in.empty({space_.rows, kRowSumsSize}, in.compute());
    row_targets_ = in.empty({space_.rows}, ScalarType::Long);
    gathered_ = in.empty({rows.listed() ? space_.rows : 0, in.hidden_units}, in.type);
    weight_cast_ = in.empty({casts_weight() ? space_.columns : 0, in.hidden_units}, in.operand());
    // Where row i is position i, the direction's own memory holds the sum while it grows.
    accumulator_ = in.empty({asked.direction && rows.listed() ? space_.rows : 0, in.hidden_units}, in.compute());
  }

  void run() const {
    for (int64_t first = range_.begin; first < range_.end; first += space_.rows) {
      const Block block = block_from(first);
      const BlockRows rows = start(block);
      for (int64_t column = 0; column < in_.vocabulary; column += space_.columns) add_chunk(block, rows, column);
      finish(block);
    }
  }

 private:
  struct Block {
    int64_t first;
    int64_t count;
    const int64_t* positions;  // null: row i is position first + i
    void* accumulated;         // [count, H], the direction while it grows; null without one
    char* retained;            // [count, V]; null where its rows are not
  };

  bool casts_weight() const { return asked_.direction && in_.weight_needs_cast(); }

  WorkspaceCase workspace_case() const {
    const bool writes = range_.retain || asked_.direction;
    const bool any_extras = asked_.more_sums() || asked_.top_gap;
    const Level level = level_of(in_, rows_.listed() ? nullptr : in_.hidden_data, writes, range_.retain, any_extras);
    const int64_t direction_bytes = asked_.direction ? in_.hidden_units * in_.compute_bytes() : 0;
    const int64_t cast_bytes = casts_weight() ? in_.hidden_units * in_.operand_bytes() : 0;
    return {.pass = asked_.direction ? Pass::kDirection : Pass::kSums,
            .level = level,
            // Level 0 has the largest logit at hand in any case.
            .extras = asked_.more_sums() || (asked_.top_gap && level == Level::kFused),
            .rows = range_.end - range_.begin,
            .logits = true,
            .operand = writes && !range_.retain,
            .retained = range_.retain,
            .row_bytes = rows_.listed() ? in_.hidden_bytes() + direction_bytes : 0,
            .column_bytes = [cast_bytes](int64_t) { return cast_bytes; }};
  }

  Block block_from(int64_t first) const {
    Block block{.first = first,
                .count = std::min(space_.rows, range_.end - first),
                .positions = rows_.from(first),
                .accumulated = nullptr,
                .retained = nullptr};
    if (asked_.direction) {
      block.accumulated = rows_.listed() ? accumulator_.data_ptr()
                                         : static_cast<char*>(results_.direction.data_ptr()) +
                                               first * in_.hidden_units * in_.compute_bytes();
    }
    if (range_.retain) {
      block.retained = static_cast<char*>(results_.retained.data_ptr()) + first * in_.vocabulary * in_.operand_bytes();
    }
    return block;
  }

  // The targets' logits, with which the sums begin; returns the rows as the chunks' products read them.
  BlockRows start(const Block& block) const {
    const void* hidden = in_.hidden_row(block.first);
    start_rows({.type = in_.type,
                .hidden = rows_.listed() ? in_.hidden_data : hidden,
                .weight = in_.weight_data,
                .bias = in_.bias,
                .targets = rows_.listed() ? in_.targets : in_.targets + block.first,
                .rows = block.positions,
                .count = block.count,
                .hidden_units = in_.hidden_units,
                .vocabulary = in_.vocabulary,
                .ignore_index = in_.ignore_index,
                .transform = in_.transform,
                .sums = sums_.data_ptr(),
                .row_targets = row_targets()},
               in_.stream);
    if (rows_.listed()) {
      gather_rows(in_.hidden_data, block.positions, block.count, in_.hidden_bytes(), gathered_.data_ptr(), in_.stream);
      hidden = gathered_.data_ptr();
    }
    return {.count = block.count, .hidden = hidden, .targets = row_targets(), .retained = block.retained};
  }

  void add_chunk(const Block& block, const BlockRows& rows, int64_t column) const {
    const ChunkArguments chunk = space_.chunk(in_, rows, column);
    forward_chunk(chunk, sums_.data_ptr(), block.accumulated, in_.stream);
    if (!asked_.direction) return;
    const void* weight = chunk.weight;
    if (in_.weight_needs_cast()) {
      convert(weight, in_.type, weight_cast_.data_ptr(), in_.operand(), chunk.rows.columns * in_.hidden_units,
              in_.stream);
      weight = weight_cast_.data_ptr();
    }
    multiply({.rows = block.count,
              .columns = in_.hidden_units,
              .depth = chunk.rows.columns,
              .operands = in_.operand(),
              .a = {chunk.rows.operand, chunk.rows.operand_stride, false},
              .b = {weight, in_.hidden_units, false},
              .out = block.accumulated,
              .out_stride = in_.hidden_units,
              .out_type = in_.compute(),
              .accumulate = column > 0,
              .tensor_float32 = in_.weight_needs_cast()});
  }

  void finish(const Block& block) const {
    finish_rows({.type = in_.type,
                 .sums = sums_.data_ptr(),
                 .targets = row_targets(),
                 .rows = block.positions,
                 .first_position = block.first,
                 .count = block.count,
                 .ignore_index = in_.ignore_index,
                 .vocabulary = in_.vocabulary,
                 .weight = in_.weight_data,
                 .accumulated = block.accumulated,
                 .retained = block.retained,
                 .transform = in_.transform,
                 .results = pointers_of(in_, asked_, results_)},
                in_.stream);
  }

  int64_t* row_targets() const { return static_cast<int64_t*>(row_targets_.data_ptr()); }

  const Inputs& in_;
  const RowList& rows_;
  const Asked& asked_;
  const Results& results_;
  const Range range_;
  const Workspace space_;
  Tensor sums_;
  Tensor row_targets_;
  Tensor gathered_;
  Tensor weight_cast_;
  Tensor accumulator_;
};

}  // namespace

ForwardResult token_logps_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                                  const std::optional<Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                                  double logit_scale, double softcap, double temperature, bool need_direction,
                                  int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits,
                                  bool top_gap) {
  const DeviceScope device(hidden.get_device_index());
  const Inputs in =
      check_inputs(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
  STD_TORCH_CHECK(retain_bytes >= 0, "`retain_bytes` is ", retain_bytes, ", but must not be negative");
  const int64_t n = in.positions;
  const int64_t retainable = std::min(n, retain_bytes / (in.vocabulary * in.operand_bytes()));

  const Asked asked{need_direction, entropy, log_sum_sq_probs, mean_logits, top_gap};
  const Results results = make_results(in, asked, retainable);
  if (n == 0) return results.tuple();
  const RowList rows = find_scored_rows(in);
  if (rows.count < n) {
    fill_rows(in.compute(), in.targets, ignore_index, rows.from(rows.count), n - rows.count,
              pointers_of(in, asked, results), in.stream);
  }
  const int64_t retained = std::min(retainable, rows.count);
  for (const Range& range : {Range{0, retained, true}, Range{retained, rows.count, false}}) {
    if (range.begin < range.end) ForwardBlocks(in, rows, asked, results, range).run();
  }
  return results.tuple();
}

}  // namespace fastdpo::cuda
