// The device that the stand-ins pretend to be.
#pragma once

#include <cstdint>

namespace ptx {

struct Device {
  bool capturing = false;
  int compute_capability = 90;
  int multiprocessors = 2;
};
Device& the_device();

// The only stream: an address that nothing lies at.
inline void* the_stream() { return reinterpret_cast<void*>(uint64_t{0x5712ea40}); }

// Device memory whose tensor is gone counts as freed. Before every launch, product and copy.
void forget_freed_tensors();

}  // namespace ptx
