// The functions of the CUDA runtime that nvcc's host objects and csrc/cuda call. A launch goes to the machine, with the
// grid, the argument structures and the kernel that the host code chose.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "api.h"
#include "device.h"

namespace {

std::map<const void*, std::string>& kernels() {  // host function -> name on the device
  static std::map<const void*, std::string> names;
  return names;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
std::vector<Configuration> g_configurations;
cudaError_t g_error = cudaSuccess;  // until it is asked for
bool g_failed = false;              // whatever is asked for after a fault fails, as on a device

// Copies to the host are made when they are waited for, and not before.
struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
std::vector<Copy> g_copies;

cudaError_t failed(const std::string& what) {
  ptx::set_fault(what);
  g_failed = true;
  return g_error = cudaErrorLaunchFailure;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, ptx::Dim cluster, void** arguments, size_t shared,
                   cudaStream_t stream) {
  if (stream != ptx::the_stream()) return failed("a launch on another stream than the op's");
  const auto found = kernels().find(function);
  if (found == kernels().end()) return failed("a launch of a function that is no kernel");
  ptx::forget_freed_tensors();
  const bool done = ptx::launch_by_name(found->second.c_str(), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z},
                                        cluster, shared, arguments);
  if (!done) g_failed = true;
  return g_error = done ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

namespace ptx {

Device& the_device() {
  static Device device;
  return device;
}

}  // namespace ptx

extern "C" {

// After a fault a process's device is lost; for the tests there is a new one.
void ptx_new_device() {
  g_failed = false;
  g_error = cudaSuccess;
  g_copies.clear();
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, void*, void*, void*, void*,
                            int*) {
  kernels()[host] = device;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  g_configurations.push_back({grid, block, shared, static_cast<cudaStream_t>(stream)});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = g_configurations.back();
  g_configurations.pop_back();
  *grid = c.grid, *block = c.block, *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, {}, arguments, shared, stream);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  ptx::Dim cluster;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    } else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization &&
               a.val.programmaticStreamSerializationAllowed) {
      return failed("a launch that may overlap the one before it");
    }
  }
  return launch(function, config->gridDim, config->blockDim, cluster, arguments, config->dynamicSmemBytes,
                config->stream);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = g_error;
  g_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : ptx::last_fault().c_str();
}

cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const ptx::Device& device = ptx::the_device();
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = device.multiprocessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device.compute_capability / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device.compute_capability % 10;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 227 * 1024;
      return cudaSuccess;
    default:
      return failed("the stand-in runtime does not know device attribute " + std::to_string(attribute));
  }
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute attribute, int value) {
  const bool fits = attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value <= 227 * 1024;
  return fits ? cudaSuccess : failed("more shared memory than a block can have");
}

cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = ptx::the_device().capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) {
  if (ptx::the_device().capturing) return failed("a question to a stream that is being captured");
  return g_failed ? cudaErrorLaunchFailure : cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  if (kind != cudaMemcpyDeviceToHost || stream != ptx::the_stream()) return failed("a copy that the stand-in has not");
  if (ptx::the_device().capturing) return failed("a copy to the host while the stream is being captured");
  g_copies.push_back({to, from, bytes});
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream != ptx::the_stream()) return failed("waits for another stream than the op's");
  if (ptx::the_device().capturing) return failed("waits for a stream that is being captured");
  for (const Copy& copy : std::exchange(g_copies, {})) {
    try {
      ptx::forget_freed_tensors();
      auto& memory = ptx::the_machine().memory;
      std::memcpy(copy.to,
                  memory.host_place(reinterpret_cast<uint64_t>(copy.from), copy.bytes, true, "cudaMemcpyAsync"),
                  copy.bytes);
    } catch (const ptx::Fault& fault) {
      return failed(fault.what());
    }
  }
  return cudaSuccess;
}

}  // extern "C"
