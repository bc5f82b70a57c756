// cvt. The source register may be wider than the type that is read of it, and the destination wider than what is
// written, which then is extended by its own sign.
#include "floats.h"
#include "lanes.h"

namespace ptx {
namespace {

// bfloat16 and float16 from float32, to nearest even, by their bits. NaN becomes 0x7fff, as PTX has it.
uint16_t to_bfloat16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

uint16_t to_float16(float x) {
  if (x != x) return 0x7fff;
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float size = std::fabs(x);
  if (size >= 65520.0f) return sign | 0x7c00;  // half way between the largest number and the next, or beyond
  if (size < 0x1p-14f) {
    // Subnormal: a multiple of 2^-24; the host rounds to nearest even.
    return sign | static_cast<uint16_t>(std::nearbyintf(size * 0x1p24f));
  }
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + ((bits >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded >> 13) - ((127 - 15) << 10));
}

float from_float16(uint16_t x) {
  const int exponent = (x >> 10) & 31;
  const int mantissa = x & 0x3ff;
  float size;
  if (exponent == 31) {
    size = mantissa == 0 ? HUGE_VALF : std::bit_cast<float>(kCanonicalNan);
  } else if (exponent == 0) {
    size = static_cast<float>(mantissa) * 0x1p-24f;
  } else {
    size = std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
  }
  return x & 0x8000 && size == size ? -size : size;
}

// Between integers: the source's low bits, extended to the destination by the sign of the type named.
template <typename D, typename S>
Outcome between_integers(Context& c) {
  const Operand& to = c.operand(0);
  if (to.width < sizeof(D)) c.fault("a register too narrow for the result");
  uint64_t values[kLanes];
  each_lane(c.mask, [&](int lane) {
    const S source = static_cast<S>(c.bits(1, lane));
    values[lane] = static_cast<uint64_t>(
        static_cast<std::conditional_t<std::is_signed_v<D>, int64_t, uint64_t>>(static_cast<D>(source)));
  });
  const auto write = [&](auto* d) {
    each_lane(c.mask, [&](int lane) { d[lane] = static_cast<std::remove_pointer_t<decltype(d)>>(values[lane]); });
  };
  if (to.width == 8) write(c.out<uint64_t>(0));
  if (to.width == 4) write(c.out<uint32_t>(0));
  if (to.width == 2) write(c.out<uint16_t>(0));
  return Outcome::kNext;
}

template <typename D>
void add_integers_to(OpTable& t, const std::string& to) {
  t["cvt." + to + ".s8"] = {between_integers<D, int8_t>};
  t["cvt." + to + ".u8"] = {between_integers<D, uint8_t>};
  t["cvt." + to + ".s16"] = {between_integers<D, int16_t>};
  t["cvt." + to + ".u16"] = {between_integers<D, uint16_t>};
  t["cvt." + to + ".s32"] = {between_integers<D, int32_t>};
  t["cvt." + to + ".u32"] = {between_integers<D, uint32_t>};
  t["cvt." + to + ".s64"] = {between_integers<D, int64_t>};
  t["cvt." + to + ".u64"] = {between_integers<D, uint64_t>};
}

// To an integral value of the same type.
template <typename F>
void add_integral(OpTable& t, const std::string& type) {
  t["cvt.rni" + type + type] = {unary<F, F, [](F a) { return canonical(std::nearbyint(a)); }>};
  t["cvt.rzi" + type + type] = {unary<F, F, [](F a) { return canonical(std::trunc(a)); }>};
  t["cvt.rmi" + type + type] = {unary<F, F, [](F a) { return canonical(std::floor(a)); }>};
  t["cvt.rpi" + type + type] = {unary<F, F, [](F a) { return canonical(std::ceil(a)); }>};
  // .sat: into [0, 1]; NaN becomes +0, and so does -0.
  t["cvt.sat" + type + type] = {unary<F, F, [](F a) { return (a > F(0) ? (a < F(1) ? a : F(1)) : F(0)); }>};
}

template <typename D, typename S>
Op cast() {
  return {unary<D, S, [](S a) { return (canonical(static_cast<D>(a))); }>};
}

}  // namespace

void add_conversions(OpTable& t) {
  add_integers_to<int16_t>(t, "s16");
  add_integers_to<uint16_t>(t, "u16");
  add_integers_to<int32_t>(t, "s32");
  add_integers_to<uint32_t>(t, "u32");
  add_integers_to<int64_t>(t, "s64");
  add_integers_to<uint64_t>(t, "u64");
  add_integral<float>(t, ".f32");
  add_integral<double>(t, ".f64");
  t["cvt.f64.f32"] = {unary<double, float, [](float a) { return (static_cast<double>(a)); }>};
  t["cvt.rn.f32.f64"] = cast<float, double>();
  t["cvt.rn.f32.s32"] = cast<float, int32_t>();
  t["cvt.rn.f32.u32"] = cast<float, uint32_t>();
  t["cvt.rn.f32.s64"] = cast<float, int64_t>();
  t["cvt.rn.f32.u64"] = cast<float, uint64_t>();
  t["cvt.rn.f64.s32"] = cast<double, int32_t>();
  t["cvt.rn.f64.s64"] = cast<double, int64_t>();
  t["cvt.rn.f64.u64"] = cast<double, uint64_t>();
  t["cvt.f32.f16"] = {unary<float, uint16_t, from_float16>};
  t["cvt.rn.f16.f32"] = {unary<uint16_t, float, to_float16>};
  t["cvt.rn.bf16.f32"] = {unary<uint16_t, float, to_bfloat16>};
  t["cvt.f32.bf16"] = {unary<float, uint16_t, [](uint16_t a) {
    return canonical(std::bit_cast<float>(static_cast<uint32_t>(a) << 16));
  }>};
  // d = {a, b}: the first source is the upper half.
  t["cvt.rn.bf16x2.f32"] = {binary<uint32_t, float, float, [](float a, float b) {
    return static_cast<uint32_t>(to_bfloat16(a)) << 16 | to_bfloat16(b);
  }>};
}

}  // namespace ptx
