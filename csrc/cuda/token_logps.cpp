// The order of things: which rows, which chunks, which kernel after which product. Against the LibTorch stable ABI
// only.
//
// forward, for each block of scored rows:        backward, for each chunk of the vocabulary:
//   start_rows   z_y, a dot product                for rows whose operand was not retained:
//   for each chunk of the vocabulary:                backward_chunk   operand
//     forward_chunk  sums, operand                 multiply           grad_weight = operand^T * scaled hidden
//     multiply       direction += operand * weight                      or weight_sum += the same
//   finish_rows  sums -> logps, direction
//
// What forward_chunk and backward_chunk are depends on the level (chunk.h): a product and the row kernel, or a product
// with the row kernel's work in it.
#include "token_logps.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../fastdpo.h"
#include "blocks.h"
#include "chunk.h"
#include "launch.h"
#include "level.h"
#include "products.h"
#include "runtime.h"

namespace fastdpo::cuda {
namespace {

using torch::headeronly::ScalarType;

std::optional<Type> float_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return Type::kFloat32;
    case ScalarType::Double:
      return Type::kFloat64;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    default:
      return std::nullopt;
  }
}

ScalarType scalar_type(Type type) {
  switch (type) {
    case Type::kFloat32:
      return ScalarType::Float;
    case Type::kFloat64:
      return ScalarType::Double;
    case Type::kFloat16:
      return ScalarType::Half;
    case Type::kBFloat16:
      break;
  }
  return ScalarType::BFloat16;
}

std::string text(ScalarType type) { return torch::headeronly::toString(type); }

std::string shape_text(const Tensor& tensor) {
  std::string out = "[";
  for (int64_t i = 0; i < tensor.dim(); ++i) out += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return out + "]";
}

std::string text(const std::vector<int64_t>& shape) {
  std::string out = "[";
  for (size_t i = 0; i < shape.size(); ++i) out += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  return out + "]";
}

// Every tensor argument passes here once; nothing below looks at a type, shape or device again.
void check_tensor(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape, ScalarType type,
                  const Tensor& hidden) {
  STD_TORCH_CHECK(tensor.scalar_type() == type, "`", name, "` is ", text(tensor.scalar_type()), ", but must be ",
                  text(type));
  bool same = tensor.dim() == static_cast<int64_t>(shape.size());
  for (size_t i = 0; same && i < shape.size(); ++i) same = tensor.size(static_cast<int64_t>(i)) == shape[i];
  STD_TORCH_CHECK(same, "`", name, "` has shape ", shape_text(tensor), ", but must have ", text(shape));
  STD_TORCH_CHECK(tensor.is_contiguous(), "`", name, "` must be contiguous");
  STD_TORCH_CHECK(tensor.is_cpu() == hidden.is_cpu() && tensor.get_device_index() == hidden.get_device_index(), "`",
                  name, "` is on another device than `hidden` (device index ", tensor.get_device_index(), ", not ",
                  hidden.get_device_index(), ")");
}

// The inputs that both ops share, checked.
struct Inputs {
  const Tensor& hidden;
  Type type;
  int64_t positions;     // N
  int64_t hidden_units;  // H
  int64_t vocabulary;    // V
  int64_t ignore_index;
  Transform transform;
  void* stream;
  const char* hidden_data;
  const char* weight_data;
  const int64_t* targets;
  Type bias_type;
  Tensor bias_as_compute;  // kept alive for `bias`
  const char* bias = nullptr;

  Type compute() const { return compute_type(type); }
  Type operand() const { return operand_type(type); }
  // The gradient products have operands of another type than the weight.
  bool weight_needs_cast() const { return operand() != type; }

  Tensor empty(std::vector<int64_t> shape, Type element) const { return empty(std::move(shape), scalar_type(element)); }
  Tensor empty(std::vector<int64_t> shape, ScalarType element) const {
    try {
      return torch::stable::new_empty(hidden, shape, element);
    } catch (const std::exception& error) {
      check_device(stream);
      // The stable ABI says only that a call failed. The front end looks for these words
      // (fastdpo/logps/out_of_memory.py).
      throw std::runtime_error("fastdpo: out of memory: could not allocate " + text(shape) + " of " + text(element) +
                               " (" + error.what() + ")");
    }
  }
  const char* weight_row(int64_t entry) const { return weight_data + entry * hidden_units * size_of(type); }
  const char* bias_at(int64_t entry) const { return bias == nullptr ? nullptr : bias + entry * size_of(compute()); }
};

