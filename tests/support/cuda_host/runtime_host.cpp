// csrc/cuda/runtime.h for the host: nothing is queued, and a test may pretend to be captured.
#include "runtime_host.h"

#include <cstring>
#include <stdexcept>

namespace fastdpo::cuda {

HostSettings& host_settings() {
  static HostSettings settings;
  return settings;
}

DeviceScope::DeviceScope(int) {}
DeviceScope::~DeviceScope() { (void)torch_guard_; }
void* current_stream(int) { return nullptr; }
int compute_capability(int) { return host_settings().compute_capability; }
int multiprocessors(int) { return host_settings().multiprocessors; }
bool is_capturing(void*) { return host_settings().capturing; }
void check_device(void*) {
  if (host_settings().device_failed)
    throw std::runtime_error("fastdpo: what ran on the device before: as a test asked");
}
void copy_to_host(void* to, const void* from, int64_t bytes, void*) { std::memcpy(to, from, bytes); }

}  // namespace fastdpo::cuda
