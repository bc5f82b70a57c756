// From a function of one lane's values to an instruction.
#pragma once

#include "machine.h"
#include "op_table.h"

namespace ptx {

// d = f(a), and so on. D, A, B and C are the types that the opcode names: their sizes are those of the registers.
template <typename D, typename A, auto kFunction>
Outcome unary(Context& c) {
  const A* a = c.in<A>(1);
  D* d = c.out<D>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = kFunction(a[lane]); });
  return Outcome::kNext;
}

template <typename D, typename A, typename B, auto kFunction>
Outcome binary(Context& c) {
  const A* a = c.in<A>(1);
  const B* b = c.in<B>(2);
  D* d = c.out<D>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = kFunction(a[lane], b[lane]); });
  return Outcome::kNext;
}

template <typename D, typename A, typename B, typename C, auto kFunction>
Outcome ternary(Context& c) {
  const A* a = c.in<A>(1);
  const B* b = c.in<B>(2);
  const C* third = c.in<C>(3);
  D* d = c.out<D>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = kFunction(a[lane], b[lane], third[lane]); });
  return Outcome::kNext;
}

}  // namespace ptx
