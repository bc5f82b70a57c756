// The CUDA ops for CPU tensors, as fastdpo_host::token_logps_forward and _backward, and what the tests may set.
#include <torch/csrc/stable/library.h>

#include "../../csrc/fastdpo.h"
#include "runtime_host.h"
#include "token_logps.h"

namespace {

void configure(int64_t workspace_bytes, int64_t forward_rows, int64_t backward_rows, int64_t chunk_multiple,
               bool capturing) {
  fastdpo::cuda::host_settings() = {{workspace_bytes, forward_rows, backward_rows, chunk_multiple}, capturing};
}

}  // namespace

STABLE_TORCH_LIBRARY(fastdpo_host, m) {
  m.def(fastdpo::kForwardSchema);
  m.def(fastdpo::kBackwardSchema);
  m.def(
      "configure(int workspace_bytes, int forward_rows, int backward_rows, int chunk_multiple, bool capturing) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CPU, m) {
  m.impl("token_logps_forward", TORCH_BOX(&fastdpo::cuda::token_logps_forward));
  m.impl("token_logps_backward", TORCH_BOX(&fastdpo::cuda::token_logps_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastdpo_host, CompositeExplicitAutograd, m) { m.impl("configure", TORCH_BOX(&configure)); }
