// Vectors of float32 over GCC's and Clang's vector types, and the functions of them that the kernels need. Included by
// the
// *_impl.h files alone, each of which is compiled once per instruction set, with FASTDPO_VECTOR_BYTES set. Everything
// here has internal linkage, so that no function compiled for one instruction set is ever linked into another's.
#pragma once

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../fastdpo.h"

namespace fastdpo::cpu {
namespace {

// Several float32 side by side, and the operations that the compiler's vector types lack.
struct WideFloat {
  static constexpr int64_t kLanes = FASTDPO_VECTOR_BYTES / sizeof(float);
  typedef float Value __attribute__((vector_size(FASTDPO_VECTOR_BYTES)));
  typedef int32_t Bits __attribute__((vector_size(FASTDPO_VECTOR_BYTES)));

  static Value set(float x) { return x - Value{}; }
  static Value load(const float* p) {
    Value v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, Value v) { std::memcpy(p, &v, sizeof v); }
  static Value if_less(Value a, Value b, Value then, Value otherwise) { return a < b ? then : otherwise; }
  static Value abs(Value v) { return (Value)((Bits)v & 0x7fffffff); }
  static Value power_of_two(Value n) { return (Value)((__builtin_convertvector(n, Bits) + 127) << 23); }
  static double sum(Value v) {
    double total = 0;
    for (int64_t i = 0; i < kLanes; ++i) total += v[i];
    return total;
  }
  static float max(Value v) {
    float most = v[0];
    for (int64_t i = 1; i < kLanes; ++i) most = most < v[i] ? v[i] : most;
    return most;
  }
};

// One number with the same operations: float32 for the ends of rows, float64 for float64 inputs.
template <typename T>
struct Single {
  static constexpr int64_t kLanes = 1;
  using Value = T;

  static T set(T x) { return x; }
  static T load(const T* p) { return *p; }
  static void store(T* p, T v) { *p = v; }
  static T if_less(T a, T b, T then, T otherwise) { return a < b ? then : otherwise; }
  static T abs(T v) { return std::fabs(v); }
  static T power_of_two(T n) { return std::ldexp(T(1), static_cast<int>(n)); }
  static double sum(T v) { return v; }
  static T max(T v) { return v; }
};

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using Wide = WideFloat;
};
template <>
struct Lanes<double> {
  using Wide = Single<double>;
};

// exp(x) for x <= 88 in float32: within 2 units in the last place; 0 below -87, where results would turn denormal;
// NaN for NaN.
template <typename V>
typename V::Value exponential(typename V::Value x, float) {
  using Value = typename V::Value;
  const Value lowest = V::set(-87.0f);
  // x = n ln2 + r, |r| <= ln2 / 2. Adding and taking away 1.5 * 2^23 rounds to the nearest integer; ln2 comes in two
  // parts, of which n times the first is exact. n must be a number even where x is not, r must not.
  const Value magic = V::set(12582912.0f);
  const Value n = (V::if_less(lowest, x, x, lowest) * 1.44269504088896341f + magic) - magic;
  const Value r = (V::if_less(x, lowest, lowest, x) - n * 0.693359375f) - n * -2.12194440e-4f;
  // exp(r) = 1 + r + r^2 P(r); P is fitted for the least relative error of the whole, 3e-9 on this interval.
  Value p = 0.00138144672f * r + 0.00836878084f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  return V::if_less(x, lowest, V::set(0.0f), p * V::power_of_two(n));
}
#if defined(__AVX512F__)
// The same with fewer steps: scalef takes any n, and a mask puts in the zeros.
template <>
inline WideFloat::Value exponential<WideFloat>(WideFloat::Value x, float) {
  static_assert(WideFloat::kLanes == 16);
  using Value = WideFloat::Value;
  const Value magic = WideFloat::set(12582912.0f);
  const Value n = (x * 1.44269504088896341f + magic) - magic;
  const Value r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  Value p = 0.00138144672f * r + 0.00836878084f;
  p = p * r + 0.0416683927f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  p = p * (r * r) + r + 1.0f;
  // "Not less than" lets a NaN through.
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (Value)_mm512_maskz_scalef_ps(counts, (__m512)p, (__m512)n);
}
#endif
template <typename V>
double exponential(double x, double) {
  return std::exp(x);
}

// tanh(x): an odd polynomial near 0 (fitted, relative error 5e-9), where the other form would cancel.
template <typename V>
typename V::Value hyperbolic_tangent(typename V::Value x, float) {
  using Value = typename V::Value;
  const Value size = V::abs(x);
  const Value square = x * x;
  Value p = -0.00570498733f * square + 0.020639088f;
  p = p * square - 0.0537397154f;
  p = p * square + 0.133314416f;
  p = p * square - 0.333332807f;
  const Value near_zero = x + x * square * p;
  const Value bounded = V::if_less(V::set(20.0f), size, V::set(20.0f), size);
  const Value far = 1.0f - 2.0f / (exponential<V>(bounded + bounded, 0.0f) + 1.0f);
  return V::if_less(size, V::set(0.625f), near_zero, V::if_less(x, V::set(0.0f), -far, far));
}
template <typename V>
double hyperbolic_tangent(double x, double) {
  return std::tanh(x);
}

template <typename V, typename T>
typename V::Value logit(typename V::Value product, const T* bias, const LogitTransform<T>& transform) {
  typename V::Value z = product;
  if (bias != nullptr) z = z + V::load(bias);
  z = z * transform.scale;
  if (transform.softcap != T(0)) z = transform.softcap * hyperbolic_tangent<V>(z / transform.softcap, T(0));
  return z * transform.inv_temperature;
}

template <typename V, typename T>
typename V::Value slope_factor(typename V::Value z, const LogitTransform<T>& transform) {
  const typename V::Value tanh_value = z / (transform.softcap * transform.inv_temperature);
  return T(1) - tanh_value * tanh_value;
}

}  // namespace
}  // namespace fastdpo::cpu
