// Sums and products rounded towards zero (.rz), down (.rm) or up (.rp): the host's own rounding mode, for the time of
// the instruction. Built with -frounding-math, so that nothing is computed beforehand in another mode.
#include <cfenv>

#include "floats.h"
#include "lanes.h"

namespace ptx {
namespace {

struct Rounding {
  explicit Rounding(int mode) : before(std::fegetround()) { std::fesetround(mode); }
  ~Rounding() { std::fesetround(before); }
  int before;
};

template <int kMode, Outcome (*kInstruction)(Context&)>
Outcome rounded(Context& c) {
  const Rounding rounding(kMode);
  return kInstruction(c);
}

template <int kMode, typename F>
void add_mode(OpTable& t, const std::string& suffix) {
  t["add" + suffix] = {rounded<kMode, binary<F, F, F, [](F a, F b) { return canonical(a + b); }>>};
  t["sub" + suffix] = {rounded<kMode, binary<F, F, F, [](F a, F b) { return canonical(a - b); }>>};
  t["mul" + suffix] = {rounded<kMode, binary<F, F, F, [](F a, F b) { return canonical(a * b); }>>};
  t["fma" + suffix] = {rounded<kMode, ternary<F, F, F, F, [](F a, F b, F c) { return canonical(std::fma(a, b, c)); }>>};
}

}  // namespace

void add_directed_ops(OpTable& t) {
  add_mode<FE_TOWARDZERO, float>(t, ".rz.f32");
  add_mode<FE_DOWNWARD, float>(t, ".rm.f32");
  add_mode<FE_UPWARD, float>(t, ".rp.f32");
  add_mode<FE_TOWARDZERO, double>(t, ".rz.f64");
  add_mode<FE_DOWNWARD, double>(t, ".rm.f64");
  add_mode<FE_UPWARD, double>(t, ".rp.f64");
}

}  // namespace ptx