Inputs check_inputs(const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                    const std::optional<Tensor>& bias, int64_t ignore_index, int64_t num_scored, double logit_scale,
                    double softcap, double temperature) {
  const ScalarType type = hidden.scalar_type();
  const std::optional<Type> input_type = float_type(type);
  const std::optional<Type> bias_type = bias.has_value() ? float_type(bias->scalar_type()) : input_type;
  STD_TORCH_CHECK(input_type.has_value(), "`hidden` is ", text(type),
                  ", but must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(bias_type.has_value(), "`bias` is ", text(bias->scalar_type()),
                  ", but must be float32, float64, float16 or bfloat16");
  STD_TORCH_CHECK(hidden.dim() == 2, "`hidden` has shape ", shape_text(hidden), ", but must have [N, H]");
  STD_TORCH_CHECK(weight.dim() == 2, "`weight` has shape ", shape_text(weight), ", but must have [V, H]");
  const int64_t positions = hidden.size(0);
  const int64_t hidden_units = hidden.size(1);
  const int64_t vocabulary = weight.size(0);
  constexpr int64_t kMostEntries = (int64_t{1} << 31) - 256;  // a chunk, rounded up, is counted in 32 bits
  STD_TORCH_CHECK(vocabulary >= 1 && vocabulary <= kMostEntries && hidden_units >= 1 && hidden_units <= kMostEntries,
                  "`weight` has shape ", shape_text(weight), ", but both sizes must lie in [1, ", kMostEntries, "]");
  check_tensor("hidden", hidden, {positions, hidden_units}, type, hidden);
  check_tensor("weight", weight, {vocabulary, hidden_units}, type, hidden);
  check_tensor("targets", targets, {positions}, ScalarType::Long, hidden);
  if (bias.has_value()) check_tensor("bias", *bias, {vocabulary}, bias->scalar_type(), hidden);
  STD_TORCH_CHECK(num_scored >= -1 && num_scored <= positions, "`num_scored` is ", num_scored,
                  ", but must be -1 (not known) or lie in [0, N = ", positions, "]");
  STD_TORCH_CHECK(softcap >= 0, "`softcap` is ", softcap, ", but must be positive, or 0 for none");
  STD_TORCH_CHECK(temperature > 0, "`temperature` is ", temperature, ", but must be positive");

  Inputs in{hidden,
            *input_type,
            positions,
            hidden_units,
            vocabulary,
            ignore_index,
            {logit_scale, softcap, 1 / temperature},
            current_stream(hidden.get_device_index()),
            static_cast<const char*>(hidden.data_ptr()),
            static_cast<const char*>(weight.data_ptr()),
            static_cast<const int64_t*>(targets.data_ptr()),
            *bias_type,
            Tensor()};
  if (bias.has_value()) {
    // In the compute type, so that the row kernel needs no instantiation for every type of bias.
    in.bias_as_compute = *bias;
    if (in.compute() != in.bias_type) {
      in.bias_as_compute = in.empty({vocabulary}, in.compute());
      convert(bias->data_ptr(), in.bias_type, in.bias_as_compute.data_ptr(), in.compute(), vocabulary, in.stream);
    }
    in.bias = static_cast<const char*>(in.bias_as_compute.data_ptr());
  }
  return in;
}

// The rows that the products run over, scored ones first.
struct ScoredRows {
  int64_t count;
  // [N] positions; rows beyond `count` are not computed. Null when row i is position i for all.
  const int64_t* positions;
  Tensor storage;
};

