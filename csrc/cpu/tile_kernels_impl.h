// The tile kernels. Included once by each tile_kernels_*.cpp, which is compiled with its own instruction set and sets
// FASTDPO_VECTOR_BYTES; everything here has internal linkage, for the reason given in vector_math.h.

#include <immintrin.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "tile_kernels.h"
#include "vector_math.h"

namespace fastdpo::cpu {
namespace {

using Value = WideFloat::Value;
constexpr int64_t kLanes = WideFloat::kLanes;
static_assert(kLaneGroup % kLanes == 0 && kPanel % kLanes == 0);

// Where lane l of the first, or the second, of two vectors comes from in a transposition's step, of both's lanes.
template <int64_t kBlock, bool kSecond>
constexpr int exchange_source(int64_t l) {
  const int64_t source = kSecond ? (l & kBlock ? kLanes + l : l + kBlock) : (l & kBlock ? kLanes + l - kBlock : l);
  return static_cast<int>(source);
}

template <int64_t kBlock, bool kSecond, int... kLane>
inline Value exchanged(Value a, Value b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, exchange_source<kBlock, kSecond>(kLane)...);
#else
  return __builtin_shuffle(a, b, WideFloat::Bits{exchange_source<kBlock, kSecond>(kLane)...});
#endif
}

// Rows become columns: kLanes vectors of kLanes numbers, in log2(kLanes) steps, each of which exchanges the
// off-diagonal blocks of twice the size.
template <int64_t kBlock>
inline void exchange_blocks(Value* v) {
  constexpr auto kAllLanes = std::make_integer_sequence<int, static_cast<int>(kLanes)>();
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; ++i) {
    if (i & kBlock) continue;
    const Value a = v[i], b = v[i + kBlock];
    v[i] = exchanged<kBlock, false>(a, b, kAllLanes);
    v[i + kBlock] = exchanged<kBlock, true>(a, b, kAllLanes);
  }
}

inline void transpose(Value* v) {
  exchange_blocks<1>(v);
  exchange_blocks<2>(v);
  exchange_blocks<4>(v);
  if constexpr (kLanes == 16) exchange_blocks<8>(v);
}

inline void store_operand(float* p, Value v) { WideFloat::store(p, v); }

#if defined(__AVX512BF16__)
inline void store_operand(Bf16Bits* p, Value v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}

inline Value load_operand(const Bf16Bits* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Value)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}
#endif
inline Value load_operand(const float* p) { return WideFloat::load(p); }

// For what is read long after it has left the caches: whole lines go to memory without being read first.
template <typename O>
inline void copy_for_later(O* to, const O* from, int64_t size) {
#if defined(__AVX512F__)
  constexpr int64_t kLine = 64 / sizeof(O);
  if (reinterpret_cast<uintptr_t>(to) % 64 == 0 && size % kLine == 0) {
    for (int64_t i = 0; i < size; i += kLine) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
    }
    return;
  }
#endif
  std::memcpy(to, from, size * sizeof(O));
}

// The sum of a block of vectors, as a tree: its rounding errors do not add up.
inline Value tree_sum(const Value* v) {
  Value half[kLanes / 2];
#pragma GCC unroll 8
  for (int64_t i = 0; i < kLanes / 2; ++i) half[i] = v[2 * i] + v[2 * i + 1];
#pragma GCC unroll 4
  for (int64_t size = kLanes / 4; size > 0; size /= 2) {
    for (int64_t i = 0; i < size; ++i) half[i] = half[2 * i] + half[2 * i + 1];
  }
  return half[0];
}

void widen_bf16(const uint16_t* from, float* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
    const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
    std::memcpy(to + i, &bits, sizeof bits);
  }
}

void widen_f16(const uint16_t* from, float* to, int64_t size) {
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
  }
  for (; i < size; ++i) to[i] = _cvtsh_ss(from[i]);
}

void transform_tile(float* values, int64_t rows, int64_t width, const float* bias,
                    const LogitTransform<float>& transform) {
  for (int64_t v = 0; v < rows; ++v) {
    const float shift = bias == nullptr ? 0.0f : bias[v];
    for (int64_t t = 0; t < width; t += kLanes) {
      float* const p = values + v * width + t;
      Value z = (WideFloat::load(p) + shift) * transform.scale;
      if (transform.softcap != 0) {
        z = transform.softcap * hyperbolic_tangent<WideFloat>(z / transform.softcap, 0.0f);
      }
      WideFloat::store(p, z * transform.inv_temperature);
    }
  }
}

