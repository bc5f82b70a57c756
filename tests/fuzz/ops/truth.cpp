#include "truth.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastdpo::fuzz {
namespace {

using Real = long double;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The error of a row's logits up to which a first-order bound of its gradients holds.
constexpr double kFirstOrder = 0.02;
// The greatest exponential that a row keeps: kMaxExponentGap in csrc/fastdpo.h.
const double kLargestOperand = std::exp(32.0);

struct Row {
  std::vector<Real> logits;
  std::vector<Real> exponentials;  // relative to the largest
  double logit_error = 0;          // absolute, the greatest of the row's
  double factor_error = 0;         // of the softcap's slope, relative
  Real lead = 0;                   // the target's logit minus the log of the others' sum of exponentials
  Real largest = 0;                // logit
  Real sum = 0;                    // of exponentials, relative to the largest
};

struct NotFinite {
  bool nan = false, infinity = false;
  void look(double x) {
    nan = nan || std::isnan(x);
    infinity = infinity || std::isinf(x);
  }
};

class Computation {
 public:
  Computation(const Call& call, const Precision& precision) : call_(call), precision_(precision) {
    for (const double w : call.weight) weight_.look(w);
    for (const double b : call.bias) {
      if (b != -kInfinity) weight_.look(b);
    }
  }

  Truth run() {
    const auto n = call_.n, h = call_.h, v = call_.v;
    for (auto* each : {&truth_.logps, &truth_.entropy, &truth_.log_sum_sq_probs, &truth_.mean_logits, &truth_.top_gap})
      each->assign(n, {});
    truth_.hidden.assign(n * h, {});
    truth_.weight.assign(v * h, {0, 0});
    truth_.bias.assign(v, {0, 0});
    truth_.scored.assign(n, false);
    truth_.nan.assign(n, false);
    sums_.assign(v * h, 0), bounds_.assign(v * h, 0), sizes_.assign(v * h, 0);
    bias_sums_.assign(v, 0), bias_bounds_.assign(v, 0), bias_sizes_.assign(v, 0);
    int64_t count = 0;
    bool all_known = true;
    for (int64_t t = 0; t < n; ++t) {
      truth_.scored[t] = call_.targets[t] != call_.ignore_index;
      if (!truth_.scored[t]) {
        for (auto* each :
             {&truth_.logps, &truth_.entropy, &truth_.log_sum_sq_probs, &truth_.mean_logits, &truth_.top_gap})
          (*each)[t] = {0, 0};
        for (int64_t k = 0; k < h; ++k) truth_.hidden[t * h + k] = {0, 0};
        continue;
      }
      ++count;
      Row row;
      const bool known = logits_of(t, row) && add_values(t, row) && add_gradients(t, row);
      all_known = all_known && known;
    }
    finish(all_known, count);
    return truth_;
  }

 private:
  // False where a logit may be no number in the compute type, or have no precision at all.
  bool logits_of(int64_t t, Row& row) {
    const auto h = call_.h, v = call_.v;
    const double unit = precision_.arithmetic, least = precision_.least;
    row.logits.resize(v);
    NotFinite found = weight_;
    for (int64_t k = 0; k < h; ++k) found.look(call_.hidden[t * h + k]);
    for (int64_t j = 0; j < v; ++j) {
      Real product = 0, terms = 0, flushed = 0;
      for (int64_t k = 0; k < h; ++k) {
        const Real a = call_.hidden[t * h + k], b = call_.weight[j * h + k];
        product += a * b;
        terms += std::fabs(a * b);
        // Before a product too.
        flushed += least * (std::fabs(a) + std::fabs(b) + 1);
      }
      const double bias = call_.bias.empty() ? 0 : call_.bias[j];
      const double finite_bias = bias == -kInfinity ? 0 : bias;
      terms += std::fabs(finite_bias);
      if (!(terms < precision_.largest / 4) || !(std::fabs(call_.scale) * terms < precision_.largest / 4))
        row.logit_error = kInfinity;
      if (bias == -kInfinity) {  // the formula without its finite terms; NaN among them is found elsewhere
        const Real masked = call_.softcap == 0 ? -std::numeric_limits<Real>::infinity() : Real(-call_.softcap);
        row.logits[j] = std::copysign(Real(1), Real(call_.scale)) * masked / call_.temperature;
        if (row.logits[j] > 0 && std::isinf(row.logits[j])) row.logit_error = kInfinity;
        if (std::isfinite(row.logits[j])) {
          row.logit_error = std::max(row.logit_error, 8 * unit * double(std::fabs(row.logits[j])));
        }
        continue;
      }
      product += bias;
      Real z = call_.scale * product;
      // A number below the least normal one may be taken for 0 after each operation.
      double argument_error = std::fabs(call_.scale) * (unit * (h + 3) * double(terms) + double(flushed)) + least;
      if (call_.softcap != 0) {
        // 1 - tanh^2 moves by 2 tanh times the argument's error, relative to itself.
        argument_error += 2 * call_.softcap * least;
        row.factor_error = std::max(row.factor_error, 2 * argument_error / call_.softcap + 8 * unit);
        z = call_.softcap * std::tanh(z / call_.softcap);
      }
      z /= call_.temperature;
      if (!(std::fabs(z) < precision_.largest / 4)) row.logit_error = kInfinity;
      row.logits[j] = z;
      const double error = argument_error / call_.temperature + 8 * unit * double(std::fabs(z)) + least;
      row.logit_error = std::max(row.logit_error, error);
    }
    truth_.nan[t] = found.nan && !found.infinity;
    return !found.nan && !found.infinity && std::isfinite(row.logit_error);
  }

