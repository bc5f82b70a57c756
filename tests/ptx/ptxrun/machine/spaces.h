// Where addresses lead.
#pragma once

#include "machine.h"

namespace ptx {

// Generic addresses of the kernel's parameters.
constexpr uint64_t kParameterWindow = uint64_t{1} << AddressSpace::kWindowBits;
// An address of another block's shared memory: mapa puts the block's rank above it, plus 1.
constexpr int kRankShift = 24;

enum class Space { kGlobal, kShared, kParameters };

// The allocation that an address of the space is in, and the offset; of shared memory, of the lane's own block or,
// where it has one in it, of the block that mapa named.
struct Place {
  Allocation* allocation;
  uint64_t offset;
};
Place place_of(Machine& machine, const Warp& warp, Space space, uint64_t address);

// Whom an access is by, and what orders it: see Races::note.
struct Accessor {
  uint32_t agent;
  Clock clock;
  const std::vector<Clock>* seen;
  const std::vector<Clock>* seen_writes;
};

// The bytes at a place, all checks done. A fault's text without what tells where; null for none.
struct Touched {
  std::byte* bytes;
  std::string wrong;
};
Touched touch(Machine& machine, Place place, uint64_t bytes, bool write, const Accessor& by);

}  // namespace ptx
