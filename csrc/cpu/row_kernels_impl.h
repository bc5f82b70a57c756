// The row kernels. Included once by each row_kernels_*.cpp, which is compiled with its own instruction set and sets
// FASTDPO_VECTOR_BYTES; everything here has internal linkage, for the reason given in vector_math.h.

#include <algorithm>
#include <limits>

#include "row_kernels.h"
#include "vector_math.h"

namespace fastdpo::cpu {
namespace {

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

constexpr RowKernels make_row_kernels() {
  return {accumulate<float>, accumulate<double>, operand<float>, operand<double>};
}

}  // namespace
}  // namespace fastdpo::cpu
