// What the fused kernels do with a tile between its matrix products, vectorised: the interface, and the choice of an
// instruction set at run time.
//
// A tile holds the products h.w_j of some tokens and some entries of the vocabulary, entries in rows and tokens in
// lanes: values[entry * width + token]. So every lane has its own exponent and sums, and nothing is summed across
// lanes. The kernels are compiled once per instruction set (tile_kernels_*.cpp, one source: tile_kernels_impl.h).
#pragma once

#include <cstdint>

#include "../fastdpo.h"

namespace fastdpo::cpu {

// The width of a tile is a multiple of this.
constexpr int64_t kLaneGroup = 16;

// bfloat16 as this header sees it: the upper half of a float32.
struct Bf16Bits {
  uint16_t bits;
};

// What the matrix products' second operand looks like in memory. float32: rows, as they are. bfloat16: two rows
// interleaved, in panels of kPanel columns, [columns / kPanel][rows / 2][kPanel][2], which is how the products read it.
template <typename O>
struct OperandLayout {
  static constexpr int64_t kPair = 1;
  static constexpr int64_t kRowsPad = 16;  // a packed operand's number of rows is made a multiple of this
};
template <>
struct OperandLayout<Bf16Bits> {
  static constexpr int64_t kPair = 2;
  static constexpr int64_t kRowsPad = 16;
};
constexpr int64_t kPanel = 64;

// Turns logits into the gradients' operand, exp(z - exponent) * slope_factor(z), and adds up the sums of each lane. The
// target's logit has been set to -inf: it counts for nothing.
template <typename O>
struct ExponentialTile {
  const float* logits;  // [rows, width]
  int64_t rows;
  int64_t width;
  const float* exponent;  // [width]
  LogitTransform<float> transform;
  // Each null if not wanted.
  O* by_token;  // [width, by_token_stride]: zeros up to padded_rows
  int64_t by_token_stride;
  int64_t padded_rows;  // a multiple of kLaneGroup where by_token is wanted
  O* by_entry;          // [rows, by_entry_stride], of the first by_entry_width lanes
  int64_t by_entry_stride;
  int64_t by_entry_width;
  // [width] each: sum of exp(z - exponent), and, null if not wanted, of exp * (z - exponent) and of exp^2.
  float* sum;
  float* weighted;
  float* squares;
};

// values[entry, token] = coefficient * exp(z - exponent) * slope_factor(z): dL/d(h.w_j), 0 at the target, whose logit
// has been set to -inf.
template <typename O>
struct GradientTile {
  const float* logits;  // [rows, width]
  int64_t rows;
  int64_t width;
  const float* exponent;     // [width]
  const float* coefficient;  // [width]
  LogitTransform<float> transform;
  O* values;  // [rows, stride]
  int64_t stride;
};

template <typename O>
struct OperandKernels {
  // Rows of `size` numbers to columns: out is [size / kPair][width][kPair], zero from count to width.
  void (*pack_columns)(const O* const* rows, int64_t count, int64_t size, int64_t width, O* out);
  // Rows, times scales where that is not null, to OperandLayout: size is made a multiple of kPanel and count one of
  // kRowsPad, with zeros.
  void (*pack_rows)(const O* const* rows, const float* scales, int64_t count, int64_t size, O* out);
  void (*exponentials)(const ExponentialTile<O>&);
  void (*gradient)(const GradientTile<O>&);
  // sums[row] += the sum over tokens of values[row, token] * coefficient[token].
  void (*add_row_dots)(const O* values, int64_t stride, int64_t rows, int64_t width, const float* coefficient,
                       float* sums);
  // values[i * stride] *= factor, which may be less than any float.
  void (*scale_column)(O* values, int64_t stride, int64_t count, double factor);
};

// One set of kernels, all of the same instruction set.
struct TileKernels {
  void (*widen_bf16)(const uint16_t* from, float* to, int64_t size);
  void (*widen_f16)(const uint16_t* from, float* to, int64_t size);
  // Products to logits, in place; bias is [rows] or null.
  void (*transform)(float* values, int64_t rows, int64_t width, const float* bias, const LogitTransform<float>&);
  // Over the rows, for each lane. A NaN is passed over by the maximum.
  void (*lane_max)(const float* values, int64_t rows, int64_t width, float* max);
  void (*lane_sum)(const float* values, int64_t rows, int64_t width, float* sum);
  OperandKernels<float> f32;
  const OperandKernels<Bf16Bits>* bf16;  // null where the instruction set has no bfloat16
};

template <typename O>
const OperandKernels<O>& operand_kernels(const TileKernels& kernels);
template <>
inline const OperandKernels<float>& operand_kernels<float>(const TileKernels& kernels) {
  return kernels.f32;
}
template <>
inline const OperandKernels<Bf16Bits>& operand_kernels<Bf16Bits>(const TileKernels& kernels) {
  return *kernels.bf16;
}

// The set for isa(); null for Isa::kPlain, which computes in whole matrix products (mm_*.cpp).
const TileKernels* tile_kernels();

// The sets themselves, in x86-64 builds alone.
const TileKernels* avx512_bf16_tile_kernels();
const TileKernels* avx512_tile_kernels();
const TileKernels* avx2_tile_kernels();

}  // namespace fastdpo::cpu
