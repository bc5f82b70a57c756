// mov, and cvta between address spaces.
#include "lanes.h"
#include "spaces.h"

namespace ptx {
namespace {

// mov.b64 d, {a, b}: a's bits are the lowest.
template <typename T>
Outcome pack(Context& c) {
  const int parts = c.size() - 1;
  const int bits = static_cast<int>(sizeof(T)) * 8 / parts;
  uint64_t values[kLanes] = {};
  for (int part = 0; part < parts; ++part) {
    const Operand& o = c.operand(1 + part);
    if (o.kind == Operand::kRegister && o.width * 8 != bits) c.fault("parts of another width than the whole's");
    const uint64_t keep = (uint64_t{1} << bits) - 1;
    each_lane(c.mask, [&](int lane) { values[lane] |= (c.bits(1 + part, lane) & keep) << (part * bits); });
  }
  T* d = c.out<T>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = static_cast<T>(values[lane]); });
  return Outcome::kNext;
}

template <typename T, typename Part>
Outcome unpack(Context& c, int parts) {
  T values[kLanes];
  const T* whole = c.in<T>(parts);
  each_lane(c.mask, [&](int lane) { values[lane] = whole[lane]; });
  for (int part = 0; part < parts; ++part) {
    Part* d = c.out<Part>(part);
    each_lane(c.mask, [&](int lane) { d[lane] = static_cast<Part>(values[lane] >> (part * sizeof(Part) * 8)); });
  }
  return Outcome::kNext;
}

template <typename T>
Outcome move(Context& c) {
  const int into = c.instruction.counts[0];
  if (into == 1 && c.size() > 2) return pack<T>(c);
  if constexpr (sizeof(T) == 8) {
    if (into == 2) return unpack<T, uint32_t>(c, 2);
    if (into == 4) return unpack<T, uint16_t>(c, 4);
  }
  if constexpr (sizeof(T) == 4) {
    if (into == 2) return unpack<T, uint16_t>(c, 2);
  }
  return unary<T, T, [](T a) { return a; }>(c);
}

Outcome to_global(Context& c) {  // a generic address of global memory is its global address
  return unary<uint64_t, uint64_t, [](uint64_t a) { return a; }>(c);
}

Outcome from_parameters(Context& c) {
  return unary<uint64_t, uint64_t, [](uint64_t a) { return a + kParameterWindow; }>(c);
}

}  // namespace

void add_moves(OpTable& t) {
  for (const char* type : {"b16", "u16", "s16"}) t[std::string("mov.") + type] = {move<uint16_t>};
  for (const char* type : {"b32", "u32", "s32", "f32"}) t[std::string("mov.") + type] = {move<uint32_t>};
  for (const char* type : {"b64", "u64", "s64", "f64"}) t[std::string("mov.") + type] = {move<uint64_t>};
  t["mov.pred"] = {[](Context& c) {
    c.out_predicate(0, c.in_predicate(1));
    return Outcome::kNext;
  }};
  t["cvta.to.global.u64"] = {to_global};
  t["cvta.global.u64"] = {to_global};
  t["cvta.param.u64"] = {from_parameters};
}

}  // namespace ptx