  bool add_values(int64_t t, Row& row) {
    const auto v = call_.v;
    const int64_t target = call_.targets[t];
    const double unit = precision_.arithmetic;
    const Real own = row.logits[target];
    if (std::isinf(own)) {  // masked
      const double others = double(*std::max_element(row.logits.begin(), row.logits.end()));
      if (others > -1e37) truth_.logps[t] = {-kInfinity, 0};
      return false;
    }
    Real other_largest = -std::numeric_limits<Real>::infinity(), mean = 0;
    for (int64_t j = 0; j < v; ++j) {
      if (j != target) other_largest = std::max(other_largest, row.logits[j]);
      mean += row.logits[j];
    }
    row.largest = std::max(own, other_largest);
    Real others = 0;
    row.exponentials.resize(v);
    for (int64_t j = 0; j < v; ++j) {
      const Real e = row.exponentials[j] = std::exp(row.logits[j] - row.largest);
      row.sum += e;
      if (j != target) others += e;
    }
    row.lead = own - row.largest - std::log(others);  // infinity where there is no other
    // log p as a logistic function of the lead: precise as p -> 1.
    const Real logp = row.lead > 0 ? -std::log1p(std::exp(-row.lead)) : row.lead - std::log1p(std::exp(row.lead));
    Real entropy = 0, squares = 0;
    const Real log_sum = std::log(row.sum) + row.largest;
    for (int64_t j = 0; j < v; ++j) {
      const Real e = row.exponentials[j];
      if (e > 0) entropy -= e / row.sum * (row.logits[j] - log_sum);
      squares += e * e;
    }
    const double bound = 2 * row.logit_error + unit * (16 + 2 * double(std::fabs(logp))) + precision_.sums * v;
    truth_.logps[t] = {double(logp), bound};
    const double gap = 1 + double(std::fabs(logp)) + double(entropy);
    const double of_sums = 8 * gap * bound + 32 * unit * gap;
    truth_.entropy[t] = {double(entropy), of_sums};
    truth_.log_sum_sq_probs[t] = {double(std::log(squares) - 2 * std::log(row.sum)), of_sums};
    Real sizes = 0;
    for (const Real z : row.logits) sizes += std::fabs(z);
    // The sum over the vocabulary may be formed in the compute type.
    if (sizes < precision_.largest / 4)
      truth_.mean_logits[t] = {double(mean / v), of_sums + 32 * unit * double(sizes / v)};
    const Real top_gap = other_largest - own;
    truth_.top_gap[t] = {
        double(top_gap),
        std::isinf(top_gap) ? 0 : 2 * row.logit_error + unit * double(std::fabs(top_gap)) + precision_.least};
    return true;
  }

