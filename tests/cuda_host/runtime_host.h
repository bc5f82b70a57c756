#pragma once

#include "runtime.h"

namespace fastdpo::cuda {

struct HostSettings {
  Limits limits{};
  bool capturing = false;
  int compute_capability = 90;
  bool has_level1 = true;
  int64_t fused_products = 0;  // counted, for tests that want to know which level ran
};
HostSettings& host_settings();

}  // namespace fastdpo::cuda