// Each lane's fold over the rows, in four parts: one alone would wait for itself at every step.
template <typename Fold>
inline void fold_rows(const float* values, int64_t rows, int64_t width, float start, float* result, const Fold& fold) {
  constexpr int64_t kParts = 4;
  for (int64_t t = 0; t < width; t += kLanes) {
    Value part[kParts];
    for (int64_t i = 0; i < kParts; ++i) part[i] = WideFloat::set(start);
    int64_t v = 0;
    for (; v + kParts <= rows; v += kParts) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kParts; ++i) part[i] = fold(part[i], WideFloat::load(values + (v + i) * width + t));
    }
    for (; v < rows; ++v) part[0] = fold(part[0], WideFloat::load(values + v * width + t));
    WideFloat::store(result + t, fold(fold(part[0], part[1]), fold(part[2], part[3])));
  }
}

void lane_max(const float* values, int64_t rows, int64_t width, float* max) {
  fold_rows(values, rows, width, -std::numeric_limits<float>::infinity(), max,
            [](Value most, Value z) { return WideFloat::if_less(most, z, z, most); });
}

void lane_sum(const float* values, int64_t rows, int64_t width, float* sum) {
  fold_rows(values, rows, width, 0.0f, sum, [](Value total, Value z) { return total + z; });
}

// The target's exponential is 0, and its slope, at -inf, no number.
inline Value times_slope(Value e, Value z, const LogitTransform<float>& transform) {
  return WideFloat::if_less(WideFloat::set(0.0f), e, e * slope_factor<WideFloat>(z, transform), e);
}

template <typename O, bool kWeighted, bool kSquares, bool kCapped>
void exponentials_of(const ExponentialTile<O>& tile) {
  const int64_t end = tile.by_token == nullptr ? tile.rows : tile.padded_rows;
  constexpr int64_t kGroups = kPanel / kLanes;
  Value sum[kGroups], weighted[kGroups], squares[kGroups];
  for (int64_t g = 0; g < kGroups; ++g) sum[g] = weighted[g] = squares[g] = WideFloat::set(0.0f);
  alignas(64) O staged[kLanes * kPanel];
  for (int64_t v = 0; v < end; v += kLanes) {
    const int64_t rows = std::min(kLanes, tile.rows - v);
    for (int64_t t = 0, g = 0; t < tile.width; t += kLanes, ++g) {
      const Value exponent = WideFloat::load(tile.exponent + t);
      Value e[kLanes];
      const auto row = [&](int64_t i) {
        const Value z = WideFloat::load(tile.logits + (v + i) * tile.width + t);
        const Value gap = z - exponent;
        e[i] = exponential<WideFloat>(gap, 0.0f);
        if constexpr (kWeighted) {
          // A masked entry has e = 0 and gap = -inf, and counts for nothing.
          const Value lowest = WideFloat::set(-1e30f);
          weighted[g] = weighted[g] + e[i] * WideFloat::if_less(lowest, gap, gap, lowest);
        }
        if constexpr (kSquares) squares[g] = squares[g] + e[i] * e[i];
      };
      if (rows == kLanes) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) row(i);
      } else {
        for (int64_t i = 0; i < kLanes; ++i) {
          e[i] = WideFloat::set(0.0f);
          if (i < rows) row(i);
        }
      }
      sum[g] = sum[g] + tree_sum(e);
      if constexpr (kCapped) {
        for (int64_t i = 0; i < rows; ++i) {
          e[i] = times_slope(e[i], WideFloat::load(tile.logits + (v + i) * tile.width + t), tile.transform);
        }
      }
      if (tile.by_entry != nullptr) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store_operand(staged + i * kPanel + t, e[i]);
      }
      if (tile.by_token != nullptr) {
        transpose(e);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kLanes; ++i) store_operand(tile.by_token + (t + i) * tile.by_token_stride + v, e[i]);
      }
    }
    if (tile.by_entry == nullptr) continue;
    for (int64_t i = 0; i < rows; ++i) {
      copy_for_later(tile.by_entry + (v + i) * tile.by_entry_stride, staged + i * kPanel, tile.by_entry_width);
    }
  }
  for (int64_t t = 0, g = 0; t < tile.width; t += kLanes, ++g) {
    WideFloat::store(tile.sum + t, sum[g]);
    if constexpr (kWeighted) WideFloat::store(tile.weighted + t, weighted[g]);
    if constexpr (kSquares) WideFloat::store(tile.squares + t, squares[g]);
  }
}

