// What the stand-in for cuTensorMapEncodeTiled puts into the 128 bytes of a CUtensorMap, for tma.cpp to read.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint64_t kMagic = 0x70616d2d72747074;
  uint64_t magic;
  uint64_t address;     // of the tensor, on the device
  uint32_t rank;        // up to 5; the innermost dimension first, as in what follows
  uint32_t swizzle;     // of 16-byte pieces in shared memory: 0 none, 1, 2, 3 for rows of 32, 64 and 128 bytes
  uint64_t strides[4];  // in bytes, of the dimensions but the innermost
  uint32_t dims[5];     // in elements
  uint16_t box[5];      // what one transfer moves
  uint16_t element_bytes;
};
static_assert(sizeof(TensorMap) <= 128);

}  // namespace ptx
