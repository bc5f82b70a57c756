// The CUDA ops for CPU tensors, as fastdpo_host::token_logps_forward and _backward, and what the tests may set.
#include <torch/csrc/stable/library.h>

#include <utility>

#include "../../csrc/fastdpo.h"
#include "runtime_host.h"
#include "token_logps.h"

namespace {

void configure(int64_t workspace_bytes, int64_t forward_rows, int64_t backward_rows, int64_t chunk_multiple,
               bool capturing) {
  auto& settings = fastdpo::cuda::host_settings();
  settings.limits = {workspace_bytes, forward_rows, backward_rows, chunk_multiple};
  settings.capturing = capturing;
}

void pretend(int64_t compute_capability, bool has_level1) {
  auto& settings = fastdpo::cuda::host_settings();
  settings.compute_capability = static_cast<int>(compute_capability);
  settings.has_level1 = has_level1;
}

int64_t fused_products() { return std::exchange(fastdpo::cuda::host_settings().fused_products, 0); }

}  // namespace

STABLE_TORCH_LIBRARY(fastdpo_host, m) {
  m.def(fastdpo::kForwardSchema);
  m.def(fastdpo::kBackwardSchema);
  m.def(
      "configure(int workspace_bytes, int forward_rows, int backward_rows, int chunk_multiple, bool capturing) -> ()");
  m.def("pretend(int compute_capability, bool has_level1) -> ()");
  m.def("fused_products() -> int");  // since the last time
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CPU, m) {
  m.impl("token_logps_forward", TORCH_BOX(&fastdpo::cuda::token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&fastdpo::cuda::token_logps_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CompositeExplicitAutograd, m) {
  m.impl("configure", TORCH_BOX(&configure));
  m.impl("pretend", TORCH_BOX(&pretend));
  m.impl("fused_products", TORCH_BOX(&fused_products));
}