template <typename O>
void exponentials(const ExponentialTile<O>& tile) {
  constexpr void (*kOf[])(const ExponentialTile<O>&) = {
      exponentials_of<O, false, false, false>, exponentials_of<O, true, false, false>,
      exponentials_of<O, false, true, false>,  exponentials_of<O, true, true, false>,
      exponentials_of<O, false, false, true>,  exponentials_of<O, true, false, true>,
      exponentials_of<O, false, true, true>,   exponentials_of<O, true, true, true>,
  };
  const bool weighted = tile.weighted != nullptr, squares = tile.squares != nullptr;
  kOf[weighted | squares << 1 | (tile.transform.softcap != 0) << 2](tile);
}

template <typename O>
void gradient(const GradientTile<O>& tile) {
  const bool capped = tile.transform.softcap != 0;
  for (int64_t v = 0; v < tile.rows; ++v) {
    for (int64_t t = 0; t < tile.width; t += kLanes) {
      const Value z = WideFloat::load(tile.logits + v * tile.width + t);
      Value g = exponential<WideFloat>(z - WideFloat::load(tile.exponent + t), 0.0f);
      if (capped) g = times_slope(g, z, tile.transform);
      store_operand(tile.values + v * tile.stride + t, g * WideFloat::load(tile.coefficient + t));
    }
  }
}

template <typename O>
void add_row_dots(const O* values, int64_t stride, int64_t rows, int64_t width, const float* coefficient, float* sums) {
  for (int64_t v = 0; v < rows; ++v) {
    Value total = WideFloat::set(0.0f);
    for (int64_t t = 0; t < width; t += kLanes) {
      total = total + load_operand(values + v * stride + t) * WideFloat::load(coefficient + t);
    }
    sums[v] += static_cast<float>(WideFloat::sum(total));
  }
}

void scale_column(float* values, int64_t stride, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) values[i * stride] = static_cast<float>(values[i * stride] * factor);
}

// 32-bit units; the bytes are moved, not looked at.
void pack_columns_of(const float* const* rows, int64_t count, int64_t size, int64_t width, float* out) {
  for (int64_t t = 0; t < width; t += kLanes) {
    int64_t k = 0;
    for (; k + kLanes <= size; k += kLanes) {
      Value v[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        v[i] = t + i < count ? WideFloat::load(rows[t + i] + k) : WideFloat::set(0.0f);
      }
      transpose(v);
      for (int64_t i = 0; i < kLanes; ++i) WideFloat::store(out + (k + i) * width + t, v[i]);
    }
    for (; k < size; ++k) {
      for (int64_t i = 0; i < kLanes; ++i) {
        if (t + i < count) {
          std::memcpy(out + k * width + t + i, rows[t + i] + k, sizeof(float));
        } else {
          out[k * width + t + i] = 0;
        }
      }
    }
  }
}

void pack_columns(const float* const* rows, int64_t count, int64_t size, int64_t width, float* out) {
  pack_columns_of(rows, count, size, width, out);
}

void pack_rows(const float* const* rows, const float* scales, int64_t count, int64_t size, float* out) {
  constexpr int64_t kPad = OperandLayout<float>::kRowsPad;
  for (int64_t i = 0; i < count; ++i) {
    const float scale = scales == nullptr ? 1.0f : scales[i];
    for (int64_t k = 0; k < size; ++k) out[i * size + k] = scale * rows[i][k];
  }
  const int64_t padded = (count + kPad - 1) / kPad * kPad;
  std::fill(out + count * size, out + padded * size, 0.0f);
}

constexpr OperandKernels<float> kF32Kernels{pack_columns,    pack_rows,           exponentials<float>,
                                            gradient<float>, add_row_dots<float>, scale_column};

#if defined(__AVX512BF16__)
void scale_column(Bf16Bits* values, int64_t stride, int64_t count, double factor) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(values[i * stride].bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    const __m128bh rounded = _mm_cvtneps_pbh(_mm_set_ss(static_cast<float>(value * factor)));
    values[i * stride].bits = static_cast<uint16_t>(_mm_extract_epi16((__m128i)rounded, 0));
  }
}

// Two neighbours of a row stay together: a transposition of 32-bit units. size is even.
void pack_columns(const Bf16Bits* const* rows, int64_t count, int64_t size, int64_t width, Bf16Bits* out) {
  const float* units[kPanel];
  for (int64_t i = 0; i < count; ++i) units[i] = reinterpret_cast<const float*>(rows[i]);
  pack_columns_of(units, count, size / 2, width, reinterpret_cast<float*>(out));
}

