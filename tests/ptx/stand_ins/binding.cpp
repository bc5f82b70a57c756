// The CUDA ops for CPU tensors whose kernels the machine runs, and what the tests may set.
#include <torch/csrc/stable/library.h>

#include "../fastdpo.h"
#include "api.h"
#include "device.h"
#include "launch.h"
#include "token_logps.h"

// PTX_OPS is a macro: one more step, and its value is what the library is called.
#define LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
#define IMPLEMENTATION(name, key, m) STABLE_TORCH_LIBRARY_IMPL(name, key, m)

extern "C" void ptx_new_device();

namespace {

void capture(bool capturing) { ptx::the_device().capturing = capturing; }

void pretend(int64_t compute_capability, int64_t multiprocessors) {
  ptx::the_device().compute_capability = static_cast<int>(compute_capability);
  ptx::the_device().multiprocessors = static_cast<int>(multiprocessors);
}

// csrc/cuda/launch.h's convert, for the pairs of types that no op asks for.
void convert(const torch::stable::Tensor& from, torch::stable::Tensor to) {
  const auto type_of = [](const torch::stable::Tensor& t) {
    using torch::headeronly::ScalarType;
    switch (t.scalar_type()) {
      case ScalarType::Float:
        return fastdpo::cuda::Type::kFloat32;
      case ScalarType::Double:
        return fastdpo::cuda::Type::kFloat64;
      case ScalarType::Half:
        return fastdpo::cuda::Type::kFloat16;
      default:
        return fastdpo::cuda::Type::kBFloat16;
    }
  };
  fastdpo::cuda::convert(from.data_ptr(), type_of(from), to.data_ptr(), type_of(to), from.numel(), ptx::the_stream());
}

// Whether every byte of the tensor has been written, as far as the device can tell.
bool written(const torch::stable::Tensor& t) {
  const auto address = reinterpret_cast<uint64_t>(t.data_ptr());
  const uint64_t bytes = static_cast<uint64_t>(t.numel()) * t.element_size();
  try {
    if (bytes != 0) ptx::the_machine().memory.host_place(address, bytes, true, "written");
    return true;
  } catch (const ptx::Fault&) {
    return false;
  }
}

void new_device() { ptx_new_device(); }

}  // namespace

LIBRARY(PTX_OPS, m) {
  m.def(fastdpo::kForwardSchema);
  m.def(fastdpo::kBackwardSchema);
  m.def("capture(bool capturing) -> ()");
  m.def("pretend(int compute_capability, int multiprocessors) -> ()");
  m.def("new_device() -> ()");
  m.def("convert(Tensor from, Tensor(a!) to) -> ()");
  m.def("written(Tensor t) -> bool");
}

IMPLEMENTATION(PTX_OPS, CPU, m) {
  m.impl("token_logps_forward", TORCH_BOX(&fastdpo::cuda::token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&fastdpo::cuda::token_logps_backward));
  m.impl("convert", TORCH_BOX(&convert));
  m.impl("written", TORCH_BOX(&written));
}

IMPLEMENTATION(PTX_OPS, CompositeExplicitAutograd, m) {
  m.impl("capture", TORCH_BOX(&capture));
  m.impl("pretend", TORCH_BOX(&pretend));
  m.impl("new_device", TORCH_BOX(&new_device));
}
