// What both ops are given, checked once, and how they cut it: blocks of tokens times chunks of the vocabulary, so that
// memory depends on neither N nor V. 16-bit inputs are multiplied in float32: at::mm on a CPU would round their
// products to 16 bits.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "row_kernels.h"

namespace fastdpo::cpu {

// What all temporary buffers may take up together, matrix products' own packing aside.
constexpr int64_t kWorkspaceBytes = 40 << 20;
constexpr int64_t kMaxBlock = 1024;  // tokens at a time
constexpr int64_t kMaxChunk = 4096;  // vocabulary entries at a time
constexpr int64_t kMinTile = 16;

// Rows below which a thread of their own does not pay.
constexpr int64_t kRowGrain = 8;

struct TileSizes {
  int64_t block;
  int64_t chunk;
};

// Two [block, H] and two [chunk, H] buffers and the [block, chunk] logits, in the compute type, within the workspace.
inline TileSizes tile_sizes(int64_t hidden_size, int64_t element_size) {
  TileSizes tiles{kMaxBlock, kMaxChunk};
  const auto bytes = [&] {
    return element_size * (2 * (tiles.block + tiles.chunk) * hidden_size + tiles.block * tiles.chunk);
  };
  while (bytes() > kWorkspaceBytes && tiles.chunk > kMinTile) {
    (tiles.chunk > tiles.block ? tiles.chunk : tiles.block) /= 2;
  }
  return tiles;
}

template <typename T>
constexpr at::ScalarType kComputeType = std::is_same_v<T, double> ? at::kDouble : at::kFloat;

// The scored rows, in order. Raises for a target that is no entry of the vocabulary: it would be read out of bounds.
inline at::Tensor find_scored(const at::Tensor& targets, int64_t ignore_index, int64_t num_scored, int64_t vocabulary) {
  const int64_t* y = targets.const_data_ptr<int64_t>();
  at::Tensor rows = at::empty({targets.size(0)}, targets.options());
  int64_t* out = rows.mutable_data_ptr<int64_t>();
  int64_t count = 0;
  for (int64_t t = 0; t < targets.size(0); ++t) {
    if (y[t] == ignore_index) continue;
    TORCH_CHECK_INDEX(y[t] >= 0 && y[t] < vocabulary, "targets[", t, "] is ", y[t], "; it should be in [0, ",
                      vocabulary, "), the rows of weight, or ignore_index (", ignore_index, ")");
    out[count++] = t;
  }
  TORCH_CHECK_VALUE(num_scored < 0 || num_scored == count, "num_scored is ", num_scored, "; targets has ", count,
                    " that are not ignore_index (", ignore_index, ")");
  return rows.narrow(0, 0, count);
}

// T is the compute type.
template <typename T>
struct Problem {
  at::Tensor hidden, weight, targets;
  at::Tensor bias;    // in the compute type; undefined if there is none
  at::Tensor scored;  // [n] rows that count
  LogitTransform<T> transform;
  TileSizes tiles;

  int64_t hidden_size() const { return hidden.size(1); }
  int64_t vocabulary() const { return weight.size(0); }
  int64_t count() const { return scored.size(0); }
  bool converts() const { return hidden.scalar_type() != kComputeType<T>; }
  bool drops() const { return count() != hidden.size(0); }
  const int64_t* rows() const { return scored.const_data_ptr<int64_t>(); }
  int64_t target(int64_t i) const { return targets.const_data_ptr<int64_t>()[rows()[i]]; }
  at::TensorOptions compute() const { return hidden.options().dtype(kComputeType<T>); }

  // Scored rows [begin, end) of hidden in the compute type: a view where it can be, else written to buffer.
  at::Tensor hidden_block(int64_t begin, int64_t end, at::Tensor& buffer) const {
    if (!drops() && !converts()) return hidden.narrow(0, begin, end - begin);
    if (!buffer.defined()) buffer = at::empty({std::min(tiles.block, count()), hidden_size()}, compute());
    at::Tensor block = buffer.narrow(0, 0, end - begin);
    block.copy_(drops() ? at::index_select(hidden, 0, scored.narrow(0, begin, end - begin))
                        : hidden.narrow(0, begin, end - begin));
    return block;
  }

