// Integer arithmetic, logic and shifts. Sums and products wrap around.
#include <limits>

#include "lanes.h"

namespace ptx {
namespace {

// Shift counts above the register's width mean the width: nothing is left of an unsigned number, the sign of a signed
// one (PTX: "shift amounts greater than the register width N are clamped to N").
template <typename T>
T shift_left(T a, uint32_t by) {
  return by >= sizeof(T) * 8 ? T(0) : static_cast<T>(a << by);
}
template <typename T>
T shift_right(T a, uint32_t by) {
  if (by >= sizeof(T) * 8) return std::is_signed_v<T> && a < 0 ? static_cast<T>(-1) : T(0);
  return static_cast<T>(a >> by);
}

// Division by zero gives a machine-specific value: no kernel of ours may rely on it.
template <typename T>
Outcome divide(Context& c) {
  const T* a = c.in<T>(1);
  const T* b = c.in<T>(2);
  T* d = c.out<T>(0);
  each_lane(c.mask, [&](int lane) {
    if (b[lane] == 0) c.fault("division by zero", lane);
    d[lane] = a[lane] / b[lane];
  });
  return Outcome::kNext;
}

template <typename S, typename U>
void add_of_width(OpTable& t, const std::string& bits) {
  // Signed overflow is undefined in C++, so what wraps is done unsigned; the bits are the same.
  for (const std::string& type : std::vector<std::string>{"s" + bits, "u" + bits}) {
    t["add." + type] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a + b)); }>};
    t["sub." + type] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a - b)); }>};
    t["mul.lo." + type] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a * b)); }>};
    t["mad.lo." + type] = {ternary<U, U, U, U, [](U a, U b, U c) { return (static_cast<U>(a * b + c)); }>};
  }
  t["neg.s" + bits] = {unary<U, U, [](U a) { return (static_cast<U>(0 - a)); }>};
  t["abs.s" + bits] = {unary<U, S, [](S a) { return (a < 0 ? static_cast<U>(0 - static_cast<U>(a)) : U(a)); }>};
  t["min.s" + bits] = {binary<S, S, S, [](S a, S b) { return a < b ? a : b; }>};
  t["max.s" + bits] = {binary<S, S, S, [](S a, S b) { return (a > b ? a : b); }>};
  t["min.u" + bits] = {binary<U, U, U, [](U a, U b) { return a < b ? a : b; }>};
  t["max.u" + bits] = {binary<U, U, U, [](U a, U b) { return (a > b ? a : b); }>};
  t["and.b" + bits] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a & b)); }>};
  t["or.b" + bits] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a | b)); }>};
  t["xor.b" + bits] = {binary<U, U, U, [](U a, U b) { return (static_cast<U>(a ^ b)); }>};
  t["not.b" + bits] = {unary<U, U, [](U a) { return (static_cast<U>(~a)); }>};
  t["shl.b" + bits] = {binary<U, U, uint32_t, shift_left<U>>};
  t["shr.b" + bits] = {binary<U, U, uint32_t, shift_right<U>>};
  t["shr.u" + bits] = {binary<U, U, uint32_t, shift_right<U>>};
  t["shr.s" + bits] = {binary<S, S, uint32_t, shift_right<S>>};
  t["div.u" + bits] = {divide<U>};
  t["div.s" + bits] = {divide<S>};
}

}  // namespace

void add_integer_ops(OpTable& t) {
  add_of_width<int16_t, uint16_t>(t, "16");
  add_of_width<int32_t, uint32_t>(t, "32");
  add_of_width<int64_t, uint64_t>(t, "64");
  // The whole product, twice as wide; or its upper half.
  t["mul.wide.s32"] = {binary<int64_t, int32_t, int32_t, [](int32_t a, int32_t b) { return int64_t{a} * b; }>};
  t["mul.wide.u32"] = {binary<uint64_t, uint32_t, uint32_t, [](uint32_t a, uint32_t b) { return uint64_t{a} * b; }>};
  t["mul.hi.u32"] = {binary<uint32_t, uint32_t, uint32_t,
                            [](uint32_t a, uint32_t b) { return (static_cast<uint32_t>(uint64_t{a} * b >> 32)); }>};
  t["mul.hi.s32"] = {binary<int32_t, int32_t, int32_t,
                            [](int32_t a, int32_t b) { return (static_cast<int32_t>(int64_t{a} * b >> 32)); }>};
  t["mul.hi.u64"] = {binary<uint64_t, uint64_t, uint64_t, [](uint64_t a, uint64_t b) {
    return (static_cast<uint64_t>(static_cast<unsigned __int128>(a) * b >> 64));
  }>};
  t["popc.b32"] = {
      unary<uint32_t, uint32_t, [](uint32_t a) { return (static_cast<uint32_t>(__builtin_popcount(a))); }>};
  t["popc.b64"] = {
      unary<uint32_t, uint64_t, [](uint64_t a) { return (static_cast<uint32_t>(__builtin_popcountll(a))); }>};
}

}  // namespace ptx