// Columns [k, k + 16) of a row as float32, times scale; zeros past the row's end.
inline __m512 load_scaled(const Bf16Bits* row, int64_t k, int64_t size, __m512 scale) {
  const int64_t left = std::clamp<int64_t>(size - k, 0, 16);
  const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << left) - 1), row + k);
  return _mm512_mul_ps((__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16), scale);
}

// Columns [k, k + 32) of a row; zeros past its end.
inline __m512i load_bits(const Bf16Bits* row, int64_t k, int64_t size) {
  const int64_t left = std::clamp<int64_t>(size - k, 0, 32);
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << left) - 1), row + k);
}

void pack_rows(const Bf16Bits* const* rows, const float* scales, int64_t count, int64_t size, Bf16Bits* out) {
  constexpr int64_t kPad = OperandLayout<Bf16Bits>::kRowsPad;
  const int64_t padded = (count + kPad - 1) / kPad * kPad;
  // Where the 16-bit numbers of two interleaved vectors come from: the low half, the high half.
  alignas(64) uint16_t low[32], high[32], halves[32];
  for (uint16_t i = 0; i < 16; ++i) {
    low[2 * i] = i, low[2 * i + 1] = 32 + i;
    high[2 * i] = 16 + i, high[2 * i + 1] = 48 + i;
    halves[2 * i] = i, halves[2 * i + 1] = 16 + i;
  }
  const __m512i low_of = _mm512_load_si512(low), high_of = _mm512_load_si512(high);
  const __m512i halves_of = _mm512_load_si512(halves);
  for (int64_t pair = 0; pair < padded / 2; ++pair) {
    const bool has_first = 2 * pair < count, has_second = 2 * pair + 1 < count;
    const Bf16Bits* const first = has_first ? rows[2 * pair] : nullptr;
    const Bf16Bits* const second = has_second ? rows[2 * pair + 1] : nullptr;
    for (int64_t k = 0; k < size; k += 32) {
      Bf16Bits* const p = out + ((k / kPanel) * (padded / 2) + pair) * 2 * kPanel + (k % kPanel) * 2;
      __m512i lower, upper;
      if (scales == nullptr) {
        const __m512i a = has_first ? load_bits(first, k, size) : _mm512_setzero_si512();
        const __m512i b = has_second ? load_bits(second, k, size) : _mm512_setzero_si512();
        lower = _mm512_permutex2var_epi16(a, low_of, b);
        upper = _mm512_permutex2var_epi16(a, high_of, b);
      } else {
        const __m512 zero = _mm512_setzero_ps();
        const __m512 first_scale = has_first ? _mm512_set1_ps(scales[2 * pair]) : zero;
        const __m512 second_scale = has_second ? _mm512_set1_ps(scales[2 * pair + 1]) : zero;
        const __m512 a0 = has_first ? load_scaled(first, k, size, first_scale) : zero;
        const __m512 a1 = has_first ? load_scaled(first, k + 16, size, first_scale) : zero;
        const __m512 b0 = has_second ? load_scaled(second, k, size, second_scale) : zero;
        const __m512 b1 = has_second ? load_scaled(second, k + 16, size, second_scale) : zero;
        lower = _mm512_permutexvar_epi16(halves_of, (__m512i)_mm512_cvtne2ps_pbh(b0, a0));
        upper = _mm512_permutexvar_epi16(halves_of, (__m512i)_mm512_cvtne2ps_pbh(b1, a1));
      }
      _mm512_storeu_si512(p, lower);
      _mm512_storeu_si512(p + 32, upper);
    }
    // The rest of the last panel.
    for (int64_t k = (size + 31) / 32 * 32; k % kPanel != 0; k += 32) {
      Bf16Bits* const p = out + ((k / kPanel) * (padded / 2) + pair) * 2 * kPanel + (k % kPanel) * 2;
      _mm512_storeu_si512(p, _mm512_setzero_si512());
      _mm512_storeu_si512(p + 32, _mm512_setzero_si512());
    }
  }
}

constexpr OperandKernels<Bf16Bits> kBf16Kernels{
    pack_columns, pack_rows, exponentials<Bf16Bits>, gradient<Bf16Bits>, add_row_dots<Bf16Bits>, scale_column};
constexpr const OperandKernels<Bf16Bits>* kBf16KernelsIfAny = &kBf16Kernels;
#else
constexpr const OperandKernels<Bf16Bits>* kBf16KernelsIfAny = nullptr;
#endif

constexpr TileKernels kTileKernels{widen_bf16, widen_f16,   transform_tile,   lane_max,
                                   lane_sum,   kF32Kernels, kBf16KernelsIfAny};

}  // namespace
}  // namespace fastdpo::cpu
