// The ops' contract and the arithmetic of one row, shared by the CPU and the CUDA back end.
//
// Free of torch and of CUDA headers, so that g++ and nvcc read the same text. Everything that decides the value
// of a log-probability once its logits are there stands in this file, and nowhere else.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#if defined(__CUDACC__)
#define FASTDPO_HD __host__ __device__ __forceinline__
#else
#define FASTDPO_HD inline
#endif

namespace fastdpo {

// N rows (tokens), H hidden units, V vocabulary entries. C is the compute type: float64 for float64 inputs, else
// float32. O, the operand type, is the inputs' type, but float32 for float16, whose range cannot hold exp(32).
//
// forward returns
//   logps            [N] C      log-probability of the target; 0 where ignored
//   row_state        [3, N] C   kRowExponent, kRowNorm, kRowTargetWeight below; (0, 1, 0) where ignored
//   direction        [N, H] C   d logp / d hidden; 0 where ignored; [0, H] unless need_direction
//   retained         [R, V] O   gradient operand of the first R = min(N, retain_bytes / (V * sizeof(O))) scored rows,
//                               for the same back end's backward, which may keep a number of its own at the target
//   entropy, log_sum_sq_probs, mean_logits, top_gap [N] C; 0 where ignored; [0] unless asked for
//
// num_scored is the number of targets that are not ignore_index, or -1 when the caller does not know it: the CPU
// counts for itself; a CUDA op needs one host synchronisation to learn it, and under stream capture computes all rows.
//
// backward returns grad_hidden [N, H], grad_weight [V, H], grad_bias [V] in the inputs' types; [0, H] and [0]
// where not needed. weight_sum [V, H] C, if given, has the weight's gradient added to it, not rounded to the inputs'
// type, and grad_weight is [0, H]; bias_sum [V] C likewise. So gradients of a batch taken in parts are rounded once.
constexpr const char* kForwardSchema =
    "token_logps_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, *, int ignore_index, "
    "int num_scored, float logit_scale, float softcap, float temperature, bool need_direction, int retain_bytes, "
    "bool entropy, bool log_sum_sq_probs, bool mean_logits, bool top_gap) -> (Tensor logps, Tensor row_state, "
    "Tensor direction, Tensor retained, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor top_gap)";
constexpr const char* kBackwardSchema =
    "token_logps_backward(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor row_state, Tensor direction, Tensor retained, Tensor(a!)? weight_sum=None, Tensor(b!)? bias_sum=None, *, "
    "int ignore_index, int num_scored, float logit_scale, float softcap, float temperature, bool need_hidden, "
    "bool need_weight, bool need_bias) "
    "-> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)";

// What backward needs of a row. With c = dL/dlogp and operand_j = exp(z_j - exponent) * slope_factor(z_j), 0 at j = y:
//   grad_weight = sum_t c_t target_weight_t e_y(t) h_t^T - sum_t (c_t slope / norm_t) operand_t h_t^T
enum RowState : int { kRowExponent = 0, kRowNorm = 1, kRowTargetWeight = 2, kRowStates = 3 };

// A row's exponent is raised when some z_j - exponent passes this. exp(32)^2 times 2^31 entries is 1.3e37, inside
// float32 and bfloat16 (3.4e38), so sums of squares need no second rule.
constexpr double kMaxExponentGap = 32.0;

// z = softcap * tanh(logit_scale * (h.w + b) / softcap) / temperature; softcap == 0 means none.
template <typename T>
struct LogitTransform {
  T scale;
  T softcap;
  T inv_temperature;

  FASTDPO_HD T logit(T product_plus_bias) const {
    T z = scale * product_plus_bias;
    if (softcap != T(0)) z = softcap * std::tanh(z / softcap);
    return z * inv_temperature;
  }
  FASTDPO_HD bool is_identity() const { return scale == T(1) && softcap == T(0) && inv_temperature == T(1); }
  // d z / d (h.w) is slope() * slope_factor(z): a constant, and what the softcap adds to it.
  FASTDPO_HD T slope() const { return scale * inv_temperature; }
  FASTDPO_HD T slope_factor(T z) const {
    if (softcap == T(0)) return T(1);
    const T tanh_value = z / (softcap * inv_temperature);
    return T(1) - tanh_value * tanh_value;
  }
};

// The results of one row, from its sums.
template <typename T>
struct RowResult {
  T logp;
  T norm;              // sum over all j of exp(z_j - exponent)
  T one_minus_p;       // 1 - p_target, formed without cancellation
  T entropy;           // -sum p log p, in nats
  T log_sum_sq_probs;  // log sum p^2
  T mean_logit;
  T top_gap;  // max over j != target of z_j, minus z_target: above 0 where another logit is greater; -inf if V is 1
};

// Running sums over the entries j != target of one row, relative to a reference exponent k. k starts at the target's
// logit, so that p -> 1 is exact; the sums then are those of exp(z_j - z_y) and logp = -log1p(sum).
template <typename T>
struct RowSums {
  T target_logit;
  T exponent;      // k
  T sum;           // sum exp(z_j - k)
  T weighted_sum;  // sum exp(z_j - k) (z_j - k)
  T square_sum;    // sum exp(z_j - k)^2
  T logit_sum;     // sum z_j
  T max_logit;     // max z_j

  FASTDPO_HD static RowSums start(T target_logit) {
    // A target masked by a bias of -inf would make z_j - k undefined where z_j is masked too; the comparison keeps NaN.
    // float's lowest for all T: sums of float32 rows may be kept in float64, but z_j - k is formed in float32.
    const T lowest = std::numeric_limits<float>::lowest();
    const T infinity = std::numeric_limits<T>::infinity();
    return {target_logit, target_logit == -infinity ? lowest : target_logit, T(0), T(0), T(0), T(0), -infinity};
  }

  // Moves k up to new_exponent and returns the factor by which everything that was formed with the old k shrinks.
  FASTDPO_HD T raise(T new_exponent) {
    const T shift = exponent - new_exponent;
    const T factor = std::exp(shift);
    weighted_sum = factor * (weighted_sum + shift * sum);
    sum *= factor;
    square_sum *= factor * factor;
    exponent = new_exponent;
    return factor;
  }

  FASTDPO_HD RowResult<T> finish(int64_t vocabulary) const {
    const T gap = target_logit - exponent;  // exactly 0 unless k was raised
    const T target_term = std::exp(gap);
    const T norm = sum + target_term;
    const T log_norm = gap == T(0) ? std::log1p(sum) : std::log(norm);
    const T target_weighted = target_term == T(0) ? T(0) : target_term * gap;
    RowResult<T> r;
    r.logp = gap - log_norm;
    r.norm = norm;
    r.one_minus_p = sum / norm;
    r.entropy = log_norm - (weighted_sum + target_weighted) / norm;
    r.log_sum_sq_probs = std::log(square_sum + target_term * target_term) - T(2) * log_norm;
    r.mean_logit = (logit_sum + target_logit) / static_cast<T>(vocabulary);
    // Infinities of one sign are a tie as equal numbers are, and their difference is no number.
    r.top_gap = max_logit == target_logit ? T(0) : max_logit - target_logit;
    return r;
  }
};

}  // namespace fastdpo
