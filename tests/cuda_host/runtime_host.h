#pragma once

#include "runtime.h"

namespace fastdpo::cuda {

struct HostSettings {
  Limits limits{};
  bool capturing = false;
};
HostSettings& host_settings();

}  // namespace fastdpo::cuda