  at::Tensor weight_chunk(int64_t begin, int64_t end, at::Tensor& buffer) const {
    if (!converts()) return weight.narrow(0, begin, end - begin);
    if (!buffer.defined()) buffer = at::empty({std::min(tiles.chunk, vocabulary()), hidden_size()}, compute());
    at::Tensor chunk = buffer.narrow(0, 0, end - begin);
    chunk.copy_(weight.narrow(0, begin, end - begin));
    return chunk;
  }

  // Scored row i of a tile whose columns are the entries [begin, begin + size) of the vocabulary.
  Row<T> row(T* values, int64_t i, int64_t begin, int64_t size) const {
    return {values, bias.defined() ? bias.const_data_ptr<T>() + begin : nullptr, size, target(i) - begin, transform};
  }
};

template <typename T>
Problem<T> make_problem(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& targets,
                        const std::optional<at::Tensor>& bias, int64_t ignore_index, int64_t num_scored,
                        double logit_scale, double softcap, double temperature) {
  // The Python front end explains misuse in its own terms; here is what keeps memory safe when the op is called bare.
  TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && targets.dim() == 1, "expected hidden [N, H], weight [V, H], ",
              "targets [N]; got ", hidden.sizes(), ", ", weight.sizes(), ", ", targets.sizes());
  TORCH_CHECK(hidden.size(0) == targets.size(0), "targets should have hidden's N = ", hidden.size(0), " entries, not ",
              targets.size(0));
  TORCH_CHECK(hidden.size(1) == weight.size(1), "weight should have hidden's H = ", hidden.size(1), " columns, not ",
              weight.size(1));
  TORCH_CHECK(weight.size(0) > 0 && weight.size(1) > 0, "weight should have at least one row and one column, not ",
              weight.sizes());
  TORCH_CHECK(targets.scalar_type() == at::kLong, "targets should be int64, not ", targets.scalar_type());
  TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight should have hidden's dtype, ", hidden.scalar_type(),
              ", not ", weight.scalar_type());
  TORCH_CHECK(hidden.is_contiguous() && weight.is_contiguous() && targets.is_contiguous(),
              "hidden, weight and targets should be contiguous");
  at::Tensor compute_bias;
  if (bias.has_value()) {
    TORCH_CHECK(bias->dim() == 1 && bias->size(0) == weight.size(0), "bias should be [V] with V = ", weight.size(0),
                ", not ", bias->sizes());
    TORCH_CHECK(bias->is_floating_point(), "bias should have a floating dtype, not ", bias->scalar_type());
    compute_bias = bias->to(kComputeType<T>).contiguous();
  }
  return {hidden,
          weight,
          targets,
          compute_bias,
          find_scored(targets, ignore_index, num_scored, weight.size(0)),
          {static_cast<T>(logit_scale), static_cast<T>(softcap), static_cast<T>(1 / temperature)},
          tile_sizes(hidden.size(1), sizeof(T))};
}

// Calls body(E()) with the tensor's element type.
template <typename Body>
auto with_element_type(const at::Tensor& tensor, const Body& body) {
  switch (tensor.scalar_type()) {
    case at::kDouble:
      return body(double());
    case at::kFloat:
      return body(float());
    case at::kHalf:
      return body(at::Half());
    default:
      return body(at::BFloat16());
  }
}

// Calls body(T()) with the compute type of the inputs' dtype.
template <typename Body>
auto with_compute_type(const at::Tensor& hidden, const Body& body) {
  switch (hidden.scalar_type()) {
    case at::kDouble:
      return body(double());
    case at::kFloat:
    case at::kHalf:
    case at::kBFloat16:
      return body(float());
    default:
      TORCH_CHECK_TYPE(false, "hidden has dtype ", hidden.scalar_type(),
                       "; it should be float32, bfloat16, float16 or float64");
  }
}

}  // namespace fastdpo::cpu
