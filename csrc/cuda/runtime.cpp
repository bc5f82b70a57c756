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

// Beside inputs, outputs and N x H numbers, an op takes this much memory for a chunk's logits, operand and gradient,
// whatever V and N are.
constexpr int64_t kWorkspaceBytes = int64_t{128} << 20;

// Rows of a token block. Forward adds to a float32 [rows, H] once a chunk: 8 H bytes for 2 H * chunk flops a row, so
// long chunks of few rows are cheap; from 300 rows on, a product does more than 300 flops for a byte of weight, which
// is what an H100 does (800 TFLOP/s over 3 TB/s). Backward adds to a float32 [chunk, H] once a block, so there long
// blocks are cheap, and a single one needs no accumulator at all.
constexpr int64_t kForwardRows = 2048;
constexpr int64_t kBackwardRows = 8192;

// The side of a matrix product's tile.
constexpr int64_t kChunkMultiple = 128;
static_assert(kChunkMultiple % kRowAlignment == 0 && kForwardRows % kRowAlignment == 0);

}  // namespace

Limits limits() { return {kWorkspaceBytes, kForwardRows, kBackwardRows, kChunkMultiple}; }

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
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
  return 10 * major + minor;
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check(cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

void copy_to_host(void* to, const void* from, int64_t bytes, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, cuda_stream), "cudaMemcpyAsync");
  check(cudaStreamSynchronize(cuda_stream), "cudaStreamSynchronize");
}

}  // namespace fastdpo::cuda
