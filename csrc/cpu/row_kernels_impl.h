// The row kernels over GCC's and Clang's vector types. Included once by each row_kernels_*.cpp, which is compiled with
// its own instruction set and sets FASTDPO_VECTOR_BYTES. Everything here has internal linkage, so that no function
// compiled for one instruction set is ever linked into another's.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "row_kernels.h"

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

// Calls body(V{}, j) for every entry j but the target: for groups of lanes, then for single entries, on both its sides.
template <typename T, typename Body>
inline void for_each_other(const Row<T>& row, int64_t begin, int64_t end, const Body& body) {
  const auto part = [&](int64_t j, int64_t stop) {
    using Wide = typename Lanes<T>::Wide;
    for (; j + Wide::kLanes <= stop; j += Wide::kLanes) body(Wide{}, j);
    for (; j < stop; ++j) body(Single<T>{}, j);
  };
  if (row.target >= begin && row.target < end) {
    part(begin, row.target);
    part(row.target + 1, end);
  } else {
    part(begin, end);
  }
}

// A sum over a row, kept in lanes for one block of entries at a time and in float64 across blocks: that is where
// float32 rounding errors would add up.
constexpr int64_t kBlock = 1024;

template <typename T>
struct LaneSum {
  typename Lanes<T>::Wide::Value lanes = Lanes<T>::Wide::set(T(0));
  double total = 0;

  void add(typename Lanes<T>::Wide, typename Lanes<T>::Wide::Value v) { lanes = lanes + v; }
  template <typename U = T>
  std::enable_if_t<(Lanes<U>::Wide::kLanes > 1)> add(Single<T>, T v) {
    total += v;
  }
  void end_block() {
    total += Lanes<T>::Wide::sum(lanes);
    lanes = Lanes<T>::Wide::set(T(0));
  }
};

template <typename T>
struct LaneMax {
  typename Lanes<T>::Wide::Value lanes = Lanes<T>::Wide::set(-std::numeric_limits<T>::infinity());
  T single = -std::numeric_limits<T>::infinity();

  // A NaN is passed over here; it reaches the result through the sums.
  void add(typename Lanes<T>::Wide, typename Lanes<T>::Wide::Value v) {
    lanes = Lanes<T>::Wide::if_less(lanes, v, v, lanes);
  }
  template <typename U = T>
  std::enable_if_t<(Lanes<U>::Wide::kLanes > 1)> add(Single<T>, T v) {
    single = single < v ? v : single;
  }
  T value() const {
    const T most = Lanes<T>::Wide::max(lanes);
    return single < most ? most : single;
  }
};

// Turns products into logits, in place.
template <typename T, bool kSum>
void take_logits(const Row<T>& row, RowSums<double>& sums, T& max) {
  LaneMax<T> most;
  LaneSum<T> total;
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    for_each_other(row, begin, std::min(begin + kBlock, row.size), [&](auto lanes, int64_t j) {
      using V = decltype(lanes);
      const auto z = logit<V>(V::load(row.values + j), row.bias == nullptr ? nullptr : row.bias + j, row.transform);
      V::store(row.values + j, z);
      most.add(lanes, z);
      if constexpr (kSum) total.add(lanes, z);
    });
    total.end_block();
  }
  sums.logit_sum += total.total;
  max = most.value();
}

template <typename T, bool kOperand, bool kEntropy, bool kSquares>
void add_exponentials(const Row<T>& row, RowSums<double>& sums) {
  const T exponent = static_cast<T>(sums.exponent);
  const bool capped = row.transform.softcap != T(0);
  LaneSum<T> sum, weighted, squares;
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    for_each_other(row, begin, std::min(begin + kBlock, row.size), [&](auto lanes, int64_t j) {
      using V = decltype(lanes);
      const auto z = V::load(row.values + j);
      const auto gap = z - exponent;
      const auto e = exponential<V>(gap, T(0));
      sum.add(lanes, e);
      // A masked entry has e = 0 and gap = -inf, and counts for nothing.
      if constexpr (kEntropy) weighted.add(lanes, e * V::if_less(gap, V::set(T(-1e30)), V::set(T(0)), gap));
      if constexpr (kSquares) squares.add(lanes, e * e);
      if constexpr (kOperand) V::store(row.values + j, capped ? e * slope_factor<V>(z, row.transform) : e);
    });
    sum.end_block();
    weighted.end_block();
    squares.end_block();
  }
  sums.sum += sum.total;
  sums.weighted_sum += weighted.total;
  sums.square_sum += squares.total;
  if (kOperand && row.target >= 0 && row.target < row.size) row.values[row.target] = T(0);
}

template <typename T>
double accumulate(const Row<T>& row, const RowOutputs& outputs, RowSums<double>& sums) {
  T max;
  outputs.mean_logits ? take_logits<T, true>(row, sums, max) : take_logits<T, false>(row, sums, max);
  sums.max_logit = std::max(sums.max_logit, static_cast<double>(max));
  double factor = 1;
  if (max - sums.exponent > kMaxExponentGap) factor = sums.raise(max);

  const int kind = outputs.operand | outputs.entropy << 1 | outputs.log_sum_sq_probs << 2;
  constexpr void (*kAdd[])(const Row<T>&, RowSums<double>&) = {
      add_exponentials<T, false, false, false>, add_exponentials<T, true, false, false>,
      add_exponentials<T, false, true, false>,  add_exponentials<T, true, true, false>,
      add_exponentials<T, false, false, true>,  add_exponentials<T, true, false, true>,
      add_exponentials<T, false, true, true>,   add_exponentials<T, true, true, true>,
  };
  kAdd[kind](row, sums);
  return factor;
}

template <typename T>
void operand(const Row<T>& row, T exponent, T coefficient, T target_value) {
  const bool capped = row.transform.softcap != T(0);
  for_each_other(row, 0, row.size, [&](auto lanes, int64_t j) {
    using V = decltype(lanes);
    const auto z = logit<V>(V::load(row.values + j), row.bias == nullptr ? nullptr : row.bias + j, row.transform);
    const auto e = coefficient * exponential<V>(z - exponent, T(0));
    V::store(row.values + j, capped ? e * slope_factor<V>(z, row.transform) : e);
  });
  if (row.target >= 0 && row.target < row.size) row.values[row.target] = target_value;
}

constexpr RowKernels make_row_kernels(const char* name) {
  return {name, accumulate<float>, accumulate<double>, operand<float>, operand<double>};
}

}  // namespace
}  // namespace fastdpo::cpu
