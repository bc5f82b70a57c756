// setp, selp and the logic of predicates.
#include <cmath>

#include "lanes.h"

namespace ptx {
namespace {

template <typename T, auto kCompare>
Outcome compare(Context& c) {
  const T* a = c.in<T>(1);
  const T* b = c.in<T>(2);
  uint32_t bits = 0;
  each_lane(c.mask, [&](int lane) { bits |= static_cast<uint32_t>(kCompare(a[lane], b[lane])) << lane; });
  c.out_predicate(0, bits);
  return Outcome::kNext;
}

// eq, ne, lt ... are false where a number is a NaN (and so is ne, which is "not equal, and ordered").
template <typename T>
void add_ordered(OpTable& t, const std::string& type) {
  const auto add = [&](const char* name, Handler run) { t["setp." + std::string(name) + type] = {run}; };
  add("eq", compare<T, [](T a, T b) { return a == b; }>);
  add("ne", compare<T, [](T a, T b) { return (a < b || a > b); }>);
  if (type[1] == 'b') return;
  add("lt", compare<T, [](T a, T b) { return a < b; }>);
  add("le", compare<T, [](T a, T b) { return a <= b; }>);
  add("gt", compare<T, [](T a, T b) { return (a > b); }>);
  add("ge", compare<T, [](T a, T b) { return (a >= b); }>);
}

// equ, neu, ltu ...: true where a number is a NaN. num, nan: whether both are numbers, whether one is not.
template <typename T>
void add_unordered(OpTable& t, const std::string& type) {
  const auto add = [&](const char* name, Handler run) { t["setp." + std::string(name) + type] = {run}; };
  add("equ", compare<T, [](T a, T b) { return (!(a < b || a > b)); }>);
  add("neu", compare<T, [](T a, T b) { return !(a == b); }>);
  add("ltu", compare<T, [](T a, T b) { return (!(a >= b)); }>);
  add("leu", compare<T, [](T a, T b) { return (!(a > b)); }>);
  add("gtu", compare<T, [](T a, T b) { return !(a <= b); }>);
  add("geu", compare<T, [](T a, T b) { return !(a < b); }>);
  add("num", compare<T, [](T a, T b) { return a == a && b == b; }>);
  add("nan", compare<T, [](T a, T b) { return a != a || b != b; }>);
}

template <typename T>
Outcome select(Context& c) {
  const T* a = c.in<T>(1);
  const T* b = c.in<T>(2);
  const uint32_t chooses = c.in_predicate(3);
  T* d = c.out<T>(0);
  each_lane(c.mask, [&](int lane) { d[lane] = chooses >> lane & 1 ? a[lane] : b[lane]; });
  return Outcome::kNext;
}

template <auto kFunction>
Outcome logic(Context& c) {
  c.out_predicate(0, kFunction(c.in_predicate(1), c.in_predicate(2)));
  return Outcome::kNext;
}

}  // namespace

void add_comparisons(OpTable& t) {
  add_ordered<int16_t>(t, ".s16");
  add_ordered<int32_t>(t, ".s32");
  add_ordered<int64_t>(t, ".s64");
  add_ordered<uint16_t>(t, ".u16");
  add_ordered<uint32_t>(t, ".u32");
  add_ordered<uint64_t>(t, ".u64");
  add_ordered<uint16_t>(t, ".b16");
  add_ordered<uint32_t>(t, ".b32");
  add_ordered<uint64_t>(t, ".b64");
  add_ordered<float>(t, ".f32");
  add_ordered<double>(t, ".f64");
  add_unordered<float>(t, ".f32");
  add_unordered<double>(t, ".f64");
  for (const char* type : {"b16", "s16", "u16"}) t[std::string("selp.") + type] = {select<uint16_t>};
  for (const char* type : {"b32", "s32", "u32", "f32"}) t[std::string("selp.") + type] = {select<uint32_t>};
  for (const char* type : {"b64", "s64", "u64", "f64"}) t[std::string("selp.") + type] = {select<uint64_t>};
  t["and.pred"] = {logic<[](uint32_t a, uint32_t b) { return a & b; }>};
  t["or.pred"] = {logic<[](uint32_t a, uint32_t b) { return a | b; }>};
  t["xor.pred"] = {logic<[](uint32_t a, uint32_t b) { return a ^ b; }>};
  t["not.pred"] = {[](Context& c) {
    c.out_predicate(0, ~c.in_predicate(1));
    return Outcome::kNext;
  }};
}

}  // namespace ptx