  bool add_gradients(int64_t t, const Row& row) {
    const auto h = call_.h, v = call_.v;
    const double c = call_.grad_logps[t], unit = precision_.arithmetic;
    if (!std::isfinite(c) || row.logit_error > kFirstOrder || row.factor_error > kFirstOrder) return false;
    const double slope = call_.scale / call_.temperature;
    const double relative = 4 * row.logit_error + 2 * row.factor_error + precision_.operand +
                            unit * (32 + std::sqrt(double(v))) +
                            precision_.sums * v;  // the norm's, whose terms may all be rounded to the same side
    // An exponential near the end of the compute type's normal numbers may be taken for 0; so may its coefficient.
    const double least =
        precision_.least * (2 * std::fabs(c * slope) + kLargestOperand * std::max(1.0, std::fabs(slope)));
    std::vector<Real> hidden(h, 0);
    std::vector<double> bound(h, 0), sizes(h, 0), unscaled(h, 0);
    for (int64_t j = 0; j < v; ++j) {
      const bool is_target = j == call_.targets[t];
      const Real p = row.exponentials[j] / row.sum;
      Real derivative = slope * (is_target ? 1 / (1 + std::exp(row.lead)) : -p);
      const double size = std::fabs(double(derivative * c));
      if (call_.softcap != 0) {
        const Real tanh = row.logits[j] * call_.temperature / call_.softcap;
        derivative *= std::isinf(tanh) ? 0 : 1 - tanh * tanh;
      }
      const double weighed = size * relative + least;
      for (int64_t k = 0; k < h; ++k) {
        const Real w = call_.weight[j * h + k], x = call_.hidden[t * h + k];
        const double w_size = double(std::fabs(w)), x_size = double(std::fabs(x));
        hidden[k] += derivative * c * w;
        bound[k] += weighed * w_size + precision_.least * (size + w_size);
        sizes[k] += size * w_size;
        unscaled[k] += kLargestOperand * w_size;  // the sum before it is divided by the row's norm
        sums_[j * h + k] += derivative * c * x;
        bounds_[j * h + k] += weighed * x_size + precision_.least * (size + x_size);
        sizes_[j * h + k] += size * x_size;
      }
      bias_sums_[j] += derivative * c;
      bias_bounds_[j] += weighed;
      bias_sizes_[j] += size;
    }
    for (int64_t k = 0; k < h; ++k) {
      const double all = (bound[k] + unit * (v + 8) * sizes[k] + precision_.hidden_least) * precision_.roundings;
      truth_.hidden[t * h + k] = fit(hidden[k], precision_.hidden * std::fabs(double(hidden[k])) + all,
                                     std::max(sizes[k], unscaled[k]), precision_.hidden_largest);
    }
    return true;
  }

  void finish(bool all_known, int64_t count) {
    const double unit = precision_.arithmetic;
    const double sum_terms = unit * (count + 8);
    for (int64_t i = 0; i < call_.v * call_.h; ++i) {
      const double all = (bounds_[i] + sum_terms * sizes_[i] + precision_.hidden_least) * precision_.roundings;
      truth_.weight[i] = all_known ? fit(sums_[i], precision_.hidden * std::fabs(double(sums_[i])) + all, sizes_[i],
                                         precision_.hidden_largest)
                                   : Expected{};
    }
    for (int64_t j = 0; j < call_.v; ++j) {
      const double all =
          (bias_bounds_[j] + sum_terms * bias_sizes_[j] + precision_.hidden_least) * precision_.roundings;
      truth_.bias[j] = all_known ? fit(bias_sums_[j], precision_.bias * std::fabs(double(bias_sums_[j])) + all,
                                       bias_sizes_[j], precision_.hidden_largest)
                                 : Expected{};
    }
  }

  // Nothing is said of what may overflow on the way.
  Expected fit(Real value, double bound, double size, double largest) const {
    const bool fits = size < precision_.largest / 1e3 && std::fabs(value) + bound < largest;
    return fits ? Expected{double(value), bound} : Expected{};
  }

  const Call& call_;
  const Precision& precision_;
  Truth truth_;
  NotFinite weight_;
  std::vector<Real> sums_, bias_sums_;
  std::vector<double> bounds_, sizes_, bias_bounds_, bias_sizes_;
};

}  // namespace

Truth truth_of(const Call& call, const Precision& precision) { return Computation(call, precision).run(); }

}  // namespace fastdpo::fuzz
