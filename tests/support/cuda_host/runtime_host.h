#pragma once

#include "runtime.h"

namespace fastdpo::cuda {

struct HostSettings {
  bool capturing = false;
  bool device_failed = false;
  int compute_capability = 90;
  int multiprocessors = 132;
  bool has_level1 = true;
  int64_t fused_products = 0;  // counted, for tests that want to know which level ran
};
HostSettings& host_settings();

}  // namespace fastdpo::cuda
