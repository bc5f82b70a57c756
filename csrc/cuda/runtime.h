// What the orchestration needs of its device besides kernels and products. Free of torch; the tests replace it.
#pragma once

#include <cstdint>

namespace fastdpo::cuda {

// While it lives, `device` is the current one, for torch and for the library's own CUDA runtime, which is linked
// statically and keeps its own notion of it. Throws when `device` is none that kernels can run on.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;

 private:
  void* torch_guard_ = nullptr;
};

void* current_stream(int device);

// 90 is 9.0.
int compute_capability(int device);

int multiprocessors(int device);

// Whether work queued on `stream` is being recorded into a graph, where nothing may be waited for.
bool is_capturing(void* stream);

// Throws if something that ran on the device before has failed: whatever is asked for next fails then as well, an
// allocation for one. Does not wait, and finds nothing while `stream` is being captured.
void check_device(void* stream);

// Copies to host memory and waits for it.
void copy_to_host(void* to, const void* from, int64_t bytes, void* stream);

}  // namespace fastdpo::cuda
