#include "runtime.h"

#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <stdexcept>
#include <string>

#include "launch.h"

namespace fastdpo::cuda {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("fastdpo: ") + what + ": " + cudaGetErrorString(error));
}

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
  return value;
}

}  // namespace

DeviceScope::DeviceScope(int device) {
  if (device < 0) throw std::runtime_error("fastdpo: `hidden` must be on a CUDA device");
  DeviceGuardHandle guard = nullptr;
  if (aoti_torch_create_device_guard(device, &guard) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("fastdpo: torch cannot make device " + std::to_string(device) + " the current one");
  }
  const cudaError_t error = cudaSetDevice(device);
  if (error != cudaSuccess) aoti_torch_delete_device_guard(guard);
  check(error, "cudaSetDevice");
  torch_guard_ = guard;
}

DeviceScope::~DeviceScope() { aoti_torch_delete_device_guard(static_cast<DeviceGuardHandle>(torch_guard_)); }

void* current_stream(int device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("fastdpo: torch gave no current CUDA stream for device " + std::to_string(device));
  }
  return stream;
}

int compute_capability(int device) {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor, device) +
         attribute(cudaDevAttrComputeCapabilityMinor, device);
}

int multiprocessors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void check_device(void* stream) {
  if (is_capturing(stream)) return;
  const cudaError_t error = cudaStreamQuery(static_cast<cudaStream_t>(stream));
  if (error != cudaErrorNotReady) check(error, "what ran on the device before");
}

void copy_to_host(void* to, const void* from, int64_t bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cuda_stream), "cudaStreamSynchronize");
}

}  // namespace fastdpo::cuda
