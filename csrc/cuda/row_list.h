// Which rows the products run over.
#pragma once

#include <cstdint>

#include "inputs.h"

namespace fastdpo::cuda {

// Scored rows first.
struct RowList {
  int64_t count;
  // [N] positions; rows beyond `count` are not computed. Null where row i is position i for all.
  const int64_t* positions;
  Tensor storage;  // kept alive for `positions`

  bool listed() const { return positions != nullptr; }
  // Of row i on; null as above.
  const int64_t* from(int64_t row) const { return listed() ? positions + row : nullptr; }
};

// Where the caller does not know how many there are, the host waits for the device to say so; and then a target outside
// the vocabulary is refused.
RowList find_scored_rows(const Inputs& in);

}  // namespace fastdpo::cuda
