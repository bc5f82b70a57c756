// libFuzzer's entry: one call of both CPU ops, under the sanitizers, its results held against extended precision.
//
// What raises c10::Error is as it should be where something was wrong on purpose, and nowhere else; any other
// exception, and a result out of its bound, ends the program.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "../../../csrc/cpu/fused.h"
#include "../../../csrc/cpu/isa.h"
#include "../../../csrc/cpu/token_logps.h"
#include "draw.h"
#include "truth.h"

namespace fastdpo::fuzz {
namespace {

struct Counts {
  int64_t calls = 0, refused = 0, misused = 0, backwards = 0, numbers = 0;
  double worst = 0;  // error over bound
  ~Counts() { print(); }
  void print() const {
    std::fprintf(stderr,
                 "path %s: %lld calls, %lld with something wrong on purpose, %lld refused, %lld backwards; %lld "
                 "numbers compared, the worst at %.2f of its bound\n",
                 cpu::name_of(cpu::isa()), (long long)calls, (long long)misused, (long long)refused,
                 (long long)backwards, (long long)numbers, worst);
  }
};
Counts counts;

// Half a unit in the last place, relative; the least normal number, of float16 the least at all; the largest.
double rounding(at::ScalarType dtype) {
  return dtype == at::kDouble ? 0x1p-53 : dtype == at::kFloat ? 0x1p-24 : dtype == at::kHalf ? 0x1p-11 : 0x1p-8;
}
double least(at::ScalarType dtype) {
  return dtype == at::kDouble ? 0x1p-1022 : dtype == at::kHalf ? 0x1p-24 : 0x1p-126;
}
double largest(at::ScalarType dtype) { return dtype == at::kDouble ? 1.7e308 : dtype == at::kHalf ? 65504 : 3.38e38; }

Precision precision_of(const Drawn& d) {
  const auto dtype = d.hidden.scalar_type();
  const auto compute = dtype == at::kDouble ? at::kDouble : at::kFloat;
  // bfloat16's exponentials are kept and multiplied in bfloat16, whoever multiplies them; rounded again where a row's
  // exponent was raised, and as scaled hidden states.
  const bool narrow = dtype == at::kBFloat16;
  const bool has_bias = d.bias.has_value();
  const auto bias = has_bias ? d.bias->scalar_type() : dtype;
  return {
      .arithmetic = rounding(compute),
      .sums = rounding(at::kDouble),
      .operand = rounding(narrow ? dtype : compute),
      .hidden = rounding(dtype),
      .bias = rounding(bias),
      .least = least(compute),
      .hidden_least = std::max(least(dtype), least(bias)),
      .largest = largest(compute),
      .hidden_largest = std::min(largest(dtype), largest(bias)),
      .roundings = narrow ? 3 : 1,
  };
}

std::vector<double> numbers(const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

void describe(const char* name, const at::Tensor& tensor) {
  const at::Tensor wide = tensor.to(at::kDouble);
  const at::Tensor finite = wide.masked_select(wide.isfinite());
  const auto most = finite.numel() > 0 ? finite.abs().max().item<double>() : 0;
  std::fprintf(stderr, "  %s: %s [%s], %lld not finite, of the others the largest is %g\n", name,
               c10::toString(tensor.scalar_type()), c10::Join(", ", tensor.sizes()).c_str(),
               static_cast<long long>(wide.numel() - finite.numel()), most);
}

[[noreturn]] void fail(const Drawn& d, const std::string& what) {
  std::fprintf(stderr, "%s\n", what.c_str());
  describe("hidden", d.hidden);
  describe("weight", d.weight);
  if (d.bias.has_value()) describe("bias", *d.bias);
  describe("grad_logps", d.grad_logps);
  std::fprintf(stderr, "  targets [%s], ignore_index %lld\n",
               c10::Join(", ", numbers(d.targets.slice(0, 0, 20))).c_str(), static_cast<long long>(d.ignore_index));
  std::fprintf(stderr, "  scale %g, softcap %g, temperature %g, retain_bytes %lld, needs %d%d%d, threads %d, path %s\n",
               d.scale, d.softcap, d.temperature, static_cast<long long>(d.retain_bytes), d.need_hidden, d.need_weight,
               d.need_bias, d.threads, cpu::name_of(cpu::isa()));
  counts.print();
  std::abort();
}

void compare(const Drawn& d, const char* name, const at::Tensor& tensor, const std::vector<Expected>& expected,
             const at::Tensor& before = {}) {
  if (tensor.numel() != static_cast<int64_t>(expected.size())) {
    fail(d, std::string(name) + " has another number of elements");
  }
  const std::vector<double> values = numbers(tensor);
  std::vector<double> start(values.size(), 0);
  if (before.defined()) start = numbers(before);
  for (size_t i = 0; i < values.size(); ++i) {
    if (expected[i].bound < 0) continue;
    const double exact = start[i] + expected[i].value;
    double bound = expected[i].bound;
    // A product of matrices may add a token at a time to what is there.
    if (before.defined()) {
      bound += (d.hidden.size(0) + 2) * rounding(tensor.scalar_type()) * (std::fabs(start[i]) + std::fabs(exact));
    }
    if (values[i] == exact) continue;
    const double error = std::fabs(values[i] - exact);
    if (!(error <= bound)) {
      char what[256];
      std::snprintf(what, sizeof what, "%s: element %zu is %.9g, it should be %.9g; error %.3g, bound %.3g", name, i,
                    values[i], exact, error, bound);
      fail(d, what);
    }
    ++counts.numbers;
    if (bound > 0) counts.worst = std::max(counts.worst, error / bound);
  }
}

Call call_of(const Drawn& d) {
  Call call{d.hidden.size(0), d.hidden.size(1), d.weight.size(0), numbers(d.hidden), numbers(d.weight),    {}, {},
            d.ignore_index,   d.scale,          d.softcap,        d.temperature,     numbers(d.grad_logps)};
  if (d.bias.has_value()) call.bias = numbers(*d.bias);
  call.targets.assign(d.targets.const_data_ptr<int64_t>(), d.targets.const_data_ptr<int64_t>() + call.n);
  return call;
}

// Factors that the Python front end refuses, or that are none in the compute type.
bool sane(const Drawn& d) {
  const auto fits = [&](double x) {
    const double size = std::fabs(x);
    return std::isfinite(x) &&
           (d.hidden.scalar_type() == at::kDouble ? size > 1e-300 && size < 1e300 : size > 1e-37 && size < 1e37);
  };
  return fits(d.scale) && fits(d.temperature) && d.temperature > 0 &&
         (d.softcap == 0 || (fits(d.softcap) && d.softcap > 0)) &&
         fits(d.softcap == 0 ? 1 : d.softcap / d.temperature) && fits(d.scale / d.temperature);
}

void check_forward(const Drawn& d, const Truth& truth, const cpu::ForwardResult& results) {
  const auto& [logps, row_state, direction, retained, entropy, squares, mean, gap] = results;
  compare(d, "logps", logps, truth.logps);
  if (d.entropy) compare(d, "entropy", entropy, truth.entropy);
  if (d.log_sum_sq_probs) compare(d, "log_sum_sq_probs", squares, truth.log_sum_sq_probs);
  if (d.mean_logits) compare(d, "mean_logits", mean, truth.mean_logits);
  if (d.top_gap) compare(d, "top_gap", gap, truth.top_gap);
  const auto values = numbers(logps);
  for (size_t t = 0; t < values.size(); ++t) {
    if (truth.nan[t] && !std::isnan(values[t])) fail(d, "a row with NaN has a log-probability");
    if (values[t] > 0) fail(d, "a log-probability is above 0");
  }
}

int run(const uint8_t* data, size_t size) {
  FuzzedDataProvider bytes(data, size);
  Drawn d = draw(bytes);
  at::set_num_threads(d.threads);
  ++counts.calls;
  counts.misused += d.misused;
  std::optional<Truth> truth;
  if (!d.misused && sane(d)) truth = truth_of(call_of(d), precision_of(d));
  bool spoilt = false;
  try {
    const auto results = cpu::token_logps_forward(d.hidden, d.weight, d.targets, d.bias, d.ignore_index, d.num_scored,
                                                  d.scale, d.softcap, d.temperature, d.need_hidden, d.retain_bytes,
                                                  d.entropy, d.log_sum_sq_probs, d.mean_logits, d.top_gap);
    if (truth.has_value()) check_forward(d, *truth, results);
    auto [logps, row_state, direction, retained, entropy, squares, mean, gap] = results;
    at::Tensor grad_logps = d.grad_logps;
    spoilt = bytes.ConsumeIntegralInRange(0, 7) == 1;
    if (spoilt) spoil_state(bytes, row_state, direction, retained, grad_logps);
    if (bytes.ConsumeBool()) at::set_num_threads(4 - d.threads);
    const auto before = [](const std::optional<at::Tensor>& sum) {
      return sum.has_value() ? sum->clone() : at::Tensor();
    };
    const at::Tensor weight_before = before(d.weight_sum), bias_before = before(d.bias_sum);
    const auto [hidden, weight, bias] = cpu::token_logps_backward(
        grad_logps, d.hidden, d.weight, d.targets, d.bias, row_state, direction, retained, d.weight_sum, d.bias_sum,
        d.ignore_index, d.num_scored, d.scale, d.softcap, d.temperature, d.need_hidden, d.need_weight, d.need_bias);
    ++counts.backwards;
    if (truth.has_value() && !spoilt) {
      if (d.need_hidden) compare(d, "grad_hidden", hidden, truth->hidden);
      if (d.need_weight) compare(d, "grad_weight", d.weight_sum.value_or(weight), truth->weight, weight_before);
      if (d.need_bias) compare(d, "grad_bias", d.bias_sum.value_or(bias), truth->bias, bias_before);
    }
  } catch (const c10::Error& error) {
    ++counts.refused;
    if (truth.has_value() && !spoilt) fail(d, error.what_without_backtrace());
  }
  return 0;
}

}  // namespace
}  // namespace fastdpo::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return fastdpo::fuzz::run(data, size); }