ScoredRows find_scored_rows(const Inputs& in, int64_t num_scored) {
  if (num_scored == in.positions || in.positions == 0) return {in.positions, nullptr, Tensor()};
  Tensor storage = in.empty({in.positions + kTargetFactsSize}, ScalarType::Long);
  auto* positions = static_cast<int64_t*>(storage.data_ptr());
  int64_t* facts = positions + in.positions;
  partition_rows(in.targets, in.positions, in.ignore_index, in.vocabulary, positions, facts, in.stream);
  if (num_scored >= 0) return {num_scored, positions, storage};
  // A graph must do the same work at every replay: all rows, through the same order of rows.
  if (is_capturing(in.stream)) return {in.positions, positions, storage};
  std::array<int64_t, kTargetFactsSize> found;
  copy_to_host(found.data(), facts, sizeof(found), in.stream);
  const auto [scored, bad_position, bad_target] = found;
  STD_TORCH_CHECK(bad_position < 0, "`targets`[", bad_position, "] is ", bad_target, ", but must be ignore_index (",
                  in.ignore_index, ") or lie in [0, V = ", in.vocabulary, ")");
  return {scored, scored == in.positions ? nullptr : positions, storage};
}

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The row stride of a chunk's logits and of its operand when it has scratch memory of its own: aligned, or out of
// alignment exactly as the rows of `retained` are.
int64_t chunk_stride(int64_t chunk, int64_t vocabulary, bool retained) {
  return round_up(chunk, kRowAlignment) + (retained ? vocabulary % kRowAlignment : 0);
}

