// What PTX says of NaNs, zeros and subnormal numbers, where it differs from the host's arithmetic.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace ptx {

// A NaN that an instruction makes of float32 is this one, whatever the inputs' bits; of float64 they may be kept.
constexpr uint32_t kCanonicalNan = 0x7fffffffu;

inline float canonical(float x) { return x != x ? std::bit_cast<float>(kCanonicalNan) : x; }
inline double canonical(double x) { return x; }

// .ftz: subnormal inputs and results become zeros of their sign.
inline float flushed(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  return (bits & 0x7f800000u) == 0 ? std::bit_cast<float>(bits & 0x80000000u) : x;
}

}  // namespace ptx
