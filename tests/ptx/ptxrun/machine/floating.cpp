// float32 and float64, rounded to nearest even (.rn, which is also what add, sub and mul without a rounding mean).
// Built without contraction: a multiply and an add are a fused one only where the opcode is fma.
#include "floats.h"
#include "lanes.h"

namespace ptx {
namespace {

// min and max: a NaN loses against a number, and -0 is below +0.
template <typename T>
T minimum(T a, T b) {
  if (a != a) return b != b ? canonical(b) : b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
template <typename T>
T maximum(T a, T b) {
  if (a != a) return b != b ? canonical(b) : b;
  if (b != b) return a;
  if (a == 0 && b == 0) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

template <typename F>
void add_of_type(OpTable& t, const std::string& type) {
  for (const std::string rounding : {"", ".rn"}) {
    t["add" + rounding + type] = {binary<F, F, F, [](F a, F b) { return canonical(a + b); }>};
    t["sub" + rounding + type] = {binary<F, F, F, [](F a, F b) { return canonical(a - b); }>};
    t["mul" + rounding + type] = {binary<F, F, F, [](F a, F b) { return canonical(a * b); }>};
  }
  t["fma.rn" + type] = {ternary<F, F, F, F, [](F a, F b, F c) { return canonical(std::fma(a, b, c)); }>};
  t["div.rn" + type] = {binary<F, F, F, [](F a, F b) { return canonical(a / b); }>};
  t["rcp.rn" + type] = {unary<F, F, [](F a) { return canonical(F(1) / a); }>};
  t["sqrt.rn" + type] = {unary<F, F, [](F a) { return canonical(std::sqrt(a)); }>};
  t["min" + type] = {binary<F, F, F, minimum<F>>};
  t["max" + type] = {binary<F, F, F, maximum<F>>};
  // These move bits; a NaN's are kept.
  t["abs" + type] = {unary<F, F, [](F a) { return std::fabs(a); }>};
  t["neg" + type] = {unary<F, F, [](F a) { return -a; }>};
  t["copysign" + type] = {binary<F, F, F, [](F sign, F value) { return std::copysign(value, sign); }>};
}

// .approx: PTX gives the largest error, and a device its own value inside of it. `ulps` units in the last place to
// either side are drawn from the argument's bits where Options::perturb asks for it, so that like arguments give like
// results, as on a device; a kernel's result must not depend on more.
float within(const Context& c, double exact, int ulps, float argument) {
  float x = static_cast<float>(exact);
  if (!c.machine.options.perturb || !std::isfinite(x) || x == 0) return x;
  uint64_t mixed = (std::bit_cast<uint32_t>(argument) + c.machine.options.seed) * 0x9e3779b97f4a7c15u;
  mixed ^= mixed >> 29;
  const int by = static_cast<int>(mixed * 0xbf58476d1ce4e5b9u >> 40) % (2 * ulps + 1) - ulps;
  for (int i = 0; i < std::abs(by); ++i) x = std::nextafterf(x, by > 0 ? HUGE_VALF : -HUGE_VALF);
  return x;
}

// Largest error over the full range: 2 ulp. Of whole numbers it is exact on every device, and CUDA's own
// double-precision tanh relies on that.
Outcome ex2_approx_ftz(Context& c) {
  const float* a = c.in<float>(1);
  float* d = c.out<float>(0);
  each_lane(c.mask, [&](int lane) {
    const float x = flushed(a[lane]);
    const float y = within(c, std::exp2(static_cast<double>(x)), x == std::nearbyint(x) ? 0 : 2, x);
    d[lane] = x != x ? canonical(x) : flushed(y);
  });
  return Outcome::kNext;
}

// Largest error: 1 ulp.
Outcome rcp_approx_ftz(Context& c) {
  const float* a = c.in<float>(1);
  float* d = c.out<float>(0);
  each_lane(c.mask, [&](int lane) {
    const float x = flushed(a[lane]);
    const float y = x == 0 ? std::copysign(HUGE_VALF, x) : within(c, 1.0 / static_cast<double>(x), 1, x);
    d[lane] = x != x ? canonical(x) : flushed(y);
  });
  return Outcome::kNext;
}

// A gross approximation, from the upper 32 bits of the argument to the upper 32 bits of the result; the others are 0.
// Subnormal numbers count as zeros.
double rcp_approx_ftz64(double a) {
  const auto upper = [](double x) { return std::bit_cast<double>(std::bit_cast<uint64_t>(x) & 0xffffffff00000000u); };
  if (a != a) return std::bit_cast<double>(uint64_t{0x7fffffff00000000});
  if (std::fabs(a) < std::numeric_limits<double>::min()) return std::copysign(HUGE_VAL, a);
  const double y = 1.0 / upper(a);
  return std::fabs(y) < std::numeric_limits<double>::min() ? std::copysign(0.0, y) : upper(y);
}

}  // namespace

void add_floating_ops(OpTable& t) {
  add_of_type<float>(t, ".f32");
  add_of_type<double>(t, ".f64");
  t["ex2.approx.ftz.f32"] = {ex2_approx_ftz};
  t["rcp.approx.ftz.f32"] = {rcp_approx_ftz};
  t["rcp.approx.ftz.f64"] = {unary<double, double, rcp_approx_ftz64>};
}

}  // namespace ptx