// `hidden` is what the products read, the input or a copy of its rows; `retained` whether the operand goes there.
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

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_logps_forward(
    const Tensor& hidden, const Tensor& weight, const Tensor& targets, const std::optional<Tensor>& bias,
    int64_t ignore_index, int64_t num_scored, double logit_scale, double softcap, double temperature,
    bool need_direction, int64_t retain_bytes, bool entropy, bool log_sum_sq_probs, bool mean_logits, bool top_gap) {
  const DeviceScope device(hidden.get_device_index());
  const Inputs in =
      check_inputs(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
  STD_TORCH_CHECK(retain_bytes >= 0, "`retain_bytes` is ", retain_bytes, ", but must not be negative");
  const int64_t n = in.positions;
  const int64_t retainable = std::min(n, retain_bytes / (in.vocabulary * size_of(in.operand())));

  Tensor logps = in.empty({n}, in.compute());
  Tensor row_state = in.empty({kRowStates, n}, in.compute());
  Tensor direction = in.empty({need_direction ? n : 0, in.hidden_units}, in.compute());
  Tensor retained = in.empty({retainable, in.vocabulary}, in.operand());
  Tensor entropy_out = in.empty({entropy ? n : 0}, in.compute());
  Tensor log_sum_sq_probs_out = in.empty({log_sum_sq_probs ? n : 0}, in.compute());
  Tensor mean_logits_out = in.empty({mean_logits ? n : 0}, in.compute());
  Tensor top_gap_out = in.empty({top_gap ? n : 0}, in.compute());
  auto outputs = [&] {
    return std::make_tuple(logps, row_state, direction, retained, entropy_out, log_sum_sq_probs_out, mean_logits_out,
                           top_gap_out);
  };
  if (n == 0) return outputs();
  const ResultPointers results{logps.data_ptr(),
                               row_state.data_ptr(),
                               need_direction ? direction.data_ptr() : nullptr,
                               entropy ? entropy_out.data_ptr() : nullptr,
                               log_sum_sq_probs ? log_sum_sq_probs_out.data_ptr() : nullptr,
                               mean_logits ? mean_logits_out.data_ptr() : nullptr,
                               top_gap ? top_gap_out.data_ptr() : nullptr,
                               n,
                               in.hidden_units};

  const ScoredRows rows = find_scored_rows(in, num_scored);
  if (rows.count < n) {
    fill_rows(in.compute(), in.targets, ignore_index, rows.positions + rows.count, n - rows.count, results, in.stream);
  }
  if (rows.count == 0) return outputs();

  const bool more_sums = entropy || log_sum_sq_probs || mean_logits;
  const int64_t hidden_bytes = in.hidden_units * size_of(in.type);
  const int64_t compute_bytes = size_of(in.compute());

  // The retained rows, then the others: a block has its operand in one place, `retained` or scratch.
  for (const bool retain : {true, false}) {
    const int64_t begin = retain ? 0 : std::min(retainable, rows.count);
    const int64_t end = retain ? std::min(retainable, rows.count) : rows.count;
    if (begin == end) continue;
    const bool writes = retain || need_direction;
    const bool scratch_operand = writes && !retain;
    const bool listed = rows.positions != nullptr;
    // Memory that torch has made lies on a boundary.
    const Level level = level_of(in, listed ? nullptr : in.hidden_data, writes, retain, more_sums || top_gap);
    // Level 0 has the largest logit at hand in any case.
    const bool extras = more_sums || (top_gap && level == Level::kFused);
    const auto [block, chunk] =
        blocks_of({.pass = need_direction ? Pass::kDirection : Pass::kSums,
                   .level = level,
                   .rows = end - begin,
                   .vocabulary = in.vocabulary,
                   .hidden_units = in.hidden_units,
                   .multiprocessors = multiprocessors(in.hidden.get_device_index()),
                   .row_bytes = listed ? hidden_bytes + (need_direction ? in.hidden_units * compute_bytes : 0) : 0,
                   .column_bytes = [&](int64_t of_rows) {
                     int64_t bytes = scratch_bytes_per_column(level, extras, of_rows, compute_bytes);
                     if (scratch_operand) bytes += of_rows * size_of(in.operand());
                     if (need_direction && in.weight_needs_cast()) bytes += in.hidden_units * size_of(in.operand());
                     return bytes;
                   }});
    const int64_t stride = chunk_stride(chunk, in.vocabulary, retain);

    Tensor sums = in.empty({block, kRowSumsSize}, in.compute());
    Tensor row_targets = in.empty({block}, ScalarType::Long);
    Tensor gathered = in.empty({listed ? block : 0, in.hidden_units}, in.type);
    Tensor scratch = in.empty({block, scratch_columns(level, extras, stride)}, in.compute());
    Tensor operand = in.empty({scratch_operand ? block : 0, stride}, in.operand());
    Tensor weight_cast =
        in.empty({need_direction && in.weight_needs_cast() ? chunk : 0, in.hidden_units}, in.operand());
    // Row i is position i: the direction's own memory can hold the sum while it grows.
    Tensor accumulator = in.empty({need_direction && listed ? block : 0, in.hidden_units}, in.compute());

    for (int64_t first = begin; first < end; first += block) {
      const int64_t count = std::min(block, end - first);
      const int64_t* positions = listed ? rows.positions + first : nullptr;
      const void* block_hidden = in.hidden_data + first * hidden_bytes;
      void* accumulated = nullptr;
      if (need_direction) {
        accumulated = positions != nullptr
                          ? accumulator.data_ptr()
                          : static_cast<char*>(direction.data_ptr()) + first * in.hidden_units * compute_bytes;
      }
      char* block_retained =
          retain ? static_cast<char*>(retained.data_ptr()) + first * in.vocabulary * size_of(in.operand()) : nullptr;
      start_rows({.type = in.type,
                  .hidden = positions != nullptr ? in.hidden_data : block_hidden,
                  .weight = in.weight_data,
                  .bias = in.bias,
                  .targets = positions != nullptr ? in.targets : in.targets + first,
                  .rows = positions,
                  .count = count,
                  .hidden_units = in.hidden_units,
                  .vocabulary = in.vocabulary,
                  .ignore_index = ignore_index,
                  .transform = in.transform,
                  .sums = sums.data_ptr(),
                  .row_targets = static_cast<int64_t*>(row_targets.data_ptr())},
                 in.stream);
      if (positions != nullptr) {
        gather_rows(in.hidden_data, positions, count, hidden_bytes, gathered.data_ptr(), in.stream);
        block_hidden = gathered.data_ptr();
      }

      for (int64_t column = 0; column < in.vocabulary; column += chunk) {
        const int64_t columns = std::min(chunk, in.vocabulary - column);
        void* chunk_operand = retain   ? static_cast<void*>(block_retained + column * size_of(in.operand()))
                              : writes ? operand.data_ptr()
                                       : nullptr;
        const int64_t operand_stride = retain ? in.vocabulary : stride;
        forward_chunk({.level = level,
                       .rows = {.type = in.type,
                                .count = count,
                                .logits = nullptr,  // in scratch memory, if anywhere
                                .logits_stride = stride,
                                .operand = chunk_operand,
                                .operand_stride = operand_stride,
                                .retained = retain,
                                .first_column = column,
                                .columns = columns,
                                .bias = in.bias_at(column),
                                .targets = static_cast<const int64_t*>(row_targets.data_ptr()),
                                .ignore_index = ignore_index,
                                .transform = in.transform},
                       .hidden = block_hidden,
                       .weight = in.weight_row(column),
                       .hidden_units = in.hidden_units,
                       .extras = extras,
                       .scratch = scratch.data_ptr()},
                      sums.data_ptr(), accumulated, in.stream);
        if (!need_direction) continue;
        const void* chunk_weight = in.weight_row(column);
        if (in.weight_needs_cast()) {
          convert(chunk_weight, in.type, weight_cast.data_ptr(), in.operand(), columns * in.hidden_units, in.stream);
          chunk_weight = weight_cast.data_ptr();
        }
        multiply({.rows = count,
                  .columns = in.hidden_units,
                  .depth = columns,
                  .operands = in.operand(),
                  .a = {chunk_operand, operand_stride, false},
                  .b = {chunk_weight, in.hidden_units, false},
                  .out = accumulated,
                  .out_stride = in.hidden_units,
                  .out_type = in.compute(),
                  .accumulate = column > 0,
                  .tensor_float32 = in.weight_needs_cast()});
      }

      finish_rows({.type = in.type,
                   .sums = sums.data_ptr(),
                   .targets = static_cast<const int64_t*>(row_targets.data_ptr()),
                   .rows = positions,
                   .first_position = first,
                   .count = count,
                   .ignore_index = ignore_index,
                   .vocabulary = in.vocabulary,
                   .weight = in.weight_data,
                   .accumulated = accumulated,
                   .retained = block_retained,
                   .transform = in.transform,
                   .results = results},
                  in.stream);
    }
  }
  return outputs();
}

std::tuple<Tensor, Tensor, Tensor> token_logps_backward(
    const Tensor& grad_logps, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
    const std::optional<Tensor>& bias, const Tensor& row_state, const Tensor& direction, const Tensor& retained,
    const std::optional<Tensor>& weight_sum, const std::optional<Tensor>& bias_sum, int64_t ignore_index,
    int64_t num_scored, double logit_scale, double softcap, double temperature, bool need_hidden, bool need_weight,
    bool need_bias) {
  const DeviceScope device(hidden.get_device_index());
  const Inputs in =
      check_inputs(hidden, weight, targets, bias, ignore_index, num_scored, logit_scale, softcap, temperature);
  const int64_t n = in.positions;
  const ScalarType compute = scalar_type(in.compute());
  check_tensor("grad_logps", grad_logps, {n}, compute, hidden);
  check_tensor("row_state", row_state, {kRowStates, n}, compute, hidden);
  STD_TORCH_CHECK(retained.dim() == 2 && retained.size(0) <= n, "`retained` has shape ", shape_text(retained),
                  ", but must have [R, V] with R <= N = ", n);
  check_tensor("retained", retained, {retained.size(0), in.vocabulary}, scalar_type(in.operand()), hidden);
  if (need_hidden) check_tensor("direction", direction, {n, in.hidden_units}, compute, hidden);
  STD_TORCH_CHECK(!need_bias || bias.has_value(), "`need_bias` is true, but there is no `bias`");
  const bool adds_weight = weight_sum.has_value();
  const bool adds_bias = bias_sum.has_value();
  STD_TORCH_CHECK(need_weight || !adds_weight, "`weight_sum` is given, but `need_weight` is false");
  STD_TORCH_CHECK(need_bias || !adds_bias, "`bias_sum` is given, but `need_bias` is false");
  if (adds_weight) check_tensor("weight_sum", *weight_sum, {in.vocabulary, in.hidden_units}, compute, hidden);
  if (adds_bias) check_tensor("bias_sum", *bias_sum, {in.vocabulary}, compute, hidden);

  Tensor grad_hidden = in.empty({need_hidden ? n : 0, in.hidden_units}, in.type);
  Tensor grad_weight = in.empty({need_weight && !adds_weight ? in.vocabulary : 0, in.hidden_units}, in.type);
  Tensor grad_bias = in.empty({need_bias && !adds_bias ? in.vocabulary : 0}, in.bias_type);
  if (need_hidden && n > 0) {
    scale_direction(in.type, grad_logps.data_ptr(), direction.data_ptr(), in.targets, ignore_index, n, in.hidden_units,
                    grad_hidden.data_ptr(), in.stream);
  }
  if (!need_weight && !need_bias) return {grad_hidden, grad_weight, grad_bias};

  const ScoredRows rows = find_scored_rows(in, num_scored);
  if (rows.count == 0) {
    torch::stable::zero_(grad_weight);
    torch::stable::zero_(grad_bias);
    return {grad_hidden, grad_weight, grad_bias};
  }
  const int64_t kept = std::min(retained.size(0), rows.count);
  const int64_t recomputed = rows.count - kept;
  const int64_t hidden_bytes = in.hidden_units * size_of(in.type);
  const int64_t compute_bytes = size_of(in.compute());

  // Once for all chunks, at the price of N x H numbers of the operand's type (and of the inputs' if rows were dropped).
  Tensor scaled = in.empty({need_weight ? rows.count : 0, in.hidden_units}, in.operand());
  Tensor coefficients = in.empty({need_bias ? rows.count : 0}, in.operand());
  scale_rows({.type = in.type,
              .grad_logps = grad_logps.data_ptr(),
              .hidden = in.hidden_data,
              .targets = in.targets,
              .rows = rows.positions,
              .row_state = row_state.data_ptr(),
              .count = rows.count,
              .positions = n,
              .hidden_units = in.hidden_units,
              .ignore_index = ignore_index,
              .slope = in.transform.scale * in.transform.inv_temperature,
              .scaled = need_weight ? scaled.data_ptr() : nullptr,
              .coefficients = need_bias ? coefficients.data_ptr() : nullptr},
             in.stream);
  const bool gather = recomputed > 0 && rows.positions != nullptr;
  Tensor gathered = in.empty({gather ? recomputed : 0, in.hidden_units}, in.type);
  Tensor recomputed_targets = in.empty({gather ? recomputed : 0}, ScalarType::Long);
  Tensor recomputed_exponents = in.empty({gather ? recomputed : 0}, in.compute());
  if (gather) {
    gather_rows(in.hidden_data, rows.positions + kept, recomputed, hidden_bytes, gathered.data_ptr(), in.stream);
    gather_rows(in.targets, rows.positions + kept, recomputed, sizeof(int64_t), recomputed_targets.data_ptr(),
                in.stream);
    const void* exponents = static_cast<const char*>(row_state.data_ptr()) + kRowExponent * n * compute_bytes;
    gather_rows(exponents, rows.positions + kept, recomputed, compute_bytes, recomputed_exponents.data_ptr(),
                in.stream);
  }
  const char* recomputed_hidden =
      gather ? static_cast<const char*>(gathered.data_ptr()) : in.hidden_data + kept * hidden_bytes;
  const int64_t* targets_of_recomputed =
      gather ? static_cast<const int64_t*>(recomputed_targets.data_ptr()) : in.targets + kept;
  const char* exponents_of_recomputed =
      static_cast<const char*>(gather ? recomputed_exponents.data_ptr() : row_state.data_ptr());
  if (!gather) exponents_of_recomputed += (kRowExponent * n + kept) * compute_bytes;

  const Level level = level_of(in, recomputed_hidden, true, false, false);
  // Sums over several products are kept in the compute type; a single product rounds its own sum once as it leaves.
  const auto sums_in_place = [&](int64_t block_rows) {
    const int64_t products = (kept > 0 ? 1 : 0) + (recomputed + block_rows - 1) / block_rows;
    return adds_weight || in.type == in.compute() || (products == 1 && in.operand() == in.type);
  };
  const auto [block, chunk] = blocks_of({.pass = Pass::kWeight,
                                         .level = level,
                                         .rows = recomputed > 0 ? recomputed : kept,
                                         .vocabulary = in.vocabulary,
                                         .hidden_units = in.hidden_units,
                                         .multiprocessors = multiprocessors(in.hidden.get_device_index()),
                                         .row_bytes = 0,
                                         .column_bytes = [&](int64_t of_rows) {
                                           int64_t bytes = 0;
                                           if (recomputed > 0) {
                                             bytes += scratch_bytes_per_column(level, false, of_rows, compute_bytes);
                                             bytes += of_rows * size_of(in.operand());
                                           }
                                           if (need_weight && !sums_in_place(of_rows))
                                             bytes += in.hidden_units * compute_bytes;
                                           return bytes;
                                         }});
  const bool in_place = sums_in_place(block);
  const Type weight_grad_type = adds_weight ? in.compute() : in.type;
  char* const weight_grad = static_cast<char*>(adds_weight ? weight_sum->data_ptr() : grad_weight.data_ptr());
  const int64_t stride = chunk_stride(chunk, in.vocabulary, false);
  Tensor scratch = in.empty({recomputed > 0 ? block : 0, scratch_columns(level, false, stride)}, in.compute());
  Tensor operand = in.empty({recomputed > 0 ? block : 0, stride}, in.operand());
  Tensor chunk_sum = in.empty({need_weight && !in_place ? chunk : 0, in.hidden_units}, in.compute());
  const bool bias_in_place = adds_bias || in.bias_type == in.compute();
  Tensor whole_bias_sum = in.empty({need_bias && !bias_in_place ? in.vocabulary : 0}, in.compute());
  char* const bias_grad = static_cast<char*>(adds_bias       ? bias_sum->data_ptr()
                                             : bias_in_place ? grad_bias.data_ptr()
                                                             : whole_bias_sum.data_ptr());

  for (int64_t column = 0; column < in.vocabulary; column += chunk) {
    const int64_t columns = std::min(chunk, in.vocabulary - column);
    char* chunk_grad = weight_grad + column * in.hidden_units * size_of(weight_grad_type);
    bool first_product = true;
    // Adds operand^T * scaled hidden of `count` rows from `row` on.
    auto add_rows = [&](const void* rows_operand, int64_t operand_stride, int64_t row, int64_t count) {
      Product product{.rows = columns,
                      .columns = in.hidden_units,
                      .depth = count,
                      .operands = in.operand(),
                      .a = {rows_operand, operand_stride, true},
                      .b = {static_cast<const char*>(scaled.data_ptr()) + row * in.hidden_units * size_of(in.operand()),
                            in.hidden_units, false},
                      .out = in_place ? chunk_grad : chunk_sum.data_ptr(),
                      .out_stride = in.hidden_units,
                      .out_type = in_place ? weight_grad_type : in.compute(),
                      .accumulate = adds_weight || !first_product,
                      .tensor_float32 = in.weight_needs_cast()};
      if (need_weight) multiply(product);
      if (need_bias) {
        product.columns = 1;
        product.b = {static_cast<const char*>(coefficients.data_ptr()) + row * size_of(in.operand()), 1, false};
        product.out = bias_grad + column * compute_bytes;
        product.out_stride = 1;
        product.out_type = in.compute();
        product.accumulate = adds_bias || !first_product;
        multiply(product);
      }
      first_product = false;
    };

    if (kept > 0) {
      add_rows(static_cast<const char*>(retained.data_ptr()) + column * size_of(in.operand()), in.vocabulary, 0, kept);
    }
    for (int64_t first = 0; first < recomputed; first += block) {
      const int64_t count = std::min(block, recomputed - first);
      // Without a list of rows, row i of this block is position kept + first + i of row_state.
      const int64_t row = kept + first;
      const bool listed = rows.positions != nullptr;
      backward_chunk({.level = level,
                      .rows = {.type = in.type,
                               .count = count,
                               .logits = nullptr,  // in scratch memory, if anywhere
                               .logits_stride = stride,
                               .operand = operand.data_ptr(),
                               .operand_stride = stride,
                               .retained = false,
                               .first_column = column,
                               .columns = columns,
                               .bias = in.bias_at(column),
                               .targets = targets_of_recomputed + first,
                               .ignore_index = ignore_index,
                               .transform = in.transform},
                      .hidden = recomputed_hidden + first * hidden_bytes,
                      .weight = in.weight_row(column),
                      .hidden_units = in.hidden_units,
                      .extras = false,
                      .scratch = scratch.data_ptr()},
                     listed ? rows.positions + row : nullptr,
                     static_cast<const char*>(row_state.data_ptr()) + (listed ? 0 : row * compute_bytes), n,
                     exponents_of_recomputed + first * compute_bytes, in.stream);
      add_rows(operand.data_ptr(), stride, row, count);
    }
    if (need_weight && !in_place) {
      convert(chunk_sum.data_ptr(), in.compute(), chunk_grad, in.type, columns * in.hidden_units, in.stream);
    }
  }
  if (need_bias && !bias_in_place) {
    convert(whole_bias_sum.data_ptr(), in.compute(), grad_bias.data_ptr(), in.bias_type, in.vocabulary, in.stream);
  }
  return {grad_hidden, grad_weight, grad_bias};
}

}  // namespace fastdpo::cuda
